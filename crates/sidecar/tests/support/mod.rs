//! A fleet in one process: a CA, agents that wrap by a toy formula, and a node
//! with the real handlers on a real socket and real mTLS.
//!
//! The toy agents stand beside the real one (top-level `tests/`), which shows
//! that keys are right; these misbehave on demand.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "test code; clippy knows #[test] functions only"
)]

pub mod agent;
pub mod ca;
pub mod enrolment;
pub mod node;
