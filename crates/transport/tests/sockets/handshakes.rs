//! Who is let in on the data port, and whom a sidecar takes for an agent.

use std::{io, sync::Arc};

use fleet_kms_identity::CertificateError;
use fleet_kms_transport::{
    CertificateRefused, ClientAuth, ConnectError, ConnectOptions, ServeLimits, TlsError, Whose,
    agent_client_tls, agent_tls, connect,
};
use rcgen::ExtendedKeyUsagePurpose;
use rustls::{HandshakeKind, NamedGroup, client::Resumption};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    ca::{AGENT, CLIENT, DAY, Leaf, NODE, SERVER, TestCa, clock, clock_at, live, now},
    harness::{Server, node_tls, trust_domain},
    raw,
};

/// Connects to a server that shows `leaf`, trusting `ca`, and returns why the agent is refused.
async fn refused_agent(ca: &TestCa, leaf: Leaf) -> CertificateRefused {
    let address = raw::silent_server(leaf, true).await;
    match connect(&address.to_string(), &node_tls(ca), ConnectOptions::default()).await {
        Err(ConnectError::AgentRefused(refused)) => refused,
        Err(other) => panic!("refused for another reason: {other:?}"),
        Ok(_) => panic!("taken for an agent"),
    }
}

/// Connects to the data port showing `leaf`, and returns the alert that refuses it.
async fn refused_client(server: &Server, leaf: Option<Leaf>) -> String {
    let error = raw::connect(server.address, raw::client_config(leaf, &[b"h2"])).await.unwrap_err();
    match TlsError::from(error) {
        TlsError::RefusedByPeer { alert } => alert,
        other => panic!("no alert: {other:?}"),
    }
}

#[tokio::test]
async fn a_node_and_an_agent_know_each_other_by_id() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    let client = server.connect(&node_tls(&ca)).await.unwrap();
    assert_eq!(client.peer.certificate.as_ref().unwrap().id().to_string(), AGENT);
    assert_eq!(client.call(0).await.unwrap(), format!("{NODE} Valid"));
    assert_eq!(server.connections.count(), 1);
}

#[tokio::test]
async fn the_hybrid_key_exchange_is_used_and_no_session_is_resumed() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    let mut config = raw::client_config(Some(ca.leaf(&[NODE], &CLIENT)), &[b"h2"]);
    config.resumption = Resumption::in_memory_sessions(8);
    for _ in 0..2 {
        let stream = raw::connect(server.address, config.clone()).await.unwrap();
        let session = stream.get_ref().1;
        assert_eq!(session.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
        assert_eq!(session.handshake_kind(), Some(HandshakeKind::Full));
    }
}

#[tokio::test]
async fn a_client_of_another_ca_with_the_same_names_is_refused_and_told() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    let impostor = TestCa::new("1").node();
    let tls = agent_client_tls(Some(impostor), ca.roots(), clock(), trust_domain());
    let refused = server.connect(&tls).await.err().unwrap();
    assert!(matches!(refused, ConnectError::RefusedByAgent { .. }), "{refused:?}");
    server.has_refused("does not chain to a trusted root").await;
    assert_eq!(server.connections.count(), 0);
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused_and_told() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    let tls = agent_client_tls(None, ca.roots(), clock(), trust_domain());
    let refused = server.connect(&tls).await.err().unwrap();
    assert!(
        matches!(&refused, ConnectError::RefusedByAgent { alert } if alert == "CertificateRequired"),
        "{refused:?}"
    );
    server.has_refused("the peer shows no certificate").await;
}

