//! What no sound client sends: each gets its own clear refusal, and nobody else notices.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: what is not there fails them")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use data_encoding::BASE64;
use fleet_kms_identity::split_pem_chain;
use fleet_kms_tests::fleet::{Cluster, Fleet, Sidecar};
use fleet_kms_tests::kms_client::{Api, Failure, KmsClient};
use fleet_kms_tests::opened_store::OpenedStore;
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::tls_probe::{Answer, Shown, probe};
use fleet_kms_tests::wait;
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;

const NOT_OURS: &str = "the ciphertext was not made by this cluster's keys, or was altered";
/// A broken connection is closed once the client's first frames are judged, or after the handshake's 5 s.
const CLOSE_LIMIT: Duration = Duration::from_secs(20);

struct Node {
    cluster: Cluster,
    sidecar: Sidecar,
}

impl Node {
    fn new(fleet: &Fleet, name: &str) -> Self {
        let cluster = fleet.cluster(name).unwrap();
        let sidecar = fleet.sidecar(&cluster, "node-1").unwrap();
        Self { cluster, sidecar }
    }

    fn client(&self, api: Api) -> KmsClient {
        KmsClient::new(ClientVersion::V0_37_2, api, &self.sidecar.socket).unwrap()
    }

    fn refused(&self, api: Api, args: &[&str]) -> Failure {
        self.client(api).call(args).unwrap().refused().unwrap()
    }

    /// One request frame by frame; returns gRPC status and decoded text.
    fn raw(&self, args: &[&str]) -> (String, String) {
        let all: Vec<&str> = ["raw"].iter().chain(args).copied().collect();
        let answer = self.client(Api::V1).call(&all).unwrap().last().unwrap();
        let text = answer["grpc_message"].as_str().unwrap_or_default().replace("%20", " ");
        (answer["grpc_status"].as_str().unwrap_or_default().to_owned(), text)
    }

    fn lives(&mut self) {
        assert!(self.sidecar.running().unwrap().is_running().unwrap());
        for api in Api::ALL {
            self.client(api).call(&["round-trip", "-sizes", "4,32"]).unwrap().ok().unwrap();
        }
    }
}

/// What `encrypt` printed, with other cipher bytes.
fn altered(answer: &Value, alter: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut answer = answer.clone();
    let mut cipher = BASE64.decode(answer["cipher"].as_str().unwrap().as_bytes()).unwrap();
    alter(&mut cipher);
    answer["cipher"] = BASE64.encode(&cipher).into();
    answer.to_string()
}

/// Items of the audit's data chain by outcome, for one operation of one cluster.
fn outcomes(lines: &[Value], cluster: &Cluster, operation: &str) -> BTreeMap<String, u64> {
    let mut outcomes = BTreeMap::new();
    for line in lines {
        if line["cluster"] == cluster.id.as_str() && line["operation"] == operation {
            let outcome = line["outcome"].as_str().unwrap().to_owned();
            *outcomes.entry(outcome).or_default() += line["items"].as_u64().unwrap();
        }
    }
    outcomes
}

#[test]
fn every_dek_that_is_not_ours_gets_one_refusal_and_the_audit_says_why() {
    let mut fleet = Fleet::start().unwrap();
    let mut one = Node::new(&fleet, "one");
    let other = Node::new(&fleet, "other");
    for api in Api::ALL {
        let ours = one.client(api).call(&["encrypt"]).unwrap().last().unwrap();
        let foreign = other.client(api).call(&["encrypt"]).unwrap().last().unwrap();
        let bad = [
            foreign.to_string(),
            altered(&ours, |cipher| cipher[0] = 2),
            altered(&ours, |cipher| cipher.truncate(61)),
            altered(&ours, |cipher| *cipher.last_mut().unwrap() ^= 1),
            altered(&ours, |cipher| cipher[4] ^= 2),
        ];
        for answer in &bad {
            let refused = one.refused(api, &["decrypt", "-answer", answer]);
            assert_eq!(refused.code, "InvalidArgument", "{api:?} {answer}");
            assert_eq!(refused.error, format!("rpc error: code = InvalidArgument desc = {NOT_OURS}"));
        }
        // The key id stands in v2 beside the cipher too, and must be the cipher's own.
        let mut unknown: Value =
            serde_json::from_str(&altered(&ours, |cipher| cipher[5..21].fill(7))).unwrap();
        let refused = one.refused(api, &["decrypt", "-answer", &unknown.to_string()]);
        assert_eq!(refused.error, format!("rpc error: code = InvalidArgument desc = {NOT_OURS}"));
        if api == Api::V2 {
            unknown["key_id"] = "07070707-0707-0707-0707-070707070707".into();
            let refused = one.refused(api, &["decrypt", "-answer", &unknown.to_string()]);
            assert_eq!(refused.error, format!("rpc error: code = InvalidArgument desc = {NOT_OURS}"));
        }
    }
    one.lives();
    fleet.agent.stop().unwrap();
    let outcomes = outcomes(&fleet.agent.audit("data").unwrap(), &one.cluster, "unwrap");
    let count = |outcome: &str| outcomes.get(outcome).copied().unwrap_or_default();
    assert_eq!(
        ["foreign_cluster", "malformed", "altered", "unknown_key"].map(count),
        [2, 4, 4, 2],
        "{outcomes:?}"
    );
}

