//! Commands that are carried out once, and the feature level that they wait for.

use super::*;

fn once(key: &str, body: &str, command: Command) -> Command {
    Command::Once(Box::new(Once {
        key: key.to_owned(),
        body: crate::once::digest(&[body.as_bytes()]),
        part: 0,
        command,
    }))
}

#[test]
fn a_command_with_a_key_is_carried_out_once_and_answers_the_same() {
    let mut world = World::new();
    let app = |yaml: &str| Command::Apply(Box::new(goal::parse(yaml).unwrap().remove(0)));
    let first = once("ann/k", "one", app(SHOP));
    assert_eq!(world.one(first.clone()), Ok(Applied::Generation(1)));
    let changed = SHOP.replace("cpu: 250m", "cpu: 300m");
    assert_eq!(world.one(app(&changed)), Ok(Applied::Generation(2)));

    let before = world.kb.applications.clone();
    assert_eq!(world.one(first), Ok(Applied::Generation(1)));
    assert_eq!(world.kb.applications, before);
    let refused = world.one(once("ann/k", "two", Command::Tick));
    assert!(
        matches!(refused, Err(Refusal::KeyReused { .. })),
        "{refused:?}"
    );

    // A refusal is an outcome like any other.
    let missing = once(
        "ann/l",
        "x",
        Command::Delete {
            application: "a/b".parse().unwrap(),
        },
    );
    let refused = world.one(missing.clone());
    assert!(
        matches!(refused, Err(Refusal::UnknownApplication(_))),
        "{refused:?}"
    );
    assert_eq!(world.one(missing), refused);
}

#[test]
fn a_key_around_a_key_or_none_is_refused() {
    let mut world = World::new();
    for command in [
        once("a", "x", once("b", "x", Command::Tick)),
        once("", "x", Command::Tick),
        once(&"k".repeat(KEY_LIMIT + 1), "x", Command::Tick),
    ] {
        let refused = world.one(command);
        assert!(
            matches!(refused, Err(Refusal::Invalid { .. })),
            "{refused:?}"
        );
    }
    assert!(world.kb.memory.is_empty());
}

#[test]
fn the_feature_level_only_rises() {
    let mut world = World::new();
    let raise = |level| Command::RaiseLevel { level };
    assert_eq!(world.one(raise(2)), Ok(Applied::Changed));
    assert_eq!(world.one(raise(1)), Ok(Applied::Unchanged));
    assert_eq!(world.kb.level, 2);
}
