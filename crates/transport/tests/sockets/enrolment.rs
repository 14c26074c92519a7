//! The enrolment port: expired peers, unknown peers, first contacts, and nodes whose clock is wrong.

use std::{sync::Arc, time::SystemTime};

use fleet_kms_identity::{Standing, fingerprint};
use fleet_kms_transport::{
    CertificateRefused, ClientAuth, ConnectError, LiveIdentity, ServeLimits, Whose, agent_client_tls,
    agent_tls, first_contact_tls,
};

use crate::{
    ca::{AGENT, CLIENT, DAY, NODE, SERVER, TestCa, clock, clock_at, live, now},
    harness::{Client, Server, node_tls, trust_domain},
    raw,
};

async fn enrolment(ca: &TestCa, identity: Arc<LiveIdentity>) -> Server {
    let tls = agent_tls(identity, ca.roots(), clock(), ClientAuth::OptionalMayBeExpired);
    Server::tls(tls, ServeLimits::default()).await
}

async fn first_contact(ca: &TestCa, server: &Server) -> Result<Client, ConnectError> {
    server.connect(&first_contact_tls(fingerprint(&ca.root_der()), clock())).await
}

#[tokio::test]
async fn a_valid_peer_stands_valid_and_an_unknown_one_is_nobody() {
    let ca = TestCa::new("1");
    let server = enrolment(&ca, ca.agent()).await;
    let client = server.connect(&node_tls(&ca)).await.unwrap();
    assert_eq!(client.call(0).await.unwrap(), format!("{NODE} Valid"));
    let unknown = agent_client_tls(None, ca.roots(), clock(), trust_domain());
    assert_eq!(server.connect(&unknown).await.unwrap().call(0).await.unwrap(), "nobody");
}

#[tokio::test]
async fn an_expired_peer_stands_expired_by_how_long() {
    let ca = TestCa::new("1");
    let server = enrolment(&ca, ca.agent()).await;
    let expired = live(ca.leaf_until(&[NODE], &CLIENT, now() - 179 * DAY));
    let tls = agent_client_tls(Some(expired), ca.roots(), clock(), trust_domain());
    let client = server.connect(&tls).await.unwrap();
    let standing = Standing::Expired { by: 179 * DAY };
    assert_eq!(client.call(0).await.unwrap(), format!("{NODE} {standing:?}"));
}

#[tokio::test]
async fn an_expired_issuer_does_not_keep_an_expired_node_out() {
    let present = TestCa::new("2");
    let (before, after) = (now() - 100 * DAY, now() - 179 * DAY);
    for (issuing_until, leaf_until) in [(before, after), (after, before), (after, now() + DAY)] {
        let past = TestCa::with_issuing_until("1", issuing_until);
        let tls = agent_tls(present.agent(), past.roots(), clock(), ClientAuth::OptionalMayBeExpired);
        let server = Server::tls(tls, ServeLimits::default()).await;
        let node = live(past.leaf_until(&[NODE], &CLIENT, leaf_until));
        let tls = agent_client_tls(Some(node), present.roots(), clock(), trust_domain());
        let client = server.connect(&tls).await.unwrap();
        let standing = Standing::Expired { by: 179 * DAY };
        assert_eq!(client.call(0).await.unwrap(), format!("{NODE} {standing:?}"));
    }
}

#[tokio::test]
async fn an_expired_peer_of_another_ca_is_refused() {
    let ca = TestCa::new("1");
    let server = enrolment(&ca, ca.agent()).await;
    let impostor = live(TestCa::new("1").leaf_until(&[NODE], &CLIENT, now() - DAY));
    let tls = agent_client_tls(Some(impostor), ca.roots(), clock(), trust_domain());
    assert!(matches!(server.connect(&tls).await, Err(ConnectError::RefusedByAgent { .. })));
    server.has_refused("does not chain to a trusted root").await;
}

#[tokio::test]
async fn an_expired_peer_must_still_be_a_client() {
    let ca = TestCa::new("1");
    let server = enrolment(&ca, ca.agent()).await;
    for leaf in [ca.leaf_until(&[NODE], &[], now() - DAY), ca.leaf_until(&[NODE, NODE], &CLIENT, now() - DAY)]
    {
        raw::connect(server.address, raw::client_config(Some(leaf), &[b"h2"])).await.unwrap_err();
    }
    server.has_refused("does not carry clientAuth").await;
    server.has_refused("2 URI names").await;
}

