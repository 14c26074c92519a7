//! The enrolment port: `Enrol`, `Renew`, `Time`.
//!
//! The only port that lets in callers without a certificate or with an expired
//! one. Whoever has a token becomes what the token says, whoever has a
//! certificate stays who it is; no name is ever taken from a CSR. Nothing here
//! reaches a KEK.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use fleet_kms_identity::Csr;
use fleet_kms_proto::agent::enrolment_server::Enrolment;
use fleet_kms_proto::agent::{CertificateResponse, EnrolRequest, RenewRequest, TimeRequest, TimeResponse};
use fleet_kms_transport::{LiveIdentity, PeerInfo};
use tonic::{Request, Response, Status, async_trait};

use crate::authz::{Denied, Permit, Policy, actions};
use crate::bulletin::Bulletin;
use crate::caller::Caller;
use crate::metrics::Metrics;
use crate::times::to_ms;

mod audit_trail;
pub mod issue;
pub mod limits;
pub mod node_names;
mod status;
pub mod tokens;

pub use status::EnrolmentError;

use issue::{Certified, Issuer, RenewError};

/// A join token's secret.
const SECRET: usize = 32;
/// No node name is longer; what is longer is not looked at.
const MAX_NODE: usize = 63;

/// The service of the enrolment port.
#[derive(Clone)]
pub struct EnrolmentService {
    shared: Arc<Shared>,
}

struct Shared {
    issuer: Arc<Issuer>,
    policy: Arc<Policy>,
    bulletin: Arc<Bulletin>,
    /// What this port serves with.
    serving: Arc<LiveIdentity>,
    metrics: Arc<Metrics>,
    monotonic: fn() -> Instant,
}

impl EnrolmentService {
    /// Makes the service. `serving` is the identity that its port shows.
    pub fn new(
        issuer: Arc<Issuer>,
        policy: Arc<Policy>,
        bulletin: Arc<Bulletin>,
        serving: Arc<LiveIdentity>,
        metrics: Arc<Metrics>,
        monotonic: fn() -> Instant,
    ) -> Self {
        Self { shared: Arc::new(Shared { issuer, policy, bulletin, serving, metrics, monotonic }) }
    }
}

#[async_trait]
impl Enrolment for EnrolmentService {
    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<CertificateResponse>, Status> {
        let shared = &self.shared;
        shared.answer("enrol", request, |request| shared.enrol(request)).await
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<CertificateResponse>, Status> {
        let shared = &self.shared;
        shared.answer("renew", request, |request| shared.renew(request)).await
    }

    async fn time(&self, request: Request<TimeRequest>) -> Result<Response<TimeResponse>, Status> {
        let shared = &self.shared;
        shared.answer("time", request, |request| shared.time(request)).await
    }
}

impl Shared {
    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<CertificateResponse, EnrolmentError> {
        let address = address(&request)?;
        let EnrolRequest { token, csr, node } = request.into_inner();
        let token = zeroize::Zeroizing::new(token);
        if token.len() != SECRET {
            return Err(EnrolmentError::Request { field: "token", problem: "must be 32 bytes" });
        }
        if node.len() > MAX_NODE {
            return Err(EnrolmentError::Request { field: "node", problem: "is longer than 63 characters" });
        }
        let join = self.issuer.read_join(&token, &csr, node, address).await?;
        let issuer = Arc::clone(&self.issuer);
        let certified = to_end(async move { issuer.enrol(&join).await }).await?;
        Ok(self.response(certified))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<CertificateResponse, EnrolmentError> {
        let caller = Caller::from_connection(request.extensions()).map_err(|_| Denied::NoCertificate)?;
        let permit = self.may_renew(&caller).await?;
        let csr = match Csr::from_der(&request.into_inner().csr).map_err(RenewError::from) {
            Ok(csr) => csr,
            Err(error) => {
                self.issuer.note_refused_renewal(caller.certificate(), &error).await;
                return Err(error.into());
            }
        };
        let issuer = Arc::clone(&self.issuer);
        let certified =
            to_end(async move { issuer.renew(&permit, caller.certificate(), &csr).await }).await?;
        Ok(self.response(certified))
    }

    async fn time(&self, request: Request<TimeRequest>) -> Result<TimeResponse, EnrolmentError> {
        let now = self.issuer.now();
        self.issuer.limits().time(address(&request)?, now)?;
        let nonce = request.into_inner().nonce;
        let nonce: &[u8; 32] = nonce
            .as_slice()
            .try_into()
            .map_err(|_| EnrolmentError::Request { field: "nonce", problem: "must be 32 bytes" })?;
        let authorities = self.issuer.authorities();
        let (unix_ms, live_key_sha256) = (to_ms(now), self.serving.live_key_sha256());
        Ok(TimeResponse {
            unix_ms,
            live_key_sha256: live_key_sha256.to_vec(),
            signature: authorities.sign_time(nonce, unix_ms, &live_key_sha256)?,
            issuers: authorities.issuers(now),
        })
    }

    /// Asks the table, after memory was brought up to the store: another agent
    /// may have issued what the caller shows.
    async fn may_renew(&self, caller: &Caller) -> Result<Permit<actions::Renew>, EnrolmentError> {
        let shown = caller.certificate();
        self.issuer.limits().may_ask_renewal(shown.serial(), self.issuer.now())?;
        self.issuer.refresh(shown.id()).await.map_err(RenewError::from)?;
        let mut permit = self.policy.permit::<actions::Renew>(caller);
        if permit.as_ref().is_err_and(|denied| denied.may_be_forgotten()) && self.issuer.readopt(shown).await
        {
            permit = self.policy.permit::<actions::Renew>(caller);
        }
        match permit {
            Ok(permit) => Ok(permit),
            Err(denied) => {
                self.issuer.note_denied_renewal(shown, denied).await;
                Err(denied.into())
            }
        }
    }

    fn response(&self, certified: Certified) -> CertificateResponse {
        CertificateResponse {
            chain: certified.chain,
            roots: self.bulletin.roots(),
            agents: self.bulletin.agents(),
        }
    }

    /// Runs one handler and says what came of it to the metrics; the audit
    /// knows from the issuer.
    async fn answer<In, Out, F>(
        &self,
        operation: &'static str,
        request: Request<In>,
        handler: impl FnOnce(Request<In>) -> F,
    ) -> Result<Response<Out>, Status>
    where
        F: Future<Output = Result<Out, EnrolmentError>>,
    {
        let started = (self.monotonic)();
        let result = handler(request).await;
        let elapsed = (self.monotonic)().saturating_duration_since(started);
        let outcome = result.as_ref().map_or_else(|error| error.code().1, |_| "ok");
        self.metrics.call(operation, outcome, elapsed);
        Ok(result.map(Response::new)?)
    }
}

/// Runs a change to its end even if the caller hangs up or its deadline passes:
/// what is committed must also be published, and its outcome recorded.
async fn to_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(work).await {
        Ok(done) => done,
        // Nobody aborts the task, so it panicked; the panic goes on here.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Where a request comes from, as the connection says.
fn address<T>(request: &Request<T>) -> Result<IpAddr, EnrolmentError> {
    let peer = request.extensions().get::<Arc<PeerInfo>>().ok_or(EnrolmentError::NoPeer)?;
    Ok(peer.address.ip())
}

#[cfg(test)]
pub(crate) mod rig;
#[cfg(test)]
mod tests;
