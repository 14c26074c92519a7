//! Workers: identities for census and rewrap of one cluster, that never read a DEK.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::nodes::NodeState;
use crate::scalars::Timestamp;

/// A worker of one cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Worker {
    /// SPIFFE ID.
    pub id: String,
    /// Name within its cluster.
    pub name: String,
    /// Cluster id.
    pub cluster_id: String,
    /// Cluster name.
    pub cluster: String,
    /// Whether it may call.
    pub state: NodeState,
    /// Revision of the identity; goes into `If-Match`.
    pub revision: u64,
    /// Serial of the certificate that it may use now, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub serial: Option<String>,
    /// When that certificate ends. A worker's is not renewed after that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub certificate_not_after: Option<Timestamp>,
}
