//! The payloads of the records, in protobuf. They are disk types: nothing else
//! uses them beyond the module that turns each into what the agent works with.
//!
//! A field is never removed and never changes its meaning. A new field raises
//! [`super::FORMAT`], because prost drops what it does not know. Times are
//! milliseconds since the Unix epoch; 0 means "not yet".

use super::Payload;

/// A cluster's label and dates (`cluster/<id>`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct ClusterRecord {
    #[prost(bytes = "vec", tag = "1")]
    pub id: Vec<u8>,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(uint64, tag = "3")]
    pub created_ms: u64,
    #[prost(uint64, tag = "4")]
    pub retired_ms: u64,
}

/// The holder of a cluster name (`cluster-name/<name>`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct NameRecord {
    #[prost(bytes = "vec", tag = "1")]
    pub cluster: Vec<u8>,
}

/// Which versions a cluster has (`keyring/<id>`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct KeyringRecord {
    #[prost(uint64, tag = "1")]
    pub period_seconds: u64,
    #[prost(message, repeated, tag = "2")]
    pub versions: Vec<VersionRecord>,
}

/// One version of a keyring.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VersionRecord {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    #[prost(bytes = "vec", tag = "2")]
    pub key_id: Vec<u8>,
    #[prost(enumeration = "VersionState", tag = "3")]
    pub state: i32,
    #[prost(uint64, tag = "4")]
    pub created_ms: u64,
    #[prost(uint64, tag = "5")]
    pub activated_ms: u64,
    #[prost(uint64, tag = "6")]
    pub deactivated_ms: u64,
    #[prost(uint64, tag = "7")]
    pub disabled_ms: u64,
    #[prost(uint64, tag = "8")]
    pub destroy_not_before_ms: u64,
    #[prost(uint64, tag = "9")]
    pub wraps: u64,
    #[prost(bool, tag = "10")]
    pub unbacked: bool,
}

/// A version's state on disk; `0` is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum VersionState {
    Unspecified = 0,
    Next = 1,
    Active = 2,
    DecryptOnly = 3,
    Disabled = 4,
    DestroyScheduled = 5,
    Destroyed = 6,
}

/// How often each version of a cluster has wrapped (`wraps/<id>`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct WrapsRecord {
    #[prost(message, repeated, tag = "1")]
    pub versions: Vec<VersionWraps>,
}

/// The count of one version.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VersionWraps {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    #[prost(uint64, tag = "2")]
    pub wraps: u64,
}

/// An identity and the serials it may use (`identity/…`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct IdentityRecord {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(message, optional, tag = "2")]
    pub current: Option<IssuedCertificate>,
    #[prost(message, optional, tag = "3")]
    pub next: Option<IssuedCertificate>,
    #[prost(uint64, tag = "4")]
    pub banned_ms: u64,
    #[prost(uint64, tag = "5")]
    pub created_ms: u64,
    /// Admins only: roles by name.
    #[prost(string, repeated, tag = "6")]
    pub roles: Vec<String>,
    /// Admins only: cluster ids; empty means all clusters.
    #[prost(bytes = "vec", repeated, tag = "7")]
    pub scope: Vec<Vec<u8>>,
    /// SHA-256 of the join token that made this identity, if one did.
    #[prost(bytes = "vec", tag = "8")]
    pub token: Vec<u8>,
    /// When a certificate from before a restore was last taken as current.
    #[prost(uint64, tag = "9")]
    pub readopted_ms: u64,
}

/// One certificate that an identity may use.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IssuedCertificate {
    #[prost(bytes = "vec", tag = "1")]
    pub serial: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub spki_sha256: Vec<u8>,
    #[prost(uint64, tag = "3")]
    pub not_after_ms: u64,
    /// Leaf first, DER: a repeated request gets the same certificate.
    #[prost(bytes = "vec", repeated, tag = "4")]
    pub chain: Vec<Vec<u8>>,
}

/// A join token (`token/<sha256>`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct TokenRecord {
    #[prost(bytes = "vec", tag = "1")]
    pub cluster: Vec<u8>,
    /// The one node name it makes; empty when `pattern` decides.
    #[prost(string, tag = "2")]
    pub node: String,
    #[prost(string, tag = "3")]
    pub pattern: String,
    #[prost(string, tag = "4")]
    pub cidr: String,
    #[prost(uint32, tag = "5")]
    pub uses_left: u32,
    #[prost(uint64, tag = "6")]
    pub issued_ms: u64,
    #[prost(uint64, tag = "7")]
    pub expires_ms: u64,
    #[prost(string, tag = "8")]
    pub issued_by: String,
    #[prost(message, repeated, tag = "9")]
    pub used: Vec<TokenUse>,
    #[prost(uint32, tag = "10")]
    pub uses: u32,
}