#[test]
fn plaintexts_that_cannot_be_wrapped_are_refused_by_name() {
    let fleet = Fleet::start().unwrap();
    let mut node = Node::new(&fleet, "sizes");
    for (api, limit) in [(Api::V1, 1_024), (Api::V2, 963)] {
        let long = format!("the plaintext is longer than {limit} bytes");
        let beyond = (limit + 1).to_string();
        for (size, code, text) in [
            ("0", "InvalidArgument", "the plaintext is empty"),
            (beyond.as_str(), "InvalidArgument", long.as_str()),
            ("1025", "InvalidArgument", long.as_str()),
            ("10485760", "OutOfRange", "decoded message length too large"),
        ] {
            let refused = node.refused(api, &["encrypt", "-size", size]);
            assert_eq!(refused.code, code, "{api:?} {size}: {}", refused.error);
            assert!(refused.error.contains(text), "{api:?} {size}: {}", refused.error);
        }
        node.client(api).call(&["round-trip", "-sizes", &limit.to_string()]).unwrap().ok().unwrap();
    }
    node.lives();
}

#[test]
fn a_deadline_that_has_passed_is_answered_as_such_and_a_malformed_one_is_named() {
    let fleet = Fleet::start().unwrap();
    let mut node = Node::new(&fleet, "deadlines");
    // One EncryptRequest with ten bytes of plaintext.
    let encrypt = ["-method", "/v1beta1.KeyManagementService/Encrypt", "-message", "Egpoa2poa2poa2po"];
    let with = |timeout: &'static str| {
        let args: Vec<&str> = encrypt.iter().copied().chain(["-grpc-timeout", timeout]).collect();
        node.raw(&args)
    };
    for timeout in ["0n", "1n", "1m"] {
        let (status, text) = with(timeout);
        assert_eq!(status, "4", "{timeout}: {text}");
        assert!(!text.is_empty(), "{timeout}");
    }
    for timeout in ["123456789S", "1", "x", "-1S"] {
        let (status, text) = with(timeout);
        assert_eq!(status, "3", "{timeout}: {text}");
        assert!(
            text.starts_with("grpc-timeout is malformed: 1 to 8 digits and one of H"),
            "{timeout}: {text}"
        );
    }
    node.lives();
}

#[test]
fn garbage_on_the_socket_closes_that_connection_and_no_other() {
    let fleet = Fleet::start().unwrap();
    let mut node = Node::new(&fleet, "garbage");
    let logs = tempfile::tempdir().unwrap();
    let mut others =
        node.client(Api::V2).start(&["loop", "-duration", "2s", "-callers", "2"], logs.path()).unwrap();
    others.wait_for_line("started", CLOSE_LIMIT).unwrap();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let oversized = [&preface[..], b"\xff\xff\xff\x01\x04\0\0\0\x01", &[b'x'; 20_000]].concat();
    let noise: Vec<u8> =
        (0..4_096_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for garbage in [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0; 4_096],
        noise,
        oversized,
        [&preface[..], &[0xff; 300]].concat(),
    ] {
        assert!(is_closed_after(&node.sidecar.socket, &garbage), "{garbage:?}");
    }
    // A message that ends in the middle, and a client that goes away in the middle of its frame.
    drop(UnixStream::connect(&node.sidecar.socket).unwrap().write_all(preface));
    assert!(others.wait_exit(CLOSE_LIMIT).unwrap().success(), "{}", others.stdout().unwrap());
    node.lives();
}

/// Whether the other end closes the connection once it has read this.
fn is_closed_after(socket: &Path, garbage: &[u8]) -> bool {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(CLOSE_LIMIT)).unwrap();
    // It may be closed before all is written.
    let _ = stream.write_all(garbage);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_token_makes_one_key_a_node_and_no_second_one() {
    let fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("tokens").unwrap();
    let token = fleet.token(&cluster, "node-1").unwrap();
    let first = fleet.unenrolled_sidecar(&cluster, "node-1").unwrap();
    first.enrol(&token).unwrap();
    let second = fleet.unenrolled_sidecar(&cluster, "node-2").unwrap();
    let refused = second.enrol_output(&token).unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{text}");
    let said =
        "refuses: token_used_up (PermissionDenied): this join token has been used up; ask for a new one";
    assert!(text.contains(said), "{text}");
    assert!(!second.identity.join("chain.pem").exists());

    let mut cut = token.clone();
    cut.truncate(50);
    for (token, status, said) in [
        ("hello", 65, "a join token begins with fkjt1."),
        (&cut, 65, "a join token has 102 characters, this has 50: copy all of it"),
        (
            &token.replacen("fkjt1.", "fkjt1.A", 1)[..102],
            1,
            "does not show the root certificate that the join token names",
        ),
    ] {
        let refused = second.enrol_output(token).unwrap();
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(status), "{text}");
        assert!(text.contains(said), "{text}");
    }
    let changes = fleet.agent.audit("changes").unwrap();
    let refused = changes.iter().filter(|line| line["action"] == "enrol_refused").collect::<Vec<_>>();
    assert!(refused.iter().any(|line| line["details"]["reason"] == "token_used_up"), "{changes:?}");
}

