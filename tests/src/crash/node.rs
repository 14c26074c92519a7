//! A node of a cluster, in this process: it speaks to the agent's real ports and remembers what was acknowledged.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use fleet_kms_identity::{JoinToken, KeyPair};
use fleet_kms_proto::agent::data_plane_client::DataPlaneClient;
use fleet_kms_proto::agent::enrolment_client::EnrolmentClient;
use fleet_kms_proto::agent::unwrap_item::Outcome;
use fleet_kms_proto::agent::{EnrolRequest, StatusRequest, UnwrapRequest, WrapRequest};
use fleet_kms_transport::{
    ClientTls, Clock, ConnectError, ConnectOptions, LinkService, LiveIdentity, Roots, agent_client_tls,
    connect, first_contact_tls,
};
use rustls_pki_types::CertificateDer;

use crate::fleet::TRUST_DOMAIN;

/// No call to an agent on this machine takes longer.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Between two attempts to connect.
const POLL: Duration = Duration::from_millis(2);
/// The agent answers this many in one call.
const BATCH: usize = 512;

/// A DEK that an agent has wrapped.
#[derive(Clone, Debug)]
pub struct Wrapped {
    /// The DEK.
    pub dek: Vec<u8>,
    /// What the agent made of it.
    pub bytes: Vec<u8>,
    /// The version that it named.
    pub version: u32,
    /// The key id that it named.
    pub key_id: Vec<u8>,
}

/// A node's certificate chain, with the key's PEM and the roots it trusts.
#[derive(Clone)]
pub struct Credentials {
    /// Leaf first, DER.
    pub chain: Vec<Vec<u8>>,
    /// The roots, DER.
    pub roots: Vec<Vec<u8>>,
    /// The private key.
    pub key: String,
}

/// The clock that everything in this process uses.
pub fn clock() -> Clock {
    Arc::new(fleet_kms_process::clock::now)
}

impl Credentials {
    fn tls(&self) -> anyhow::Result<ClientTls> {
        let der = |all: &[Vec<u8>]| all.iter().cloned().map(CertificateDer::from).collect::<Vec<_>>();
        let identity = LiveIdentity::new(der(&self.chain), &KeyPair::from_pem(&self.key)?)?;
        let roots = Arc::new(Roots::new(der(&self.roots))?);
        Ok(agent_client_tls(Some(Arc::new(identity)), roots, clock(), TRUST_DOMAIN.parse()?))
    }
}

/// A node's connection to the data port.
pub struct Node {
    client: DataPlaneClient<LinkService>,
}

impl Node {
    /// Connects; it waits for an agent that listens but does not serve yet.
    ///
    /// # Errors
    /// When the agent does not let it in.
    pub async fn connect(port: u16, credentials: &Credentials) -> anyhow::Result<Self> {
        Ok(Self { client: DataPlaneClient::new(link(port, &credentials.tls()?).await?) })
    }

    /// Wraps a DEK.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn wrap(&mut self, dek: &[u8]) -> anyhow::Result<Wrapped> {
        let request = WrapRequest { plaintext: dek.to_vec(), key_id: Vec::new() };
        let answer = in_time(self.client.wrap(request)).await?;
        Ok(Wrapped {
            dek: dek.to_vec(),
            bytes: answer.wrapped,
            version: answer.version,
            key_id: answer.key_id,
        })
    }

    /// Unwraps all and names each that does not give its DEK.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn unreadable(&mut self, wrapped: &[Wrapped]) -> anyhow::Result<Vec<String>> {
        let mut bad = Vec::new();
        for batch in wrapped.chunks(BATCH) {
            let request =
                UnwrapRequest { wrapped: batch.iter().map(|one| one.bytes.clone().into()).collect() };
            let answer = in_time(self.client.unwrap(request)).await?;
            ensure!(answer.items.len() == batch.len(), "{} answers", answer.items.len());
            for (one, item) in batch.iter().zip(answer.items) {
                match item.outcome {
                    Some(Outcome::Plain(dek)) if dek == one.dek => {}
                    other => bad.push(format!("a DEK acknowledged under version {}: {other:?}", one.version)),
                }
            }
        }
        Ok(bad)
    }

    /// The active version.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn version(&mut self) -> anyhow::Result<u32> {
        let request = StatusRequest { build: "test".to_owned(), ..StatusRequest::default() };
        Ok(in_time(self.client.status(request)).await?.version)
    }
}

/// Shows a join token on the enrolment port.
///
/// # Errors
/// When the agent does not answer or refuses.
pub async fn enrol(port: u16, token: &JoinToken, key: &str) -> anyhow::Result<Credentials> {
    let secret = secret_of(token)?;
    let link = link(port, &first_contact_tls(*token.root_sha256(), clock())).await?;
    let csr = KeyPair::from_pem(key)?.csr_der()?;
    let request = EnrolRequest { token: secret, csr, node: String::new() };
    let answer = in_time(EnrolmentClient::new(link).enrol(request)).await?;
    Ok(Credentials { chain: answer.chain, roots: answer.roots, key: key.to_owned() })
}

/// The 32 secret bytes, which a token shows only in its text.
pub(super) fn secret_of(token: &JoinToken) -> anyhow::Result<Vec<u8>> {
    let text = token.to_text();
    let (_, encoded) = text.split_once('.').context("a token's text has a prefix")?;
    let bytes = data_encoding::BASE64URL_NOPAD.decode(encoded.as_bytes())?;
    Ok(bytes.get(..32).context("a token has a secret")?.to_vec())
}

async fn link(port: u16, tls: &ClientTls) -> anyhow::Result<LinkService> {
    let options = ConnectOptions { timeout: CALL_LIMIT, ..ConnectOptions::default() };
    let address = format!("127.0.0.1:{port}");
    let connected = async {
        loop {
            match connect(&address, tls, options).await {
                // The program has not bound its ports yet.
                Err(ConnectError::Tcp(_)) => tokio::time::sleep(POLL).await,
                other => return other,
            }
        }
    };
    let link = tokio::time::timeout(CALL_LIMIT, connected).await.context("nothing listens")??;
    tokio::spawn(link.driver);
    Ok(link.service)
}

async fn in_time<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> anyhow::Result<T> {
    match tokio::time::timeout(CALL_LIMIT, call).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => bail!("no answer in {CALL_LIMIT:?}"),
    }
}
