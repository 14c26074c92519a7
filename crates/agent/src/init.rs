//! `kms-agent init`: root key file, store, fleet CA and the first admin.
//!
//! The store is made beside its place and renamed there at the end, so that an
//! interrupted init leaves nothing that looks like a store; running it again is
//! the remedy.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use fleet_kms_audit::ChangeLog;
use fleet_kms_identity::Name;
use fleet_kms_process::exit;
use fleet_kms_seal::{FileSlot, PassphraseSlot, RootSlot, generate_passphrase};
use fleet_kms_transport::Clock;
use zeroize::Zeroizing;

use crate::authz::{Role, Scope, internal};
use crate::ca::{self, Authorities, SignError};
use crate::changes::{ChangeError, Changes};
use crate::config::Config;
use crate::enrolment::issue::{Bundle, DirectError, Issuer};
use crate::identities::LiveIdentities;
use crate::ledger::{Changeset, Generator};
use crate::live_keyrings::{KeysError, LiveKeyrings, LoadError};
use crate::root::{Root, RootError};
use crate::storage::{self, Storage, StorageError};
use crate::trail::Intent;
use crate::witness::Witness;

/// What `init` is told on its command line.
#[derive(Debug)]
pub struct Options {
    /// The first admin's name.
    pub admin: Name,
    /// The directory that gets the admin's key, certificate and context.
    pub admin_directory: PathBuf,
    /// Makes no second slot with a recovery passphrase.
    pub single_slot: bool,
}

/// What `init` made, for the operator to read.
pub struct Done {
    root: String,
    store: PathBuf,
    admin: Name,
    context: PathBuf,
    /// Printed once and kept nowhere.
    recovery: Option<Zeroizing<String>>,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "root key       {} (keep a copy where the store's backups are not)", self.root)?;
        writeln!(f, "store          {}", self.store.display())?;
        writeln!(f, "first admin    {} (operator, key-officer)", self.admin)?;
        write!(f, "kmsctl context {} (use it with KMSCTL_CONFIG)", self.context.display())?;
        if let Some(passphrase) = &self.recovery {
            writeln!(f, "\n\nrecovery passphrase: {}", **passphrase)?;
            writeln!(
                f,
                "It opens the store and its backups when the root key is lost. Write it down, and keep it"
            )?;
            write!(f, "in a safe place: it is shown only now and stored nowhere.")?;
        }
        Ok(())
    }
}

