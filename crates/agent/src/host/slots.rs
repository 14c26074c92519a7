//! `kms-agent slot …`

use std::path::{Path, PathBuf};

use clap::Subcommand;
use fleet_kms_process::exit;
use fleet_kms_seal::{FileSlot, MIN_PASSPHRASE};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::secrets::{Given, from_descriptor, prompt, root_file, utf8};
use super::{Host, HostError, odd};
use crate::errors::chain;
use crate::local::protocol::{Reply, Request, Secret, SecretKind, SlotLine};
use crate::root::Root;
use crate::times::from_ms;

/// `kms-agent slot …`
#[derive(Debug, Subcommand)]
pub enum SlotCommand {
    /// List the slots.
    List,
    /// Add a slot.
    Add {
        #[command(subcommand)]
        kind: AddCommand,
    },
    /// Say which slot a root key or passphrase opens; that slot then counts as verified.
    Test {
        #[command(flatten)]
        given: Given,
    },
    /// Remove a slot and renew the store key.
    Remove(Remove),
}

/// `kms-agent slot add …`
#[derive(Debug, Subcommand)]
pub enum AddCommand {
    /// A root key file: the one at this path, or a new one.
    File {
        /// The file.
        path: PathBuf,
    },
    /// A passphrase.
    Passphrase {
        /// A descriptor to read it from; without it the terminal asks.
        #[arg(long)]
        passphrase_fd: Option<u32>,
    },
}

/// `kms-agent slot remove …`
#[derive(Debug, clap::Args)]
pub struct Remove {
    /// The slot's id, from `slot list`.
    id: String,
    /// Even the last slot that opens a kept backup.
    #[arg(long)]
    force: bool,
    /// Its root key may be known to others: also rotate every cluster fresh.
    #[arg(long)]
    compromised: bool,
    /// Replace passphrase slots that stay by one with a new passphrase, shown once.
    #[arg(long)]
    new_passphrase: bool,
    /// Root key files of slots that stay, when they are not where they were.
    #[arg(long)]
    root_file: Vec<PathBuf>,
    /// A descriptor to read the passphrase of the slot that stays from.
    #[arg(long)]
    passphrase_fd: Option<u32>,
}

pub(super) async fn run(host: &Host<'_>, command: SlotCommand) -> Result<String, HostError> {
    let usage = |error: String| HostError::new(exit::CONFIG, error);
    match command {
        SlotCommand::List => Ok(table(&list(host).await?)),
        SlotCommand::Add { kind } => {
            let (secret, label) = match kind {
                AddCommand::File { path } => new_file(host, &path).map_err(usage)?,
                AddCommand::Passphrase { passphrase_fd } => new_passphrase(passphrase_fd).map_err(usage)?,
            };
            let request = Request::SlotAdd { label, secrets: vec![secret.kind] };
            match host.ask(request, vec![secret]).await? {
                Reply::Slot { id } => Ok(format!("added slot {id}; test it with `kms-agent slot test`")),
                _ => Err(odd()),
            }
        }
        SlotCommand::Test { given } => {
            let secret = match given.secret().map_err(usage)? {
                Some(secret) => secret,
                None => match &host.config.root {
                    Root::File(path) => root_file(path).map_err(usage)?,
                    Root::Credential(_) | Root::PassphraseCredential(_) => {
                        return Err(usage("give --root-file, --passphrase-fd or --passphrase".to_owned()));
                    }
                },
            };
            match host.ask(Request::SlotTest { secrets: vec![secret.kind] }, vec![secret]).await? {
                Reply::Slot { id } => Ok(format!("it opens slot {id}")),
                _ => Err(odd()),
            }
        }
        SlotCommand::Remove(remove) => self::remove(host, remove).await,
    }
}

async fn list(host: &Host<'_>) -> Result<Vec<SlotLine>, HostError> {
    match host.ask(Request::SlotList, Vec::new()).await? {
        Reply::Slots { slots } => Ok(slots),
        _ => Err(odd()),
    }
}

