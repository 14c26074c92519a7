//! The calls to an agent's enrolment port: the first certificate, the next one,
//! and the time.
//!
//! Each call has a connection of its own. It must never send a token to an agent
//! that has not proved the root that the token names, and never logs one.

use std::time::{Duration, SystemTime};

use fleet_kms_identity::{AgentAddress, JoinToken, KeyPair, KeyPairError};
use fleet_kms_process::clock;
use fleet_kms_proto::agent::enrolment_client::EnrolmentClient;
use fleet_kms_proto::agent::{CertificateResponse, EnrolRequest, RenewRequest, TimeRequest};
use fleet_kms_transport::{
    ClientTls, ConnectError, ConnectOptions, Link, LinkService, connect, first_contact_tls,
};
use rustls_pki_types::CertificateDer;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use crate::believed_time::{BelievedTime, TimeProofError, verify};
use crate::links::{Refusal, attempt_request, refusal};

/// The time of one call, connection included. An agent signs within a second.
const CALL_WITHIN: Duration = Duration::from_secs(10);

/// The reason of an agent that wants to be told the node's name.
pub const NODE_MISSING: &str = "token_node_missing";

/// The reason of an agent that has given all certificates of this token.
pub const TOKEN_USED_UP: &str = "token_used_up";

/// The program's generator, as far as it is needed here.
pub type Random = fn() -> [u8; 32];

/// Why a call to the enrolment port failed.
#[derive(Debug, thiserror::Error)]
pub enum EnrolmentError {
    /// No agent is configured or known.
    #[error("no agent's enrolment address is known; set agents.addresses")]
    NoAgent,
    /// No connection.
    #[error("cannot connect to the agent at {address}")]
    Connect {
        /// The enrolment port's address.
        address: String,
        /// Why.
        source: ConnectError,
    },
    /// The agent answered, with a refusal.
    #[error("the agent at {address} refuses")]
    Refused {
        /// The enrolment port's address.
        address: String,
        /// What it said.
        source: Refusal,
    },
    /// The connection failed the call.
    #[error("the agent at {address} gave no answer")]
    NoAnswer {
        /// The enrolment port's address.
        address: String,
        /// What the connection said.
        source: Box<Status>,
    },
    /// The time's proof is wrong.
    #[error("the agent at {address} tells a time that is not proven")]
    Time {
        /// The enrolment port's address.
        address: String,
        /// Why.
        source: TimeProofError,
    },
    /// No request could be made of the key.
    #[error("cannot make a certificate request")]
    Key(#[from] KeyPairError),
}

impl EnrolmentError {
    /// Whether another agent may answer otherwise.
    fn is_about_this_agent(&self) -> bool {
        !matches!(self, Self::Refused { .. } | Self::Key(_))
    }

    /// Whether a certificate was refused for its dates.
    pub fn is_about_dates(&self) -> bool {
        matches!(self, Self::Connect { source: ConnectError::CertificateDates { .. }, .. })
    }

    /// The agent's reason, if it refused.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Refused { source, .. } => Some(&source.reason),
            _ => None,
        }
    }
}

/// A first certificate, and the root that the token named.
#[derive(Debug)]
pub struct FirstCertificate {
    /// The agent's answer.
    pub answer: CertificateResponse,
    /// The verified root.
    pub root: CertificateDer<'static>,
}

/// Exchanges a join token for a certificate, at the first agent that answers.
pub async fn enrol(
    agents: &[AgentAddress],
    token: &JoinToken,
    key: &KeyPair,
    node: &str,
    time: &BelievedTime,
    random: Random,
) -> Result<FirstCertificate, EnrolmentError> {
    time.has_passed(token.issued());
    let csr = key.csr_der()?;
    let tls = first_contact_tls(*token.root_sha256(), time.clock());
    let mut last = EnrolmentError::NoAgent;
    for AgentAddress { enrolment, .. } in agents {
        let request =
            EnrolRequest { token: token.expose_secret().to_vec(), csr: csr.clone(), node: node.to_owned() };
        let mut asked = enrol_at(enrolment, &tls, request.clone()).await;
        if asked.as_ref().is_err_and(EnrolmentError::is_about_dates) {
            // Whatever this clock says: the root is known, so it can be asked.
            asked = match ask_time_at(enrolment, &tls, &[], time, random).await {
                Ok(_) => enrol_at(enrolment, &tls, request).await,
                Err(error) => Err(error),
            };
        }
        match asked {
            Err(error) if error.is_about_this_agent() => last = error,
            done => return done,
        }
    }
    Err(last)
}

