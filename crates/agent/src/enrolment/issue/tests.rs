use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use fleet_kms_identity::{Certificate, JoinToken, KeyPair};
use fleet_kms_store::contract::Fault;

use super::*;
use crate::enrolment::rig::{CLUSTER, DAY, Rig, generator, leaf, open, secret};
use crate::enrolment::tokens::{DEFAULT_LIFE, TokenRefused, TokenTerms};
use crate::identities::SerialStanding;
use crate::records::payload::{ClusterRecord, TokenRecord};

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

fn standing(rig: &Rig, certificate: &Certificate) -> SerialStanding {
    rig.identities.find(certificate.id()).unwrap().standing_of(certificate)
}

async fn refused(rig: &Rig, join: &Join) -> EnrolError {
    rig.issuer.enrol(join).await.unwrap_err()
}

#[tokio::test]
async fn a_token_and_a_key_become_an_identity_that_may_connect() {
    let rig = Rig::new().await;
    let (token, key) = (rig.token("cp1").await, key());
    let certified = rig.issuer.enrol(&Rig::join(&token, &key, "")).await.unwrap();
    let certificate = leaf(&certified);
    assert_eq!(
        certificate.id().to_string(),
        "spiffe://fleet.test/cluster/07070707-0707-0707-0707-070707070707/node/cp1"
    );
    assert_eq!(certificate.spki_sha256(), &key.spki_sha256());
    assert_eq!(certificate.serial().issue_number(), 1);
    assert_eq!(standing(&rig, &certificate), SerialStanding::Current);
    let row: TokenRecord = rig.read(rows::token(&token.hash())).await.unwrap();
    assert_eq!((row.uses_left, row.used.len()), (0, 1));
    assert!(rig.permit(&certificate).is_ok());
}

#[tokio::test]
async fn a_csr_that_asks_for_a_cas_rights_gets_the_tokens_name() {
    let rig = Rig::new().await;
    let token = rig.token("cp1").await;
    let asker = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "spiffe://fleet.test/admin/root");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let csr = params.serialize_request(&asker).unwrap();
    let address = "192.0.2.1".parse().unwrap();
    let join = rig.issuer.read_join(&secret(&token), csr.der(), String::new(), address).await.unwrap();
    let certificate = leaf(&rig.issuer.enrol(&join).await.unwrap());
    assert_eq!(certificate.id().subject.name().as_str(), "cp1");
    assert!(certificate.id().subject.cluster().is_some());
}

#[tokio::test]
async fn a_csr_that_asks_for_a_name_is_refused_costs_a_guess_and_leaves_the_token_good() {
    let rig = Rig::new().await;
    let token = rig.token("cp1").await;
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names =
        vec![rcgen::SanType::URI("spiffe://fleet.test/admin/root".try_into().unwrap())];
    let csr = params.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap();
    let address = "192.0.2.1".parse().unwrap();
    let mut refused = Vec::new();
    for _ in 0..21 {
        let join = rig.issuer.read_join(&secret(&token), csr.der(), String::new(), address).await;
        refused.push(join.unwrap_err().reason());
    }
    assert_eq!(refused.iter().filter(|reason| **reason == "csr").count(), 20);
    assert_eq!(refused.last(), Some(&"rate_limited"));
    let elsewhere = Rig::join_from(&token, &key(), "", "192.0.2.2");
    rig.issuer.enrol(&elsewhere).await.unwrap();
}

#[tokio::test]
async fn the_same_token_and_key_get_the_same_certificate_again_even_when_the_token_is_over() {
    let rig = Rig::new().await;
    let (token, key) = (rig.token("cp1").await, key());
    let join = Rig::join(&token, &key, "");
    let first = rig.issuer.enrol(&join).await.unwrap();
    rig.pass(DAY);
    let again = rig.issuer.enrol(&join).await.unwrap();
    assert_eq!(first.chain, again.chain);
    assert!(again.again && !first.again);
}

#[tokio::test]
async fn another_token_with_the_same_key_is_a_new_enrolment() {
    let rig = Rig::new().await;
    let key = key();
    let old = rig.enrol("cp1", &key).await.unwrap();
    let error = refused(&rig, &Rig::join(&rig.token("").await, &key, "cp1")).await;
    assert!(matches!(error, EnrolError::NameTaken));
    let new = rig.enrol("cp1", &key).await.unwrap();
    assert_eq!(
        (standing(&rig, &old), standing(&rig, &new)),
        (SerialStanding::Superseded, SerialStanding::Current)
    );
}