fn table(slots: &[SlotLine]) -> String {
    let mut text = format!("{:<36}  {:<10}  {:<20}  {}", "SLOT", "KIND", "VERIFIED", "ROOT KEY");
    for slot in slots {
        let verified = match slot.verified_ms {
            0 => "never".to_owned(),
            ms => OffsetDateTime::from(from_ms(ms)).date().to_string(),
        };
        let kind = name(slot.kind);
        let used = if slot.in_use { " (in use)" } else { "" };
        text.push_str(&format!("\n{:<36}  {kind:<10}  {verified:<20}  {}{used}", slot.id, slot.label));
    }
    text
}

async fn remove(host: &Host<'_>, remove: Remove) -> Result<String, HostError> {
    let slots = list(host).await?;
    let staying: Vec<&SlotLine> = slots.iter().filter(|slot| slot.id != remove.id).collect();
    let secrets = secrets(host, &remove, &staying).map_err(|error| HostError::new(exit::CONFIG, error))?;
    let Remove { id, force, compromised, new_passphrase, .. } = remove;
    let kinds = secrets.iter().map(|secret| secret.kind).collect();
    let request = Request::SlotRemove { id: id.clone(), force, compromised, new_passphrase, secrets: kinds };
    let Reply::SlotRemoved { kept, rotated, passphrase } = host.ask(request, secrets).await? else {
        return Err(odd());
    };
    let passphrase = passphrase.map(Zeroizing::new);
    let mut text = format!("removed slot {id}; {kept} slots are left; the store key is being renewed");
    if compromised {
        text.push_str(&format!("\nrotated {rotated} clusters fresh"));
    }
    if let Some(passphrase) = passphrase {
        text.push_str(&format!("\n\nnew recovery passphrase: {}\n", *passphrase));
        text.push_str("Write it down: it is shown only now. The passphrases of before are no longer good.");
    }
    text.push_str(
        "\nBackups made before still open with the removed slot: make one now and let the old ones go.",
    );
    Ok(text)
}

/// Gathers the root keys of the slots that stay: the new store key is sealed
/// for each of them.
fn secrets(host: &Host<'_>, remove: &Remove, staying: &[&SlotLine]) -> Result<Vec<Secret>, String> {
    let mut secrets = Vec::new();
    for path in &remove.root_file {
        secrets.push(root_file(path)?);
    }
    for slot in staying.iter().filter(|slot| slot.kind == SecretKind::File) {
        let configured = match &host.config.root {
            Root::File(path) => Some(path.as_path()),
            Root::Credential(_) | Root::PassphraseCredential(_) => None,
        };
        let known = Some(Path::new(&slot.label)).filter(|path| path.is_absolute());
        for path in [known, configured].into_iter().flatten().filter(|path| path.exists()) {
            secrets.push(root_file(path)?);
        }
    }
    if let Some(fd) = remove.passphrase_fd {
        secrets.push(from_descriptor(fd)?);
    } else if !remove.new_passphrase {
        for slot in staying.iter().filter(|slot| slot.kind == SecretKind::Passphrase) {
            let asked = prompt(&format!("Passphrase of slot {}, which stays: ", slot.id));
            secrets.push(asked.map_err(|error| format!("{error}, or --new-passphrase"))?);
        }
    }
    Ok(secrets)
}

fn new_file(host: &Host<'_>, path: &Path) -> Result<(Secret, String), String> {
    let path = std::path::absolute(path).map_err(|error| error.to_string())?;
    if !path.exists() {
        FileSlot::create(&path, &mut *(host.generator)()).map_err(|error| chain(&error))?;
    }
    Ok((root_file(&path)?, path.display().to_string()))
}

fn new_passphrase(fd: Option<u32>) -> Result<(Secret, String), String> {
    let secret = match fd {
        Some(fd) => from_descriptor(fd)?,
        None => {
            let first = prompt("New passphrase: ")?;
            if prompt("Once more: ")?.bytes != first.bytes {
                return Err("the two passphrases differ".to_owned());
            }
            first
        }
    };
    if utf8(&secret)?.chars().count() < MIN_PASSPHRASE {
        return Err(format!("the passphrase is too short: use at least {MIN_PASSPHRASE} characters"));
    }
    Ok((secret, "passphrase".to_owned()))
}

fn name(kind: SecretKind) -> &'static str {
    match kind {
        SecretKind::File => "file",
        SecretKind::Passphrase => "passphrase",
    }
}
