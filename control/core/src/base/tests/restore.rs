//! A backup that is restored: what it brings back, and what it leaves alone.

use super::*;

fn restored(kb: &KnowledgeBase, backup: &KnowledgeBase) -> KnowledgeBase {
    let mut kb = kb.clone();
    let restore = Command::Restore(Box::new(backup.sketch()));
    let now = kb.log_time_ms;
    let outcome = kb.apply(kb.index + 1, &batch(now, vec![restore]));
    assert_eq!(outcome, [Ok(Applied::Changed)]);
    kb
}

#[test]
fn a_restore_brings_wishes_and_addresses_back_and_leaves_alone_what_runs() {
    let mut world = World::new();
    world.apply(SHOP).unwrap();
    world.settle();
    let backup = world.kb.clone();
    let other = SHOP.replace("name: shop }", "name: later }");
    world.apply(&other).unwrap();
    let shop: AppName = "default/shop".parse().unwrap();
    let remove = Command::Delete {
        application: "default/later".parse().unwrap(),
    };
    world.settle();
    let taken = world.kb.services[&service("default/later/front")].number6;
    let running = world.kb.slots[&slot("default/shop/front#0")].clone();

    let kb = restored(&world.kb, &backup);
    assert_eq!(kb.applications.keys().collect::<Vec<_>>(), [&shop]);
    assert_eq!(
        kb.services.keys().collect::<Vec<_>>(),
        backup.services.keys().collect::<Vec<_>>()
    );
    for (name, service) in &backup.services {
        assert_eq!(kb.services[name].number6, service.number6, "{name}");
    }
    assert_eq!(kb.slots[&slot("default/shop/front#0")], running);
    assert!(
        kb.slots.keys().all(|slot| slot.service.app() == shop),
        "{:?}",
        kb.slots.keys()
    );
    assert!(
        kb.owed_stops.is_empty(),
        "what runs is not stopped for being unknown"
    );
    assert!(kb.revision() > world.kb.revision());
    assert_eq!(kb.mesh.as_ref().unwrap().incarnation, 1);
    assert!(kb.next_epoch > world.kb.next_epoch);
    check_one_live_binding(&kb);

    // An address that was given since is not given to another before it has rested.
    let mut later = kb.clone();
    let new = Command::Apply(Box::new(
        goal::parse(&other.replace("later", "third"))
            .unwrap()
            .remove(0),
    ));
    let now = later.log_time_ms;
    assert!(later.apply(later.index + 1, &batch(now, vec![new]))[0].is_ok());
    let given: Vec<u32> = later
        .services
        .values()
        .map(|service| service.number6)
        .collect();
    assert!(!given.contains(&taken), "{taken} in {given:?}");
    assert!(matches!(world.one(remove), Ok(Applied::Changed)));
}

#[test]
fn a_backup_of_another_mesh_is_refused() {
    let world = World::new();
    let mut other = world.kb.clone();
    other.mesh.as_mut().unwrap().seed += 1;
    for backup in [other, KnowledgeBase::default()] {
        let mut kb = world.kb.clone();
        let restore = Command::Restore(Box::new(backup));
        let outcome = kb.apply(kb.index + 1, &batch(0, vec![restore]));
        assert!(
            matches!(&outcome[0], Err(Refusal::OtherBackup(_))),
            "{outcome:?}"
        );
        assert_eq!(kb.mesh, world.kb.mesh);
    }
}

#[test]
fn what_came_to_run_after_the_backup_is_adopted_by_the_restored_leads_and_the_old_copy_is_stopped()
{
    let mut world = World::new();
    world.apply(SHOP).unwrap();
    world.settle();
    let mut fresh = KnowledgeBase::default();
    fresh.apply(1, &batch(0, vec![Command::InitMesh(mesh())]));
    let mut kb = restored(&fresh, &world.kb);
    let moved = slot("default/shop/front#0");
    let (old, binding) = kb
        .live(&moved)
        .map(|(epoch, it)| (epoch, it.clone()))
        .unwrap();

    // The clusters come back; the one that had it has it no more, another has a later copy.
    let later = old + 5;
    let other = kb
        .clusters
        .keys()
        .find(|name| **name != binding.cluster)
        .unwrap()
        .clone();
    let mut at = kb.index;
    let mut say = |kb: &mut KnowledgeBase, cluster: &Name, instances: Vec<InstanceReport>| {
        at += 2;
        let facts = Box::new(kb.clusters[cluster].facts.clone());
        let register = Command::RegisterCluster {
            cluster: cluster.clone(),
            session: 77,
            facts,
        };
        let report = Report {
            nodes: BTreeMap::new(),
            instances,
        };
        let report = Command::Report {
            cluster: cluster.clone(),
            session: 77,
            report: Box::new(report),
        };
        let now = kb.log_time_ms;
        for outcome in kb.apply(at, &batch(now, vec![register, report])) {
            outcome.unwrap();
        }
    };
    say(&mut kb, &binding.cluster, Vec::new());
    let copy = InstanceReport {
        id: moved.at(later),
        node: "n".to_owned(),
        phase: Phase::Ready,
        endpoint: None,
        reason: String::new(),
    };
    say(&mut kb, &other, vec![copy]);
    let (epoch, live) = kb.live(&moved).unwrap();
    assert_eq!((epoch, &live.cluster), (later, &other));
    assert_eq!(kb.slots[&moved][&old].state, BindingState::Stopping);
    assert!(kb.next_epoch > later);
    check_one_live_binding(&kb);
}
