//! The harness of the system tests: starts real programs and real peers.
