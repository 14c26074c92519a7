//! An error with all its causes, for one line of this node's log.

use std::error::Error;
use std::fmt::Write as _;

/// Returns the error and its causes, separated by colons. Not for kube-apiserver:
/// causes name hosts and paths.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string cannot fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