#[test]
fn only_one_certificate_of_the_fleet_with_one_name_opens_a_port() {
    let mut fleet = Fleet::start_with("[log]\nfilter = \"debug\"").unwrap();
    let mut node = Node::new(&fleet, "names");
    let store = OpenedStore::of(&fleet.agent.directory).unwrap();
    let chain = fs::read(node.sidecar.identity.join("chain.pem")).unwrap();
    let issuing = split_pem_chain(&chain).unwrap()[1].clone();
    let id = format!("spiffe://fleet.test/cluster/{}/node/node-1", node.cluster.id);
    let signed = |names: &[&str]| {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(store.issuing_key().unwrap().to_vec()));
        let issuer = Issuer::from_ca_cert_der(&issuing, KeyPair::try_from(&key).unwrap()).unwrap();
        leaf(names, &issuer, vec![issuing.clone()])
    };
    let other_key = KeyPair::generate().unwrap();
    let other_ca = Issuer::new(CertificateParams::default(), other_key);
    let alert = |name: &str| Answer::Alert(name.to_owned());
    for port in [fleet.agent.ports.data, fleet.agent.ports.admin] {
        // The control: the same certificate with one name gets in, and is then judged call by call.
        assert_eq!(probe(port, Some(signed(&[&id]))).unwrap(), Answer::LetIn);
        let two = [id.as_str(), "spiffe://fleet.test/admin/first"];
        assert_eq!(probe(port, Some(signed(&two))).unwrap(), alert("CertificateUnknown"));
        assert_eq!(probe(port, Some(signed(&[]))).unwrap(), alert("CertificateUnknown"));
        assert_eq!(probe(port, Some(leaf(&[&id], &other_ca, vec![]))).unwrap(), alert("UnknownCA"));
        assert_eq!(probe(port, None).unwrap(), alert("CertificateRequired"));
    }
    let enrolment = fleet.agent.ports.enrolment;
    assert_eq!(probe(enrolment, None).unwrap(), Answer::LetIn);
    assert_eq!(probe(enrolment, Some(leaf(&[&id], &other_ca, vec![]))).unwrap(), alert("UnknownCA"));
    let log = fleet.agent.log().unwrap();
    for why in ["NoCertificate", "UnknownIssuer", "UriNames(2)", "UriNames(0)"] {
        assert!(log.contains(why), "{why}: {log}");
    }
    node.lives();
    assert!(fleet.agent.running().unwrap().is_running().unwrap());
}

/// A client's leaf with these URI names.
fn leaf(names: &[&str], issuer: &Issuer<'_, KeyPair>, issuers: Vec<CertificateDer<'static>>) -> Shown {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names =
        names.iter().map(|name| SanType::URI(Ia5String::try_from(*name).unwrap())).collect();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.serial_number = Some(vec![1].into());
    let signed = params.signed_by(&key, issuer).unwrap();
    let chain = [signed.der().clone()].into_iter().chain(issuers).collect();
    (chain, PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())))
}

#[test]
fn a_node_of_another_fleet_says_whom_it_does_not_trust() {
    let mut home = Fleet::start().unwrap();
    let cluster = home.cluster("strays").unwrap();
    let mut stray = home.unenrolled_sidecar(&cluster, "node-1").unwrap();
    stray.enrol(&home.token(&cluster, "node-1").unwrap()).unwrap();
    home.agent.stop().unwrap();

    // Another fleet has taken the addresses over.
    let mut abroad = Fleet::start().unwrap();
    let (from, to) = (home.agent.ports, abroad.agent.ports);
    for file in [&stray.config, &stray.identity.join("state.json")] {
        let text = fs::read_to_string(file).unwrap();
        let text = text.replace(&format!(":{}", from.data), &format!(":{}", to.data));
        fs::write(file, text.replace(&format!(":{}", from.enrolment), &format!(":{}", to.enrolment)))
            .unwrap();
    }
    stray.start().unwrap();
    let why = "the agent's certificate is refused: the peer's certificate does not chain to a trusted root";
    wait::until("the refusal in the log", CLOSE_LIMIT, || Ok(stray.log()?.contains(why).then_some(())))
        .unwrap();
    let client = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &stray.socket).unwrap();
    let refused = client.call(&["encrypt", "-timeout", "1s"]).unwrap().refused().unwrap();
    assert!(refused.error.contains("no kms-agent could be reached"), "{}", refused.error);
    assert_eq!(stray.ops("/readyz").unwrap().status, 503);
    assert!(stray.running().unwrap().is_running().unwrap());
    Node::new(&abroad, "natives").lives();
    assert!(abroad.agent.running().unwrap().is_running().unwrap());
}