#[tokio::test]
async fn a_certificate_handed_out_again_may_connect_to_this_agent() {
    let rig = Rig::new().await;
    let (token, key) = (rig.token("cp1").await, key());
    let join = Rig::join(&token, &key, "");
    let id = rig.issuer.enrol(&join).await.unwrap().id;
    // As if another agent had issued it.
    rig.forget(&id);
    rig.issuer.enrol(&join).await.unwrap();
    let node = leaf(&rig.issuer.enrol(&join).await.unwrap());
    assert_eq!(standing(&rig, &node), SerialStanding::Current);

    let next = self::key();
    rig.renew(&node, &next).await.unwrap();
    rig.forget(&id);
    let renewed = rig.renew(&node, &next).await.unwrap();
    assert_eq!(standing(&rig, &renewed), SerialStanding::Next);
}

#[tokio::test]
async fn a_used_token_does_not_help_another_key() {
    let rig = Rig::new().await;
    let token = rig.token("cp1").await;
    rig.issuer.enrol(&Rig::join(&token, &key(), "")).await.unwrap();
    let error = refused(&rig, &Rig::join(&token, &key(), "")).await;
    assert!(matches!(error, EnrolError::Token(TokenRefused::UsedUp)));
}

#[tokio::test]
async fn each_refused_token_is_audited_with_its_reason_and_not_consumed() {
    let rig = Rig::new().await;
    let other_fleet = JoinToken::generate([0; 32], rig.now(), &mut *generator());
    let net = TokenTerms::new(CLUSTER, None, Some("cp-*"), Some("10.0.0.0/8"), 1, DEFAULT_LIFE).unwrap();
    let net = rig.token_with(net).await;
    let key = key();
    let unknown = refused(&rig, &Rig::join(&other_fleet, &key, "cp-1")).await;
    let address = refused(&rig, &Rig::join(&net, &key, "cp-1")).await;
    let node = refused(&rig, &Rig::join_from(&net, &key, "worker-1", "10.1.1.1")).await;
    let missing = refused(&rig, &Rig::join_from(&net, &key, "", "10.1.1.1")).await;
    let form = refused(&rig, &Rig::join_from(&net, &key, "..", "10.1.1.1")).await;
    rig.pass(DEFAULT_LIFE);
    let expired = refused(&rig, &Rig::join_from(&net, &key, "cp-1", "10.1.1.1")).await;
    for (error, reason) in [
        (unknown, "token_unknown"),
        (address, "token_address"),
        (node, "token_node"),
        (missing, "token_node_missing"),
        (form, "node_form"),
        (expired, "token_expired"),
    ] {
        assert_eq!(error.reason(), reason);
        assert!(rig.audit().contains(reason), "{reason} is not in the audit");
    }
    let row: TokenRecord = rig.read(rows::token(&net.hash())).await.unwrap();
    assert_eq!((row.uses_left, row.used.len()), (1, 0));
}

#[tokio::test]
async fn no_token_is_ever_in_the_audit_or_the_store() {
    let rig = Rig::new().await;
    let (token, key) = (rig.token("cp1").await, key());
    rig.issuer.enrol(&Rig::join(&token, &key, "")).await.unwrap();
    let _ = refused(&rig, &Rig::join(&token, &self::key(), "")).await;
    let secret = secret(&token);
    let spellings = [data_encoding::HEXLOWER.encode(&secret), data_encoding::BASE64URL_NOPAD.encode(&secret)];
    for text in spellings.iter().chain([&token.to_text().to_string()]) {
        assert!(!rig.audit().contains(text.as_str()));
    }
    for row in rig.changes.ledger().scan_rows("").await.unwrap() {
        assert!(!row.bytes.windows(32).any(|window| window == secret));
    }
}

#[tokio::test]
async fn a_token_without_a_name_never_takes_over_a_node_that_exists() {
    let rig = Rig::new().await;
    let old = rig.enrol("cp1", &key()).await.unwrap();
    let error = refused(&rig, &Rig::join(&rig.token("").await, &key(), "cp1")).await;
    assert!(matches!(error, EnrolError::NameTaken));
    assert_eq!(standing(&rig, &old), SerialStanding::Current);
}

#[tokio::test]
async fn a_token_bound_to_a_node_replaces_it_and_supersedes_its_serials() {
    let rig = Rig::new().await;
    let old = rig.enrol("cp1", &key()).await.unwrap();
    let pending = rig.renew(&old, &key()).await.unwrap();
    let new = rig.enrol("cp1", &key()).await.unwrap();
    assert_eq!(standing(&rig, &old), SerialStanding::Superseded);
    assert_eq!(standing(&rig, &pending), SerialStanding::Superseded);
    assert_eq!(standing(&rig, &new), SerialStanding::Current);
}

#[tokio::test]
async fn a_banned_node_does_not_come_back_by_a_token() {
    let rig = Rig::new().await;
    let (token, key) = (rig.token("cp1").await, key());
    let join = Rig::join(&token, &key, "");
    let certificate = leaf(&rig.issuer.enrol(&join).await.unwrap());
    rig.ban(certificate.id()).await;
    assert!(matches!(refused(&rig, &join).await, EnrolError::Banned));
    let error = rig.enrol("cp1", &self::key()).await.unwrap_err();
    assert!(matches!(error, EnrolError::Banned));
    assert!(rig.identity(certificate.id()).await.banned_ms != 0);
}

