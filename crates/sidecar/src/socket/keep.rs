//! Keeps the path served for the process's life: binds again when the directory
//! was made anew, and hands over to a successor.

use std::io;
use std::net::TcpListener;
use std::time::Duration;

use fleet_kms_transport::{Accepted, Listener, Peer, Protocol, TlsError, UnixPeer};
use futures_util::future::FutureExt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::handover::{Request, answer};
use super::{Bound, SocketPath};

/// How often the path is looked at. A kube-apiserver that lost the socket dials
/// again after a second.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// kube-apiserver's port: the path's listener, which changes when the path was
/// bound again.
///
/// `wrap` is put between a connection and HTTP/2. Accepted connections outlive
/// the listener that they came from.
#[derive(Debug)]
pub struct SocketPort<W> {
    current: UnixListener,
    next: Option<mpsc::Receiver<UnixListener>>,
    wrap: W,
}

impl<W> SocketPort<W> {
    /// A listener that somebody else owns, as systemd, and that never changes.
    pub fn fixed(listener: std::os::unix::net::UnixListener, wrap: W) -> io::Result<Self> {
        Ok(Self { current: UnixListener::from_std(listener)?, next: None, wrap })
    }

    async fn accept_stream(&mut self) -> io::Result<UnixStream> {
        loop {
            let next = async {
                match &mut self.next {
                    Some(next) => next.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                accepted = self.current.accept() => return accepted.map(|(stream, _)| stream),
                next = next => match next {
                    Some(next) => self.current = next,
                    None => self.next = None,
                },
            }
        }
    }
}

impl<W, Io> Listener for SocketPort<W>
where
    W: Fn(UnixStream) -> Io + Send + Sync + 'static,
    Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Io = Io;

    async fn accept(&mut self) -> io::Result<Accepted<Io>> {
        let stream = self.accept_stream().await?;
        let peer = stream.peer_cred().map(UnixPeer::from);
        let io = (self.wrap)(stream);
        let handshake = async move { Ok((io, Peer::Unix(peer.map_err(TlsError::Io)?), Protocol::Http2)) };
        Ok(Accepted { source: None, handshake: handshake.boxed() })
    }
}

/// Starts to keep the path. Returns its port, and a future that ends when a
/// successor serves the path: then this process must drain. `ops` is this
/// process's ops port, which the successor gets too.
pub fn keep_bound<W>(
    path: SocketPath,
    bound: Bound,
    ops: TcpListener,
    wrap: W,
) -> io::Result<(SocketPort<W>, impl Future<Output = ()> + Send + use<W>)> {
    let (send, next) = mpsc::channel(1);
    let port = SocketPort { current: UnixListener::from_std(bound.calls)?, next: Some(next), wrap };
    let handover = UnixListener::from_std(bound.handover)?;
    Ok((port, keep(path, handover, ops, send)))
}

async fn keep(
    mut path: SocketPath,
    mut handover: UnixListener,
    ops: TcpListener,
    listeners: mpsc::Sender<UnixListener>,
) {
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let own_uid = rustix::process::geteuid().as_raw();
    let mut trouble = None;
    loop {
        tokio::select! {
            accepted = handover.accept() => match accepted {
                Ok((stream, _)) => match answer(stream, &path.lock, &ops, own_uid).await {
                    Request::Taken => return tracing::info!("another process has taken the socket's path over"),
                    Request::Abandoned => path.note_holder(),
                },
                Err(_) => {
                    look.tick().await;
                }
            },
            _ = look.tick() => {}
        }
        let found = path
            .check()
            .map_err(|error| error.to_string())
            .and_then(|bound| bound.map(from_std).transpose().map_err(|error| error.to_string()));
        match found {
            Ok(None) => trouble = None,
            Ok(Some((calls, next_handover))) => {
                tracing::info!("bound the socket's path again");
                handover = next_handover;
                trouble = None;
                let _ = listeners.send(calls).await;
            }
            Err(error) => {
                // Once per kind of trouble, not twice a second.
                if trouble.as_ref() != Some(&error) {
                    tracing::error!(error, "the socket's path is not served");
                }
                trouble = Some(error);
            }
        }
    }
}

