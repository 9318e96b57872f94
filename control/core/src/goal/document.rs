//! The goal file as it is written: one document, with the line of each field, nothing checked but its form.
//!
//! Unknown fields are refused. The JSON Schema is made of these types, so that it and the parser agree.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_saphyr::Spanned;

/// A text and where it stands.
pub(super) type Text = Spanned<String>;
/// A whole number and where it stands.
pub(super) type Whole = Spanned<i64>;

/// A goal file's document: an application and what its owner wants of it.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[schemars(title = "MeshApplication")]
pub(super) struct Document {
    /// `weft.dev/v1alpha1`.
    #[schemars(with = "String", extend("const" = super::API_VERSION))]
    pub(super) api_version: Text,
    /// `MeshApplication`.
    #[schemars(with = "String", extend("const" = super::KIND))]
    pub(super) kind: Text,
    /// Its name.
    pub(super) metadata: MetadataDoc,
    /// What is wanted.
    pub(super) spec: SpecDoc,
}

/// The name of an application.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MetadataDoc {
    /// An RFC 1123 label.
    #[schemars(with = "String", extend("pattern" = LABEL))]
    pub(super) name: Text,
    /// An RFC 1123 label; `default` when it is left out.
    #[serde(default)]
    #[schemars(with = "Option<String>", extend("pattern" = LABEL))]
    pub(super) namespace: Option<Text>,
}

/// What [`crate::name::Name`] accepts.
const LABEL: &str = "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$";

/// What is wanted of an application.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SpecDoc {
    /// Its services.
    pub(super) services: Vec<ServiceDoc>,
    /// Who calls whom; a link is also what allows it.
    #[serde(default)]
    pub(super) links: Vec<LinkDoc>,
    /// What matters how much; all alike when it is left out.
    #[serde(default)]
    pub(super) weights: Option<WeightsDoc>,
    /// Who else may call.
    #[serde(default)]
    pub(super) grants: Vec<GrantDoc>,
}

/// One service.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ServiceDoc {
    /// An RFC 1123 label, unique in the application.
    #[schemars(with = "String", extend("pattern" = LABEL))]
    pub(super) name: Text,
    /// Container image.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(super) image: Option<Text>,
    /// Program and arguments.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub(super) command: Vec<Text>,
    /// The ports that its addresses answer.
    #[serde(default)]
    pub(super) ports: Vec<PortDoc>,
    /// How many instances; 1 when it is left out.
    #[serde(default)]
    #[schemars(with = "Option<u32>", extend("minimum" = 0, "maximum" = super::MAX_REPLICAS))]
    pub(super) replicas: Option<Whole>,
    /// What one instance needs.
    #[serde(default)]
    pub(super) requests: RequestsDoc,
    /// Environment of its instances.
    #[serde(default)]
    pub(super) env: BTreeMap<String, String>,
    /// `one`: never two copies of an instance at a time; `many` when it is left out.
    #[serde(default)]
    #[schemars(with = "Option<super::Writers>")]
    pub(super) writers: Option<Text>,
    /// Where it may run.
    #[serde(default)]
    pub(super) constraints: ConstraintsDoc,
    /// The policies for which it has addresses; `balanced` and `closest` when it is left out.
    #[serde(default)]
    #[schemars(with = "Option<Vec<String>>")]
    pub(super) policies: Option<Vec<Text>>,
    /// Particular addresses asked for.
    #[serde(default)]
    pub(super) vips: Vec<VipDoc>,
    /// Where its users call from.
    #[serde(default)]
    pub(super) ingress: Vec<IngressDoc>,
    /// Let its connections to services on the same node that set it too bypass TCP: faster for requests and answers,
    /// but only for programs that wait in poll or epoll (a blocking recv may say EAGAIN) and use neither splice(2) out
    /// of a connection (Go's io.Copy between two does: what it forwards is lost), MSG_WAITALL, SO_RCVLOWAT,
    /// MSG_ZEROCOPY, urgent data nor TLS of the kernel. Nothing is spliced unless the operator of the nodes names a
    /// cgroup. See docs/datapath.md, Splice.
    #[serde(default)]
    pub(super) splice: bool,
}

