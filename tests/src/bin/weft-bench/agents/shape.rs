//! What runs where: applications of ten services of ten instances, which call each other as a tree.
//!
//! ```text
//!  each application, all of it in one cluster         across: the root of a cluster's first application
//!  s0 -+- s1 -+- s3 -+- s7                            calls leaf s9 of the last application of the next
//!      |      |      '- s8                            two clusters
//!      |      '- s4 --- s9
//!      '- s2 -+- s5
//!             '- s6
//! ```
//!
//! With ten applications per cluster 2 of 92 links leave it. A node runs a fortieth of the instances, each of another
//! service, and so holds about as many services as it runs instances.

use std::{collections::BTreeSet, fmt::Write as _};

use anyhow::{Result, ensure};

/// Services of an application.
const SERVICES: usize = 10;
/// Instances of a service.
const REPLICAS: usize = 10;
/// The service of an application that other clusters call, a leaf.
const SHARED: usize = SERVICES - 1;
/// How many clusters behind its own a cluster calls.
const ACROSS: usize = 2;
/// The namespace of everything.
const NAMESPACE: &str = "bench";

/// How large the mesh is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) clusters: usize,
    /// Nodes of each cluster.
    pub(super) nodes: usize,
    /// Endpoints of each cluster.
    endpoints: usize,
}

/// One service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Service {
    /// The cluster in which all of it runs.
    pub(super) cluster: usize,
    application: usize,
    service: usize,
}

impl Shape {
    pub(super) fn new(clusters: usize, nodes: usize, endpoints: usize) -> Result<Self> {
        let one = SERVICES * REPLICAS;
        ensure!(
            endpoints > 0 && endpoints.is_multiple_of(one),
            "--endpoints {endpoints}: an application has {one}, so a multiple of it"
        );
        ensure!(
            clusters > ACROSS,
            "--agents {clusters}: more than {ACROSS}, or nobody is unconcerned"
        );
        ensure!(nodes > 0, "--nodes 0: a cluster has nodes");
        Ok(Self {
            clusters,
            nodes,
            endpoints,
        })
    }

    /// Endpoints of each cluster.
    pub(super) fn endpoints(&self) -> usize {
        self.endpoints
    }

    /// The clusters' applications.
    pub(super) fn applications(&self) -> usize {
        self.endpoints / (SERVICES * REPLICAS)
    }

    /// The goal file of an application.
    pub(super) fn goal(&self, cluster: usize, application: usize) -> String {
        let mut goal = format!(
            "\
apiVersion: weft.dev/v1alpha1
kind: MeshApplication
metadata: {{ name: {}, namespace: {NAMESPACE} }}
spec:
  services:
",
            application_name(cluster, application)
        );
        for service in 0..SERVICES {
            let _ = write!(
                goal,
                "    - name: s{service}
      image: registry.example/bench/s{service}:1
      ports: [{{ name: http, port: 80, targetPort: 8080 }}]
      replicas: {REPLICAS}
      requests: {{ cpu: 10m, memory: 8Mi }}
      constraints: {{ labels: {{ cluster: {} }} }}
",
                cluster_name(cluster)
            );
        }
        goal.push_str("  links:\n");
        for service in 1..SERVICES {
            let caller = (service - 1) / 2;
            let _ = writeln!(goal, "    - {{ from: s{caller}, to: s{service} }}");
        }
        if application == 0 {
            for other in self.neighbours(cluster, 1) {
                let to = self.shared(other).name();
                let _ = writeln!(goal, "    - {{ from: s0, to: {to} }}");
            }
        }
        goal
    }

    /// The clusters that `cluster` calls (`way` 1), or those that call it (`way` -1).
    fn neighbours(&self, cluster: usize, way: isize) -> impl Iterator<Item = usize> {
        let count = self.clusters;
        (1..=ACROSS).map(move |step| {
            if way > 0 {
                (cluster + step) % count
            } else {
                (cluster + count - step) % count
            }
        })
    }

    /// What other clusters call of `cluster`.
    fn shared(&self, cluster: usize) -> Service {
        Service {
            cluster,
            application: self.applications() - 1,
            service: SHARED,
        }
    }

    /// The service of which an instance is changed in `turn`, and the instance's number: each time of another cluster, and
    /// of one that other clusters call in every third turn.
    pub(super) fn changed(&self, turn: usize) -> (Service, u32) {
        // Coprime to most counts: the clusters in no order.
        let cluster = (turn * 7) % self.clusters;
        let service = if turn.is_multiple_of(3) {
            self.shared(cluster)
        } else {
            Service {
                cluster,
                application: turn % self.applications(),
                // The root has no callers.
                service: 1 + turn % (SERVICES - 1),
            }
        };
        let instance = (turn / 3) % REPLICAS;
        (service, u32::try_from(instance).expect("it is small"))
    }

    /// The services that call `called`.
    pub(super) fn callers(&self, called: Service) -> BTreeSet<Service> {
        let mut callers = BTreeSet::new();
        if called.service > 0 {
            callers.insert(Service {
                service: (called.service - 1) / 2,
                ..called
            });
        }
        if called == self.shared(called.cluster) {
            let others = self.neighbours(called.cluster, -1);
            callers.extend(others.map(|cluster| Service {
                cluster,
                application: 0,
                service: 0,
            }));
        }
        callers
    }
}

impl Service {
    /// `namespace/application/service`.
    pub(super) fn name(self) -> String {
        let application = application_name(self.cluster, self.application);
        format!("{NAMESPACE}/{application}/s{}", self.service)
    }
}

/// The name of a cluster.
pub(super) fn cluster_name(cluster: usize) -> String {
    format!("c{cluster:03}")
}

fn application_name(cluster: usize, application: usize) -> String {
    format!("c{cluster:03}-a{application}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_concerns_the_callers_cluster_and_sometimes_two_more() {
        let shape = Shape::new(7, 4, 300).unwrap();
        let clusters = |service: Service| -> BTreeSet<usize> {
            let callers = shape.callers(service);
            callers.iter().map(|caller| caller.cluster).collect()
        };
        for turn in 0..100 {
            let (service, instance) = shape.changed(turn);
            assert!(instance < 10);
            let concerned = clusters(service);
            assert!(concerned.contains(&service.cluster));
            let count = if service == shape.shared(service.cluster) {
                3
            } else {
                1
            };
            assert_eq!(concerned.len(), count, "{service:?}");
        }
        assert_eq!(clusters(shape.shared(0)), BTreeSet::from([0, 5, 6]));
    }

    #[test]
    fn a_goal_file_names_every_link_that_the_callers_are_known_by() {
        let shape = Shape::new(5, 4, 200).unwrap();
        let goal = shape.goal(4, 0);
        assert!(goal.contains("to: bench/c000-a1/s9 }"), "{goal}");
        assert!(goal.contains("to: bench/c001-a1/s9 }"), "{goal}");
        assert_eq!(goal.matches("from: ").count(), 11);
        assert_eq!(shape.goal(4, 1).matches("from: ").count(), 9);
        let callers = shape.callers(shape.shared(0));
        let of_four = Service {
            cluster: 4,
            application: 0,
            service: 0,
        };
        assert!(callers.contains(&of_four), "{callers:?}");
    }
}