fn from_std(bound: Bound) -> io::Result<(UnixListener, UnixListener)> {
    Ok((UnixListener::from_std(bound.calls)?, UnixListener::from_std(bound.handover)?))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::socket::SocketConfig;

    fn config(directory: &Path) -> SocketConfig {
        SocketConfig { path: directory.join("kms.sock"), mode: 0o600, owner: None, group: None }
    }

    fn start(directory: &Path, pid: u32) -> (SocketPort<()>, impl Future<Output = ()> + Send + 'static) {
        let (path, bound) = SocketPath::claim(config(directory), pid).unwrap();
        keep_bound(path, bound, ops(), ()).unwrap()
    }

    fn ops() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }

    /// Whether a new connection to the path arrives at this listener.
    async fn is_dialled(listener: &mut SocketPort<()>, directory: &Path) -> bool {
        let _client = UnixStream::connect(config(directory).path).await.unwrap();
        tokio::time::timeout(Duration::from_millis(200), listener.accept_stream()).await.is_ok()
    }

    #[tokio::test]
    async fn a_successor_takes_the_path_and_the_old_process_goes_on_until_told_to_drain() {
        let directory = tempfile::tempdir().unwrap();
        let (path, bound) = SocketPath::claim(config(directory.path()), 1).unwrap();
        let old_ops = ops();
        let ops = old_ops.local_addr().unwrap();
        let (mut old, old_ends) = keep_bound(path, bound, old_ops, ()).unwrap();
        let old_ends = tokio::spawn(old_ends);
        let client = UnixStream::connect(config(directory.path()).path).await.unwrap();

        let replaced = config(directory.path());
        let taken = tokio::task::spawn_blocking(move || SocketPath::replace(replaced, 2)).await.unwrap();
        let (path, bound, mut handover) = taken.unwrap();
        let ops = handover.as_mut().unwrap().take_ops(ops).expect("the old process's ops port");
        let (mut new, new_ends) = keep_bound(path, bound, ops, ()).unwrap();
        let _new_ends = tokio::spawn(new_ends);

        let mut served = old.accept_stream().await.unwrap();
        assert!(is_dialled(&mut new, directory.path()).await);
        assert!(!old_ends.is_finished());
        let finish = handover.expect("there was a holder");
        tokio::task::spawn_blocking(|| finish.finish()).await.unwrap().unwrap();
        old_ends.await.unwrap();

        let (mut client, mut byte) = (client, [0]);
        client.write_all(b"x").await.unwrap();
        served.read_exact(&mut byte).await.unwrap();
        drop(old);
        assert!(is_dialled(&mut new, directory.path()).await);
        let error = SocketPath::claim(config(directory.path()), 3).unwrap_err().to_string();
        assert!(error.contains("process 2"), "{error}");
    }

    #[tokio::test]
    async fn a_successor_that_dies_half_way_costs_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (mut old, old_ends) = start(directory.path(), 1);
        let old_ends = tokio::spawn(old_ends);
        let replaced = config(directory.path());
        let taken = tokio::task::spawn_blocking(move || SocketPath::replace(replaced, 2)).await.unwrap();
        drop(taken.unwrap());
        tokio::time::sleep(2 * LOOK_EVERY).await;
        assert!(!old_ends.is_finished());
        assert!(is_dialled(&mut old, directory.path()).await);
        let error = SocketPath::claim(config(directory.path()), 3).unwrap_err().to_string();
        assert!(error.contains("process 1"), "{error}");
    }

    #[tokio::test]
    async fn without_a_holder_a_replacement_is_an_ordinary_start() {
        let directory = tempfile::tempdir().unwrap();
        let (_path, _bound, handover) = SocketPath::replace(config(directory.path()), 1).unwrap();
        assert!(handover.is_none());
    }

    #[tokio::test]
    async fn a_holder_that_does_not_answer_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let (_path, bound) = SocketPath::claim(config(directory.path()), 77).unwrap();
        drop(bound);
        let error = SocketPath::replace(config(directory.path()), 2).unwrap_err().to_string();
        assert!(error.starts_with("process 77 does not hand"), "{error}");
    }

    #[tokio::test]
    async fn a_directory_made_anew_is_served_again_by_itself() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let (mut listener, ends) = start(&run, 1);
        let _ends = tokio::spawn(ends);
        std::fs::remove_dir_all(&run).unwrap();
        tokio::time::sleep(LOOK_EVERY).await;
        std::fs::create_dir(&run).unwrap();
        let accept = tokio::spawn(async move { listener.accept_stream().await.is_ok() });
        let dial = async {
            while UnixStream::connect(config(&run).path).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(4 * LOOK_EVERY, dial).await.unwrap();
        assert!(accept.await.unwrap());
    }
}