#[tokio::test]
async fn a_token_of_a_retired_cluster_is_refused() {
    let rig = Rig::new().await;
    let token = rig.token("cp1").await;
    rig.edit(rows::cluster(&CLUSTER), |cluster: &mut ClusterRecord| cluster.retired_ms = 1).await;
    assert!(matches!(refused(&rig, &Rig::join(&token, &key(), "")).await, EnrolError::Retired));
}

#[tokio::test]
async fn a_reusable_token_makes_as_many_nodes_as_it_has_uses() {
    let rig = Rig::new().await;
    let terms = TokenTerms::new(CLUSTER, None, Some("cp-*"), None, 3, DEFAULT_LIFE).unwrap();
    let token = rig.token_with(terms).await;
    for n in 0..3 {
        rig.issuer.enrol(&Rig::join(&token, &key(), &format!("cp-{n}"))).await.unwrap();
    }
    let error = refused(&rig, &Rig::join(&token, &key(), "cp-3")).await;
    assert!(matches!(error, EnrolError::Token(TokenRefused::UsedUp)));
}

#[tokio::test]
async fn guessed_tokens_are_limited_by_address_and_starve_nobody_else() {
    let rig = Rig::new().await;
    let old = rig.enrol("cp1", &key()).await.unwrap();
    let csr = key().csr_der().unwrap();
    let mut limited = 0;
    for n in 0..1_000_u32 {
        let mut guess = [0; 32];
        guess[..4].copy_from_slice(&n.to_be_bytes());
        let join = Join::parse(&guess, &csr, "cp9".to_owned(), "198.51.100.1".parse().unwrap()).unwrap();
        limited += usize::from(matches!(refused(&rig, &join).await, EnrolError::Limited(_)));
    }
    assert_eq!(limited, 980);
    assert_eq!(rig.audit().matches("token_unknown").count(), 20);
    assert_eq!(rig.audit().matches("rate_limited").count(), 1);
    rig.renew(&old, &key()).await.unwrap();
    rig.enrol("cp2", &key()).await.unwrap();
}

#[tokio::test]
async fn next_becomes_current_when_it_is_seen_in_use_and_only_then() {
    let rig = Rig::new().await;
    let old = rig.enrol("cp1", &key()).await.unwrap();
    let new = rig.renew(&old, &key()).await.unwrap();
    assert_eq!((standing(&rig, &old), standing(&rig, &new)), (SerialStanding::Current, SerialStanding::Next));
    rig.issuer.promote(new.id(), &new.serial()).await.unwrap();
    assert_eq!(
        (standing(&rig, &old), standing(&rig, &new)),
        (SerialStanding::Superseded, SerialStanding::Current)
    );
    let lines = rig.audit().lines().count();
    rig.issuer.promote(new.id(), &new.serial()).await.unwrap();
    rig.issuer.promote(new.id(), &old.serial()).await.unwrap();
    assert_eq!(rig.audit().lines().count(), lines);
    assert_eq!(standing(&rig, &new), SerialStanding::Current);
}

#[tokio::test]
async fn a_change_by_another_agent_is_seen_by_a_refresh() {
    let rig = Rig::new().await;
    let node = rig.enrol("cp1", &key()).await.unwrap();
    rig.edit(rows::identity(node.id()), |record: &mut IdentityRecord| record.banned_ms = 1).await;
    assert!(rig.permit(&node).is_ok());
    rig.issuer.refresh(node.id()).await.unwrap();
    assert!(rig.permit(&node).is_err());
}

#[tokio::test]
async fn a_lost_issue_number_stops_issuing_instead_of_starting_again() {
    let rig = Rig::new().await;
    let token = rig.token("cp1").await;
    let prepare = || async {
        let mut changeset = rig.changes.ledger().changeset();
        let last = rig.changes.ledger().read::<IssuedRecord>(&rows::fixed(rows::ISSUED)).await?.unwrap();
        changeset.delete(&last);
        Ok::<_, LedgerError>((changeset, ()))
    };
    rig.changes.run(crate::trail::Intent::new("edit", "test"), prepare).await.unwrap();
    let error = refused(&rig, &Rig::join(&token, &key(), "")).await;
    assert_eq!(error.reason(), "store_damaged");
}

