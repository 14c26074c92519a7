//! A TLS client that shows whatever it is given, to see how a port answers what no client of ours would send.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

/// How long a port may be silent.
const SILENCE_LIMIT: Duration = Duration::from_secs(20);

/// The client's connection preface and an empty SETTINGS frame (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A certificate chain, leaf first, and its key.
pub type Shown = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// How a port of 127.0.0.1 takes a client.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// It speaks HTTP/2 to it.
    LetIn,
    /// It sends this TLS alert.
    Alert(String),
    /// It hangs up without a word.
    Closed,
}

/// Connects and waits for the first word.
///
/// # Errors
/// When the port is silent.
pub fn probe(port: u16, shown: Option<Shown>) -> anyhow::Result<Answer> {
    probe_with(port, shown, &[b"h2"])
}

/// As [`probe`], with these application protocols.
///
/// # Errors
/// As [`probe`].
pub fn probe_with(port: u16, shown: Option<Shown>, protocols: &[&[u8]]) -> anyhow::Result<Answer> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer(Arc::clone(&provider))));
    let mut config = match shown {
        // Not compared: the key may be another than the certificate's.
        Some((chain, key)) => {
            let key = provider.key_provider.load_private_key(key)?;
            builder.with_client_cert_resolver(Arc::new(Shows(Arc::new(CertifiedKey::new(chain, key)))))
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let connection = ClientConnection::new(Arc::new(config), ServerName::try_from("agent.invalid")?)?;
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(SILENCE_LIMIT))?;
    let mut stream = StreamOwned::new(connection, stream);
    let first = stream.write_all(PREFACE).and_then(|()| stream.read_exact(&mut [0]));
    let Err(error) = first else { return Ok(Answer::LetIn) };
    match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::AlertReceived(alert)) => {
            Ok(Answer::Alert(alert.as_str().context("an alert with a name")?.to_owned()))
        }
        None if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
            Ok(Answer::Closed)
        }
        _ => bail!("port {port} answers neither HTTP/2 nor an alert: {error}"),
    }
}

/// Shows one chain, whoever asks.
#[derive(Debug)]
struct Shows(Arc<CertifiedKey>);

impl ResolvesClientCert for Shows {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Takes any server: who is under test is the server's judgement, not ours.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