/// One use of a join token.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TokenUse {
    #[prost(string, tag = "1")]
    pub identity: String,
    #[prost(bytes = "vec", tag = "2")]
    pub spki_sha256: Vec<u8>,
    #[prost(uint64, tag = "3")]
    pub used_ms: u64,
}

/// One generation of a certificate authority (`ca/<kind>/<generation>`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct AuthorityRecord {
    #[prost(uint32, tag = "1")]
    pub generation: u32,
    /// DER.
    #[prost(bytes = "vec", tag = "2")]
    pub certificate: Vec<u8>,
    #[prost(enumeration = "AuthorityState", tag = "3")]
    pub state: i32,
    #[prost(uint64, tag = "4")]
    pub not_after_ms: u64,
    /// The root generation that signed an issuing CA; 0 for a root.
    #[prost(uint32, tag = "5")]
    pub signed_by: u32,
    /// DER of this certificate cross-signed by the previous root, if any.
    #[prost(bytes = "vec", tag = "6")]
    pub cross_signed: Vec<u8>,
    #[prost(uint64, tag = "7")]
    pub retired_ms: u64,
}

/// A CA generation's state; `0` is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum AuthorityState {
    Unspecified = 0,
    Prepared = 1,
    Active = 2,
    Retiring = 3,
}

/// The last issue number (`issued`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct IssuedRecord {
    #[prost(uint64, tag = "1")]
    pub last: u64,
}

/// The last restore (`restored`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct RestoredRecord {
    #[prost(uint64, tag = "1")]
    pub restored_ms: u64,
    /// The last issue number in what was restored.
    #[prost(uint64, tag = "2")]
    pub issued_before: u64,
    /// Issue numbers above this one were given after the restore.
    #[prost(uint64, tag = "3")]
    pub issued_floor: u64,
}

/// The last verified backup (`backup`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct BackupRecord {
    #[prost(uint64, tag = "1")]
    pub verified_ms: u64,
    #[prost(string, tag = "2")]
    pub file: String,
}

/// What is known of a root slot (`slot-note/<id>`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct SlotNote {
    #[prost(uint64, tag = "1")]
    pub added_ms: u64,
    /// When it last opened the store.
    #[prost(uint64, tag = "2")]
    pub verified_ms: u64,
    /// Where its root key was, in the operator's words; no secret.
    #[prost(string, tag = "3")]
    pub label: String,
}

/// The end of one chain of an agent's audit (`audit-head/<agent>/<chain>`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct AuditHeadRecord {
    /// The number of the last durable record.
    #[prost(uint64, tag = "1")]
    pub seq: u64,
    /// SHA-256 of its line.
    #[prost(bytes = "vec", tag = "2")]
    pub hash: Vec<u8>,
    /// When this row was written.
    #[prost(uint64, tag = "3")]
    pub written_ms: u64,
}

/// A change as its store transaction carries it (`change/<id>`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct ChangeRecord {
    #[prost(bytes = "vec", tag = "1")]
    pub change: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub audit_seq: u64,
    /// SHA-256 of the intent's line.
    #[prost(bytes = "vec", tag = "3")]
    pub intent: Vec<u8>,
    #[prost(string, tag = "4")]
    pub agent: String,
}

macro_rules! payloads {
    ($($type:ty => $what:literal),* $(,)?) => {$(
        impl Payload for $type {
            const WHAT: &'static str = $what;
        }
    )*};
}

payloads! {
    ClusterRecord => "a cluster",
    NameRecord => "a cluster name",
    KeyringRecord => "a keyring",
    WrapsRecord => "counted wraps",
    IdentityRecord => "an identity",
    TokenRecord => "a join token",
    AuthorityRecord => "a certificate authority",
    IssuedRecord => "the issue number",
    RestoredRecord => "the last restore",
    BackupRecord => "the last backup",
    AuditHeadRecord => "an audit chain's head",
    SlotNote => "a root slot's note",
    ChangeRecord => "a change",
}
