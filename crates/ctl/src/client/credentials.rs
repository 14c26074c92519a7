//! Who we are and whom we trust: the files of a context, read and judged
//! before anything is sent, so that an error names the file and the cure.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use zeroize::Zeroizing;

use fleet_kms_identity::{
    Certificate, CertificateError, KeyPair, KeyPairError, SpiffeId, Standing, Subject, split_pem_chain,
};
use fleet_kms_transport::{LiveIdentity, LiveIdentityError, Roots, RootsError};

use crate::contexts::Context;
use crate::output::time::short;

/// The longest certificate, key or roots file.
const MAX_FILE: u64 = 1 << 20;

/// Bits that a key file may not have.
const OPEN_TO_OTHERS: u32 = 0o077;

/// What a link needs to prove who we are and to know an agent.
pub(super) struct Credentials {
    pub(super) identity: LiveIdentity,
    pub(super) roots: Roots,
    pub(super) id: SpiffeId,
}

/// Why the files of a context cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("cannot read the {what} {}", path.display())]
    File {
        /// What it holds.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others may read the key.
    #[error("the key {} may be read by others (mode {mode:04o})", path.display())]
    OpenKey {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A file that holds no certificate of a fleet.
    #[error("{} holds no certificate of a fleet", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        source: CertificateError,
    },
    /// A file that holds no key of ours.
    #[error("{} holds no key that can be used", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        source: KeyPairError,
    },
    /// Certificate and key do not belong together.
    #[error("the certificate {} and the key cannot be used together", path.display())]
    Pair {
        /// The certificate's file.
        path: PathBuf,
        /// Why.
        source: LiveIdentityError,
    },
    /// A file that holds no roots.
    #[error("{} holds no roots", path.display())]
    Roots {
        /// The file.
        path: PathBuf,
        /// Why.
        source: RootsError,
    },
    /// The certificate names no admin.
    #[error("this is the certificate of {id}, which is no admin")]
    NoAdmin {
        /// Whose it is.
        id: Box<SpiffeId>,
    },
    /// The certificate's dates do not allow its use.
    #[error("the certificate of {id} {standing}")]
    Dates {
        /// Whose it is.
        id: Box<SpiffeId>,
        /// In words: since when it is expired, or when it begins.
        standing: String,
    },
}

impl CredentialsError {
    /// What to do about it.
    pub fn remedy(&self) -> String {
        match self {
            Self::OpenKey { path, .. } => format!("run chmod 0600 {}", path.display()),
            Self::NoAdmin { .. } | Self::Dates { .. } => {
                "on the agent's host, run `kms-agent admin issue NAME --role ROLE`".into()
            }
            _ => "run `kmsctl context show`, and mend the context or its file".into(),
        }
    }
}

impl Credentials {
    /// Reads the files of a context and judges the certificate at `now`.
    ///
    /// # Errors
    /// When a file cannot be used, or the certificate may not be used now.
    pub(super) fn read(context: &Context, now: SystemTime) -> Result<Self, CredentialsError> {
        let certificate =
            |path: &Path, source| CredentialsError::Certificate { path: path.to_owned(), source };
        let path = &context.certificate;
        let chain =
            split_pem_chain(&read("certificate", path)?).map_err(|source| certificate(path, source))?;
        let pem = read("key", &context.key)?;
        let key = KeyPair::from_pem(&String::from_utf8_lossy(&pem))
            .map_err(|source| CredentialsError::Key { path: context.key.clone(), source })?;
        let identity = LiveIdentity::new(chain, &key)
            .map_err(|source| CredentialsError::Pair { path: path.clone(), source })?;
        let id = judge(&identity.certificate(), now)?;
        let path = &context.roots;
        let roots = split_pem_chain(&read("roots", path)?).map_err(|source| certificate(path, source))?;
        let roots =
            Roots::new(roots).map_err(|source| CredentialsError::Roots { path: path.clone(), source })?;
        Ok(Self { identity, roots, id })
    }
}

/// The agent refuses what is refused here too, but cannot say why before TLS ends.
fn judge(certificate: &Certificate, now: SystemTime) -> Result<SpiffeId, CredentialsError> {
    let id = certificate.id().clone();
    if !matches!(id.subject, Subject::Admin { .. }) {
        return Err(CredentialsError::NoAdmin { id: Box::new(id) });
    }
    let standing = match certificate.judge(now) {
        Standing::Valid => return Ok(id),
        Standing::NotYetValid { by } => format!("begins only in {}; is this clock right?", short(by)),
        Standing::Expired { by } => format!("expired {} ago", short(by)),
    };
    Err(CredentialsError::Dates { id: Box::new(id), standing })
}

fn read(what: &'static str, path: &Path) -> Result<Zeroizing<Vec<u8>>, CredentialsError> {
    let failed = |source| CredentialsError::File { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
    if what == "key" && mode & OPEN_TO_OTHERS != 0 {
        return Err(CredentialsError::OpenKey { path: path.to_owned(), mode });
    }
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}
