//! What every long-running program needs around its job, in the order of a start.
//!
//! A program starts like this, and in no other order:
//!
//! 1. [`config::load_as`]: parse the configuration; a bad one ends with [`exit::CONFIG`] before a socket is bound.
//! 2. [`listen`]: bind std listeners or take those that systemd holds, open files.
//! 3. [`hardening::apply`]: give up rights. Landlock and capabilities belong to a thread, so no other thread
//!    may exist yet.
//! 4. [`logging::init`]: this starts the first thread.
//! 5. [`runtime`]: build the runtime, then `from_std` the listeners. Never `#[tokio::main]`.
//!
//! This crate must never hold a word of the programs' domain: no key, no certificate, no cluster.

pub mod config;
pub mod exit;
pub mod listen;
pub mod hardening;
pub mod logging;
pub mod runtime;
pub mod clock;
pub mod signals;
pub mod ops;
