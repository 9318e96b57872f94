use super::*;
use crate::{
    assignment,
    world::{SHOP, World, name, service},
};

fn names(table: &NodeTable) -> Vec<String> {
    table.services.iter().map(|s| s.name.to_string()).collect()
}

fn node_of(world: &World, name: &str) -> (Name, String) {
    let slot = service(name).slot(0);
    let (_, binding) = world.kb.live(&slot).unwrap();
    (binding.cluster.clone(), binding.node.clone())
}

#[test]
fn a_table_and_the_assignments_are_what_nodes_and_agents_were_given() {
    let mut world = World::new();
    world.apply(SHOP).unwrap();
    world.settle();
    let (cluster, node) = node_of(&world, "default/shop/client");
    insta::assert_yaml_snapshot!("table", project(&world.kb, &cluster, &node).unwrap());
    let assignments = assignment::project(&world.kb, &name("cloud"));
    insta::assert_yaml_snapshot!("assignments", assignments);
}

#[test]
fn a_node_knows_only_what_its_instances_link_to() {
    let mut world = World::new();
    world.apply(SHOP).unwrap();
    world.settle();
    let (cluster, node) = node_of(&world, "default/shop/client");
    let table = project(&world.kb, &cluster, &node).unwrap();
    assert_eq!(names(&table), ["default/shop/front"]);
    let other = if node == "n1" { "n2" } else { "n1" };
    assert_eq!(
        names(&project(&world.kb, &cluster, other).unwrap()),
        [""; 0]
    );
    assert_eq!(
        concerned(&world.kb, &service("default/shop/front")),
        [(cluster, node)].into()
    );
    assert_eq!(project(&world.kb, &name("edge"), "n9"), None);
    assert_eq!(table.peers.len(), 5, "a small mesh is a full mesh");
}

#[test]
fn a_link_across_namespaces_needs_a_grant() {
    let mut world = World::new();
    world.apply(SHOP).unwrap();
    let caller = "
apiVersion: weft.dev/v1alpha1
kind: MeshApplication
metadata: { name: probe, namespace: ops }
spec:
  services: [{ name: probe, command: [probe], constraints: { tier: [fog] } }]
  links: [{ from: probe, to: default/shop/stock }]
";
    world.apply(caller).unwrap();
    world.settle();
    let (cluster, node) = node_of(&world, "ops/probe/probe");
    assert_eq!(
        names(&project(&world.kb, &cluster, &node).unwrap()),
        [""; 0]
    );
    let granted = format!("{SHOP}  grants: [{{ service: stock, toNamespace: ops }}]\n");
    world.apply(&granted).unwrap();
    let table = project(&world.kb, &cluster, &node).unwrap();
    assert_eq!(names(&table), ["default/shop/stock"]);
}

#[test]
fn a_grant_to_hosts_reaches_every_node_of_that_cluster_and_no_other() {
    let mut world = World::new();
    world
        .apply(&format!("{SHOP}  grants: [{{ toHostsOf: fog }}]\n"))
        .unwrap();
    world.settle();
    for node in ["n1", "n2"] {
        let table = project(&world.kb, &name("fog"), node).unwrap();
        assert_eq!(table.services.len(), 4);
    }
    let concerned = concerned(&world.kb, &service("default/shop/stock"));
    assert!(concerned.contains(&(name("fog"), "n2".to_owned())));
}

#[test]
fn a_cluster_whose_prefixes_collide_is_reached_by_ipv6_only() {
    let mut world = World::new();
    let mut facts = world.agent("edge").facts.clone();
    facts.prefixes = vec!["10.20.0.0/16".parse().unwrap()];
    world.agent("edge").facts = facts;
    world.register("edge");
    world.apply(SHOP).unwrap();
    world.settle();
    let (cluster, node) = node_of(&world, "default/shop/client");
    let table = project(&world.kb, &cluster, &node).unwrap();
    assert_eq!((table.prefix4, table.blocks4.len()), (None, 0));
    assert!(table.services[0].vips.iter().all(|vip| vip.addr4.is_none()));
    let why = world.kb.clusters[&name("edge")]
        .without_ipv4
        .as_ref()
        .unwrap();
    assert!(
        why.contains("10.20.0.0/16") && why.contains("10.16.0.0/12"),
        "{why}"
    );
}

#[test]
fn a_node_knows_which_of_its_services_ask_to_be_spliced() {
    let mut world = World::new();
    let asking = SHOP.replace("command: [client]", "command: [client]\n      splice: true");
    world.apply(&asking).unwrap();
    world.settle();
    let (cluster, node) = node_of(&world, "default/shop/client");
    let spliced = |world: &World| project(&world.kb, &cluster, &node).unwrap().spliced;
    assert_eq!(spliced(&world), [service("default/shop/client")]);
    world.apply(SHOP).unwrap();
    assert_eq!(spliced(&world), []);
}
