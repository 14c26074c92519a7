//! The program `kms-sidecar`: it stands beside kube-apiserver and answers its
//! KMS calls through an agent.
//!
//! It holds no KEK and links no code that could use one. A call flows through
//! the modules in the order in which they are listed here, down to
//! [`agent_link`]; then come what the node does for itself, and what all share.

pub mod run;
pub mod socket;
pub mod authority;
pub mod kms;
pub mod kms_v1;
pub mod kms_v2;
pub mod answer;
pub mod agent_calls;
pub mod wrapped_header;
pub mod links;
pub mod agent_link;

pub mod node_status;
pub mod node_identity;
pub mod enrolment;
pub mod upkeep;
pub mod believed_time;
pub mod doctor;

pub mod grpc_code;
pub mod errors;
pub mod metrics;
pub mod request_id;
pub mod config;
