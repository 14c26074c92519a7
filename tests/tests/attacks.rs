//! Attacks on the ports of a real agent and on a real sidecar: each is refused, and the audit says so.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests: what is not there fails them"
)]

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use fleet_kms_identity::{KeyPair, Serial};
use fleet_kms_process::{clock, runtime};
use fleet_kms_proto::agent::Refusal;
use fleet_kms_proto::agent::unwrap_item::Outcome;
use fleet_kms_tests::faketime::FakeClock;
use fleet_kms_tests::fleet::{AGENT, Cluster, Fleet, Ports, Sidecar, TRUST_DOMAIN};
use fleet_kms_tests::forge::{Forger, Leaf};
use fleet_kms_tests::impostor::Impostor;
use fleet_kms_tests::member::{ELSEWHERE, Guesser, Member, enrol_for, reason, reason_of};
use fleet_kms_tests::tls_probe::{Answer, Shown, probe, probe_with};
use fleet_kms_tests::wait;
use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, SanType};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;
use tokio::net::TcpSocket;

/// For whatever must happen soon on a machine that is busy with all other tests.
const SOON: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(86_400);

/// A number that a longer run makes larger.
fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn alert(name: &str) -> Answer {
    Answer::Alert(name.to_owned())
}

/// The chain with another key than its leaf's.
fn with_other_key((chain, _): Shown) -> Shown {
    let key = KeyPair::generate().unwrap().to_pkcs8_der().to_vec();
    (chain, PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key)))
}

fn shown(member: &Member) -> Shown {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(member.key.to_pkcs8_der().to_vec()));
    (member.chain.clone(), key)
}

/// Enrols a node in this process.
fn node(fleet: &Fleet, cluster: &Cluster, name: &str) -> Member {
    let token = fleet.token(cluster, name).unwrap();
    block_on(Member::enrol(fleet.agent.ports, &token, "")).unwrap()
}

fn block_on<F: Future>(work: F) -> F::Output {
    runtime::multi_thread().unwrap().block_on(work)
}

/// The denials of the data chain: operation, reason, address.
fn denials(lines: &[Value]) -> Vec<(String, String, String)> {
    let text = |line: &Value, field: &str| line[field].as_str().unwrap_or_default().to_owned();
    let denied = lines.iter().filter(|line| line["kind"] == "denied");
    denied.map(|line| (text(line, "operation"), text(line, "reason"), text(line, "address"))).collect()
}

/// Connections from one address that the data chain counts as refused for a reason.
fn counted(lines: &[Value], operation: &str, reason: &str, address: &str) -> u64 {
    let wanted = |line: &&Value| {
        line["kind"] == "calls"
            && line["operation"] == operation
            && line["outcome"] == reason
            && line["identity"] == address
    };
    lines.iter().filter(wanted).filter_map(|line| line["calls"].as_u64()).sum()
}

/// Audited events of one action and reason.
fn events(fleet: &Fleet, action: &str, reason: &str) -> Vec<Value> {
    let lines = fleet.agent.audit("changes").unwrap();
    let wanted = |line: &Value| line["action"] == action && line["details"]["reason"] == reason;
    lines.into_iter().filter(|line| wanted(line)).collect()
}

