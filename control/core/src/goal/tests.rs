use super::*;

const GOOD: &str = r#"
apiVersion: weft.dev/v1alpha1
kind: MeshApplication
metadata:
  name: bookinfo
spec:
  services:
    - name: productpage
      command: [/usr/bin/weft-bookinfo, productpage]
      ports: [{ name: http, port: 80, targetPort: 9080 }]
      requests: { cpu: 250m, memory: 64Mi }
      policies: [balanced, closest, instance]
      vips: [{ policy: balanced, address: 10.24.1.2 }]
      ingress: [{ cluster: edge, rate: 250 }]
      env: { LEVEL: info, PORT: 9080 }
    - name: ratings
      image: registry.example/ratings:1
      replicas: 1
      writers: one
      requests: { cpu: 1, memory: 1.5Gi, gpu: 1 }
      constraints: { labels: { disk: ssd }, tier: [cloud, fog], residency: [de] }
  links:
    - { from: productpage, to: ratings, maxLatency: 20ms, bandwidth: 5Mbps, rate: 100 }
    - { from: productpage, to: shop/pay/api }
  weights: { energy: 0.5, cost: 1 }
  grants:
    - { service: productpage, toHostsOf: edge }
    - { toNamespace: ops }
---
apiVersion: weft.dev/v1alpha1
kind: MeshApplication
metadata: { name: other, namespace: shop }
spec: { services: [{ name: a, command: [a] }] }
"#;

#[test]
fn a_goal_file_becomes_checked_types() {
    let applications = parse(GOOD).unwrap();
    insta::assert_yaml_snapshot!(applications);
}

#[test]
fn a_checked_application_survives_the_log() {
    for application in parse(GOOD).unwrap() {
        let text = serde_json::to_string(&application).unwrap();
        assert_eq!(
            serde_json::from_str::<Application>(&text).unwrap(),
            application
        );
    }
}

#[test]
fn every_mistake_is_reported_with_path_line_and_way_out() {
    let bad = r#"
apiVersion: weft.dev/v1
kind: MeshApplication
metadata:
  name: Bookinfo
spec:
  services:
    - name: a
      command: [a]
      ports:
        - { name: http, port: 80 }
        - { name: http, port: 80, protocol: SCTP }
        - { name: other, port: 80 }
        - { name: high, port: 70000 }
      requests: { cpu: 250u, memory: 64, gpu: -1 }
      replicas: 2000
      policies: [nearest]
      vips: [{ policy: sticky, address: 10.24 }, { policy: sticky, address: 10.28.0.1 }]
      constraints: { tier: [moon] }
      env: { 1A: x, WEFT_EPOCH: "3" }
    - name: a
      command: [a]
    - name: b
      writers: one
      replicas: 2
  links:
    - { from: a, to: nowhere }
    - { from: b, to: b, maxLatency: "20", bandwidth: 5MB }
    - { from: a, to: b, rate: -1 }
  weights: { cost: 0, energy: 0.0 }
  grants:
    - { service: c, toNamespace: x }
    - { toNamespace: x, toHostsOf: edge }
    - {}
"#;
    let errors = parse(bad).unwrap_err();
    insta::assert_snapshot!(errors.to_string());
    assert!(errors.0.len() >= 24, "{}", errors.0.len());
}

#[test]
fn only_a_udp_port_can_follow() {
    let port = "{ name: http, port: 80, targetPort: 9080 }";
    let udp = "{ name: http, port: 80, protocol: UDP, follow: true }";
    let applications = parse(&GOOD.replace(port, udp)).unwrap();
    let service = applications[0].services.values().next().unwrap();
    assert!(service.ports[0].follow);
    let tcp = "{ name: http, port: 80, follow: true }";
    let error = parse(&GOOD.replace(port, tcp)).unwrap_err().to_string();
    assert!(
        error.contains("ports[0].follow") && error.contains("protocol: UDP"),
        "{error}"
    );
}

#[test]
fn a_document_of_the_wrong_form_is_refused_with_its_line() {
    let cases = [
        ("unknown field", GOOD.replace("replicas: 1", "replica: 1")),
        (
            "duplicate key",
            GOOD.replace("replicas: 1", "replicas: 1\n      replicas: 2"),
        ),
        ("wrong type", GOOD.replace("replicas: 1", "replicas: many")),
        (
            "no list",
            GOOD.replace(
                "policies: [balanced, closest, instance]",
                "policies: balanced",
            ),
        ),
        (
            "missing field",
            GOOD.replace("kind: MeshApplication\nmetadata:\n", "metadata:\n"),
        ),
        (
            "no yaml",
            GOOD.replace("spec:\n  services:", "spec: [\n  services:"),
        ),
        ("empty", String::new()),
        (
            "twice",
            format!("{GOOD}---{}", GOOD.split("---").next().unwrap()),
        ),
    ];
    let shown: Vec<String> = cases
        .iter()
        .map(|(name, yaml)| format!("{name}: {}", parse(yaml).unwrap_err()))
        .collect();
    insta::assert_snapshot!(shown.join("\n"));
}

#[test]
fn the_schema_is_what_editors_were_given() {
    insta::assert_json_snapshot!(schema());
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "[a-z0-9:\\[\\]{}, \n&*-]{0,200}") {
        let _ = parse(&text);
    }
}

#[test]
fn the_goal_file_of_the_readme_is_a_goal_file() {
    let readme = include_str!("../../../../README.md");
    let (_, rest) = readme.split_once("```yaml\n").unwrap();
    let (yaml, _) = rest.split_once("```").unwrap();
    assert_eq!(parse(yaml).unwrap().len(), 1);
}
