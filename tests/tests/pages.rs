//! What the pages in `docs/` say of the code.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::{
    fs,
    path::{Path, PathBuf},
};

const PAGE: &str = "docs/datapath-tests.md";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The file of a test's module, written as the page does.
fn file_of(modules: &[&str]) -> Option<PathBuf> {
    let (folder, rest) = match modules.split_first()? {
        (&"netmanager", rest) => ("netmanager/src", rest),
        _ => ("tests/tests", modules),
    };
    let path = root().join(folder).join(rest.join("/"));
    Some(path.with_extension("rs")).filter(|path| path.is_file())
}

/// The words of a page that name a test: `module::name`.
fn named(page: &str) -> Vec<Vec<&str>> {
    page.split('`')
        .skip(1)
        .step_by(2)
        .map(|word| word.split("::").collect::<Vec<_>>())
        .filter(|words| words.len() > 1 && words.last().is_some_and(|name| name.contains('_')))
        .collect()
}

fn is_there(words: &[&str]) -> bool {
    let (name, modules) = words.split_last().unwrap();
    let function = format!("fn {name}(");
    file_of(modules).is_some_and(|file| fs::read_to_string(file).unwrap().contains(&function))
}

#[test]
fn the_page_of_the_data_paths_tests_names_only_tests_that_are_there() {
    let page = fs::read_to_string(root().join(PAGE)).unwrap();
    let tests = named(&page);
    assert!(tests.len() > 80, "{}", tests.len());
    let missing: Vec<_> = tests.iter().filter(|words| !is_there(words)).collect();
    assert!(missing.is_empty(), "{PAGE} names {missing:?}");
}

#[test]
fn a_test_that_is_not_there_is_missed() {
    assert!(is_there(&["pages", "a_test_that_is_not_there_is_missed"]));
    assert!(!is_there(&["pages", "a_test_that_never_was"]));
    assert!(!is_there(&[
        "nowhere",
        "a_test_that_is_not_there_is_missed"
    ]));
}