async fn enrol_at(
    address: &str,
    tls: &ClientTls,
    request: EnrolRequest,
) -> Result<FirstCertificate, EnrolmentError> {
    let mut port = Port::connect(address, tls).await?;
    let root = port.learnt_root.take().ok_or_else(|| no_root(address))?;
    let answer = port.client.enrol(attempt_request(request, CALL_WITHIN)).await;
    let answer = answer.map_err(|status| failed(address, status))?.into_inner();
    Ok(FirstCertificate { answer, root })
}

/// Exchanges this node's certificate, even an expired one, for the next.
pub async fn renew(
    agents: &[AgentAddress],
    tls: &ClientTls,
    key: &KeyPair,
) -> Result<CertificateResponse, EnrolmentError> {
    let csr = key.csr_der()?;
    let mut last = EnrolmentError::NoAgent;
    for AgentAddress { enrolment, .. } in agents {
        match renew_at(enrolment, tls, csr.clone()).await {
            Err(error) if error.is_about_this_agent() => last = error,
            done => return done,
        }
    }
    Err(last)
}

async fn renew_at(
    address: &str,
    tls: &ClientTls,
    csr: Vec<u8>,
) -> Result<CertificateResponse, EnrolmentError> {
    let mut port = Port::connect(address, tls).await?;
    let answer = port.client.renew(attempt_request(RenewRequest { csr }, CALL_WITHIN)).await;
    Ok(answer.map_err(|status| failed(address, status))?.into_inner())
}

/// Asks for the time, believes the proven answer, and returns it.
pub async fn ask_time(
    agents: &[AgentAddress],
    tls: &ClientTls,
    roots: &[CertificateDer<'_>],
    time: &BelievedTime,
    random: Random,
) -> Result<SystemTime, EnrolmentError> {
    let mut last = EnrolmentError::NoAgent;
    for AgentAddress { enrolment, .. } in agents {
        match ask_time_at(enrolment, tls, roots, time, random).await {
            Err(error) if error.is_about_this_agent() => last = error,
            done => return done,
        }
    }
    Err(last)
}

async fn ask_time_at(
    address: &str,
    tls: &ClientTls,
    roots: &[CertificateDer<'_>],
    time: &BelievedTime,
    random: Random,
) -> Result<SystemTime, EnrolmentError> {
    match ask_time_once(address, tls, roots, time, random).await {
        // Most likely the agent has renewed its certificate since the handshake; a relay fails again.
        Err(EnrolmentError::Time { source: TimeProofError::OtherKey, .. }) => {
            ask_time_once(address, tls, roots, time, random).await
        }
        asked => asked,
    }
}

async fn ask_time_once(
    address: &str,
    tls: &ClientTls,
    roots: &[CertificateDer<'_>],
    time: &BelievedTime,
    random: Random,
) -> Result<SystemTime, EnrolmentError> {
    let mut port = Port::connect(address, &tls.clone().ignoring_dates()).await?;
    let nonce = random();
    let request = attempt_request(TimeRequest { nonce: nonce.to_vec() }, CALL_WITHIN);
    let answer = port.client.time(request).await.map_err(|status| failed(address, status))?.into_inner();
    // The agent said it before it arrived here: this errs towards the past, by the way back.
    let at = clock::monotonic();
    let learnt = port.learnt_root.as_ref().map(std::slice::from_ref);
    verify(&answer, &nonce, &port.live_key_sha256, learnt.unwrap_or(roots))
        .inspect(|proven| time.believe(*proven, at))
        .map_err(|source| EnrolmentError::Time { address: address.to_owned(), source })
}

/// A connection to an enrolment port.
struct Port {
    client: EnrolmentClient<LinkService>,
    learnt_root: Option<CertificateDer<'static>>,
    live_key_sha256: [u8; 32],
    _driver: AbortOnDropHandle<()>,
}

impl Port {
    async fn connect(address: &str, tls: &ClientTls) -> Result<Self, EnrolmentError> {
        let options = ConnectOptions { timeout: CALL_WITHIN, ..ConnectOptions::default() };
        let Link { service, peer, learnt_root, driver } = connect(address, tls, options)
            .await
            .map_err(|source| EnrolmentError::Connect { address: address.to_owned(), source })?;
        let driver = tokio::spawn(async move {
            driver.await;
        });
        Ok(Self {
            client: EnrolmentClient::new(service),
            learnt_root,
            live_key_sha256: peer.certificate.map_or([0; 32], |agent| *agent.spki_sha256()),
            _driver: AbortOnDropHandle::new(driver),
        })
    }
}

fn failed(address: &str, status: Status) -> EnrolmentError {
    let address = address.to_owned();
    match refusal(&status) {
        Some(source) => EnrolmentError::Refused { address, source },
        None => EnrolmentError::NoAnswer { address, source: Box::new(status) },
    }
}

fn no_root(address: &str) -> EnrolmentError {
    let status = Status::internal("the connection names no root");
    EnrolmentError::NoAnswer { address: address.to_owned(), source: Box::new(status) }
}
