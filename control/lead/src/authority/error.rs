//! Why an authority refuses.

use std::{io, path::PathBuf};

use netmanager_api::identity::IdentityError;

/// Why the authority refused.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Not a label.
    #[error(
        "{field}: {value:?} is not a name: use 1 to 63 of a-z, 0-9 and '-', first and last a letter or digit"
    )]
    Name {
        /// Which argument.
        field: &'static str,
        /// What it was.
        value: String,
    },
    /// Not a mesh's prefix.
    #[error("{field}: {value} {problem}")]
    Prefix {
        /// Which argument.
        field: &'static str,
        /// What it was.
        value: String,
        /// What is wrong and what would be right.
        problem: &'static str,
    },
    /// The file is there already.
    #[error("{} exists already: choose another folder, or remove it if you are sure that nothing uses it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("failed to {action} {}", path.display())]
    File {
        /// Read, write or make.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A holder's files cannot be written.
    #[error(transparent)]
    Holding(#[from] IdentityError),
    /// The mesh file is not one.
    #[error("{} is not a mesh file (weft init writes it as mesh.json)", path.display())]
    Mesh {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The CA's key or certificate does not serve.
    #[error("failed to make a certificate with the authority in {}", dir.display())]
    Certificate {
        /// The authority's folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// A step of a rotation before the one that it follows.
    #[error("{} {problem}: first {first}", dir.display())]
    Order {
        /// The authority's folder.
        dir: PathBuf,
        /// What it has or lacks.
        problem: &'static str,
        /// The command that comes first.
        first: &'static str,
    },
    /// No certificate of an authority.
    #[error("{} holds no certificate", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A certificate that names nobody.
    #[error("{} names no holder to renew it for", path.display())]
    Holder {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: IdentityError,
    },
    /// The folder of another holder.
    #[error("{} is of {found}, not of lead {name:?}: name that lead's folder, or an empty one", path.display())]
    OtherHolder {
        /// The certificate in it.
        path: PathBuf,
        /// Its holder.
        found: String,
        /// The lead that was named.
        name: String,
    },
    /// A certificate of another mesh.
    #[error("{} is of {identity}, and this authority's mesh is {mesh:?}", path.display())]
    OtherMesh {
        /// The file.
        path: PathBuf,
        /// Its holder.
        identity: String,
        /// The authority's mesh.
        mesh: String,
    },
    /// The system gave no random numbers.
    #[error("the operating system gave no random numbers")]
    Random,
}