#[tokio::test]
async fn a_client_must_have_exactly_one_fleet_identity_and_client_auth() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    for (leaf, reason) in [
        (ca.leaf(&[NODE, AGENT], &CLIENT), "2 URI names"),
        (ca.leaf(&[], &CLIENT), "0 URI names"),
        (ca.leaf(&["https://fleet.example/agent/a"], &CLIENT), "no fleet identity"),
        (ca.leaf(&["spiffe://fleet.example/admin/*"], &CLIENT), "no fleet identity"),
        (ca.leaf(&[NODE], &[]), "does not carry clientAuth"),
        (ca.leaf(&[NODE], &[ExtendedKeyUsagePurpose::Any]), ""),
        (ca.leaf(&[AGENT], &SERVER), ""),
    ] {
        let alert = refused_client(&server, Some(leaf)).await;
        assert!(!alert.is_empty());
        server.has_refused(reason).await;
    }
    server.has_refused_times(7).await;
}

#[tokio::test]
async fn nobody_but_an_agent_passes_for_one() {
    let ca = TestCa::new("1");
    let both = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let admin = "spiffe://fleet.example/admin/jo";
    let worker = "spiffe://fleet.example/cluster/0b5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44/worker/w";
    for id in [NODE, admin, worker] {
        let refused = refused_agent(&ca, ca.leaf(&[id], &both)).await;
        assert_eq!(refused, CertificateRefused::NotAnAgent(id.parse().unwrap()));
        let refused = refused_agent(&ca, ca.leaf(&[id], &CLIENT)).await;
        assert!(matches!(refused, CertificateRefused::Chain(_)), "clientAuth serves nobody: {refused:?}");
    }
}

#[tokio::test]
async fn an_agent_must_carry_server_auth_and_one_name_of_our_trust_domain() {
    let ca = TestCa::new("1");
    let agent = AGENT.parse().unwrap();
    assert_eq!(refused_agent(&ca, ca.leaf(&[AGENT], &[])).await, CertificateRefused::NoServerAuth(agent));
    let two = refused_agent(&ca, ca.leaf(&[AGENT, NODE], &SERVER)).await;
    assert_eq!(two, CertificateRefused::Form(CertificateError::UriNames(2)));
    let foreign = "spiffe://other.example/agent/a";
    let refused = refused_agent(&ca, ca.leaf(&[foreign], &SERVER)).await;
    assert_eq!(refused, CertificateRefused::OtherTrustDomain(foreign.parse().unwrap()));
    let impostor = refused_agent(&ca, TestCa::new("1").leaf(&[AGENT], &SERVER)).await;
    assert!(matches!(impostor, CertificateRefused::Chain(_)), "{impostor:?}");
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    // A ClientHello of TLS 1.2 with ECDHE-ECDSA-AES128-GCM-SHA256, P-256 and ECDSA-P256-SHA256.
    let extensions = [
        0, 10, 0, 4, 0, 2, 0, 23, // supported_groups
        0, 11, 0, 2, 1, 0, // ec_point_formats
        0, 13, 0, 4, 0, 2, 4, 3, // signature_algorithms
    ];
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0xc0, 0x2b, 1, 0, 0, extensions.len() as u8]);
    body.extend(extensions);
    let mut hello = vec![22, 3, 1, 0, body.len() as u8 + 4, 1, 0, 0, body.len() as u8];
    hello.extend(body);
    stream.write_all(&hello).await.unwrap();
    let mut alert = Vec::new();
    stream.read_to_end(&mut alert).await.unwrap();
    assert_eq!(alert, [21, 3, 3, 0, 2, 2, 70], "fatal protocol_version");
    server.has_refused("does not speak TLS 1.3").await;
}

#[tokio::test]
async fn a_client_that_names_no_or_another_protocol_is_refused() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    for alpn in [&[][..], &[&b"http/1.1"[..]]] {
        let config = raw::client_config(Some(ca.leaf(&[NODE], &CLIENT)), alpn);
        raw::connect(server.address, config).await.unwrap_err();
        server.has_refused("does not speak HTTP/2").await;
    }
    server.has_refused_times(2).await;
    assert_eq!(server.connections.count(), 0);
}