/// Why `init` did not finish. Nothing is half-done: run it again.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A store is there already.
    #[error("{path} exists: this agent is initialised; remove it only if the keys in it may be lost")]
    Exists { path: String },
    /// A file or directory could not be made.
    #[error("cannot make {path}")]
    File {
        path: String,
        #[source]
        source: io::Error,
    },
    /// The root key cannot be used.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The store could not be made.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The store could not be read again.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The keys could not be made.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The fleet CA could not be made.
    #[error("cannot make the fleet CA")]
    Authority(#[from] SignError),
    /// The fleet CA could not be read again.
    #[error("cannot use the new fleet CA")]
    Authorities(#[from] ca::LoadError),
    /// The first admin could not be made.
    #[error("cannot make the first admin")]
    Admin(#[from] DirectError),
    /// The audit cannot be used.
    #[error("cannot use the audit in {path}")]
    Audit {
        path: String,
        #[source]
        source: fleet_kms_audit::LogError,
    },
    /// The first rows could not be written.
    #[error("cannot write the first rows")]
    Change(#[source] Box<ChangeError<KeysError>>),
}

impl InitError {
    /// Returns the exit status.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Exists { .. } => exit::BUSY,
            _ => exit::FAILURE,
        }
    }
}

/// Makes everything that a first start needs.
///
/// # Errors
///
/// See [`InitError`]; an existing store is never touched.
pub async fn run(
    config: &Config,
    options: &Options,
    clock: Clock,
    generator: Generator,
) -> Result<Done, InitError> {
    if config.store.exists() {
        return Err(InitError::Exists { path: text(&config.store) });
    }
    let root = match &config.root {
        Root::File(path) => path.parent(),
        Root::Credential(_) | Root::PassphraseCredential(_) => None,
    };
    for directory in [config.store.parent(), root, Some(&*config.audit)].into_iter().flatten() {
        make_directory(directory)?;
    }
    make_directory(&options.admin_directory)?;
    let slot = root_slot(&config.root, generator)?;
    let recovery = (!options.single_slot).then(|| generate_passphrase(&mut *generator()));
    let recovery_slot = recovery.clone().map(PassphraseSlot::existing);
    let recovery_slot = recovery_slot.as_ref().map(|slot| slot as &dyn RootSlot);
    let slots: Vec<&dyn RootSlot> = std::iter::once(&*slot).chain(recovery_slot).collect();
    let unfinished = config.store.with_extension("unfinished");
    remove_unfinished(&unfinished)?;
    let storage = storage::create(&unfinished, &slots, config.name.as_str(), generator).await?;
    let bundle = fill(config, options, storage, clock, generator).await?;
    put_in_place(&unfinished, &config.store)?;
    let context = write_admin(config, options, &bundle)?;
    let (root, store, admin) = (config.root.to_string(), config.store.clone(), options.admin.clone());
    Ok(Done { root, store, admin, context, recovery })
}

/// Writes the fleet CA and the first admin.
async fn fill(
    config: &Config,
    options: &Options,
    storage: Storage,
    clock: Clock,
    generator: Generator,
) -> Result<Bundle, InitError> {
    let Storage { ledger, store_keys, .. } = storage;
    let (keyrings, _) = LiveKeyrings::load(&ledger, store_keys, generator).await?;
    let log = ChangeLog::open(&config.audit)
        .map_err(|source| InitError::Audit { path: text(&config.audit), source })?;
    let witness = Witness::new(&config.audit);
    let changes = Changes::new(Arc::clone(&ledger), log, witness, None, Arc::clone(&clock), generator);
    let changes = Arc::new(changes);
    let made = ca::create(&config.trust_domain, clock(), &mut *generator())?;
    let prepare = async || -> Result<(Changeset, ()), KeysError> {
        let mut changeset = ledger.changeset();
        let permit = internal::authority();
        made.write_to(&mut changeset, |row, key| keyrings.seal_ca_key(&permit, row, key))?;
        Ok((changeset, ()))
    };
    let done = changes.run(Intent::new("init", "init"), prepare).await;
    done.map_err(|error| InitError::Change(Box::new(error)))?;
    let open = |row: &_, bytes: &_| keyrings.open_ca_key(&internal::authority(), row, bytes);
    let authorities = Authorities::load(&ledger, config.trust_domain.clone(), open).await?;
    let issuer = Issuer::new(
        changes,
        Arc::new(ArcSwap::from_pointee(authorities)),
        Arc::new(LiveIdentities::default()),
        generator,
    );
    let roles = [Role::Operator, Role::KeyOfficer];
    Ok(issuer.issue_admin("init", &options.admin, &roles, &Scope::All).await?)
}

/// Takes the root key that is there, or makes a root key file.
fn root_slot(root: &Root, generator: Generator) -> Result<Box<dyn RootSlot>, RootError> {
    match root {
        Root::File(path) if !path.exists() => {
            Ok(Box::new(FileSlot::create(path, &mut *generator()).map_err(RootError::from)?))
        }
        root => root.slot(),
    }
}

/// Removes what an interrupted init left: nothing was ever served from it.
fn remove_unfinished(path: &Path) -> Result<(), InitError> {
    for suffix in ["", "-wal", "-shm", ".lock"] {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        match fs::remove_file(&name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(InitError::File { path: text(Path::new(&name)), source: error });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Renames the finished, closed store to its place.
fn put_in_place(from: &Path, to: &Path) -> Result<(), InitError> {
    let failed = |source| InitError::File { path: text(to), source };
    fs::rename(from, to).map_err(failed)?;
    let parent = to.parent().unwrap_or(Path::new("/"));
    File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)?;
    remove_unfinished(from)
}

/// Writes the admin's identity and the kmsctl context; returns the context's
/// path. `docs/kmsctl.md` describes the file.
fn write_admin(config: &Config, options: &Options, bundle: &Bundle) -> Result<PathBuf, InitError> {
    let directory = &options.admin_directory;
    let name = options.admin.as_str();
    let context = context(config, &options.admin);
    write_private(&directory.join(format!("{name}.key")), bundle.key.to_pem().as_bytes())?;
    write_private(&directory.join(format!("{name}.crt")), bundle.chain_pem().as_bytes())?;
    write_private(&directory.join("roots.crt"), bundle.roots_pem().as_bytes())?;
    let path = directory.join("kmsctl.toml");
    write_private(&path, context.as_bytes())?;
    Ok(path)
}

/// Returns the kmsctl context of an admin, whose files are beside it.
pub(crate) fn context(config: &Config, admin: &Name) -> String {
    let (name, server) = (admin.as_str(), reachable(config));
    format!(
        "current = \"{name}\"\n\n[[contexts]]\nname = \"{name}\"\nserver = \"{server}\"\ncertificate = \"{name}.crt\"\nkey = \"{name}.key\"\nroots = \"roots.crt\"\n"
    )
}

/// The admin port as a kmsctl on this host reaches it.
fn reachable(config: &Config) -> String {
    let admin = config.listen.admin;
    if admin.ip().is_unspecified() { format!("127.0.0.1:{}", admin.port()) } else { admin.to_string() }
}

fn make_directory(path: &Path) -> Result<(), InitError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| InitError::File { path: text(path), source })
}

fn write_private(path: &Path, bytes: &[u8]) -> Result<(), InitError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|source| InitError::File { path: text(path), source })
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
