//! `kmsctl`, the operator's command line, and the typed client of the admin API.
//!
//! The modules stand in the order of a call: what was asked ([`cli`]), of whom
//! ([`contexts`]), how ([`client`]), which command ([`commands`]), how it is
//! shown ([`output`]) and how it ends ([`failure`]). Nothing here opens a
//! store or holds a key of the fleet: all it can do, the admin API can do.

pub mod cli;
pub mod contexts;
pub mod worker_identity;
pub mod client;
pub mod commands;
pub mod console;
mod progress;
pub mod output;
pub mod failure;
