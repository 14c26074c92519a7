//! The program `kms-sidecar`: it stands beside kube-apiserver and answers its
//! KMS calls through an agent.
//!
//! It holds no KEK and links no code that could use one. A call flows through
//! the modules in the order in which they are listed here.

pub mod socket;
pub mod authority;