/// How often the agent's metric says that a connection was refused.
fn refused_count(fleet: &Fleet, port: &str, reason: &str) -> u64 {
    let metrics = fleet.agent.ops("/metrics").unwrap().ok().unwrap();
    let series = format!("fleet_kms_agent_tls_refused_total{{port=\"{port}\",reason=\"{reason}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&series)).map_or(0, |count| count.parse().unwrap())
}

#[test]
fn what_fails_in_the_handshake_is_refused_counted_and_audited_with_its_address() {
    let mut fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("one").unwrap();
    let node = node(&fleet, &cluster, "node-1");
    let forger = Forger::of(&fleet.agent.directory, &node).unwrap();
    let id = node.certificate().unwrap().id().to_string();
    let wildcard = format!("spiffe://{TRUST_DOMAIN}/cluster/{}/node/*", cluster.id);
    let signed = |uris: &[&str]| forger.leaf(&Leaf { uris, ..Leaf::default() }).unwrap().shown();
    // The control: the same certificate with one name gets in.
    assert_eq!(probe(fleet.agent.ports.data, Some(signed(&[&id]))).unwrap(), Answer::LetIn);

    let stranger = Forger::stranger().unwrap();
    let strange = stranger.leaf(&Leaf { uris: &[&id], ..Leaf::default() }).unwrap().shown();
    let server = forger.leaf(&Leaf { uris: &[&id], usages: &[ServerAuth], ..Leaf::default() });
    let dns = forger.leaf(&Leaf { dns: &["*.fleet.test", "localhost"], ..Leaf::default() });
    let two = [id.as_str(), "spiffe://fleet.test/admin/first"];
    let attacks = [
        ("another CA, the same names", strange, alert("UnknownCA"), "unknown_ca"),
        ("two URI names", signed(&two), alert("CertificateUnknown"), "not_a_fleet_certificate"),
        (
            "no SPIFFE ID",
            signed(&["https://fleet.test/"]),
            alert("CertificateUnknown"),
            "not_a_fleet_certificate",
        ),
        ("a wildcard", signed(&[&wildcard]), alert("CertificateUnknown"), "not_a_fleet_certificate"),
        ("a DNS wildcard", dns.unwrap().shown(), alert("CertificateUnknown"), "not_a_fleet_certificate"),
        ("a server's certificate", server.unwrap().shown(), alert("UnsupportedCertificate"), "wrong_usage"),
        ("another key", with_other_key(shown(&node)), alert("DecryptError"), "bad_signature"),
    ];
    for port in ["data", "enrolment", "admin"] {
        let number = port_number(fleet.agent.ports, port);
        for (what, shown, answer, reason) in &attacks {
            let before = refused_count(&fleet, port, reason);
            let shown = (shown.0.clone(), shown.1.clone_key());
            assert_eq!(&probe(number, Some(shown)).unwrap(), answer, "{what} on the {port} port");
            wait::until(&format!("{what} counted"), SOON, || {
                Ok((refused_count(&fleet, port, reason) == before + 1).then_some(()))
            })
            .unwrap();
        }
        assert_eq!(probe_with(number, Some(shown(&node)), &[]).unwrap(), Answer::Closed, "no ALPN");
        assert_ne!(probe_with(number, Some(shown(&node)), &[b"h3"]).unwrap(), Answer::LetIn);
        let old = tls_1_2(number);
        assert!(old.contains("protocol version"), "{old}");
    }
    assert_eq!(probe(fleet.agent.ports.data, None).unwrap(), alert("CertificateRequired"));

    fleet.agent.stop().unwrap();
    let denied = denials(&fleet.agent.audit("data").unwrap());
    let lines = fleet.agent.audit("data").unwrap();
    for (port, operation) in
        [("data", "connect_data"), ("enrolment", "connect_enrolment"), ("admin", "connect_admin")]
    {
        for reason in
            ["unknown_ca", "not_a_fleet_certificate", "wrong_usage", "bad_signature", "no_alpn", "tls"]
        {
            let counted = counted(&lines, operation, reason, "127.0.0.1");
            assert!(counted > 0, "{reason} on the {port} port: {lines:?}");
        }
    }
    assert!(
        denied.iter().any(|(operation, _, address)| operation == "connect_data" && address == "127.0.0.1")
    );
}

fn port_number(ports: Ports, name: &str) -> u16 {
    match name {
        "data" => ports.data,
        "enrolment" => ports.enrolment,
        _ => ports.admin,
    }
}

/// What OpenSSL says about a port when it may speak TLS 1.2 only.
fn tls_1_2(port: u16) -> String {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-tls1_2", "-alpn", "h2", "-connect"]).arg(format!("127.0.0.1:{port}"));
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_dek_of_another_cluster_stays_wrapped() {
    let mut fleet = Fleet::start().unwrap();
    let (one, two) = (fleet.cluster("one").unwrap(), fleet.cluster("two").unwrap());
    let (ours, theirs) = (node(&fleet, &one, "node-1"), node(&fleet, &two, "node-1"));
    let ports = fleet.agent.ports;
    block_on(async {
        let (mut ours, mut theirs) = (ours.data(ports).await.unwrap(), theirs.data(ports).await.unwrap());
        let wrapped = theirs.wrap(&[7; 32]).await.unwrap();
        let refused = ours.unwrap(&wrapped).await.unwrap();
        assert!(matches!(refused, Outcome::Refused(why) if why == Refusal::NotOurs as i32), "{refused:?}");
        let opened = theirs.unwrap(&wrapped).await.unwrap();
        assert!(matches!(opened, Outcome::Plain(plain) if plain == [7; 32]));
    });
    fleet.agent.stop().unwrap();
    let lines = fleet.agent.audit("data").unwrap();
    let audited = lines.iter().find(|line| line["outcome"] == "foreign_cluster").unwrap();
    assert_eq!(audited["cluster"], one.id.as_str());
    assert!(audited["identity"].as_str().unwrap().ends_with("/node/node-1"), "{audited}");
}

#[test]
fn a_superseded_certificate_is_refused_as_a_clone_and_never_bans_the_current_one() {
    let fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("one").unwrap();
    let old = node(&fleet, &cluster, "node-1");
    let ports = fleet.agent.ports;
    let current = block_on(async {
        let new = old.renew(ports).await.unwrap();
        let mut link = new.data(ports).await.unwrap();
        // Seen in use, it becomes the current one, soon.
        link.status().await.unwrap();
        new
    });
    wait::until("the promotion", SOON, || {
        Ok((!fleet.agent.audit("changes")?.iter().all(|line| line["action"] != "promote")).then_some(()))
    })
    .unwrap();
    block_on(async {
        wait_superseded(&old, ports).await;
        assert_eq!(reason(&old.renew(ports).await.map(drop).unwrap_err()), "superseded");
        current.data(ports).await.unwrap().status().await.unwrap();
        current.renew(ports).await.unwrap().data(ports).await.unwrap().status().await.unwrap();
    });
    let serial = old.certificate().unwrap().serial().to_string();
    let clones = events(&fleet, "identity_clone", "superseded");
    assert!(clones.len() >= 2, "one of the data port, one of the renewal: {clones:?}");
    assert!(clones.iter().all(|line| line["details"]["serial"] == serial.as_str()), "{clones:?}");
    let nodes = fleet.kmsctl(&["node", "list", "--cluster", "one"]).unwrap();
    assert!(!nodes.contains("banned"), "{nodes}");
}

/// A certificate is superseded as soon as its successor is promoted.
async fn wait_superseded(old: &Member, ports: Ports) {
    let end = clock::monotonic() + SOON;
    loop {
        match old.data(ports).await.unwrap().status().await {
            Err(refused) => return assert_eq!(reason_of(&refused), "superseded"),
            Ok(_) => assert!(clock::monotonic() < end, "the old certificate still serves"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn names_in_a_request_and_keys_that_are_not_on_record_get_no_certificate() {
    let mut fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("one").unwrap();
    let node = node(&fleet, &cluster, "node-1");
    let ports = fleet.agent.ports;
    let forger = Forger::of(&fleet.agent.directory, &node).unwrap();
    let certificate = node.certificate().unwrap();
    let (id, serial) = (certificate.id().to_string(), *certificate.serial().as_bytes());

    // The right name and serial, signed by the right CA, for the wrong key.
    let leaf = Leaf { uris: &[&id], serial: &serial, ..Leaf::default() };
    let twin = forger.leaf(&leaf).unwrap().member(&node.roots).unwrap();
    assert_eq!(reason(&block_on(twin.renew(ports)).map(drop).unwrap_err()), "foreign_key");
    assert_eq!(events(&fleet, "renew_refused", "foreign_key").len(), 1);
    let refused = block_on(async { twin.data(ports).await.unwrap().status().await.unwrap_err() });
    assert_eq!(reason_of(&refused), "foreign_key");
    // An issue number that was never given out, and an admin that nobody made.
    let unknown = Serial::new(1_000_000, [7; 8]).unwrap();
    let leaf = Leaf { uris: &[&id], serial: unknown.as_bytes(), ..Leaf::default() };
    let forged = forger.leaf(&leaf).unwrap().member(&node.roots).unwrap();
    assert_eq!(reason(&block_on(forged.renew(ports)).map(drop).unwrap_err()), "superseded");
    let leaf = Leaf { uris: &["spiffe://fleet.test/admin/root"], ..Leaf::default() };
    let admin = forger.leaf(&leaf).unwrap().member(&node.roots).unwrap();
    assert_eq!(reason(&block_on(admin.renew(ports)).map(drop).unwrap_err()), "wrong_kind");
    assert_eq!(events(&fleet, "renew_refused", "wrong_kind").len(), 1);

    // A renewal that asks for another name.
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names =
        vec![SanType::URI(Ia5String::try_from("spiffe://fleet.test/admin/first").unwrap())];
    let csr = params.serialize_request(&key).unwrap().der().to_vec();
    assert_eq!(reason(&block_on(node.renew_for(ports, csr.clone())).map(drop).unwrap_err()), "csr");
    assert_eq!(events(&fleet, "renew_refused", "csr").len(), 1);
    // And an enrolment; its token stays good for an honest one.
    let token = fleet.token(&cluster, "node-2").unwrap();
    let refused = block_on(enrol_for(ports, &token, "", csr)).unwrap_err();
    assert_eq!(reason(&refused), "csr");
    let audited = events(&fleet, "enrol_refused", "csr");
    assert_eq!(audited.len(), 1);
    assert_eq!(audited[0]["details"]["address"], "127.0.0.1");
    block_on(Member::enrol(ports, &token, "")).unwrap();
    // The node's own certificate still does all it may.
    block_on(async { node.data(ports).await.unwrap().status().await.unwrap() });
    fleet.agent.stop().unwrap();
}

#[test]
fn guessed_tokens_are_rate_limited_and_a_returning_node_renews_meanwhile() {
    let fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("one").unwrap();
    let node = node(&fleet, &cluster, "node-1");
    let (good, ports) = (fleet.token(&cluster, "node-2").unwrap(), fleet.agent.ports);
    let guesses = number("GUESSES", 2_000);
    let (looked_up, limited, renewals) = block_on(async {
        let guesser = tokio::spawn(guess(ports, good.clone(), guesses));
        let mut node = node;
        let mut renewals = 0;
        while !guesser.is_finished() {
            // The same address, which has spent its guesses by now: what is limited is guessing.
            node = node.renew(ports).await.unwrap();
            node.data(ports).await.unwrap().status().await.unwrap();
            renewals += 1;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let (looked_up, limited) = guesser.await.unwrap();
        (looked_up, limited, renewals)
    });
    println!(
        "{guesses} guesses: {looked_up} looked up, {limited} rate limited; {renewals} renewals meanwhile"
    );
    assert!(renewals > 0);
    assert!((20..guesses / 10).contains(&looked_up), "{looked_up} guesses were looked up");
    assert_eq!(looked_up + limited, guesses);
    assert_eq!(events(&fleet, "enrol_refused", "token_unknown").len(), looked_up);
    let audited = events(&fleet, "enrol_refused", "rate_limited").len();
    assert!((1..=looked_up).contains(&audited), "{audited} lines for {limited} refusals");
}

/// Tries tokens; returns how many the agent looked up, and how many it refused unseen.
async fn guess(ports: Ports, good: String, guesses: usize) -> (usize, usize) {
    let (mut looked_up, mut limited, mut made) = (0, 0, 0);
    let mut guesser = Guesser::connect(ports, &good).await.unwrap();
    while made < guesses {
        match reason_of(&guesser.guess(made as u64).await.unwrap()).as_str() {
            "token_unknown" => looked_up += 1,
            "rate_limited" => limited += 1,
            // The connection's age, or its end; the guess was not heard.
            other => {
                println!("another connection after {made}: {other}");
                guesser = Guesser::connect(ports, &good).await.unwrap();
                continue;
            }
        }
        made += 1;
    }
    (looked_up, limited)
}

/// Makes the sidecar look for its agent elsewhere.
fn lead_astray(sidecar: &Sidecar, from: Ports, data: u16, enrolment: u16) {
    for file in [&sidecar.config, &sidecar.identity.join("state.json")] {
        let text = fs::read_to_string(file).unwrap();
        let text = text.replace(&format!(":{}", from.data), &format!(":{data}"));
        fs::write(file, text.replace(&format!(":{}", from.enrolment), &format!(":{enrolment}"))).unwrap();
    }
}

#[test]
fn no_certificate_of_the_fleet_but_an_agents_can_pose_as_the_agent() {
    let mut fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("one").unwrap();
    let mut sidecar = fleet.sidecar(&cluster, "node-1").unwrap();
    sidecar.stop().unwrap();
    let other = node(&fleet, &cluster, "node-2");
    let roots = other.roots.clone();
    let forger = Forger::of(&fleet.agent.directory, &other).unwrap();
    fleet.agent.stop().unwrap();

    let cluster = &cluster.id;
    let of = |path: String, usages: &[rcgen::ExtendedKeyUsagePurpose]| {
        let uri = format!("spiffe://{TRUST_DOMAIN}/{path}");
        forger.leaf(&Leaf { uris: &[&uri], usages, ..Leaf::default() }).unwrap().member(&roots).unwrap()
    };
    let both = [ServerAuth, ClientAuth];
    let abroad =
        forger.leaf(&Leaf { uris: &["spiffe://other.test/agent/x"], usages: &both, ..Leaf::default() });
    let not = |who: &str| format!("the peer is spiffe://{TRUST_DOMAIN}/{who}, not an agent");
    let posers = [
        // As it was issued: no serverAuth, which is refused before anything is read off its name.
        ("a node's own", other, "agent's certificate is refused".to_owned()),
        (
            "a node's",
            of(format!("cluster/{cluster}/node/n"), &both),
            not(&format!("cluster/{cluster}/node/n")),
        ),
        (
            "a worker's",
            of(format!("cluster/{cluster}/worker/w"), &both),
            not(&format!("cluster/{cluster}/worker/w")),
        ),
        ("an admin's", of("admin/root".to_owned(), &both), not("admin/root")),
        (
            "a client's",
            of("agent/client".to_owned(), &[ClientAuth]),
            "agent's certificate is refused".to_owned(),
        ),
        (
            "a certificate without usages",
            of("agent/bare".to_owned(), &[]),
            "does not carry serverAuth".to_owned(),
        ),
        ("another fleet's", abroad.unwrap().member(&roots).unwrap(), "of another trust domain".to_owned()),
    ];
    let runtime = runtime::multi_thread().unwrap();
    let _guard = runtime.enter();
    let impostor = Impostor::start(&posers[0].1).unwrap();
    lead_astray(&sidecar, fleet.agent.ports, impostor.port, impostor.port);
    // Before it is shown: a refusal is logged once, until there is another reason.
    let mut before = sidecar.log().unwrap().len();
    sidecar.start().unwrap();
    for (number, (what, poser, why)) in posers.iter().enumerate() {
        if number > 0 {
            before = sidecar.log().unwrap().len();
            impostor.show(poser).unwrap();
        }
        let refused = format!("{what}: a refusal with {why:?}");
        let shows_up = || Ok(sidecar.log()?.get(before..).unwrap_or_default().contains(why).then_some(()));
        match wait::until(&refused, SOON, shows_up) {
            Ok(()) => {}
            Err(error) => panic!("{error:#}: {}", sidecar.log().unwrap()),
        }
        assert_eq!(impostor.calls(), 0, "{what}: the sidecar called an impostor");
    }
    assert_eq!(sidecar.ops("/readyz").unwrap().status, 503);
    // The control: whoever holds an agent's key is called.
    impostor.show(&of(format!("agent/{AGENT}"), &both)).unwrap();
    wait::until("a call", SOON, || Ok((impostor.calls() > 0).then_some(()))).unwrap();
}

#[test]
fn a_stolen_expired_agent_key_helps_nothing_on_a_node_whose_clock_is_back_in_time() {
    let mut fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("one").unwrap();
    let node = node(&fleet, &cluster, "node-2");
    let forger = Forger::of(&fleet.agent.directory, &node).unwrap();
    // Three weeks later: the key that an agent had in its first week is long expired.
    let agent_clock = FakeClock::new(&fleet.agent.directory).unwrap();
    agent_clock.set(20 * 86_400).unwrap();
    fleet.agent.stop().unwrap();
    fleet.agent.respec(|spec| agent_clock.apply(spec).unwrap());
    fleet.agent.start().unwrap();
    let mut sidecar = fleet.unenrolled_sidecar(&cluster, "node-1").unwrap();
    let node_clock = FakeClock::new(sidecar.identity.parent().unwrap()).unwrap();
    node_clock.set(20 * 86_400).unwrap();
    sidecar.respec(|spec| node_clock.apply(spec).unwrap());
    let token = fleet.token(&cluster, "node-1").unwrap();
    fs::write(sidecar.identity.join("token"), token).unwrap();
    sidecar.start().unwrap();
    sidecar.wait_ready().unwrap();
    wait::until("the proven time on disk", SOON, || Ok((last_good_time(&sidecar) > 0).then_some(())))
        .unwrap();
    sidecar.stop().unwrap();
    fleet.agent.stop().unwrap();

    let uri = format!("spiffe://{TRUST_DOMAIN}/agent/{AGENT}");
    let from = clock::now() - DAY;
    let validity = Some((from, from + 7 * DAY));
    let leaf = Leaf { uris: &[&uri], usages: &[ServerAuth, ClientAuth], validity, ..Leaf::default() };
    let stolen = forger.leaf(&leaf).unwrap().member(&node.roots).unwrap();
    let runtime = runtime::multi_thread().unwrap();
    let _guard = runtime.enter();
    let (data, enrolment) = (Impostor::start(&stolen).unwrap(), Impostor::start(&stolen).unwrap());
    lead_astray(&sidecar, fleet.agent.ports, data.port, enrolment.port);
    // The battery is empty: the node is back in the week of the stolen key.
    node_clock.set(0).unwrap();
    sidecar.start().unwrap();
    // It asks for the time, which ignores dates; only the issuing CA's key could answer.
    wait::until("questions for the time", SOON, || Ok((enrolment.calls() >= 2).then_some(()))).unwrap();
    let why = "the agent's certificate is not valid at this time";
    assert!(sidecar.log().unwrap().contains(why), "{}", sidecar.log().unwrap());
    assert_eq!(data.calls(), 0, "a call went to whoever stole an expired key");
    sidecar.stop().unwrap();

    // The control: a node that never heard the time has nothing but its clock, and would be deceived.
    let state = sidecar.identity.join("state.json");
    let mut text: Value = serde_json::from_str(&fs::read_to_string(&state).unwrap()).unwrap();
    text["last_good_time"] = 0.into();
    fs::write(&state, text.to_string()).unwrap();
    sidecar.start().unwrap();
    wait::until("a call", SOON, || Ok((data.calls() > 0).then_some(()))).unwrap();
}

fn last_good_time(sidecar: &Sidecar) -> u64 {
    let state = fs::read_to_string(sidecar.identity.join("state.json")).unwrap_or_default();
    serde_json::from_str::<Value>(&state).ok().and_then(|state| state["last_good_time"].as_u64()).unwrap_or(0)
}

#[test]
fn stalled_handshakes_of_one_source_take_nothing_from_another() {
    let mut fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("one").unwrap();
    let node = node(&fleet, &cluster, "node-1");
    let ports = fleet.agent.ports;
    block_on(async {
        let mut link = node.data(ports).await.unwrap();
        for port in [ports.data, ports.enrolment] {
            let mut stalled = Vec::new();
            for _ in 0..300 {
                let socket = TcpSocket::new_v4().unwrap();
                socket.bind(SocketAddr::new(ELSEWHERE, 0)).unwrap();
                let stream = socket.connect(SocketAddr::from(([127, 0, 0, 1], port))).await.unwrap();
                // The first bytes of a ClientHello, and then nothing more.
                let _ = stream.try_write(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]);
                stalled.push(stream);
            }
            for _ in 0..20 {
                link.status().await.unwrap();
                node.data(ports).await.unwrap().status().await.unwrap();
            }
            drop(stalled);
        }
        node.renew(ports).await.unwrap();
    });
    let slow = thread::spawn(move || drip(ports.data));
    wait::until("a handshake that took too long", SOON, || {
        Ok((refused_count(&fleet, "data", "timeout") > 0).then_some(()))
    })
    .unwrap();
    assert!(slow.join().unwrap() < SOON, "a byte a second keeps a place");
    assert!(refused_count(&fleet, "data", "source_full") > 100);
    fleet.agent.stop().unwrap();
    let lines = fleet.agent.audit("data").unwrap();
    let audited = ("connect_data".to_owned(), "source_full".to_owned(), ELSEWHERE.to_string());
    assert!(denials(&lines).contains(&audited), "{lines:?}");
    for operation in ["connect_data", "connect_enrolment"] {
        assert!(counted(&lines, operation, "source_full", &ELSEWHERE.to_string()) > 100, "{lines:?}");
    }
}

/// Sends a handshake byte by byte, and returns how long the port took it.
fn drip(port: u16) -> Duration {
    let started = clock::monotonic();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    // A long ClientHello, as far as it goes.
    let beginning = [0x16, 0x03, 0x01, 0x3f, 0xff, 0x01, 0x00, 0x3f, 0xfb, 0x03, 0x03];
    for byte in beginning.into_iter().chain(std::iter::repeat(0)) {
        if stream.write_all(&[byte]).is_err() || started.elapsed() > SOON {
            break;
        }
        thread::sleep(Duration::from_millis(500));
    }
    started.elapsed()
}
