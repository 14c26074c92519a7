//! What a store holds in clear once its root key has opened it: for tests that look for it where it must not be, or
//! that need the fleet's CA to sign what no agent would.

use std::fs;
use std::path::Path;

use anyhow::{Context, anyhow};
use fleet_kms_agent::records::payload::IdentityRecord;
use fleet_kms_agent::records::rows;
use fleet_kms_agent::root::Root;
use fleet_kms_agent::storage::{self, Storage};
use fleet_kms_identity::Serial;
use fleet_kms_keyring::sealed::{self, Kind, SealContext};
use fleet_kms_seal::{FileSlot, SlotRecord, open_any};

/// The secrets of one store.
pub struct OpenedStore {
    /// Every KEK of every cluster.
    pub keks: Vec<Vec<u8>>,
    /// The keys that records and head are authenticated by.
    pub derived: Vec<Vec<u8>>,
    /// The private keys of the CAs, PKCS #8, with their rows' names.
    pub authorities: Vec<(String, Vec<u8>)>,
}

impl OpenedStore {
    /// Opens a copy of an agent's store, so that the agent may run on.
    ///
    /// # Errors
    /// When the store does not open.
    pub fn of(agent_directory: &Path) -> anyhow::Result<Self> {
        let copies = tempfile::tempdir()?;
        for name in ["store.db", "store.db-wal"] {
            let from = agent_directory.join(name);
            if from.exists() {
                fs::copy(from, copies.path().join(name))?;
            }
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(read(&copies.path().join("store.db"), &agent_directory.join("root.key")))
    }

    /// The private key of the CA that signs leaves.
    ///
    /// # Errors
    /// When there is none.
    pub fn issuing_key(&self) -> anyhow::Result<&[u8]> {
        let issuing = self.authorities.iter().find(|(row, _)| row.contains("/issuing/"));
        Ok(&issuing.context("a key of an issuing CA")?.1)
    }
}

async fn read(store: &Path, root: &Path) -> anyhow::Result<OpenedStore> {
    let from = Root::File(root.to_owned());
    let Storage { ledger, .. } = storage::open(store, &from, "a-test", generator).await?;
    let slots = ledger.scan_rows(rows::SLOTS).await?;
    let slots = slots.iter().map(|row| SlotRecord::parse(&row.bytes)).collect::<Result<Vec<_>, _>>()?;
    let (_, store_key) = open_any(&FileSlot::open(root)?, &slots, ledger.codec().store())?;
    let mut opened = OpenedStore {
        keks: Vec::new(),
        derived: vec![
            store_key.mac_key().expose_secret().to_vec(),
            store_key.head_key().expose_secret().to_vec(),
        ],
        authorities: Vec::new(),
    };
    for (prefix, kind) in [(rows::KEKS, Kind::Kek), (rows::AUTHORITY_KEYS, Kind::CaKey)] {
        for row in ledger.scan_rows(prefix).await? {
            let context = SealContext {
                store: store_key.store(),
                row: row.name.as_bytes(),
                kind,
                epoch: store_key.epoch(),
            };
            let secret = sealed::open(&store_key.seal_key(), &context, &row.bytes)
                .map_err(|error| anyhow!("{}: {error}", row.name.as_str()))?;
            match kind {
                Kind::Kek => opened.keks.push(secret.to_vec()),
                _ => opened.authorities.push((row.name.as_str().to_owned(), secret.to_vec())),
            }
        }
    }
    Ok(opened)
}

fn generator() -> Box<dyn rand_core::CryptoRng + Send> {
    Box::new(rand_core::UnwrapErr(getrandom::SysRng))
}

/// Every certificate that an identity of the store may use: its SPIFFE ID and the serial.
///
/// # Errors
/// When the store does not open, or an agent has it open.
pub fn issued_serials(agent_directory: &Path) -> anyhow::Result<Vec<(String, Serial)>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let from = Root::File(agent_directory.join("root.key"));
        let Storage { ledger, .. } =
            storage::open(&agent_directory.join("store.db"), &from, "a-test", generator).await?;
        let mut serials = Vec::new();
        for record in ledger.scan::<IdentityRecord>(rows::IDENTITIES).await? {
            for issued in [&record.payload.current, &record.payload.next].into_iter().flatten() {
                let serial = <[u8; 16]>::try_from(issued.serial.as_slice()).ok();
                let serial = serial.and_then(Serial::from_bytes).context("a serial")?;
                serials.push((record.payload.id.clone(), serial));
            }
        }
        Ok(serials)
    })
}
