//! From a document as written to a checked application: all errors at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    net::IpAddr,
    str::FromStr,
};

use ebpf_common::addr::Policy;

use super::{
    API_VERSION, Application, Constraints, GoalError, Grant, Grantee, Ingress, KIND, Link,
    MAX_REPLICAS, PolicyName, Port, Protocol, Requests, Service, Weights, Writers,
    document::{
        ConstraintsDoc, Document, GrantDoc, LinkDoc, PortDoc, ServiceDoc, SpecDoc, Text,
        WeightsDoc, Whole,
    },
};
use crate::{
    name::{AppName, Name, ServiceName},
    report::Tier,
};

/// Collects errors; a value that is wrong is left out and the check goes on.
#[derive(Default)]
pub(super) struct Check {
    pub(super) errors: Vec<GoalError>,
}

impl Check {
    fn error(&mut self, path: &str, line: u64, message: impl Into<String>) {
        self.errors.push(GoalError {
            path: path.to_owned(),
            line,
            message: message.into(),
        });
    }

    fn parse<T: FromStr<Err: Display>>(&mut self, path: &str, text: &Text) -> Option<T> {
        text.value
            .parse()
            .map_err(|error: T::Err| self.error(path, text.referenced.line(), error.to_string()))
            .ok()
    }

    fn whole<T: TryFrom<i64>>(
        &mut self,
        path: &str,
        number: &Whole,
        range: std::ops::RangeInclusive<i64>,
    ) -> Option<T> {
        let (low, high) = (*range.start(), *range.end());
        let value = range
            .contains(&number.value)
            .then(|| T::try_from(number.value).ok())
            .flatten();
        if value.is_none() {
            let message = format!("{} is out of range: use {low} to {high}", number.value);
            self.error(path, number.referenced.line(), message);
        }
        value
    }

    /// One of a few words.
    fn word<T: Copy>(&mut self, path: &str, text: &Text, words: &[(&str, T)]) -> Option<T> {
        let found = words.iter().find(|(word, _)| *word == text.value);
        if found.is_none() {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            let message = format!("{:?} is not known: use {}", text.value, known.join(", "));
            self.error(path, text.referenced.line(), message);
        }
        found.map(|(_, value)| *value)
    }

    pub(super) fn document(&mut self, document: &Document) -> Option<Application> {
        self.word("apiVersion", &document.api_version, &[(API_VERSION, ())]);
        self.word("kind", &document.kind, &[(KIND, ())]);
        let name = self.parse("metadata.name", &document.metadata.name);
        let namespace = match &document.metadata.namespace {
            Some(text) => self.parse("metadata.namespace", text),
            None => "default".parse().ok(),
        };
        // The rest is checked even when the name is wrong, so that all errors come at once.
        let stand_in = || "default".parse::<Name>().ok();
        let app = AppName {
            name: name.clone().or_else(stand_in)?,
            namespace: namespace.clone().or_else(stand_in)?,
        };
        let spec = &document.spec;
        let services = self.services(spec);
        let declared: BTreeSet<&str> = spec
            .services
            .iter()
            .map(|s| s.name.value.as_str())
            .collect();
        let links = self.links(&app, &spec.links, &declared);
        let weights = self.weights(spec.weights.as_ref());
        let grants = spec
            .grants
            .iter()
            .enumerate()
            .filter_map(|(i, grant)| self.grant(&format!("spec.grants[{i}]"), grant, &declared))
            .collect();
        Some(Application {
            name: app,
            services,
            links,
            weights: weights?,
            grants,
        })
    }

    fn services(&mut self, spec: &SpecDoc) -> BTreeMap<Name, Service> {
        if spec.services.is_empty() {
            self.error("spec.services", 0, "is empty: name at least one service");
        }
        let mut services = BTreeMap::new();
        let mut lines: BTreeMap<&str, u64> = BTreeMap::new();
        for (i, document) in spec.services.iter().enumerate() {
            let path = format!("spec.services[{i}]");
            let (text, line) = (
                document.name.value.as_str(),
                document.name.referenced.line(),
            );
            if let Some(first) = lines.get(text) {
                let message = format!(
                    "{text:?} is declared twice, first on line {first}: give it another name"
                );
                self.error(&format!("{path}.name"), line, message);
            } else {
                lines.insert(text, line);
            }
            let name: Option<Name> = self.parse(&format!("{path}.name"), &document.name);
            let service = self.service(&path, document);
            if let (Some(name), Some(service)) = (name, service) {
                services.insert(name, service);
            }
        }
        services
    }

