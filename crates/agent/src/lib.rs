//! kms-agent: owns the KEKs of many clusters and rotates them.
//!
//! The modules stand in the order of the flow: a call comes in, who makes it,
//! may they, which keys, do it, say so; then what changes keys and identities;
//! then what all of it is kept in. This crate must never put key material into
//! a log, an error or a record in clear.
#![allow(
    missing_docs,
    reason = "fields of errors and of disk records are explained by the item they stand in"
)]

pub mod config;
pub mod root;
pub mod serve;
pub mod agent;
pub mod turned_away;
pub mod in_flight;
pub mod data_plane;
pub mod answer;
pub mod request_id;
pub mod caller;
pub mod authz;
pub mod turns;
pub mod live_keyrings;
pub mod grpc_code;
pub mod metrics;

pub mod aside;
pub mod admin;
pub mod ops;
pub mod scrape;
pub mod enrolment;
pub mod ca;
pub mod control_plane;
pub mod rotation;
pub mod wraps;
pub mod high_water;
pub mod changes;
pub mod trail;
pub mod backup;
pub mod restore;
pub mod recovery;
pub mod host;
pub mod slots;
pub mod local;
pub mod bans;
pub mod restored;
pub mod rolled_back;

pub mod bulletin;
pub mod fleet_ca;
pub mod clusters;
pub mod max_offline;
pub mod identities;
pub mod sightings;
pub mod nodes;
pub mod ledger;
pub mod records;
pub mod storage;
pub mod migration;
pub mod witness;
pub mod init;
pub mod check_store;
pub mod times;
pub mod errors;
#[cfg(test)]
mod promises;