#[tokio::test]
async fn a_first_contact_learns_the_root_that_its_token_names() {
    let ca = TestCa::new("1");
    let server = enrolment(&ca, ca.agent_with_root()).await;
    let client = first_contact(&ca, &server).await.unwrap();
    assert_eq!(client.learnt_root, Some(ca.root_der()));
    assert_eq!(client.peer.certificate.as_ref().unwrap().id().to_string(), AGENT);
    assert_eq!(client.call(0).await.unwrap(), "nobody");
}

#[tokio::test]
async fn a_first_contact_trusts_nobody_on_first_use() {
    let (ca, attacker) = (TestCa::new("1"), TestCa::new("1"));
    let server = enrolment(&attacker, attacker.agent_with_root()).await;
    let refused = first_contact(&ca, &server).await.err().unwrap();
    assert!(matches!(refused, ConnectError::AgentRefused(CertificateRefused::OtherRoot)), "{refused:?}");

    // Roots are public: who shows ours must also chain to it.
    let (mut chain, key) = attacker.leaf(&[AGENT], &SERVER);
    chain.push(ca.root_der());
    let server = enrolment(&attacker, live((chain, key))).await;
    let refused = first_contact(&ca, &server).await.err().unwrap();
    assert!(matches!(refused, ConnectError::AgentRefused(CertificateRefused::Chain(_))), "{refused:?}");
}

#[tokio::test]
async fn a_first_contact_refuses_an_agent_that_hides_its_root_and_whoever_is_no_agent() {
    let ca = TestCa::new("1");
    let server = enrolment(&ca, ca.agent()).await;
    let refused = first_contact(&ca, &server).await.err().unwrap();
    assert!(matches!(refused, ConnectError::AgentRefused(CertificateRefused::OtherRoot)), "{refused:?}");

    let (mut chain, key) = ca.leaf(&[NODE], &SERVER);
    chain.push(ca.root_der());
    let server = enrolment(&ca, live((chain, key))).await;
    let refused = first_contact(&ca, &server).await.err().unwrap();
    assert!(matches!(refused, ConnectError::AgentRefused(CertificateRefused::NotAnAgent(_))), "{refused:?}");
}

#[tokio::test]
async fn a_first_contact_after_a_rollover_finds_the_old_root_of_its_token() {
    let (old, new) = (TestCa::new("1"), TestCa::new("2"));
    let (mut chain, key) = new.leaf(&[AGENT], &SERVER);
    chain.extend([new.root_signed_by(&old, "2"), new.root_der(), old.root_der()]);
    let server = enrolment(&new, live((chain, key))).await;
    for ca in [&old, &new] {
        assert_eq!(first_contact(ca, &server).await.unwrap().learnt_root, Some(ca.root_der()));
    }
}

#[tokio::test]
async fn asking_the_time_forgives_dates_and_nothing_else() {
    let ca = TestCa::new("1");
    let server = enrolment(&ca, ca.agent_with_root()).await;
    for (clock, standing) in [
        (clock_at(SystemTime::UNIX_EPOCH), "NotYetValid"),
        (clock_at(now() + 365 * DAY), "Expired"),
        (clock(), "Valid"),
    ] {
        let pinned = agent_client_tls(None, ca.roots(), Arc::clone(&clock), trust_domain());
        for tls in [pinned, first_contact_tls(fingerprint(&ca.root_der()), Arc::clone(&clock))] {
            if standing != "Valid" {
                let refused = server.connect(&tls).await.err().unwrap();
                assert!(
                    matches!(refused, ConnectError::CertificateDates { whose: Whose::Agents }),
                    "{refused:?}"
                );
            }
            let client = server.connect(&tls.ignoring_dates()).await.unwrap();
            assert!(format!("{:?}", client.peer.standing).starts_with(standing));
            client.call(0).await.unwrap();
        }
    }
    let impostor = TestCa::new("1");
    let server = enrolment(&impostor, impostor.agent_with_root()).await;
    let tls =
        agent_client_tls(None, ca.roots(), clock_at(now() + 365 * DAY), trust_domain()).ignoring_dates();
    assert!(matches!(
        server.connect(&tls).await,
        Err(ConnectError::AgentRefused(CertificateRefused::Chain(_)))
    ));
    let server = enrolment(&ca, live(ca.leaf(&[NODE], &SERVER))).await;
    let tls = agent_client_tls(None, ca.roots(), clock(), trust_domain()).ignoring_dates();
    assert!(matches!(
        server.connect(&tls).await,
        Err(ConnectError::AgentRefused(CertificateRefused::NotAnAgent(_)))
    ));
}