    fn service(&mut self, path: &str, document: &ServiceDoc) -> Option<Service> {
        let line = document.name.referenced.line();
        if document.image.is_none() && document.command.is_empty() {
            self.error(
                path,
                line,
                "has neither image nor command: give one of them",
            );
        }
        let replicas = match &document.replicas {
            Some(number) => self.whole(
                &format!("{path}.replicas"),
                number,
                0..=i64::from(MAX_REPLICAS),
            ),
            None => Some(1),
        };
        let writers = match &document.writers {
            Some(text) => self.word(
                &format!("{path}.writers"),
                text,
                &[("one", Writers::One), ("many", Writers::Many)],
            ),
            None => Some(Writers::Many),
        };
        if let (Some(Writers::One), Some(replicas @ 2..), Some(text)) =
            (writers, replicas, &document.replicas)
        {
            let message = format!(
                "{replicas} replicas and writers: one exclude each other: set replicas: 1 or leave writers out"
            );
            self.error(&format!("{path}.replicas"), text.referenced.line(), message);
        }
        for key in document.env.keys() {
            let well_formed = key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
                && !key.starts_with(|c: char| c.is_ascii_digit())
                && !key.is_empty();
            let field = format!("{path}.env");
            if !well_formed {
                let message =
                    format!("{key:?} is not a name of a variable: use letters, digits and '_'");
                self.error(&field, line, message);
            } else if key.starts_with("WEFT_") {
                let message = format!("{key:?} is set by Weft: choose a name without WEFT_");
                self.error(&field, line, message);
            }
        }
        // All are evaluated before the first `?`, so that one error does not hide another.
        let policies = self.policies(path, document);
        let vips = self.vips(path, document, &policies);
        let ports = self.ports(path, &document.ports);
        let requests = self.requests(path, document);
        let constraints = self.constraints(&format!("{path}.constraints"), &document.constraints);
        let ingress = self.ingress(path, document);
        Some(Service {
            image: document.image.as_ref().map(|text| text.value.clone()),
            command: document.command.iter().map(|t| t.value.clone()).collect(),
            ports,
            replicas: replicas?,
            requests: requests?,
            env: document.env.clone(),
            writers: writers?,
            constraints,
            policies,
            vips,
            ingress,
            splice: document.splice,
        })
    }

    fn ports(&mut self, path: &str, documents: &[PortDoc]) -> Vec<Port> {
        let mut ports: Vec<Port> = Vec::new();
        for (i, document) in documents.iter().enumerate() {
            let path = format!("{path}.ports[{i}]");
            let line = document.name.referenced.line();
            let name: Option<Name> = self.parse(&format!("{path}.name"), &document.name);
            let port: Option<u16> = self.whole(&format!("{path}.port"), &document.port, 1..=65535);
            let target_port = match &document.target_port {
                Some(number) => self.whole(&format!("{path}.targetPort"), number, 1..=65535),
                None => port,
            };
            let protocol = match &document.protocol {
                Some(text) => self.word(
                    &format!("{path}.protocol"),
                    text,
                    &[("TCP", Protocol::Tcp), ("UDP", Protocol::Udp)],
                ),
                None => Some(Protocol::Tcp),
            };
            let (Some(name), Some(port), Some(target_port), Some(protocol)) =
                (name, port, target_port, protocol)
            else {
                continue;
            };
            if document.follow && protocol == Protocol::Tcp {
                let message = "only a UDP port can follow: a TCP connection is drained; leave it out or say protocol: UDP".to_owned();
                self.error(&format!("{path}.follow"), line, message);
            }
            if ports.iter().any(|other| other.name == name) {
                let message = format!(
                    "{name:?} names two ports: give each its own name",
                    name = name.as_str()
                );
                self.error(&format!("{path}.name"), line, message);
            }
            if let Some(other) = ports
                .iter()
                .find(|o| (o.port, o.protocol) == (port, protocol))
            {
                let message = format!(
                    "port {port} is taken by port {:?}: choose another",
                    other.name.as_str()
                );
                self.error(
                    &format!("{path}.port"),
                    document.port.referenced.line(),
                    message,
                );
            }
            ports.push(Port {
                name,
                protocol,
                port,
                target_port,
                follow: document.follow,
            });
        }
        ports
    }

