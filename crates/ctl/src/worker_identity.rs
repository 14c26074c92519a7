//! A worker's identity on this host: enrolled with a join token, renewed while
//! it is valid. The directory is laid out like a node's.
//!
//! The token is read from a file or standard input only, and sent only to an
//! agent that has proved the root it names.

use std::fs::DirBuilder;
use std::io::{self, Read as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use data_encoding::BASE64;
use fleet_kms_identity::{
    AgentAddress, Certificate, CertificateError, Directory, DirectoryError, DirectoryLock, InstallError,
    JoinToken, JoinTokenError, KeyPair, KeyPairError, LoadError, LockError, Renewal, State, Subject,
    renewal_due,
};
use fleet_kms_process::clock;
use fleet_kms_proto::agent::enrolment_client::EnrolmentClient;
use fleet_kms_proto::agent::{CertificateResponse, EnrolRequest, RenewRequest};
use fleet_kms_transport::{
    ClientTls, ConnectError, ConnectOptions, LinkService, LiveIdentity, LiveIdentityError, Roots, RootsError,
    agent_client_tls, connect, first_contact_tls,
};
use tonic::{Code, Request, Status};
use zeroize::Zeroizing;

use crate::failure::Exit;

/// The longest token text that is read.
const MAX_TOKEN: u64 = 4_096;
/// The trailer of an agent's own error.
const REASON: &str = "fleet-kms-reason";

/// Why a worker was not enrolled or not renewed.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The token cannot be read.
    #[error("cannot read the join token")]
    ReadToken(#[source] io::Error),
    /// It is none.
    #[error(transparent)]
    Token(#[from] JoinTokenError),
    /// The directory cannot be made.
    #[error("cannot make the directory")]
    MakeDirectory(#[source] io::Error),
    /// The directory's files cannot be used.
    #[error("the identity directory cannot be used")]
    Load(#[from] LoadError),
    /// Another process writes.
    #[error("the identity directory cannot be locked")]
    Lock(#[from] LockError),
    /// A file cannot be written.
    #[error("the identity directory cannot be written")]
    Write(#[from] DirectoryError),
    /// The certificate does not fit the key.
    #[error("the new certificate cannot be used")]
    Install(#[from] InstallError),
    /// No key could be made or used.
    #[error(transparent)]
    Key(#[from] KeyPairError),
    /// Key and chain make no TLS identity.
    #[error("the certificate cannot be shown")]
    Live(#[from] LiveIdentityError),
    /// No or broken roots.
    #[error("the root certificates cannot be used")]
    Roots(#[from] RootsError),
    /// The agent's answer has no usable certificate.
    #[error("the agent answered no certificate of a fleet")]
    Answer(#[from] CertificateError),
    /// The token or the directory is another kind of caller's.
    #[error("this is no worker's: {0}")]
    NotAWorker(String),
    /// Nobody enrolled here.
    #[error("the directory holds no identity")]
    NotEnrolled,
    /// No agent to ask.
    #[error("no agent's enrolment port is known here")]
    NoAgent,
    /// No connection.
    #[error("cannot connect to the agent at {address}")]
    Connect {
        /// Its enrolment port.
        address: String,
        /// Why.
        source: ConnectError,
    },
    /// The agent, or the connection, failed the call.
    #[error("the agent at {address} refuses: {}", .status.message())]
    Refused {
        /// Its enrolment port.
        address: String,
        /// What it said.
        status: Box<Status>,
    },
}

impl WorkerError {
    /// The exit code.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Connect { source: ConnectError::RefusedByAgent { .. }, .. } => Exit::Denied,
            Self::Connect { .. } => Exit::Unavailable,
            Self::Refused { status, .. } => match status.code() {
                Code::Unauthenticated | Code::PermissionDenied => Exit::Denied,
                Code::FailedPrecondition | Code::AlreadyExists | Code::Aborted => Exit::Conflict,
                Code::InvalidArgument => Exit::Usage,
                _ => Exit::Unavailable,
            },
            Self::NotEnrolled => Exit::NotFound,
            Self::Answer(_) | Self::Install(_) => Exit::Failed,
            _ => Exit::Usage,
        }
    }

    /// What to do about it; empty when the text says it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NotAWorker(_) => "make a token with `kmsctl worker token`, and use a directory of its own",
            Self::NotEnrolled => "run `kmsctl worker enrol` first",
            Self::NoAgent => "name one with --agent HOST:7444",
            Self::Connect { .. } => "check the address (port 7444), and this host's clock",
            Self::Refused { status, .. } if status.metadata().get(REASON).is_some() => {
                "a worker needs a new token (`kmsctl worker token`) once its certificate has ended or was superseded"
            }
            Self::Refused { .. } => "try again",
            _ => "",
        }
    }
}

/// What came of asking for a renewal.
#[derive(Debug, PartialEq, Eq)]
pub enum Renewed {
    /// There is a new certificate.
    Done(Box<Certificate>),
    /// It is too early for one, by so much.
    NotDue(Duration),
}

/// Reads a token from a file, or from standard input.
///
/// # Errors
/// When it cannot be read or is none.
pub fn read_token(file: Option<&Path>) -> Result<JoinToken, WorkerError> {
    let mut text = Zeroizing::new(String::new());
    let read = match file {
        Some(path) => {
            std::fs::File::open(path).and_then(|file| file.take(MAX_TOKEN).read_to_string(&mut text))
        }
        None => io::stdin().take(MAX_TOKEN).read_to_string(&mut text),
    };
    read.map_err(WorkerError::ReadToken)?;
    Ok(text.trim().parse()?)
}

/// Exchanges a token for a worker's certificate in `path`. Running it again
/// with the same token after a lost answer gets the same certificate.
///
/// # Errors
/// See [`WorkerError`].
pub async fn enrol(
    path: &Path,
    agent: &str,
    token: &JoinToken,
    timeout: Duration,
) -> Result<Certificate, WorkerError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(WorkerError::MakeDirectory)?;
    let directory = Directory::open(path)?;
    refuse_others(&directory)?;
    let lock = directory.lock()?;
    let key = next_key(&lock)?;
    let tls = first_contact_tls(*token.root_sha256(), Arc::new(clock::now));
    let mut port = Port::connect(agent, &tls, timeout).await?;
    let request =
        EnrolRequest { token: token.expose_secret().to_vec(), csr: key.csr_der()?, node: String::new() };
    let answer = port.client.enrol(port.request(request)).await;
    let answer = answer.map_err(|status| port.refused(status))?.into_inner();
    // Whatever the agent says, the root that the token names is one of them.
    let mut roots = answer.roots.clone();
    if let Some(learnt) = port.learnt_root.filter(|learnt| !roots.iter().any(|root| root == learnt)) {
        roots = vec![learnt];
    }
    install(&lock, &answer, &roots, agent)
}

/// Exchanges the certificate in `path` for the next one, with a new key, if it
/// is due.
///
/// # Errors
/// See [`WorkerError`].
pub async fn renew(path: &Path, agent: Option<&str>, timeout: Duration) -> Result<Renewed, WorkerError> {
    let directory = Directory::open(path)?;
    refuse_others(&directory)?;
    let lock = directory.lock()?;
    let stored = lock.load()?.ok_or(WorkerError::NotEnrolled)?;
    let state = lock.state()?;
    let not_after = stored.certificate.not_after();
    if let Renewal::In(wait) = renewal_due(not_after, state.leaf_life(), clock::now(), 0) {
        return Ok(Renewed::NotDue(wait));
    }
    let known = state.agents.first().map(|agent| agent.enrolment.clone());
    let agent = agent.map(str::to_owned).or(known).ok_or(WorkerError::NoAgent)?;
    let roots = lock.roots()?.ok_or(WorkerError::NotEnrolled)?;
    let trust_domain = stored.certificate.id().trust_domain.clone();
    let live = LiveIdentity::new(stored.chain, &stored.key)?;
    let clock = Arc::new(clock::now);
    let tls = agent_client_tls(Some(Arc::new(live)), Arc::new(Roots::new(roots)?), clock, trust_domain);
    let key = next_key(&lock)?;
    let mut port = Port::connect(&agent, &tls, timeout).await?;
    let answer = port.client.renew(port.request(RenewRequest { csr: key.csr_der()? })).await;
    let answer = answer.map_err(|status| port.refused(status))?.into_inner();
    install(&lock, &answer, &answer.roots, &agent).map(|certificate| Renewed::Done(Box::new(certificate)))
}

/// A node's directory is its sidecar's.
fn refuse_others(directory: &Directory) -> Result<(), WorkerError> {
    match directory.load()?.map(|stored| stored.certificate.id().clone()) {
        Some(id) if !matches!(id.subject, Subject::Worker { .. }) => {
            Err(WorkerError::NotAWorker(id.to_string()))
        }
        _ => Ok(()),
    }
}

/// The key whose answer was lost, or a new one that is on disk before it is sent.
fn next_key(lock: &DirectoryLock) -> Result<KeyPair, WorkerError> {
    if let Ok(Some(staged)) = lock.staged_key() {
        return Ok(staged);
    }
    let key = KeyPair::generate()?;
    lock.stage_key(&key)?;
    Ok(key)
}

fn install(
    lock: &DirectoryLock,
    answer: &CertificateResponse,
    roots: &[Vec<u8>],
    agent: &str,
) -> Result<Certificate, WorkerError> {
    let leaf = answer.chain.first().ok_or(CertificateError::Empty)?;
    let certificate = Certificate::from_der(leaf)?;
    let Subject::Worker { .. } = certificate.id().subject else {
        return Err(WorkerError::NotAWorker(certificate.id().to_string()));
    };
    let now: SystemTime = clock::now();
    let named = answer
        .agents
        .iter()
        .map(|agent| AgentAddress { data: agent.data.clone(), enrolment: agent.enrolment.clone() });
    let mut agents: Vec<AgentAddress> = named.collect();
    if agents.is_empty() {
        agents.push(AgentAddress { data: String::new(), enrolment: agent.to_owned() });
    }
    let state = State {
        trust_domain: Some(certificate.id().trust_domain.to_string()),
        agents,
        leaf_life_seconds: certificate.not_after().duration_since(now).unwrap_or_default().as_secs(),
        ..lock.state().unwrap_or_default()
    };
    lock.save_roots(&to_pem(roots))?;
    lock.save_state(&state)?;
    lock.install(&to_pem(&answer.chain))?;
    Ok(certificate)
}

/// PEM (RFC 7468), 64 characters a line.
fn to_pem(certificates: &[Vec<u8>]) -> String {
    let mut text = String::new();
    for certificate in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        for line in certificate.chunks(48) {
            text.push_str(&BASE64.encode(line));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

/// A connection to an enrolment port.
struct Port {
    client: EnrolmentClient<LinkService>,
    learnt_root: Option<Vec<u8>>,
    address: String,
    timeout: Duration,
}

impl Port {
    async fn connect(address: &str, tls: &ClientTls, timeout: Duration) -> Result<Self, WorkerError> {
        let options = ConnectOptions { timeout, ..ConnectOptions::default() };
        let link = connect(address, tls, options)
            .await
            .map_err(|source| WorkerError::Connect { address: address.to_owned(), source })?;
        // It ends with this process, which makes one call.
        tokio::spawn(link.driver);
        let learnt_root = link.learnt_root.map(|root| root.to_vec());
        Ok(Self {
            client: EnrolmentClient::new(link.service),
            learnt_root,
            address: address.to_owned(),
            timeout,
        })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        request
    }

    fn refused(&self, status: Status) -> WorkerError {
        WorkerError::Refused { address: self.address.clone(), status: Box::new(status) }
    }
}
