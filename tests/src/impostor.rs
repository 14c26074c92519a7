//! A server that stands where an agent should be, with whatever certificate it could get hold of.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fleet_kms_process::clock;
use fleet_kms_transport::{
    ClientAuth, Connections, Drain, LiveIdentity, Roots, ServeLimits, TlsPort, agent_tls, serve,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tower::service_fn;

use crate::member::Member;

/// A port of 127.0.0.1 that takes whoever comes.
pub struct Impostor {
    /// Which.
    pub port: u16,
    live: Arc<LiveIdentity>,
    calls: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl Impostor {
    /// Serves with this identity; needs a runtime.
    ///
    /// # Errors
    /// When no port is free or the identity is none.
    pub fn start(shows: &Member) -> anyhow::Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let live = Arc::new(LiveIdentity::new(full_chain(shows), &shows.key)?);
        let roots = Arc::new(Roots::new(shows.roots.clone())?);
        let auth = ClientAuth::OptionalMayBeExpired;
        let tls = agent_tls(Arc::clone(&live), roots, Arc::new(clock::now), auth);
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let service = service_fn(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
            let refused = Status::unavailable("an impostor").into_http::<tonic::body::Body>();
            std::future::ready(Ok::<_, std::convert::Infallible>(refused))
        });
        let listener = TlsPort::from_std(listener, tls)?;
        let serving = serve(listener, service, ServeLimits::default(), Connections::new(), Drain::new());
        Ok(Self { port, live, calls, _task: AbortOnDropHandle::new(tokio::spawn(serving)) })
    }

    /// Shows another identity from now on.
    ///
    /// # Errors
    /// When it is none.
    pub fn show(&self, shows: &Member) -> anyhow::Result<()> {
        Ok(self.live.replace(full_chain(shows), &shows.key)?)
    }

    /// Calls that somebody has made here.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

/// With the root, as agents send it.
fn full_chain(member: &Member) -> Vec<rustls_pki_types::CertificateDer<'static>> {
    member.chain.iter().chain(member.roots.first()).cloned().collect()
}
