//! The harness of the system tests: starts real programs and real peers.
//!
//! It must never hide a failure: whatever does not become ready in time is an error with the end of its log, and nothing
//! is skipped because a tool is missing.

pub mod wait;
pub mod ports;
pub mod http;
pub mod child;
pub mod peer;
pub mod peers;
pub mod tools;
pub mod kms_client;
pub mod etcd;
pub mod encryption_config;
pub mod apiserver;
pub mod programs;
pub mod fleet;
pub mod big_store;
pub mod faketime;
pub mod stored;
pub mod control_plane;
pub mod crash;
pub mod audit_crash;
pub mod refusal;
pub mod golden;
pub mod opened_store;
pub mod tls_probe;
pub mod member;
pub mod forge;
pub mod impostor;
pub mod proxy;
