//! The local socket: how commands on the agent's host reach the running agent.
//!
//! A unix socket in the store's directory, for root and the agent's own user
//! only. One connection is one request: a line of JSON, then the secrets that
//! it announces, to the end; the answer is one line. No secret is in the JSON,
//! none is kept, and nothing here is reachable from another host.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fleet_kms_transport::Drain;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use zeroize::Zeroizing;

use crate::agent::Agent;
use crate::host::execute;

pub mod client;
pub mod protocol;

use protocol::{Answer, MAX_REQUEST, Request, parse};

/// Requests at a time.
const AT_A_TIME: usize = 8;
/// A request is there at once: it comes from a program on this host.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// The loop rests so long after an accept error.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Returns where the socket of an agent with this store is.
pub fn path_of(store: &Path) -> PathBuf {
    store.with_file_name("kms-agent.sock")
}

/// Binds the socket. Called by who holds the store's lock, so that what is in
/// the way is a leftover.
///
/// # Errors
///
/// When the directory cannot be written or the path is too long for a socket.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    // Under its name only with its mode.
    let new = path.with_extension("new");
    for leftover in [&new, path] {
        match fs::remove_file(leftover) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    fs::rename(&new, path)?;
    Ok(listener)
}

/// Serves the socket until `drain`.
pub async fn serve(listener: UnixListener, agent: Arc<Agent>, drain: Drain) {
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = drain.drained() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let agent = Arc::clone(&agent);
                tokio::spawn(async move {
                    if let Err(error) = answer(stream, &agent).await {
                        tracing::debug!(%error, "a request on the local socket came to nothing");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the local socket does not accept");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

async fn answer(mut stream: UnixStream, agent: &Agent) -> io::Result<()> {
    let peer = stream.peer_cred()?;
    let own = rustix::process::geteuid().as_raw();
    let result = if peer.uid() == 0 || peer.uid() == own {
        match timeout(REQUEST_WITHIN, read(&mut stream)).await.map_err(io::Error::from)? {
            Ok((request, secrets)) => execute::execute(agent, request, secrets).await,
            Err(error) => return Err(error),
        }
    } else {
        tracing::warn!(uid = peer.uid(), "the local socket refused another user");
        Err("only root and the agent's own user may use this socket".to_owned())
    };
    let answer = match result {
        Ok(reply) => Answer::Ok(Box::new(reply)),
        Err(error) => Answer::Error(error),
    };
    let line = Zeroizing::new(serde_json::to_vec(&answer)?);
    stream.write_all(&line).await?;
    stream.shutdown().await
}

/// Reads a request to its end, into memory that is wiped.
async fn read(stream: &mut UnixStream) -> io::Result<(Request, Vec<protocol::Secret>)> {
    let mut bytes = Zeroizing::new(vec![0; MAX_REQUEST + 1]);
    let mut length = 0;
    loop {
        let rest = bytes.get_mut(length..).unwrap_or_default();
        match stream.read(rest).await? {
            0 => break,
            read => length += read,
        }
    }
    parse(bytes.get(..length).unwrap_or_default())
}
