//! Free TCP ports for programs that must be told one before they start.

use std::collections::HashSet;
use std::net::TcpListener;
use std::process;
use std::sync::Mutex;

use anyhow::Context;

/// Below the range from which Linux takes the source ports of outgoing connections, so that nothing takes a port
/// between the look and its use.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;

static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);

/// A port on 127.0.0.1 that is free now and that this process gave to nobody else.
///
/// # Errors
/// When none is left.
pub fn free_port() -> anyhow::Result<u16> {
    let mut given = GIVEN.lock().expect("nothing panics while it holds the lock");
    let given = given.get_or_insert_with(HashSet::new);
    let port = candidates()
        .find(|port| !given.contains(port) && TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .context("no free port")?;
    given.insert(port);
    Ok(port)
}

/// All ports, from a place that differs from process to process, so that two test runs seldom try the same one.
fn candidates() -> impl Iterator<Item = u16> {
    let start = u16::try_from(process::id() % u32::from(COUNT)).expect("COUNT fits u16");
    (0..COUNT).map(move |step| FIRST + (start.wrapping_mul(37) % COUNT + step) % COUNT)
}
