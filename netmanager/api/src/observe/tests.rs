use super::*;

fn event() -> FlowEvent {
    FlowEvent {
        time_ms: 86_400_000 + 3_723_004,
        node: "n1".into(),
        verdict: Verdict::Opened,
        reason: None,
        protocol: "TCP".into(),
        from: Place {
            address: "10.16.0.2:40000".parse().unwrap(),
            pod: Some("shop/client-1".into()),
        },
        to: Place {
            address: "10.24.0.5:80".parse().unwrap(),
            pod: None,
        },
        service: Some("shop/web/front".into()),
        policy: Some("balanced".into()),
        translated_to: Some("10.16.0.33:8080".parse().unwrap()),
        instance: Some(1),
        backend_node: Some(2),
        age_s: None,
        probe: false,
    }
}

#[test]
fn an_event_is_one_line_for_people() {
    assert_eq!(
        event().to_string(),
        "01:02:03.004 n1: opened TCP 10.16.0.2:40000 (shop/client-1) -> 10.24.0.5:80 shop/web/front balanced => 10.16.0.33:8080 #1 on node 2"
    );
    let refused = FlowEvent {
        verdict: Verdict::Refused,
        reason: Some("not_linked".into()),
        protocol: "ICMP".into(),
        to: Place {
            address: "10.24.0.6:0".parse().unwrap(),
            pod: None,
        },
        service: None,
        policy: None,
        translated_to: None,
        instance: None,
        backend_node: None,
        probe: true,
        ..event()
    };
    assert_eq!(
        refused.to_string(),
        "01:02:03.004 n1: refused not_linked ICMP 10.16.0.2:40000 (shop/client-1) -> 10.24.0.6 [probe]"
    );
}

#[test]
fn a_filter_takes_full_names_and_their_last_parts() {
    let fits = |service: Option<&str>, pod: Option<&str>, verdict| {
        Filter {
            service: service.map(str::to_owned),
            pod: pod.map(str::to_owned),
            verdict,
        }
        .fits(&event())
    };
    assert!(fits(None, None, None));
    for service in ["shop/web/front", "web/front", "front"] {
        assert!(
            fits(Some(service), Some("client-1"), Some(Verdict::Opened)),
            "{service}"
        );
    }
    assert!(!fits(Some("ront"), None, None));
    assert!(!fits(Some("other"), None, None));
    assert!(!fits(None, Some("lient-1"), None));
    assert!(!fits(None, Some("shop"), None));
    assert!(!fits(None, None, Some(Verdict::Refused)));
    let nameless = FlowEvent {
        service: None,
        ..event()
    };
    let filter = Filter {
        service: Some("front".into()),
        ..Filter::default()
    };
    assert!(!filter.fits(&nameless));
}

#[test]
fn a_verdict_is_written_by_its_name() {
    for verdict in Verdict::ALL {
        assert_eq!(
            serde_json::to_string(&verdict).unwrap(),
            format!("\"{}\"", verdict.name())
        );
        assert_eq!(Verdict::from_name(verdict.name()), Some(verdict));
    }
    assert_eq!(Verdict::from_name("lost"), None);
}
