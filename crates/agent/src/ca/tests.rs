use std::time::Duration;

use fleet_kms_identity::{Certificate, KeyPair, StatementError};
use p256::ecdsa::signature::Verifier;
use p256::ecdsa::{Signature, VerifyingKey};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::*;
use crate::changes::ChangeError;
use crate::enrolment::rig::{DAY, Rig, generator, load, open, seal};
use crate::ledger::Ledger;
use crate::records::payload::{AuthorityRecord, AuthorityState};
use crate::records::rows;
use crate::times::to_ms;
use crate::trail::Intent;

fn parse(der: &[u8]) -> X509Certificate<'_> {
    X509Certificate::from_der(der).unwrap().1
}

fn serial(number: u64) -> Serial {
    Serial::new(number, [0xab; 8]).unwrap()
}

fn id(path: &str) -> SpiffeId {
    format!("spiffe://fleet.test/{path}").parse().unwrap()
}

const NODE: &str = "cluster/07070707-0707-0707-0707-070707070707/node/cp1";

fn issue(authorities: &Authorities, path: &str, now: SystemTime) -> (Vec<Vec<u8>>, Certificate) {
    let key = KeyPair::generate().unwrap();
    let leaf = authorities.issue(&id(path), &serial(9), &key.spki_der(), now).unwrap();
    let certificate = Certificate::from_der(&leaf.chain[0]).unwrap();
    assert_eq!(certificate.spki_sha256(), &key.spki_sha256());
    assert_eq!(certificate.not_after(), leaf.not_after);
    (leaf.chain, certificate)
}

#[tokio::test]
async fn the_chain_holds_from_leaf_to_root_and_all_begin_at_once() {
    let rig = Rig::new().await;
    let authorities = rig.authorities.load_full();
    rig.pass(Duration::from_secs(100 * 86_400));
    let (chain, leaf) = issue(&authorities, NODE, rig.now());
    assert_eq!(chain.len(), 2);
    let (leaf_x509, issuing, root) = (parse(&chain[0]), parse(&chain[1]), parse(authorities.root()));
    leaf_x509.verify_signature(Some(issuing.public_key())).unwrap();
    issuing.verify_signature(Some(root.public_key())).unwrap();
    root.verify_signature(None).unwrap();
    assert_eq!(leaf_x509.issuer(), issuing.subject());
    assert_eq!(issuing.issuer(), root.subject());
    let begin = root.validity().not_before;
    assert_eq!(issuing.validity().not_before, begin);
    assert_eq!(leaf_x509.validity().not_before, begin);
    assert_eq!(leaf.not_after(), whole_seconds(rig.now() + 7 * DAY));
    assert_eq!(leaf.serial(), serial(9));
}

#[tokio::test]
async fn the_cas_may_sign_certificates_and_nothing_longer_than_their_place() {
    let rig = Rig::new().await;
    let authorities = rig.authorities.load_full();
    let issuers = authorities.issuers(rig.now());
    let (issuing, root) = (parse(&issuers[0]), parse(authorities.root()));
    // Below a root: an issuing CA, and two later roots as their predecessors signed them.
    for (ca, path_length, signs_data) in [(&root, 3, false), (&issuing, 0, true)] {
        let constraints = ca.basic_constraints().unwrap().unwrap();
        assert!(constraints.critical && constraints.value.ca);
        assert_eq!(constraints.value.path_len_constraint, Some(path_length));
        let usage = ca.key_usage().unwrap().unwrap().value;
        assert!(usage.key_cert_sign() && !usage.crl_sign());
        assert_eq!(usage.digital_signature(), signs_data);
        assert!(ca.extended_key_usage().unwrap().is_none());
    }
    let years = |ca: &X509Certificate<'_>| {
        (ca.validity().not_after.timestamp() - ca.validity().not_before.timestamp()) / (365 * 86_400)
    };
    assert_eq!((years(&root), years(&issuing)), (10, 1));
}

