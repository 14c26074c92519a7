//! The names of all rows. `docs/store-format.md` lists them.

use data_encoding::HEXLOWER;
use fleet_kms_audit::ChangeId;
use fleet_kms_identity::{SpiffeId, Subject};
use fleet_kms_keyring::{ClusterId, SlotId, Version};
use fleet_kms_store::RowName;

/// Format and store id, in clear: read before any key is open.
pub const META: &str = "meta";
/// The sealed head.
pub const HEAD: &str = "head";
/// The last issue number given to a certificate.
pub const ISSUED: &str = "issued";
/// Prefix of the root slots.
pub const SLOTS: &str = "slot/";
/// Prefix of the clusters.
pub const CLUSTERS: &str = "cluster/";
/// Prefix of the keyring records.
pub const KEYRINGS: &str = "keyring/";
/// Prefix of the counted wraps.
pub const WRAPS: &str = "wraps/";
/// Prefix of the sealed KEKs.
pub const KEKS: &str = "kek/";
/// Prefix of the identities.
pub const IDENTITIES: &str = "identity/";
/// Prefix of the join tokens.
pub const TOKENS: &str = "token/";
/// Prefix of the certificate authorities.
pub const AUTHORITIES: &str = "ca/";
/// Prefix of the certificate authorities' sealed keys.
pub const AUTHORITY_KEYS: &str = "ca-key/";
/// Prefix of the store keys of earlier epochs, while a rotation is under way.
pub const OLDER_STORE_KEYS: &str = "store-key/";
/// When the store was last restored, and from which issue number on.
pub const RESTORED: &str = "restored";
/// The last verified backup.
pub const BACKUP: &str = "backup";
/// Prefix of what is known of the root slots beyond the slots themselves.
pub const SLOT_NOTES: &str = "slot-note/";
/// Prefix of the ends of the agents' audit chains.
pub const AUDIT_HEADS: &str = "audit-head/";
/// Prefix of the changes whose outcome is not yet in the audit.
pub const CHANGES: &str = "change/";

fn row(name: String) -> RowName {
    RowName::try_from(name).expect("row names are short ASCII by construction")
}

/// A fixed row.
pub fn fixed(name: &'static str) -> RowName {
    row(name.to_owned())
}

/// The cluster's record: its name and when it was made.
pub fn cluster(id: &ClusterId) -> RowName {
    row(format!("{CLUSTERS}{id}"))
}

/// Reserves a name for one live cluster. Names are at most 63 ASCII bytes.
pub fn cluster_name(name: &str) -> RowName {
    row(format!("cluster-name/{name}"))
}

/// The keyring record: which versions exist and in which state.
pub fn keyring(id: &ClusterId) -> RowName {
    row(format!("{KEYRINGS}{id}"))
}

/// How often each version of a cluster has wrapped.
pub fn wraps(id: &ClusterId) -> RowName {
    row(format!("{WRAPS}{id}"))
}

/// One sealed KEK. Written once; rewritten only to re-seal or to destroy it.
pub fn kek(id: &ClusterId, version: Version) -> RowName {
    row(format!("{KEKS}{id}/{:010}", version.get()))
}

/// Prefix of one cluster's sealed KEKs.
pub fn keks(id: &ClusterId) -> String {
    format!("{KEKS}{id}/")
}

/// One identity.
pub fn identity(id: &SpiffeId) -> RowName {
    row(match &id.subject {
        Subject::Node { cluster, name } => format!("{IDENTITIES}node/{cluster}/{name}"),
        Subject::Worker { cluster, name } => format!("{IDENTITIES}worker/{cluster}/{name}"),
        Subject::Agent { name } => format!("{IDENTITIES}agent/{name}"),
        Subject::Admin { name } => format!("{IDENTITIES}admin/{name}"),
    })
}

/// One join token, by the SHA-256 of its secret.
pub fn token(hash: &[u8; 32]) -> RowName {
    row(format!("{TOKENS}{}", HEXLOWER.encode(hash)))
}

/// One generation of the root CA (`root`) or the issuing CA (`issuing`).
pub fn authority(kind: &str, generation: u32) -> RowName {
    row(format!("{AUTHORITIES}{kind}/{generation:010}"))
}

/// The sealed private key of one CA generation.
pub fn authority_key(kind: &str, generation: u32) -> RowName {
    row(format!("{AUTHORITY_KEYS}{kind}/{generation:010}"))
}

/// One root slot.
pub fn slot(id: &SlotId) -> RowName {
    row(format!("{SLOTS}{id}"))
}

/// What is known of a root slot beyond the slot itself.
pub fn slot_note(id: &SlotId) -> RowName {
    row(format!("{SLOT_NOTES}{id}"))
}

/// The store key of an earlier epoch, while a rotation is under way.
pub fn older_store_key(epoch: u32) -> RowName {
    row(format!("{OLDER_STORE_KEYS}{epoch:010}"))
}

/// The end of one chain of one agent's audit. Agent names are at most 63 ASCII bytes.
pub fn audit_head(agent: &str, chain: &str) -> RowName {
    row(format!("{AUDIT_HEADS}{agent}/{chain}"))
}

/// One change, until its outcome is in the audit.
pub fn change(id: &ChangeId) -> RowName {
    row(format!("{CHANGES}{id}"))
}
