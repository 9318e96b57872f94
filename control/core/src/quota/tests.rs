use super::*;
use crate::command::Command;
use crate::world::{SHOP, World, name};

/// A quota that every amount of [`SHOP`] just fits into.
const FITS: Quota = Quota {
    applications: Some(1),
    instances: Some(4),
    cpu: Some(Cpu::milli(1_250)),
    memory: Some(Bytes::new(192 << 20)),
    gpus: Some(0),
};

fn world(quota: Quota) -> World {
    let mut world = World::new();
    let namespace = name("default");
    let set = Command::SetQuota { namespace, quota };
    assert_eq!(world.one(set), Ok(Applied::Changed));
    world
}

fn problems(outcome: Outcome) -> Vec<String> {
    match outcome {
        Err(Refusal::OverQuota {
            namespace,
            problems,
        }) => {
            assert_eq!(namespace, name("default"));
            problems.into()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn goals_are_taken_up_to_the_quota_and_refused_beyond_each_amount_of_it() {
    assert_eq!(world(FITS).apply(SHOP), Ok(Applied::Generation(1)));
    for (quota, problem) in [
        (
            Quota {
                applications: Some(0),
                ..FITS
            },
            "applications would be 1 of 0 (0 now)",
        ),
        (
            Quota {
                instances: Some(3),
                ..FITS
            },
            "instances would be 4 of 3 (0 now)",
        ),
        (
            Quota {
                cpu: Some(Cpu::milli(1_249)),
                ..FITS
            },
            "cpu would be 1250m of 1249m (0m now)",
        ),
        (
            Quota {
                memory: Some(Bytes::new(128 << 20)),
                ..FITS
            },
            "memory would be 192Mi of 128Mi (0B now)",
        ),
    ] {
        let mut world = world(quota);
        let before = world.kb.numbers.clone();
        assert_eq!(problems(world.apply(SHOP)), [problem]);
        assert_eq!(world.kb.applications.len(), 0);
        assert_eq!(world.kb.numbers, before);
        // Another namespace is not concerned.
        let elsewhere = SHOP.replace("name: shop", "name: shop, namespace: other");
        assert_eq!(world.apply(&elsewhere), Ok(Applied::Generation(1)));
    }
    let gpus = SHOP.replace("memory: 64Mi }", "memory: 64Mi, gpu: 2 }");
    let asked = problems(world(FITS).apply(&gpus));
    assert_eq!(asked, ["gpus would be 6 of 0 (0 now)"]);
}

#[test]
fn replicas_and_other_applications_count_and_what_is_deleted_no_more() {
    let quota = Quota {
        instances: Some(8),
        ..Quota::default()
    };
    let mut world = world(quota);
    world.apply(SHOP).unwrap();
    let second = SHOP.replace("name: shop", "name: second");
    world.apply(&second).unwrap();
    let more = second.replace("command: [stock]", "command: [stock]\n      replicas: 2");
    let problem = ["instances would be 9 of 8 (8 now)"];
    assert_eq!(problems(world.apply(&more)), problem);
    let application = "default/shop".parse().unwrap();
    world.one(Command::Delete { application }).unwrap();
    assert_eq!(world.apply(&more), Ok(Applied::Generation(2)));
    assert_eq!(world.kb.usage(&name("default"), None).instances, 5);
}

#[test]
fn what_was_there_before_a_smaller_quota_stays_and_may_ask_for_less_but_not_for_more() {
    let mut world = world(FITS);
    world.apply(SHOP).unwrap();
    let namespace = name("default");
    let quota = Quota {
        cpu: Some(Cpu::milli(100)),
        ..Quota::default()
    };
    world.one(Command::SetQuota { namespace, quota }).unwrap();
    let with = |cpu: &str| SHOP.replace("cpu: 250m", &format!("cpu: {cpu}"));
    // As much as before, with other weights.
    let other = SHOP.replace("weights: { cost: 1 }", "weights: { latency: 1 }");
    assert_eq!(world.apply(&other), Ok(Applied::Generation(2)));
    assert_eq!(world.apply(&with("200m")), Ok(Applied::Generation(3)));
    let problem = ["cpu would be 1201m of 100m (1200m now)"];
    assert_eq!(problems(world.apply(&with("201m"))), problem);
    let namespace = name("default");
    world.one(Command::RemoveQuota { namespace }).unwrap();
    assert_eq!(world.apply(&with("4")), Ok(Applied::Generation(4)));
}

#[test]
fn a_quota_that_bounds_nothing_is_refused_and_the_same_one_again_changes_nothing() {
    let mut world = world(FITS);
    let namespace = name("default");
    let quota = FITS;
    let again = world.one(Command::SetQuota { namespace, quota });
    assert_eq!(again, Ok(Applied::Unchanged));
    let (namespace, quota) = (name("default"), Quota::default());
    let nothing = world.one(Command::SetQuota { namespace, quota });
    assert!(matches!(nothing, Err(Refusal::Invalid { .. })));
    assert_eq!(world.kb.quotas.len(), 1);
    let namespace = name("other");
    let unknown = world.one(Command::RemoveQuota { namespace });
    assert_eq!(unknown, Ok(Applied::Unchanged));
}

#[test]
fn a_quota_is_in_a_backup_and_comes_back_with_it() {
    let mut world = world(FITS);
    let backup = Box::new(world.kb.sketch());
    let namespace = name("default");
    world.one(Command::RemoveQuota { namespace }).unwrap();
    // Leads of an older version would not have it.
    world.one(Command::Restore(backup.clone())).unwrap();
    assert!(world.kb.quotas.is_empty());
    let level = crate::command::LEVEL;
    world.one(Command::RaiseLevel { level }).unwrap();
    world.one(Command::Restore(backup)).unwrap();
    assert_eq!(world.kb.quotas[&name("default")], FITS);
}
