//! Certificates made by rcgen, read back.

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType, SerialNumber,
    date_time_ymd,
};

use super::*;

const NODE: &str = "spiffe://fleet.example/cluster/0b5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44/node/cp-1";

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn params(names: Vec<SanType>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    params.serial_number = Some(SerialNumber::from_slice(Serial::new(258, [0x80; 8]).unwrap().as_bytes()));
    params.not_before = date_time_ymd(2026, 1, 1);
    params.not_after = date_time_ymd(2026, 1, 8);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params
}

fn read(params: &CertificateParams) -> Result<Certificate, CertificateError> {
    Certificate::from_der(params.clone().self_signed(&KeyPair::generate().unwrap()).unwrap().der())
}

#[test]
fn a_leaf_is_read_with_its_id_serial_dates_and_usages() {
    let leaf = read(&params(vec![uri(NODE)])).unwrap();
    assert_eq!(leaf.id().to_string(), NODE);
    assert_eq!(leaf.serial(), Serial::new(258, [0x80; 8]).unwrap());
    assert_eq!(leaf.serial().issue_number(), 258);
    assert_eq!(leaf.not_after().duration_since(leaf.not_before()).unwrap(), Duration::from_secs(7 * 86_400));
    assert!(leaf.has_client_auth() && !leaf.has_server_auth());
}

#[test]
fn other_kinds_of_names_are_ignored() {
    let dns = SanType::DnsName("agent.example".try_into().unwrap());
    assert_eq!(read(&params(vec![dns, uri(NODE)])).unwrap().id().to_string(), NODE);
}

#[test]
fn none_or_two_uri_names_are_refused() {
    assert_eq!(read(&params(vec![])), Err(CertificateError::UriNames(0)));
    assert_eq!(read(&params(vec![uri(NODE), uri(NODE)])), Err(CertificateError::UriNames(2)));
    let foreign = vec![uri(NODE), uri("https://example.org")];
    assert_eq!(
        read(&params(foreign)),
        Err(CertificateError::UriNames(2)),
        "a second URI counts, whatever its scheme"
    );
}

#[test]
fn a_uri_that_is_no_fleet_identity_is_refused() {
    for text in ["https://fleet.example/agent/a", "spiffe://fleet.example/agent/*", "spiffe://other"] {
        assert!(matches!(read(&params(vec![uri(text)])), Err(CertificateError::Id(_))), "{text}");
    }
}

#[test]
fn a_certificate_authority_is_no_leaf() {
    let mut params = params(vec![uri(NODE)]);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    assert_eq!(read(&params), Err(CertificateError::Authority));
}

#[test]
fn no_or_any_extended_key_usage_grants_neither_role() {
    let mut params = params(vec![uri(NODE)]);
    for usages in [vec![], vec![ExtendedKeyUsagePurpose::Any]] {
        params.extended_key_usages = usages;
        let leaf = read(&params).unwrap();
        assert!(!leaf.has_client_auth() && !leaf.has_server_auth());
    }
}

#[test]
fn a_serial_of_more_than_16_bytes_is_refused() {
    let mut params = params(vec![uri(NODE)]);
    params.serial_number = Some(SerialNumber::from_slice(&[1; 17]));
    assert_eq!(read(&params), Err(CertificateError::Serial));
    params.serial_number = Some(SerialNumber::from_slice(&[0xff; 16]));
    assert_eq!(read(&params), Err(CertificateError::Serial), "the top bit is not an issue number's");
}

#[test]
fn small_serials_keep_their_leading_zeros() {
    let mut params = params(vec![uri(NODE)]);
    params.serial_number = Some(SerialNumber::from_slice(&[5]));
    let leaf = read(&params).unwrap();
    assert_eq!(leaf.serial().issue_number(), 0);
    assert_eq!(leaf.serial().to_string(), "00000000000000000000000000000005");
    assert_eq!(Serial::new(1 << 63, [0; 8]), None);
}

#[test]
fn trailing_bytes_and_rubbish_are_refused() {
    let certificate = params(vec![uri(NODE)]).self_signed(&KeyPair::generate().unwrap()).unwrap();
    let mut der = certificate.der().to_vec();
    der.push(0);
    assert_eq!(Certificate::from_der(&der), Err(CertificateError::Malformed));
    assert_eq!(Certificate::from_der(b""), Err(CertificateError::Malformed));
    assert_eq!(Certificate::from_der(&vec![0x30; MAX_CERTIFICATE + 1]), Err(CertificateError::TooLong));
}

#[test]
fn dates_are_judged_at_the_time_that_is_named() {
    let leaf = read(&params(vec![uri(NODE)])).unwrap();
    let day = Duration::from_secs(86_400);
    assert_eq!(leaf.judge(leaf.not_before()), Standing::Valid);
    assert_eq!(leaf.judge(leaf.not_after()), Standing::Valid);
    assert_eq!(leaf.judge(leaf.not_after() + day), Standing::Expired { by: day });
    assert_eq!(leaf.judge(leaf.not_before() - day), Standing::NotYetValid { by: day });
}

#[test]
fn a_pem_chain_is_read_in_order_and_bounded() {
    let certificate =
        |name: &str| params(vec![uri(name)]).self_signed(&KeyPair::generate().unwrap()).unwrap();
    let (first, second) = (certificate(NODE), certificate("spiffe://f/agent/a"));
    let chain = split_pem_chain(format!("{}{}", first.pem(), second.pem()).as_bytes()).unwrap();
    assert_eq!(chain, [first.der().clone(), second.der().clone()]);
    assert_eq!(split_pem_chain(b""), Err(CertificateError::Empty));
    assert_eq!(split_pem_chain(first.pem().repeat(9).as_bytes()), Err(CertificateError::TooLong));
}