/// A declared port.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct PortDoc {
    /// An RFC 1123 label, unique in the service.
    #[schemars(with = "String", extend("pattern" = LABEL))]
    pub(super) name: Text,
    /// The port of its addresses.
    #[schemars(with = "u16")]
    pub(super) port: Whole,
    /// The port on which instances listen; `port` when it is left out.
    #[serde(default)]
    #[schemars(with = "Option<u16>")]
    pub(super) target_port: Option<Whole>,
    /// TCP when it is left out.
    #[serde(default)]
    #[schemars(with = "Option<super::Protocol>")]
    pub(super) protocol: Option<Text>,
    /// UDP only: flows move to another instance at once when theirs drains or dies, instead of being drained.
    #[serde(default)]
    pub(super) follow: bool,
}

/// What one instance needs.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RequestsDoc {
    /// Processing power: `250m`, `2`.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(super) cpu: Option<Text>,
    /// Memory: `64Mi`.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(super) memory: Option<Text>,
    /// GPUs.
    #[serde(default)]
    #[schemars(with = "Option<u32>")]
    pub(super) gpu: Option<Whole>,
}

/// Where a service may run; each list that is given must be met.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ConstraintsDoc {
    /// Labels that the cluster must have.
    #[serde(default)]
    pub(super) labels: BTreeMap<String, String>,
    /// Any of these tiers.
    #[serde(default)]
    #[schemars(with = "Vec<crate::report::Tier>")]
    pub(super) tier: Vec<Text>,
    /// Any of these regions.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub(super) residency: Vec<Text>,
    /// GPUs that one instance needs; the same as `requests.gpu`.
    #[serde(default)]
    #[schemars(with = "Option<u32>")]
    pub(super) gpu: Option<Whole>,
}

/// A particular address asked for.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct VipDoc {
    /// The policy; the address must be one of that policy's.
    #[schemars(with = "String")]
    pub(super) policy: Text,
    /// The address, IPv4 or IPv6.
    #[schemars(with = "String")]
    pub(super) address: Text,
}

/// Calls of users from outside the application.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct IngressDoc {
    /// The cluster in which they enter.
    #[schemars(with = "String")]
    pub(super) cluster: Text,
    /// Calls per second.
    #[schemars(with = "u32")]
    pub(super) rate: Whole,
}

/// One service calls another.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct LinkDoc {
    /// The caller, a service of this application.
    #[schemars(with = "String")]
    pub(super) from: Text,
    /// The called one: a service of this application, or `namespace/application/service`.
    #[schemars(with = "String")]
    pub(super) to: Text,
    /// Round-trip time that must not be exceeded: `20ms`.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(super) max_latency: Option<Text>,
    /// Traffic in both directions together: `5Mbps`.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(super) bandwidth: Option<Text>,
    /// Calls per second; 1 when it is left out.
    #[serde(default)]
    #[schemars(with = "Option<u32>")]
    pub(super) rate: Option<Whole>,
}

/// What matters how much, as shares; a goal that is left out does not matter.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct WeightsDoc {
    /// Carbon of the power drawn.
    #[serde(default)]
    #[schemars(with = "Option<f64>", extend("minimum" = 0))]
    pub(super) energy: Option<Text>,
    /// Money.
    #[serde(default)]
    #[schemars(with = "Option<f64>", extend("minimum" = 0))]
    pub(super) cost: Option<Text>,
    /// Time that calls spend on the way.
    #[serde(default)]
    #[schemars(with = "Option<f64>", extend("minimum" = 0))]
    pub(super) latency: Option<Text>,
    /// Room to breathe.
    #[serde(default)]
    #[schemars(with = "Option<f64>", extend("minimum" = 0))]
    pub(super) performance: Option<Text>,
}

/// Permission to call without a link: to a namespace, or to the hosts of a cluster.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct GrantDoc {
    /// The service that may be called; all of them when neither this nor `services` is given.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(super) service: Option<Text>,
    /// The services that may be called.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub(super) services: Vec<Text>,
    /// To all instances of this namespace.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(super) to_namespace: Option<Text>,
    /// To processes on the hosts of this cluster.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(super) to_hosts_of: Option<Text>,
}
