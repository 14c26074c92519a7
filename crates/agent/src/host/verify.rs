//! `kms-agent backup verify`: opens every version in a backup with a slot that
//! it is given, and lists the slots that open it. Needs no agent and no store.

use std::path::Path;
use std::sync::Arc;

use fleet_kms_process::exit;
use fleet_kms_store::{SqliteStore, Store};

use super::{HostError, secrets::Given};
use crate::backup;
use crate::config::Config;
use crate::errors::chain;
use crate::ledger::Generator;
use crate::live_keyrings::LiveKeyrings;
use crate::local::protocol::SecretKind;
use crate::migration;
use crate::storage;

pub(super) async fn run(
    config: &Config,
    file: &Path,
    given: &Given,
    generator: Generator,
) -> Result<String, HostError> {
    let data = |error: &dyn std::error::Error| {
        HostError::new(exit::DATA, format!("{}: {}", file.display(), chain(error)))
    };
    let (slot, root) = given.root(config).map_err(|error| HostError::new(exit::CONFIG, error))?;
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open_read_only(file).map_err(|error| data(&error))?);
    let slots = storage::slots(&*store).await.map_err(|error| data(&error))?;
    let outlook = migration::outlook(&*store).await.map_err(|error| data(&error))?;
    let agent = config.name.as_str();
    let opened = storage::open_with((store, file), (&*slot, &root), agent, generator).await;
    let opened = opened.map_err(|error| data(&error))?;
    let (keyrings, _) = LiveKeyrings::load(&opened.ledger, opened.store_keys, generator)
        .await
        .map_err(|error| data(&error))?;
    let held = backup::look_into(&opened.ledger, &keyrings).await.map_err(|error| data(&error))?;
    let mut text = format!(
        "{}: {} versions of {} clusters, each opened\n",
        file.display(),
        held.versions,
        held.highest.len()
    );
    for known in &slots {
        let opens = if known.slot() == opened.slot { "opens it" } else { "not tried" };
        let kind = match known.kind().into() {
            SecretKind::File => "file",
            SecretKind::Passphrase => "passphrase",
        };
        text.push_str(&format!("slot {}  {kind:<10}  {opens}\n", known.slot()));
    }
    if let Some(outlook) = outlook {
        text.push_str(&format!("{outlook}\n"));
    }
    Ok(text.trim_end().to_owned())
}
