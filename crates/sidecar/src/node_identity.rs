//! Who this node is: its directory on disk, and what lives from it.
//!
//! Every change goes to disk first and is used after that. The directory's lock
//! is held only while something is written, so that `kms-sidecar enrol` and a
//! successor can write too.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use data_encoding::BASE64;
use fleet_kms_identity::{
    AgentAddress, Certificate, Directory, DirectoryError, DirectoryLock, InstallError, KeyPair, KeyPairError,
    LoadError, LockError, State, StoredIdentity, Subject, TrustDomain, fingerprint,
};
use fleet_kms_proto::agent::CertificateResponse;
use fleet_kms_transport::{ClientTls, LiveIdentity, LiveIdentityError, Roots, RootsError, agent_client_tls};
use rustls_pki_types::CertificateDer;

use crate::believed_time::BelievedTime;
use crate::enrolment::FirstCertificate;
use crate::errors::chain;
use crate::node_status::Learnt;

/// How long another process may write before it is named as the obstacle.
const LOCK_TRIES: u32 = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Why an identity could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The directory's files cannot be used.
    #[error("the identity directory cannot be used")]
    Load(#[from] LoadError),
    /// Another process writes, or the lock cannot be taken.
    #[error("the identity directory cannot be locked")]
    Lock(#[from] LockError),
    /// A file could not be written.
    #[error("the identity directory cannot be written")]
    Write(#[from] DirectoryError),
    /// The certificate cannot be put into use.
    #[error("the new certificate cannot be used")]
    Install(#[from] InstallError),
    /// Key and chain do not make a TLS identity.
    #[error("the certificate cannot be shown")]
    Live(#[from] LiveIdentityError),
    /// No or broken roots.
    #[error("the root certificates cannot be used")]
    Roots(#[from] RootsError),
    /// No key could be made.
    #[error("no key could be made")]
    Key(#[from] KeyPairError),
    /// There is a certificate, but nothing to judge agents by.
    #[error("the identity directory has no roots.pem; enrol this node again")]
    NoRoots,
    /// The certificate is no node's.
    #[error("the certificate is not a node's")]
    NotANode,
    /// The writing thread died.
    #[error("writing was interrupted")]
    Interrupted,
}

/// An enrolled node's identity. Clones are the same.
#[derive(Clone)]
pub struct NodeIdentity(Arc<Shared>);

struct Shared {
    directory: Directory,
    live: Arc<LiveIdentity>,
    roots: Arc<Roots>,
    trust_domain: TrustDomain,
    configured: Vec<AgentAddress>,
    state: Mutex<State>,
    /// One change at a time, from reading the state to having written it.
    writing: tokio::sync::Mutex<()>,
    time: BelievedTime,
}

impl NodeIdentity {
    /// Reads the directory; `None` if this node is not enrolled.
    pub fn load(
        directory: &Directory,
        configured: &[AgentAddress],
        time: &BelievedTime,
    ) -> Result<Option<Self>, IdentityError> {
        let Some(stored) = directory.load()? else { return Ok(None) };
        if stored.is_previous {
            tracing::warn!("the newest certificate has no key here; the one before is used");
        }
        let Subject::Node { .. } = stored.certificate.id().subject else {
            return Err(IdentityError::NotANode);
        };
        let roots = directory.roots()?.ok_or(IdentityError::NoRoots)?;
        let state = directory.state().unwrap_or_else(|error| {
            tracing::warn!(
                error = chain(&error),
                "the state beside the identity is lost; it is learnt again"
            );
            State::default()
        });
        time.has_passed(state.last_good_time());
        for root in &roots {
            if let Ok((not_before, _)) = fleet_kms_identity::validity(root) {
                time.has_passed(not_before);
            }
        }
        Ok(Some(Self(Arc::new(Shared {
            directory: directory.clone(),
            trust_domain: stored.certificate.id().trust_domain.clone(),
            live: Arc::new(LiveIdentity::new(stored.chain, &stored.key)?),
            roots: Arc::new(Roots::new(roots)?),
            configured: configured.to_vec(),
            state: Mutex::new(state),
            writing: tokio::sync::Mutex::default(),
            time: time.clone(),
        }))))
    }

    /// How this node talks to agents.
    pub fn tls(&self) -> ClientTls {
        let Shared { live, roots, time, trust_domain, .. } = &*self.0;
        agent_client_tls(Some(Arc::clone(live)), Arc::clone(roots), time.clock(), trust_domain.clone())
    }

    /// The agents: those of the configuration, then those that agents have
    /// named. A wrong answer must not lose those that work.
    pub fn agents(&self) -> Vec<AgentAddress> {
        let mut agents = self.0.configured.clone();
        for agent in &self.state().agents {
            if !agents.contains(agent) {
                agents.push(agent.clone());
            }
        }
        agents
    }

    /// The roots that are trusted now.
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.0.roots.certificates()
    }

    /// The certificate that is shown now.
    pub fn certificate(&self) -> Arc<Certificate> {
        self.0.live.certificate()
    }

    /// The highest key version that this node has seen.
    pub fn highest_version(&self) -> u32 {
        self.state().highest_version
    }

    /// The life of the certificate at its issue.
    pub fn leaf_life(&self) -> Duration {
        self.state().leaf_life()
    }

    /// When the certificate on disk was last written: a cheap question before
    /// [`Self::is_superseded`].
    pub fn chain_written(&self) -> Option<SystemTime> {
        self.0.directory.path().join("chain.pem").metadata().and_then(|metadata| metadata.modified()).ok()
    }

    /// Whether the directory holds another certificate than the one in use, as
    /// after `kms-sidecar enrol`.
    pub fn is_superseded(&self) -> bool {
        let Ok(Some(stored)) = self.0.directory.load() else { return false };
        stored.certificate.spki_sha256() != self.certificate().spki_sha256()
    }

    /// The key for the next certificate, on disk: the one of a request whose
    /// answer was lost, or a new one.
    pub async fn next_key(&self) -> Result<KeyPair, IdentityError> {
        let _writing = self.0.writing.lock().await;
        let directory = self.0.directory.clone();
        blocking(move || next_key(&directory)).await
    }

    /// Puts the next certificate into use.
    pub async fn install(&self, answer: CertificateResponse) -> Result<(), IdentityError> {
        let _writing = self.0.writing.lock().await;
        let (directory, time) = (self.0.directory.clone(), self.0.time.clone());
        let roots = to_certificates(answer.roots.clone());
        let kept = if roots.is_empty() { self.roots() } else { roots };
        let (stored, state, roots) = blocking(move || {
            let (stored, state) = write_certificate(&directory, &answer, &kept, &time)?;
            Ok((stored, state, kept))
        })
        .await?;
        self.0.live.replace(stored.chain, &stored.key)?;
        self.0.roots.replace(roots)?;
        *self.state() = state;
        Ok(())
    }

    /// Keeps what the fleet has told about itself.
    pub async fn learn(&self, learnt: Learnt) -> Result<(), IdentityError> {
        let _writing = self.0.writing.lock().await;
        let mut state = self.state().clone();
        state.highest_version = state.highest_version.max(learnt.highest_version);
        if !learnt.agents.is_empty() {
            state.agents = learnt.agents;
        }
        let roots = to_certificates(learnt.roots);
        if !roots.is_empty() && roots != self.roots() {
            let (directory, pem) = (self.0.directory.clone(), to_pem(&roots));
            blocking(move || Ok(lock(&directory)?.save_roots(&pem)?)).await?;
            self.0.roots.replace(roots)?;
            tracing::info!("the fleet's roots have changed");
        }
        self.save(state).await
    }

    /// Keeps the time that an agent has proved.
    pub async fn note_time(&self, proven: SystemTime) -> Result<(), IdentityError> {
        let _writing = self.0.writing.lock().await;
        let mut state = self.state().clone();
        state.last_good_time = seconds(proven);
        self.save(state).await
    }

    async fn save(&self, state: State) -> Result<(), IdentityError> {
        if *self.state() == state {
            return Ok(());
        }
        let (directory, saved) = (self.0.directory.clone(), state.clone());
        blocking(move || Ok(lock(&directory)?.save_state(&saved)?)).await?;
        *self.state() = state;
        Ok(())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes sure of a key for a request: the staged one, or a new one that is on
/// disk before the request is sent.
pub fn next_key(directory: &Directory) -> Result<KeyPair, IdentityError> {
    let lock = lock(directory)?;
    if let Ok(Some(staged)) = lock.staged_key() {
        return Ok(staged);
    }
    let key = KeyPair::generate()?;
    lock.stage_key(&key)?;
    Ok(key)
}

/// Makes a node enrolled: roots and state first, the certificate last.
pub fn install_first(
    directory: &Directory,
    first: &FirstCertificate,
    time: &BelievedTime,
) -> Result<(), IdentityError> {
    let mut roots = to_certificates(first.answer.roots.clone());
    let is_root = |root: &CertificateDer<'_>| fingerprint(root) == fingerprint(&first.root);
    if !roots.iter().any(is_root) {
        roots = vec![first.root.clone()];
    }
    write_certificate(directory, &first.answer, &roots, time)?;
    lock(directory)?.delete_token()?;
    Ok(())
}

fn write_certificate(
    directory: &Directory,
    answer: &CertificateResponse,
    roots: &[CertificateDer<'static>],
    time: &BelievedTime,
) -> Result<(StoredIdentity, State), IdentityError> {
    let leaf = answer.chain.first().map_or(&[][..], Vec::as_slice);
    let certificate = Certificate::from_der(leaf).map_err(InstallError::from)?;
    let Subject::Node { .. } = certificate.id().subject else { return Err(IdentityError::NotANode) };
    let now = time.now();
    let lock = lock(directory)?;
    let mut state = lock.state().unwrap_or_default();
    state.trust_domain = Some(certificate.id().trust_domain.to_string());
    state.leaf_life_seconds = certificate.not_after().duration_since(now).unwrap_or_default().as_secs();
    if time.is_proven() {
        state.last_good_time = seconds(now);
    }
    if !answer.agents.is_empty() {
        let address = |agent: &fleet_kms_proto::agent::AgentAddress| AgentAddress {
            data: agent.data.clone(),
            enrolment: agent.enrolment.clone(),
        };
        state.agents = answer.agents.iter().map(address).collect();
    }
    lock.save_roots(&to_pem(roots))?;
    lock.save_state(&state)?;
    let stored = lock.install(&to_pem(&to_certificates(answer.chain.clone())))?;
    Ok((stored, state))
}

/// Waits a moment for another process that writes. Blocks.
fn lock(directory: &Directory) -> Result<DirectoryLock, IdentityError> {
    for _ in 0..LOCK_TRIES {
        match directory.lock() {
            Err(LockError::Held { .. }) => std::thread::sleep(LOCK_PAUSE),
            taken => return Ok(taken?),
        }
    }
    Ok(directory.lock()?)
}

fn to_certificates(ders: Vec<Vec<u8>>) -> Vec<CertificateDer<'static>> {
    ders.into_iter().map(CertificateDer::from).collect()
}

/// PEM (RFC 7468), 64 characters a line.
fn to_pem(certificates: &[CertificateDer<'_>]) -> String {
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

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Writes with fsync are not for the one async thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, IdentityError> + Send + 'static,
) -> Result<T, IdentityError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(IdentityError::Interrupted))
}
