//! The admin API's JSON types and its OpenAPI document, shared by the agent
//! that serves it and by the typed client of `kmsctl`.
//!
//! Requests refuse unknown fields; responses and their enums tolerate them,
//! or two releases could not talk. Nothing here does I/O, holds a key or
//! decides anything: the types say what can be asked and answered, no more.

pub mod operations;
pub mod clusters;
pub mod versions;
pub mod tokens;
pub mod nodes;
pub mod audit;
pub mod authorities;
pub mod status;
pub mod change;
pub mod paging;
pub mod problem;
pub mod scalars;
pub mod openapi;
mod open_enum;

pub use audit::{AuditChain, AuditHead, AuditQuery, AuditRecord};
pub use authorities::{Ca, CaGeneration, CaKind, CaState, RotateCa, RotatedCa};
pub use change::{Change, ChangeQuery};
pub use clusters::{Cluster, CreateCluster, SetRotation};
pub use nodes::{Node, NodeState};
pub use operations::{Method, Operation};
pub use paging::{Page, PageQuery};
pub use problem::{Code, Problem};
pub use scalars::{HumanDuration, Timestamp};
pub use status::Status;
pub use tokens::{CreateToken, IssuedToken, Token};
pub use versions::{Explanation, Guard, RotateKey, Version, VersionState};