#[tokio::test]
async fn what_a_leaf_is_good_for_follows_from_its_name() {
    let rig = Rig::new().await;
    let authorities = rig.authorities.load_full();
    let worker = "cluster/07070707-0707-0707-0707-070707070707/worker/w";
    let kinds = [(NODE, false, 7), (worker, false, 7), ("agent/a1", true, 7), ("admin/ada", false, 30)];
    for (path, serves, days) in kinds {
        let (chain, leaf) = issue(&authorities, path, rig.now());
        assert_eq!(leaf.id(), &id(path));
        assert_eq!((leaf.has_server_auth(), leaf.has_client_auth()), (serves, true), "{path}");
        assert_eq!(leaf.not_after(), rig.now() + days * DAY, "{path}");
        let x509 = parse(&chain[0]);
        assert_eq!(x509.subject_alternative_name().unwrap().unwrap().value.general_names.len(), 1);
        assert!(!x509.is_ca());
        let usage = x509.key_usage().unwrap().unwrap().value;
        assert!(usage.digital_signature() && !usage.key_cert_sign());
    }
}

#[tokio::test]
async fn a_leaf_never_outlives_its_issuer_and_an_expired_issuer_makes_none() {
    let rig = Rig::new().await;
    let authorities = rig.authorities.load_full();
    let end = authorities.issuing.not_after;
    assert!(!authorities.issuing_due(rig.now()));
    assert!(authorities.issuing_due(end - ISSUING_LIFE / 2 + Duration::from_secs(1)));
    let (_, late) = issue(&authorities, NODE, end - DAY);
    assert_eq!(late.not_after(), end);
    let key = KeyPair::generate().unwrap();
    let refused = authorities.issue(&id(NODE), &serial(1), &key.spki_der(), end).unwrap_err();
    assert!(matches!(refused, SignError::IssuingExpired));
    let rubbish = authorities.issue(&id(NODE), &serial(1), &[0x30, 0x00], rig.now()).unwrap_err();
    assert!(matches!(rubbish, SignError::PublicKey(_)));
}

#[tokio::test]
async fn a_time_answer_is_signed_by_the_issuing_ca_over_nonce_time_and_key() {
    let rig = Rig::new().await;
    let authorities = rig.authorities.load_full();
    let signature = authorities.sign_time(&[1; 32], 0x0102_0304_0506_0708, &[2; 32]).unwrap();
    let mut message = b"fleet-kms/time/1".to_vec();
    message.extend([1; 32]);
    message.extend([1, 2, 3, 4, 5, 6, 7, 8]);
    message.extend([2; 32]);
    let issuers = authorities.issuers(rig.now());
    let point = parse(&issuers[0]).public_key().subject_public_key.data.to_vec();
    let key = VerifyingKey::from_sec1_bytes(&point).unwrap();
    let signature = Signature::from_der(&signature).unwrap();
    key.verify(&message, &signature).unwrap();
    message[16] ^= 1;
    assert!(key.verify(&message, &signature).is_err());
}

#[tokio::test]
async fn a_checkpoint_is_judged_by_the_fleets_roots_alone() {
    let (rig, other) = (Rig::new().await, Rig::new().await);
    let authorities = rig.authorities.load_full();
    let signature = authorities.sign_checkpoint("text").unwrap();
    let (issuers, roots) = (authorities.issuers(rig.now()), [authorities.root().to_vec()]);
    let judge = |text: &str, signature: &[u8], roots: &[Vec<u8>]| {
        fleet_kms_identity::verify_statement(&fleet_kms_audit::message(text), signature, &issuers, roots)
    };
    assert_eq!(judge("text", &signature, &roots), Ok(()));
    assert_eq!(judge("texu", &signature, &roots), Err(StatementError::Signature));
    let foreign = other.authorities.load_full();
    assert_eq!(judge("text", &signature, &[foreign.root().to_vec()]), Err(StatementError::Chain));
    assert_eq!(
        judge("text", &foreign.sign_checkpoint("text").unwrap(), &roots),
        Err(StatementError::Signature)
    );
    let time = authorities.sign_time(&[1; 32], 1, &[2; 32]).unwrap();
    assert_eq!(judge("text", &time, &roots), Err(StatementError::Signature), "another context");
}

#[tokio::test]
async fn only_the_issuing_cas_key_is_opened_at_start() {
    let rig = Rig::new().await;
    let opened = std::sync::Mutex::new(Vec::new());
    let note = |row: &_, bytes: &[u8]| {
        opened.lock().unwrap().push(RowName::as_str(row).to_owned());
        open(row, bytes)
    };
    Authorities::load(rig.changes.ledger(), "fleet.test".parse().unwrap(), note).await.unwrap();
    assert_eq!(*opened.lock().unwrap(), ["ca-key/issuing/0000000001"]);
}

