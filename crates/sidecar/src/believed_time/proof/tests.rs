use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SigningKey};

use super::*;

const NONCE: [u8; 32] = [1; 32];
const LIVE: [u8; 32] = [2; 32];

struct Authority {
    params: CertificateParams,
    key: KeyPair,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { params, key: KeyPair::generate().unwrap() }
    }

    fn root(&self) -> CertificateDer<'static> {
        self.params.self_signed(&self.key).unwrap().der().clone()
    }

    fn signed_by(&self, issuer: &Self) -> Vec<u8> {
        let issuer = Issuer::from_params(&issuer.params, &issuer.key);
        self.params.signed_by(&self.key, &issuer).unwrap().der().to_vec()
    }

    fn answer(&self, nonce: &[u8; 32], issuers: Vec<Vec<u8>>) -> TimeResponse {
        let unix_ms = 1_800_000_000_123_u64;
        let signed = [CONTEXT, nonce.as_slice(), &unix_ms.to_be_bytes(), LIVE.as_slice()].concat();
        let signature = self.key.sign(&signed).unwrap();
        TimeResponse { unix_ms, live_key_sha256: LIVE.to_vec(), signature, issuers }
    }
}

#[test]
fn an_answer_signed_under_a_pinned_root_is_believed() {
    let (root, issuing) = (Authority::new("root"), Authority::new("issuing"));
    let answer = issuing.answer(&NONCE, vec![issuing.signed_by(&root)]);
    let time = verify(&answer, &NONCE, &LIVE, &[root.root()]).unwrap();
    assert_eq!(time, SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_123));
}

#[test]
fn a_new_root_that_the_old_one_signed_is_followed() {
    let (old, new, issuing) = (Authority::new("old"), Authority::new("new"), Authority::new("issuing"));
    let answer = issuing.answer(&NONCE, vec![issuing.signed_by(&new), new.signed_by(&old)]);
    assert!(verify(&answer, &NONCE, &LIVE, &[old.root()]).is_ok());
    assert!(verify(&answer, &NONCE, &LIVE, &[new.root()]).is_ok());
}

#[test]
fn another_root_another_key_another_nonce_and_another_time_are_refused() {
    let (root, issuing) = (Authority::new("root"), Authority::new("issuing"));
    let answer = issuing.answer(&NONCE, vec![issuing.signed_by(&root)]);
    let imposter = Authority::new("root");
    assert_eq!(verify(&answer, &NONCE, &LIVE, &[imposter.root()]), Err(TimeProofError::Chain));
    assert_eq!(verify(&answer, &NONCE, &[3; 32], &[root.root()]), Err(TimeProofError::OtherKey));
    assert_eq!(verify(&answer, &[9; 32], &LIVE, &[root.root()]), Err(TimeProofError::Signature));
    let later = TimeResponse { unix_ms: answer.unix_ms + 1, ..answer.clone() };
    assert_eq!(verify(&later, &NONCE, &LIVE, &[root.root()]), Err(TimeProofError::Signature));
    let none = TimeResponse { issuers: Vec::new(), ..answer };
    assert_eq!(verify(&none, &NONCE, &LIVE, &[root.root()]), Err(TimeProofError::Issuers));
}

#[test]
fn a_leaf_cannot_sign_the_time() {
    let (root, mut leaf) = (Authority::new("root"), Authority::new("leaf"));
    leaf.params.is_ca = IsCa::ExplicitNoCa;
    let answer = leaf.answer(&NONCE, vec![leaf.signed_by(&root)]);
    assert_eq!(verify(&answer, &NONCE, &LIVE, &[root.root()]), Err(TimeProofError::Issuers));
}