#[tokio::test]
async fn a_refused_client_that_talks_on_still_learns_why() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    for _ in 0..20 {
        let config = raw::client_config(Some(ca.leaf(&[NODE, NODE], &CLIENT)), &[b"h2"]);
        let stream = TcpStream::connect(server.address).await.unwrap();
        let name = "any.invalid".try_into().unwrap();
        let mut stream =
            tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        // Whatever becomes of these bytes, the server does not want them.
        let _ = stream.write_all(&[0; 16 * 1_024]).await;
        let refused = TlsError::from(stream.read_u8().await.unwrap_err());
        assert!(matches!(refused, TlsError::RefusedByPeer { .. }), "{refused:?}");
        let end = stream.into_inner().0.read_u8().await.unwrap_err().kind();
        assert_eq!(end, io::ErrorKind::UnexpectedEof, "closed in order, not reset");
    }
}

#[tokio::test]
async fn an_expired_certificate_is_told_apart_on_either_side() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    let expired = live(ca.leaf_until(&[NODE], &CLIENT, now() - DAY));
    let tls = agent_client_tls(Some(expired), ca.roots(), clock(), trust_domain());
    let refused = server.connect(&tls).await.err().unwrap();
    assert!(matches!(refused, ConnectError::CertificateDates { whose: Whose::Own }), "{refused:?}");

    let late = agent_client_tls(Some(ca.node()), ca.roots(), clock_at(now() + 30 * DAY), trust_domain());
    let refused = server.connect(&late).await.err().unwrap();
    assert!(matches!(refused, ConnectError::CertificateDates { whose: Whose::Agents }), "{refused:?}");
}

#[tokio::test]
async fn a_new_identity_and_new_roots_count_from_the_next_connection_on() {
    let (old, new) = (TestCa::new("1"), TestCa::new("2"));
    let (identity, roots) = (old.agent(), old.roots());
    let tls = agent_tls(Arc::clone(&identity), Arc::clone(&roots), clock(), ClientAuth::Required);
    let server = Server::tls(tls, ServeLimits::default()).await;
    let before = server.connect(&node_tls(&old)).await.unwrap();

    let (chain, key) = new.leaf(&[AGENT], &SERVER);
    identity.replace(chain, &key).unwrap();
    roots.replace(vec![new.root_der()]).unwrap();
    assert_eq!(identity.live_key_sha256(), key.spki_sha256());
    let after = server.connect(&node_tls(&new)).await.unwrap();
    assert_eq!(*after.peer.certificate.as_ref().unwrap().spki_sha256(), identity.live_key_sha256());
    after.call(0).await.unwrap();
    before.call(0).await.unwrap();
    assert!(server.connect(&node_tls(&old)).await.is_err());

    let tls = agent_client_tls(Some(old.node()), new.roots(), clock(), trust_domain());
    assert!(matches!(server.connect(&tls).await, Err(ConnectError::RefusedByAgent { .. })));
}

#[tokio::test]
async fn a_cross_signed_root_carries_both_sides_over_a_rollover() {
    let (old, new) = (TestCa::new("1"), TestCa::new("2"));
    let cross = new.root_signed_by(&old, "2");
    let (mut chain, key) = new.leaf(&[AGENT], &SERVER);
    chain.push(cross);
    let roots = Arc::new(fleet_kms_transport::Roots::new(vec![new.root_der(), old.root_der()]).unwrap());
    let tls = agent_tls(live((chain, key)), roots, clock(), ClientAuth::Required);
    let server = Server::tls(tls, ServeLimits::default()).await;
    for pinned in [&old, &new] {
        let client = server.connect(&node_tls(pinned)).await.unwrap();
        client.call(0).await.unwrap();
    }
}

#[tokio::test]
async fn a_peer_that_speaks_no_tls_is_no_certificate_problem() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _: Result<usize, io::Error> = stream.read_to_end(&mut answer).await;
    server.has_refused("does not speak TLS 1.3").await;
}
