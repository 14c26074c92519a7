//! TLS, the connection loop and links over real sockets, with certificates made at run time.

#![expect(clippy::unwrap_used, clippy::panic, reason = "this whole program is a test")]

mod ca;
mod harness;
mod raw;
mod handshakes;
mod enrolment;
mod serving;
mod shutdown;
mod links;