    fn requests(&mut self, path: &str, document: &ServiceDoc) -> Option<Requests> {
        let gpu = |check: &mut Self, field: &str, number: &Option<Whole>| match number {
            Some(number) => check.whole(&format!("{path}.{field}"), number, 0..=1024),
            None => Some(0),
        };
        let requested: Option<u32> = gpu(self, "requests.gpu", &document.requests.gpu);
        let constrained: Option<u32> = gpu(self, "constraints.gpu", &document.constraints.gpu);
        let cpu = match &document.requests.cpu {
            Some(text) => self.parse(&format!("{path}.requests.cpu"), text),
            None => Some(super::Cpu::default()),
        };
        let memory = match &document.requests.memory {
            Some(text) => self.parse(&format!("{path}.requests.memory"), text),
            None => Some(super::Bytes::default()),
        };
        Some(Requests {
            cpu: cpu?,
            memory: memory?,
            gpus: requested?.max(constrained?),
        })
    }

    fn constraints(&mut self, path: &str, document: &ConstraintsDoc) -> Constraints {
        let tiers = [
            ("cloud", Tier::Cloud),
            ("fog", Tier::Fog),
            ("edge", Tier::Edge),
        ];
        Constraints {
            labels: document.labels.clone(),
            tiers: document
                .tier
                .iter()
                .enumerate()
                .filter_map(|(i, text)| self.word(&format!("{path}.tier[{i}]"), text, &tiers))
                .collect(),
            residency: document.residency.iter().map(|t| t.value.clone()).collect(),
        }
    }

    fn policy(&mut self, path: &str, text: &Text) -> Option<PolicyName> {
        let words = Policy::ALL.map(|policy| (policy.name(), PolicyName(policy)));
        self.word(path, text, &words)
    }

    fn policies(&mut self, path: &str, document: &ServiceDoc) -> BTreeSet<PolicyName> {
        let Some(texts) = &document.policies else {
            return [Policy::Balanced, Policy::Closest].map(PolicyName).into();
        };
        texts
            .iter()
            .enumerate()
            .filter_map(|(i, text)| self.policy(&format!("{path}.policies[{i}]"), text))
            .collect()
    }

    fn vips(
        &mut self,
        path: &str,
        document: &ServiceDoc,
        policies: &BTreeSet<PolicyName>,
    ) -> BTreeMap<PolicyName, Vec<IpAddr>> {
        let mut vips: BTreeMap<PolicyName, Vec<IpAddr>> = BTreeMap::new();
        for (i, vip) in document.vips.iter().enumerate() {
            let path = format!("{path}.vips[{i}]");
            let policy = self.policy(&format!("{path}.policy"), &vip.policy);
            let address: Option<IpAddr> = match vip.address.value.parse() {
                Ok(address) => Some(address),
                Err(_) => {
                    let message = format!("{:?} is not an IPv4 or IPv6 address", vip.address.value);
                    self.error(
                        &format!("{path}.address"),
                        vip.address.referenced.line(),
                        message,
                    );
                    None
                }
            };
            let (Some(policy), Some(address)) = (policy, address) else {
                continue;
            };
            let line = vip.policy.referenced.line();
            if policy.0 == Policy::Instance {
                let message = "addresses of policy instance cannot be chosen: leave it out";
                self.error(&format!("{path}.policy"), line, message);
            } else if !policies.contains(&policy) {
                let message = format!("the service has no policy {policy}: add it to policies");
                self.error(&format!("{path}.policy"), line, message);
            }
            vips.entry(policy).or_default().push(address);
        }
        vips
    }

    fn ingress(&mut self, path: &str, document: &ServiceDoc) -> Vec<Ingress> {
        let mut entries = Vec::new();
        for (i, entry) in document.ingress.iter().enumerate() {
            let path = format!("{path}.ingress[{i}]");
            let cluster = self.parse(&format!("{path}.cluster"), &entry.cluster);
            let rate = self.whole(&format!("{path}.rate"), &entry.rate, 0..=1_000_000_000);
            if let (Some(cluster), Some(rate)) = (cluster, rate) {
                entries.push(Ingress { cluster, rate });
            }
        }
        entries
    }

    fn links(
        &mut self,
        app: &AppName,
        documents: &[LinkDoc],
        declared: &BTreeSet<&str>,
    ) -> Vec<Link> {
        let mut links: Vec<Link> = Vec::new();
        for (i, document) in documents.iter().enumerate() {
            let path = format!("spec.links[{i}]");
            let Some(link) = self.link(&path, app, document, declared) else {
                continue;
            };
            if links
                .iter()
                .any(|other| (&other.from, &other.to) == (&link.from, &link.to))
            {
                let message = format!("{} -> {} is declared twice: keep one", link.from, link.to);
                self.error(&path, document.from.referenced.line(), message);
            }
            links.push(link);
        }
        links
    }