#[tokio::test]
async fn a_ca_without_its_own_key_is_refused() {
    let rig = Rig::new().await;
    let ledger = rig.changes.ledger();
    let row = rows::authority_key("issuing", 1);

    let root_key = ledger.scan_rows(rows::authority_key("root", 1).as_str()).await.unwrap().remove(0);
    let root_key = open(&root_key.name, &root_key.bytes).unwrap();
    replace(&rig, &row, Some(seal(&row, &root_key).unwrap())).await;
    assert!(matches!(load(ledger).await, Err(LoadError::ForeignKey)));

    replace(&rig, &row, Some(seal(&rows::authority_key("root", 1), &root_key).unwrap())).await;
    assert!(matches!(load(ledger).await, Err(LoadError::Open { kind: "issuing", .. })));

    replace(&rig, &row, None).await;
    assert!(matches!(load(ledger).await, Err(LoadError::NoKey("issuing"))));
}

#[tokio::test]
async fn exactly_one_generation_is_active() {
    let rig = Rig::new().await;
    let row = rows::authority("root", 1);
    rig.edit(row, |root: &mut AuthorityRecord| root.state = AuthorityState::Retiring.into()).await;
    let refused = load(rig.changes.ledger()).await;
    assert!(matches!(refused, Err(LoadError::Active { kind: "root", found: 0 })));
}

#[tokio::test]
async fn a_renewed_issuing_ca_is_under_the_same_root_and_what_the_old_one_made_stays_good() {
    let rig = Rig::new().await;
    let before = rig.authorities.load_full();
    let (old_chain, _) = issue(&before, NODE, rig.now());
    let early = rolled(&rig, Roll::IssuingIfDue).await;
    assert!(matches!(early, Err(ChangeError::Refused(RolloverError::NotDue))));
    // A year off, so that the old one has expired as well.
    rig.set(before.issuing.not_after + DAY);
    let after = roll_to(&rig, Roll::IssuingIfDue).await;
    let roots = |ca: &Authorities| ca.trusted_roots(Port::Enrolment, rig.now());
    assert_eq!((after.root(), roots(&after)), (before.root(), roots(&before)));
    assert!(!after.issuing_due(rig.now()));
    let (chain, leaf) = issue(&after, NODE, rig.now());
    assert_ne!(chain[1], old_chain[1]);
    assert_eq!(leaf.not_before(), Certificate::from_der(&old_chain[0]).unwrap().not_before());
    for chain in [&chain, &old_chain] {
        let (leaf, issuing) = (parse(&chain[0]), parse(&chain[1]));
        leaf.verify_signature(Some(issuing.public_key())).unwrap();
        issuing.verify_signature(Some(parse(after.root()).public_key())).unwrap();
    }
    let old: AuthorityRecord = rig.read(rows::authority("issuing", 1)).await.unwrap();
    assert_eq!((old.state, old.retired_ms), (AuthorityState::Retiring.into(), to_ms(rig.now())));
    assert!(rig.audit().contains("ca_issuing_renew"));
    assert!(keys(&rig).await == ["ca-key/issuing/0000000002", "ca-key/root/0000000001"]);
}

#[tokio::test]
async fn an_issuing_ca_is_not_renewed_without_the_roots_key() {
    let rig = Rig::new().await;
    replace(&rig, &rows::authority_key("root", 1), None).await;
    rig.pass(ISSUING_LIFE / 2 + DAY);
    let refused = rolled(&rig, Roll::IssuingIfDue).await;
    let Err(ChangeError::Refused(RolloverError::Load(LoadError::NoKey("root")))) = refused else {
        panic!("{refused:?}");
    };
    load(rig.changes.ledger()).await.unwrap();
}

/// Whether a chain (without its root) leads from its leaf to `root`.
fn leads_to(chain: &[Vec<u8>], root: &[u8]) -> bool {
    let root = parse(root);
    let is_by = |one: &X509Certificate<'_>, ca: &X509Certificate<'_>| {
        one.issuer() == ca.subject() && one.verify_signature(Some(ca.public_key())).is_ok()
    };
    let chain: Vec<_> = chain.iter().map(|der| parse(der)).collect();
    let unbroken = |end: usize| (0..end).all(|at| is_by(&chain[at], &chain[at + 1]));
    (0..chain.len()).any(|end| unbroken(end) && is_by(&chain[end], &root))
}

