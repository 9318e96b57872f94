//! The agent's configuration file.
//!
//! ```yaml
//!  cluster: edge
//!  facts: { tier: edge, region: AT, cpu_price_ueur_h: 40000, cpu_power_mw: 9000, carbon_g_kwh: 120 }
//!  driver:
//!    local:
//!      run_dir: /run/weft/edge
//!      cni_plugin: /opt/cni/bin/weft-cni
//!      nodes:
//!        - { name: edge-1, netns: /run/netns/edge-1, cni_socket: /run/weft/edge-1.sock, cpu: 2, memory: 4Gi }
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use control_core::{
    goal::{Bytes, Cpu, Requests},
    report::ClusterFacts,
};
use netmanager_api::identity::is_label;
use serde::{Deserialize, Deserializer, de};

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The cluster's name; must be the one in the agent's certificate.
    pub cluster: String,
    /// What the operator says of the cluster.
    pub facts: ClusterFacts,
    /// What runs the instances.
    pub driver: DriverConfig,
}

/// What runs the instances.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum DriverConfig {
    /// Processes on this machine.
    Local(LocalConfig),
}

/// The local driver: processes in network namespaces of this machine.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalConfig {
    /// Where it keeps what must outlive the agent.
    pub run_dir: PathBuf,
    /// The `weft-cni` binary.
    pub cni_plugin: PathBuf,
    /// The nodes.
    pub nodes: Vec<LocalNode>,
}

/// One node of the local driver.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalNode {
    /// Its name; the one in its NetManager's certificate.
    pub name: String,
    /// The network namespace that plays the node; none is the machine's own.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// The CNI socket of its NetManager.
    pub cni_socket: PathBuf,
    /// Allocatable processing power.
    #[serde(deserialize_with = "quantity")]
    pub cpu: Cpu,
    /// Allocatable memory.
    #[serde(deserialize_with = "quantity")]
    pub memory: Bytes,
    /// Allocatable GPUs.
    #[serde(default)]
    pub gpus: u32,
}

/// Why the configuration does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("failed to read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file does not say what it should.
    #[error("{path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        message: String,
    },
    /// A field does not say what it should.
    #[error("{path}: {field}: {problem}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The path of the field.
        field: String,
        /// The value, and the way out.
        problem: String,
    },
}

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// When the file cannot be read, has an unknown or missing field, or a field's value does not serve.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Checks `text`, as read from `path`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = serde_saphyr::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string(),
        })?;
        config
            .check()
            .map_err(|(field, problem)| ConfigError::Field {
                path: path.to_owned(),
                field,
                problem,
            })?;
        Ok(config)
    }

    /// What each node has for instances.
    #[must_use]
    pub fn capacity(&self) -> BTreeMap<String, Requests> {
        let DriverConfig::Local(local) = &self.driver;
        let nodes = local.nodes.iter();
        nodes
            .map(|node| {
                let capacity = Requests {
                    cpu: node.cpu,
                    memory: node.memory,
                    gpus: node.gpus,
                };
                (node.name.clone(), capacity)
            })
            .collect()
    }

    fn check(&self) -> Result<(), (String, String)> {
        check_label("cluster".to_owned(), &self.cluster)?;
        let DriverConfig::Local(local) = &self.driver;
        let mut names = BTreeSet::new();
        for (index, node) in local.nodes.iter().enumerate() {
            let field = format!("driver.local.nodes[{index}].name");
            check_label(field.clone(), &node.name)?;
            if !names.insert(&node.name) {
                return Err((
                    field,
                    format!("{:?} stands twice: name each node once", node.name),
                ));
            }
        }
        if names.is_empty() {
            return Err((
                "driver.local.nodes".to_owned(),
                "there is none: a cluster needs at least one node".to_owned(),
            ));
        }
        Ok(())
    }
}

fn check_label(field: String, name: &str) -> Result<(), (String, String)> {
    if is_label(name) {
        Ok(())
    } else {
        Err((
            field,
            format!(
                "{name:?} is not a name: use 1 to 63 of a-z, 0-9 and '-', first and last a letter or digit"
            ),
        ))
    }
}

/// A quantity as written, with or without quotes (`2`, `500m`, `4Gi`).
fn quantity<'de, D, Q>(deserializer: D) -> Result<Q, D::Error>
where
    D: Deserializer<'de>,
    Q: FromStr,
    Q::Err: fmt::Display,
{
    String::deserialize(deserializer)?
        .parse()
        .map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
cluster: edge
facts: { tier: edge, region: AT, cpu_price_ueur_h: 40000, cpu_power_mw: 9000, carbon_g_kwh: 120 }
driver:
  local:
    run_dir: /run/weft/edge
    cni_plugin: /opt/cni/bin/weft-cni
    nodes:
      - { name: edge-1, netns: /run/netns/edge-1, cni_socket: /run/weft/edge-1.sock, cpu: 2, memory: 4Gi }
      - { name: edge-2, cni_socket: /run/weft/edge-2.sock, cpu: 500m, memory: 64Mi, gpus: 1 }
";

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("agent.yaml")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_configuration_has_units_with_and_without_quotes() {
        let capacity = parse(GOOD).unwrap().capacity();
        let both = ["edge-1", "edge-2"].map(|name| capacity[name]);
        assert_eq!(both.map(|node| node.cpu.as_milli()), [2000, 500]);
        assert_eq!(both.map(|node| node.memory.get()), [4 << 30, 64 << 20]);
        assert_eq!(both.map(|node| node.gpus), [0, 1]);
    }

    #[test]
    fn an_error_names_the_file_the_field_and_the_value() {
        for (right, wrong, needles) in [
            ("cluster: edge", "cluster: Edge", ["cluster", "\"Edge\""]),
            ("run_dir:", "rundir:", ["rundir", "run_dir"]),
            ("cpu: 500m", "cpu: 500u", ["500u", "line 10"]),
            (
                "name: edge-2",
                "name: edge-1",
                ["driver.local.nodes[1].name", "twice"],
            ),
            ("tier: edge", "tier: shore", ["shore", "cloud"]),
        ] {
            let error = parse(&GOOD.replace(right, wrong)).unwrap_err();
            assert!(error.starts_with("agent.yaml: "), "{error}");
            for needle in needles {
                assert!(error.contains(needle), "{needle:?} is not in: {error}");
            }
        }
    }
}
