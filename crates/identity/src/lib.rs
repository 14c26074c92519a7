//! Who someone is: SPIFFE IDs, certificates read and judged at a given time, certificate requests, join tokens,
//! the renewal decision and the directory that a node keeps its identity in.
//!
//! This crate opens no socket, reads no clock and decides nothing about what an identity may do. It never accepts
//! "almost" an ID: what does not parse strictly is refused, and a certificate names exactly one identity.

mod spiffe_id;
mod certificate;
mod key_pair;
mod csr;
mod renewal;
mod authority;
mod join_token;
mod directory;

pub use authority::{StatementError, verify_statement};
pub use certificate::{
    Certificate, CertificateError, Serial, Standing, fingerprint, split_pem_chain, validity,
};
pub use csr::{Csr, CsrError, MAX_CSR};
pub use directory::{
    AgentAddress, Directory, DirectoryError, DirectoryLock, InstallError, LoadError, LockError, State,
    StoredIdentity,
};
pub use join_token::{JoinToken, JoinTokenError};
pub use key_pair::{KeyPair, KeyPairError};
pub use renewal::{Renewal, renewal_due};
pub use spiffe_id::{
    ClusterUuid, Name, NameError, SpiffeId, SpiffeIdError, Subject, TrustDomain, TrustDomainError,
};