#[tokio::test]
async fn a_transaction_that_applies_late_does_not_stop_later_ones() {
    let rig = Rig::new().await;
    rig.enrol("cp1", &key()).await.unwrap();
    let (token, key) = (rig.token("cp2").await, key());
    let join = Rig::join(&token, &key, "");
    rig.store.inject(Fault::Late);
    // The ledger does not guess: it moves the head, and so finds out that the transaction has applied.
    assert!(!rig.issuer.enrol(&join).await.unwrap().again);
    rig.enrol("cp3", &self::key()).await.unwrap();
    assert!(rig.issuer.enrol(&join).await.unwrap().again);
    rig.enrol("cp4", &self::key()).await.unwrap();
}

/// Faults of the store at every third commit; each client asks again with the same
/// token and key until it has its certificate, as a sidecar does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_thousand_enrolments_with_lost_replies_no_serial_is_issued_twice() {
    const NODES: usize = 1_000;
    let rig = Arc::new(Rig::new().await);
    let terms = TokenTerms::new(CLUSTER, None, None, None, 1_500, DEFAULT_LIFE).unwrap();
    let token = rig.token_with(terms).await;
    let faults = [Fault::ReplyLost, Fault::RequestLost, Fault::NotApplied, Fault::Late];
    for n in 0..NODES {
        rig.store.inject((n % 3 == 0).then(|| faults[n / 3 % faults.len()]));
    }
    let secret = Arc::new(secret(&token));
    let tasks: Vec<_> = (0..NODES)
        .map(|n| {
            let (rig, secret) = (Arc::clone(&rig), Arc::clone(&secret));
            tokio::spawn(async move {
                let csr = key().csr_der().unwrap();
                // Clients come from everywhere, and their first reply is lost.
                let address = format!("10.0.{}.{}", n / 250, n % 250).parse().unwrap();
                let join = Join::parse(&secret, &csr, format!("n{n}"), address).unwrap();
                let (mut seen, mut failures) = (Vec::new(), 0);
                while seen.len() < 2 && failures < 20 {
                    match rig.issuer.enrol(&join).await {
                        Ok(certified) => seen.push(leaf(&certified)),
                        Err(EnrolError::Limited(_)) => {
                            rig.pass(Duration::from_millis(10));
                            tokio::task::yield_now().await;
                        }
                        Err(EnrolError::Failed(_)) => failures += 1,
                        Err(error) => panic!("{error}"),
                    }
                }
                assert_eq!(seen.len(), 2, "node {n} did not get its certificate twice");
                assert_eq!(seen[0], seen[1]);
                seen.remove(0)
            })
        })
        .collect();
    let mut certificates = Vec::new();
    for task in tasks {
        certificates.push(task.await.unwrap());
    }
    let serials: BTreeSet<_> = certificates.iter().map(Certificate::serial).collect();
    let numbers: BTreeSet<_> = serials.iter().map(|serial| serial.issue_number()).collect();
    assert_eq!((serials.len(), numbers.len()), (NODES, NODES));
    for certificate in &certificates {
        let record = rig.identity(certificate.id()).await;
        assert_eq!(record.current.unwrap().serial, certificate.serial().as_bytes());
    }
    let row: TokenRecord = rig.read(rows::token(&token.hash())).await.unwrap();
    assert_eq!(row.uses_left, 500);
    let check = rig.changes.ledger().check().await.unwrap();
    assert!(matches!(check, crate::ledger::Integrity::Intact { .. }), "{check:?}");
}

#[tokio::test]
async fn two_agents_that_issue_at_once_share_the_issue_numbers() {
    let rig = Rig::new().await;
    let authorities = Authorities::load(rig.changes.ledger(), "fleet.test".parse().unwrap(), open).await;
    let other = Issuer::new(
        Arc::clone(&rig.changes),
        Arc::new(ArcSwap::from_pointee(authorities.unwrap())),
        Arc::new(LiveIdentities::default()),
        generator,
    );
    let mut numbers = BTreeSet::new();
    for n in 0..20 {
        let (one, two) = (rig.token(&format!("a{n}")).await, rig.token(&format!("b{n}")).await);
        let (one, two) = (Rig::join(&one, &key(), ""), Rig::join(&two, &key(), ""));
        let (one, two) = tokio::join!(rig.issuer.enrol(&one), other.enrol(&two));
        numbers.extend([one, two].map(|certified| leaf(&certified.unwrap()).serial().issue_number()));
    }
    assert_eq!(numbers, (1..=40).collect());
}

#[tokio::test]
async fn an_enrolment_that_the_store_does_not_take_leaves_the_token_as_it_was() {
    let rig = Rig::new().await;
    let (token, key) = (rig.token("cp1").await, key());
    let join = Rig::join(&token, &key, "");
    rig.store.inject(Fault::NotApplied);
    assert_eq!(refused(&rig, &join).await.reason(), "store");
    let row: TokenRecord = rig.read(rows::token(&token.hash())).await.unwrap();
    assert_eq!(row.uses_left, 1);
    rig.issuer.enrol(&join).await.unwrap();
}