#[tokio::test]
async fn a_new_root_is_trusted_and_reached_by_who_knows_only_the_old_one() {
    let rig = Rig::new().await;
    let before = rig.authorities.load_full();
    let (old_chain, _) = issue(&before, NODE, rig.now());
    let after = roll_to(&rig, Roll::Root).await;
    let (chain, leaf) = issue(&after, NODE, rig.now());
    assert_eq!(chain.len(), 3);
    assert!(leads_to(&chain, before.root()) && leads_to(&chain, after.root()));
    assert!(!leads_to(&old_chain, after.root()), "what vouches for the old leaf is the old root alone");
    assert_eq!(leaf.not_before(), validity_of(before.root()).0);
    let cross_signed = parse(&chain[2]);
    assert_eq!(cross_signed.subject(), parse(after.root()).subject());
    assert_eq!(validity_of(&chain[2]).1, validity_of(before.root()).1);
    assert_eq!(keys(&rig).await, ["ca-key/issuing/0000000002", "ca-key/root/0000000002"]);
    assert_eq!(after.shown_roots(rig.now()), [after.root(), before.root()]);
}

#[tokio::test]
async fn a_replaced_root_is_trusted_as_long_as_what_it_vouches_for_may_come_to_each_port() {
    let rig = Rig::new().await;
    let old = rig.authorities.load_full().root().to_vec();
    let ca = roll_to(&rig, Roll::Root).await;
    let start = rig.now();
    for (port, days) in [(Port::Data, 7), (Port::Admin, 30), (Port::Enrolment, 187)] {
        let (last, second) = (start + days * DAY, Duration::from_secs(1));
        assert_eq!(ca.trusted_roots(port, last), [ca.root(), &*old], "{port:?}");
        assert_eq!(ca.trusted_roots(port, last + second), [ca.root()], "{port:?}");
        // A clock that was ahead for a while has forgotten nothing.
        assert_eq!(ca.trusted_roots(port, start).len(), 2, "{port:?}");
    }
    assert_eq!(ca.issuers(start + 187 * DAY).len(), 2);
    assert_eq!(ca.issuers(start + 188 * DAY).len(), 1);
}

#[tokio::test]
async fn a_chain_leads_over_two_rollovers_and_a_third_one_has_to_wait() {
    let rig = Rig::new().await;
    let first = rig.authorities.load_full();
    let second = roll_to(&rig, Roll::Root).await;
    let third = roll_to(&rig, Roll::Root).await;
    let (chain, _) = issue(&third, NODE, rig.now());
    for ca in [&first, &second, &third] {
        assert!(leads_to(&chain, ca.root()));
    }
    // What a peer takes at most: 6 certificates beside the leaf.
    assert_eq!(chain.len() - 1 + third.shown_roots(rig.now()).len(), 6);
    let refused = rolled(&rig, Roll::Root).await;
    assert!(matches!(refused, Err(ChangeError::Refused(RolloverError::Retiring))));
    rig.pass(188 * DAY);
    roll_to(&rig, Roll::Root).await;
}

#[tokio::test]
async fn a_root_is_prepared_when_half_its_life_is_over_and_used_when_every_node_has_heard_of_it() {
    let rig = Rig::new().await;
    let before = rig.authorities.load_full();
    assert_eq!(before.due(rig.now()), None);
    rig.set(before.ends().0 - ROOT_LIFE / 2 + Duration::from_secs(1));
    assert_eq!(before.due(rig.now()), Some(Roll::PrepareRoot));
    let prepared = roll_to(&rig, Roll::PrepareRoot).await;
    assert_eq!(prepared.root(), before.root());
    assert_eq!(prepared.issuers(rig.now()), before.issuers(rig.now()));
    let told = prepared.trusted_roots(Port::Enrolment, rig.now());
    assert_eq!((told.len(), &*told[0]), (2, before.root()));
    assert_eq!(prepared.due(rig.now()), Some(Roll::IssuingIfDue), "half of its year is long over");
    let prepared = roll_to(&rig, Roll::IssuingIfDue).await;
    assert_eq!(prepared.due(rig.now()), None);
    let early = rolled(&rig, Roll::RootIfPrepared).await;
    assert!(matches!(early, Err(ChangeError::Refused(RolloverError::NotDue))));

    rig.pass(7 * DAY);
    assert_eq!(prepared.due(rig.now()), Some(Roll::RootIfPrepared));
    let after = roll_to(&rig, Roll::RootIfPrepared).await;
    assert_eq!(after.root(), told[1]);
    assert_eq!(after.due(rig.now()), None);
    let (chain, _) = issue(&after, NODE, rig.now());
    assert!(leads_to(&chain, before.root()) && leads_to(&chain, after.root()));
    let audit = rig.audit();
    assert!(audit.contains("ca_root_prepare") && audit.contains("ca_root_renew"));
}

