//! Enrolment, renewal and power cuts at every step between.

use std::{fs, os::unix::fs::PermissionsExt};

use rcgen::{CertificateParams, SanType};

use super::*;

fn chain_for(key: &KeyPair) -> String {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI("spiffe://f/agent/a".try_into().unwrap())];
    params.serial_number = Some(vec![1].into());
    params.self_signed(&rcgen::KeyPair::from_pem(&key.to_pem()).unwrap()).unwrap().pem()
}

/// A directory with one installed identity, and that identity's key.
fn enrolled() -> (tempfile::TempDir, KeyPair) {
    let temp = tempfile::tempdir().unwrap();
    let key = KeyPair::generate().unwrap();
    let lock = Directory::open(temp.path()).unwrap().lock().unwrap();
    lock.stage_key(&key).unwrap();
    lock.install(&chain_for(&key)).unwrap();
    (temp, key)
}

fn loaded(temp: &tempfile::TempDir) -> StoredIdentity {
    Directory::open(temp.path()).unwrap().load().unwrap().unwrap()
}

#[test]
fn an_empty_directory_is_not_enrolled() {
    let temp = tempfile::tempdir().unwrap();
    let directory = Directory::open(temp.path()).unwrap();
    assert!(directory.load().unwrap().is_none());
    assert!(directory.roots().unwrap().is_none());
    assert_eq!(directory.state().unwrap(), State::default());
    assert!(directory.token().unwrap().is_none());
}

#[test]
fn a_staged_key_alone_is_not_enrolled_but_can_be_asked_for_again() {
    let temp = tempfile::tempdir().unwrap();
    let key = KeyPair::generate().unwrap();
    let lock = Directory::open(temp.path()).unwrap().lock().unwrap();
    lock.stage_key(&key).unwrap();
    assert!(lock.load().unwrap().is_none());
    assert_eq!(lock.staged_key().unwrap().unwrap().spki_sha256(), key.spki_sha256());
}

#[test]
fn an_installed_pair_is_loaded_and_its_key_is_private() {
    let (temp, key) = enrolled();
    assert_eq!(loaded(&temp).key.spki_sha256(), key.spki_sha256());
    let mode = |name: &str| fs::metadata(temp.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(KEY), mode(CHAIN)), (0o600, 0o644));
    assert!(!temp.path().join("key.pem.next").exists());
}

#[test]
fn a_renewal_keeps_the_pair_before_it() {
    let (temp, old) = enrolled();
    let new = KeyPair::generate().unwrap();
    let lock = Directory::open(temp.path()).unwrap().lock().unwrap();
    lock.stage_key(&new).unwrap();
    assert_eq!(loaded(&temp).key.spki_sha256(), old.spki_sha256(), "a staged key changes nothing");
    lock.install(&chain_for(&new)).unwrap();
    assert_eq!(loaded(&temp).key.spki_sha256(), new.spki_sha256());

    fs::write(temp.path().join(CHAIN), "torn").unwrap();
    let fallback = loaded(&temp);
    assert!(fallback.is_previous);
    assert_eq!(fallback.key.spki_sha256(), old.spki_sha256());
}

#[test]
fn a_power_cut_at_any_step_of_a_renewal_leaves_a_pair() {
    let (temp, old) = enrolled();
    let new = KeyPair::generate().unwrap();
    let path = |name: &str| temp.path().join(name);
    let is = |key: &KeyPair| assert_eq!(loaded(&temp).key.spki_sha256(), key.spki_sha256());
    fs::write(path("key.pem.next"), new.to_pem().as_bytes()).unwrap();
    is(&old);
    fs::write(path(".chain.pem.next.tmp"), "half").unwrap();
    is(&old);
    fs::write(path("chain.pem.next"), chain_for(&new)).unwrap();
    is(&new);
    fs::copy(path(KEY), path("key.pem.previous")).unwrap();
    is(&new);
    fs::copy(path(CHAIN), path("chain.pem.previous")).unwrap();
    is(&new);
    fs::rename(path("key.pem.next"), path(KEY)).unwrap();
    is(&new);
    fs::rename(path("chain.pem.next"), path(CHAIN)).unwrap();
    is(&new);
}

#[test]
fn a_chain_for_another_key_changes_nothing() {
    let (temp, key) = enrolled();
    let lock = Directory::open(temp.path()).unwrap().lock().unwrap();
    let other = chain_for(&KeyPair::generate().unwrap());
    assert!(matches!(lock.install(&other), Err(InstallError::OtherKey)));
    assert_eq!(loaded(&temp).key.spki_sha256(), key.spki_sha256());
    lock.install(&chain_for(&key)).unwrap();
}

#[test]
fn chains_without_their_keys_are_an_error_and_not_an_unenrolled_node() {
    let (temp, _) = enrolled();
    fs::write(temp.path().join(KEY), KeyPair::generate().unwrap().to_pem().as_bytes()).unwrap();
    let directory = Directory::open(temp.path()).unwrap();
    assert!(matches!(directory.load(), Err(LoadError::NoPair { .. })));
}

#[test]
fn a_second_process_is_told_who_holds_the_directory() {
    let (temp, _) = enrolled();
    let directory = Directory::open(temp.path()).unwrap();
    let held = directory.lock().unwrap();
    let error = directory.lock().unwrap_err();
    assert!(error.to_string().ends_with(&format!("is in use by process {}", std::process::id())), "{error}");
    drop(held);
    directory.lock().unwrap();
}

#[test]
fn roots_state_and_token_are_read_back() {
    let (temp, key) = enrolled();
    let lock = Directory::open(temp.path()).unwrap().lock().unwrap();
    lock.save_roots(&chain_for(&key)).unwrap();
    assert_eq!(lock.roots().unwrap().unwrap().len(), 1);
    let agent = AgentAddress { data: "10.0.0.1:7443".to_owned(), enrolment: "10.0.0.1:7444".to_owned() };
    let state = State { agents: vec![agent], highest_version: 3, ..State::default() };
    lock.save_state(&state).unwrap();
    assert_eq!(lock.state().unwrap(), state);
    fs::write(temp.path().join(TOKEN), "fkjt1.x").unwrap();
    assert_eq!(lock.token().unwrap().unwrap().as_str(), "fkjt1.x");
    lock.delete_token().unwrap();
    lock.delete_token().unwrap();
    assert!(lock.token().unwrap().is_none());
}

#[test]
fn state_of_a_newer_program_is_read_and_broken_state_is_named() {
    let (temp, _) = enrolled();
    let directory = Directory::open(temp.path()).unwrap();
    fs::write(temp.path().join(STATE), r#"{"highest_version": 7, "of_the_future": true}"#).unwrap();
    assert_eq!(directory.state().unwrap().highest_version, 7);
    fs::write(temp.path().join(STATE), "{").unwrap();
    assert!(directory.state().unwrap_err().to_string().contains(STATE));
}