    fn link(
        &mut self,
        path: &str,
        app: &AppName,
        document: &LinkDoc,
        declared: &BTreeSet<&str>,
    ) -> Option<Link> {
        let from = self.declared(&format!("{path}.from"), &document.from, declared);
        let to = if document.to.value.contains('/') {
            self.parse::<ServiceName>(&format!("{path}.to"), &document.to)
        } else {
            self.declared(&format!("{path}.to"), &document.to, declared)
                .map(|name| app.service(&name))
        };
        if let (Some(from), Some(to)) = (&from, &to)
            && app.service(from) == *to
        {
            let message = format!("{from} links to itself: remove the link");
            self.error(path, document.to.referenced.line(), message);
        }
        let max_latency = document.max_latency.as_ref();
        let max_latency = max_latency.map(|text| self.parse(&format!("{path}.maxLatency"), text));
        let bandwidth = document.bandwidth.as_ref();
        let bandwidth = bandwidth.map(|text| self.parse(&format!("{path}.bandwidth"), text));
        let rate = match &document.rate {
            Some(number) => self.whole(&format!("{path}.rate"), number, 0..=1_000_000_000),
            None => Some(1),
        };
        Some(Link {
            from: from?,
            to: to?,
            max_latency: max_latency.flatten(),
            bandwidth: bandwidth.flatten(),
            rate: rate?,
        })
    }

    /// The name of a service of this application.
    fn declared(&mut self, path: &str, text: &Text, declared: &BTreeSet<&str>) -> Option<Name> {
        if !declared.contains(text.value.as_str()) {
            let known: Vec<&str> = declared.iter().copied().collect();
            let message = format!(
                "no service {:?}: there are {}",
                text.value,
                known.join(", ")
            );
            self.error(path, text.referenced.line(), message);
            return None;
        }
        // A declared name that is no label was reported where it is declared.
        text.value.parse().ok()
    }

    fn weights(&mut self, document: Option<&WeightsDoc>) -> Option<Weights> {
        let Some(document) = document else {
            return Some(Weights::default());
        };
        let mut weight = |name: &str, text: &Option<Text>| match text {
            None => Some(0),
            Some(text) => self.weight(&format!("spec.weights.{name}"), text),
        };
        let energy = weight("energy", &document.energy);
        let cost = weight("cost", &document.cost);
        let latency = weight("latency", &document.latency);
        let performance = weight("performance", &document.performance);
        let weights = Weights {
            energy: energy?,
            cost: cost?,
            latency: latency?,
            performance: performance?,
        };
        let line = [
            &document.energy,
            &document.cost,
            &document.latency,
            &document.performance,
        ]
        .into_iter()
        .flatten()
        .map(|text| text.referenced.line())
        .next()
        .unwrap_or(0);
        if [
            weights.energy,
            weights.cost,
            weights.latency,
            weights.performance,
        ] == [0; 4]
        {
            self.error(
                "spec.weights",
                line,
                "all are zero: give at least one of energy, cost, latency, performance a positive weight",
            );
            return None;
        }
        Some(weights)
    }

    /// A number from 0 to 1000 with at most three decimals, in thousandths.
    fn weight(&mut self, path: &str, text: &Text) -> Option<u32> {
        let (whole, fraction) = text.value.split_once('.').unwrap_or((&text.value, "0"));
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let milli = (digits(whole) && digits(fraction) && fraction.len() <= 3)
            .then(|| format!("{fraction:0<3}"))
            .and_then(|padded| Some((whole.parse::<u32>().ok()?, padded.parse::<u32>().ok()?)))
            .filter(|(whole, _)| *whole <= 1000)
            .map(|(whole, milli)| whole * 1000 + milli);
        if milli.is_none() {
            let message = format!(
                "{:?} is not a weight: use a number from 0 to 1000 with at most three decimals",
                text.value
            );
            self.error(path, text.referenced.line(), message);
        }
        milli
    }

    fn grant(
        &mut self,
        path: &str,
        document: &GrantDoc,
        declared: &BTreeSet<&str>,
    ) -> Option<Grant> {
        let mut services = BTreeSet::new();
        for text in document.service.iter().chain(&document.services) {
            services.extend(self.declared(&format!("{path}.services"), text, declared));
        }
        let to = match (&document.to_namespace, &document.to_hosts_of) {
            (Some(text), None) => {
                Grantee::Namespace(self.parse(&format!("{path}.toNamespace"), text)?)
            }
            (None, Some(text)) => Grantee::HostsOf(self.parse(&format!("{path}.toHostsOf"), text)?),
            (first, second) => {
                let line = first
                    .iter()
                    .chain(second)
                    .next()
                    .map_or(0, |t| t.referenced.line());
                self.error(path, line, "give exactly one of toNamespace and toHostsOf");
                return None;
            }
        };
        Some(Grant { services, to })
    }
}