#[tokio::test]
async fn an_operator_need_not_wait_for_a_prepared_root() {
    let rig = Rig::new().await;
    rig.set(rig.authorities.load().ends().0 - ROOT_LIFE / 3);
    let prepared = roll_to(&rig, Roll::PrepareRoot).await;
    let told = prepared.trusted_roots(Port::Enrolment, rig.now());
    let after = roll_to(&rig, Roll::Root).await;
    assert_eq!(after.root(), told[1]);
    assert_eq!(after.generations().iter().filter(|one| one.kind == Kind::Root).count(), 2);
}

#[tokio::test]
async fn after_a_compromise_nothing_of_the_old_cas_is_left_and_nothing_leads_to_them() {
    let rig = Rig::new().await;
    rig.set(rig.authorities.load().ends().0 - ROOT_LIFE / 3);
    let before = roll_to(&rig, Roll::PrepareRoot).await;
    let after = roll_to(&rig, Roll::Compromised).await;
    let (chain, _) = issue(&after, NODE, rig.now());
    assert_eq!(chain.len(), 2);
    assert!(leads_to(&chain, after.root()) && !leads_to(&chain, before.root()));
    for port in [Port::Data, Port::Admin, Port::Enrolment] {
        assert_eq!(after.trusted_roots(port, rig.now()), [after.root()]);
    }
    assert_eq!(keys(&rig).await, ["ca-key/issuing/0000000002", "ca-key/root/0000000003"]);
    assert_eq!(after.generations().len(), 2);
    assert!(rig.audit().contains("ca_replace"));
}

#[tokio::test]
async fn a_rollover_that_the_store_refuses_leaves_the_cas_as_they_were() {
    let rig = Rig::new().await;
    for what in [Roll::Issuing, Roll::Root, Roll::Compromised] {
        let before = load(rig.changes.ledger()).await.unwrap();
        let no_seal = |_: &_, _: &[u8]| Err::<Vec<u8>, _>(std::io::Error::other("no"));
        let intent = Intent::new(what.action(), "test");
        let domain = before.trust_domain();
        let refused = roll(&rig.changes, domain, (what, intent), open, no_seal, generator).await;
        assert!(matches!(refused, Err(ChangeError::Refused(RolloverError::Seal(_)))), "{what:?}");
        let after = load(rig.changes.ledger()).await.unwrap();
        assert_eq!(before.revisions(), after.revisions(), "{what:?}");
        assert_eq!(&revisions(rig.changes.ledger()).await.unwrap(), after.revisions());
    }
}

fn validity_of(der: &[u8]) -> (SystemTime, SystemTime) {
    fleet_kms_identity::validity(der).unwrap()
}

async fn rolled(rig: &Rig, what: Roll) -> Result<(), ChangeError<RolloverError>> {
    let domain = "fleet.test".parse().unwrap();
    let intent = Intent::new(what.action(), "test");
    roll(&rig.changes, &domain, (what, intent), open, seal, generator).await
}

async fn roll_to(rig: &Rig, what: Roll) -> Authorities {
    rolled(rig, what).await.unwrap();
    load(rig.changes.ledger()).await.unwrap()
}

/// The rows of private keys.
async fn keys(rig: &Rig) -> Vec<String> {
    let rows = rig.changes.ledger().scan_revisions(rows::AUTHORITY_KEYS).await.unwrap();
    rows.iter().map(|(row, _)| row.as_str().to_owned()).collect()
}

async fn replace(rig: &Rig, row: &RowName, sealed: Option<Vec<u8>>) {
    let ledger: &Ledger = rig.changes.ledger();
    let prepare = || async {
        let mut changeset = ledger.changeset();
        let old = ledger.scan_rows(row.as_str()).await?.remove(0);
        match &sealed {
            Some(sealed) => changeset.replace_sealed(&old, sealed.clone()),
            None => changeset.delete_sealed(&old),
        }
        Ok::<_, fleet_kms_store::ReadError>((changeset, ()))
    };
    rig.changes.run(Intent::new("edit", "test"), prepare).await.unwrap();
}
