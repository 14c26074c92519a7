//! A whole agent on a temporary disk, asked through its admin router without
//! a socket: the caller's certificate goes where the connection would put it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Method, Request, StatusCode};
use prometheus_client::registry::Registry;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng as _;
use serde_json::Value;
use tempfile::TempDir;
use tower::ServiceExt as _;

use fleet_kms_admin_api::Operation;
use fleet_kms_agent::admin;
use fleet_kms_agent::agent::Agent;
use fleet_kms_agent::authz::{Role, Scope};
use fleet_kms_agent::caller::Caller;
use fleet_kms_agent::config::{Config, RawConfig};
use fleet_kms_agent::enrolment::issue::Join;
use fleet_kms_agent::init::{self, Options};
use fleet_kms_identity::{Certificate, JoinToken, KeyPair, Standing};
use fleet_kms_transport::{Clock, Connections, PeerInfo};

/// The agent's time: 2027-01-15T08:00:00Z.
pub(crate) fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn generator() -> Box<dyn rand_core::CryptoRng + Send> {
    static SEED: AtomicU64 = AtomicU64::new(0);
    Box::new(ChaCha20Rng::seed_from_u64(SEED.fetch_add(1, Ordering::Relaxed)))
}

/// The agent, its router and its disk.
pub(crate) struct Rig {
    pub(crate) agent: Arc<Agent>,
    router: Router,
    folder: TempDir,
    passed: Arc<AtomicU64>,
}

/// An answer.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
}

impl Answer {
    /// The problem's code.
    pub(crate) fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or("ok")
    }
}

/// A request under construction.
pub(crate) struct Ask {
    method: Method,
    target: String,
    headers: Vec<(&'static str, String)>,
    body: Option<String>,
    endless: bool,
}

impl Ask {
    pub(crate) fn new(operation: Operation, path: &[&str]) -> Self {
        Self::target(operation.method().as_str(), &operation.path_with(path))
    }

    pub(crate) fn target(method: &str, target: &str) -> Self {
        Self {
            method: method.parse().unwrap(),
            target: target.to_owned(),
            headers: Vec::new(),
            body: None,
            endless: false,
        }
    }

    pub(crate) fn query(mut self, query: &str) -> Self {
        self.target = format!("{}?{query}", self.target);
        self
    }

    pub(crate) fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    pub(crate) fn json(self, body: &Value) -> Self {
        self.header("content-type", "application/json").raw(&body.to_string())
    }

    /// Lets the body come to no end.
    pub(crate) fn endless(self) -> Self {
        Self { endless: true, ..self }
    }

    pub(crate) fn raw(mut self, body: &str) -> Self {
        self.body = Some(body.to_owned());
        self
    }
}

impl Rig {
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = config(&folder);
        let options = Options {
            admin: "first".parse().unwrap(),
            admin_directory: folder.path().join("admin"),
            single_slot: true,
        };
        let passed = Arc::new(AtomicU64::new(0));
        let of_rig = Arc::clone(&passed);
        let clock: Clock = Arc::new(move || now() + Duration::from_secs(of_rig.load(Ordering::SeqCst)));
        init::run(&config, &options, Arc::clone(&clock), generator).await.unwrap();
        let mut registry = Registry::default();
        let agent = Agent::open(&config, &mut registry, clock, monotonic, generator).await.unwrap();
        let agent = Arc::new(agent);
        let router = admin::router(Arc::clone(&agent), Connections::new());
        Self { agent, router, folder, passed }
    }

    /// Lets time pass.
    pub(crate) fn pass(&self, time: Duration) {
        self.passed.fetch_add(time.as_secs(), Ordering::SeqCst);
    }

    /// The certificate that `init` made.
    pub(crate) fn first_admin(&self) -> Certificate {
        let pem = std::fs::read(self.folder.path().join("admin/first.crt")).unwrap();
        Certificate::from_der(&fleet_kms_identity::split_pem_chain(&pem).unwrap()[0]).unwrap()
    }

    /// The certificate of a new admin.
    pub(crate) async fn admin(&self, name: &str, roles: &[Role], scope: &Scope) -> Certificate {
        let bundle =
            self.agent.issuer.issue_admin("test", &name.parse().unwrap(), roles, scope).await.unwrap();
        Certificate::from_der(&bundle.certified.chain[0]).unwrap()
    }

    /// Asks as the first admin.
    pub(crate) async fn ask(&self, ask: Ask) -> Answer {
        self.ask_as(&self.first_admin(), ask).await
    }

    /// Asks with a certificate.
    pub(crate) async fn ask_as(&self, certificate: &Certificate, ask: Ask) -> Answer {
        let peer = peer(certificate, Standing::Valid);
        let mut request = Request::builder().method(ask.method).uri(&ask.target).extension(peer);
        for (name, value) in &ask.headers {
            request = request.header(*name, value);
        }
        let body = match ask.endless {
            true => Body::new(Never),
            false => ask.body.map_or_else(Body::empty, Body::from),
        };
        let request = request.body(body).unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let bytes = to_bytes(response.into_body(), 16 << 20).await.unwrap();
        let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        Answer { status, headers, body }
    }

    pub(crate) async fn create_cluster(&self, name: &str) -> Value {
        let ask = Ask::new(Operation::CreateCluster, &[]).json(&serde_json::json!({ "name": name }));
        let answer = self.ask(ask).await;
        assert_eq!(answer.status, 201, "{}", answer.body);
        answer.body["result"].clone()
    }

    /// Enrols a node with a token text, as the enrolment port would.
    pub(crate) async fn enrol(&self, token: &str) -> Certificate {
        let token: JoinToken = token.parse().unwrap();
        let text = token.to_text();
        let bytes =
            data_encoding::BASE64URL_NOPAD.decode(text.split_once('.').unwrap().1.as_bytes()).unwrap();
        let csr = KeyPair::generate().unwrap().csr_der().unwrap();
        let address: IpAddr = "192.0.2.9".parse().unwrap();
        let join = Join::parse(&bytes[..32], &csr, String::new(), address).unwrap();
        let certified = self.agent.issuer.enrol(&join).await.unwrap();
        Certificate::from_der(&certified.chain[0]).unwrap()
    }

    /// All lines of the audit's changes.
    pub(crate) fn audit(&self) -> String {
        let mut text = String::new();
        for entry in std::fs::read_dir(self.folder.path().join("audit")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "jsonl") {
                text.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
        text
    }
}

fn monotonic() -> std::time::Instant {
    fleet_kms_process::clock::monotonic()
}

fn config(folder: &TempDir) -> Config {
    let at = |name: &str| folder.path().join(name).display().to_string();
    let text = format!(
        "agent = {{ name = \"agent-1\", trust_domain = \"fleet.test\", addresses = \
         [{{ data = \"127.0.0.1:7443\", enrolment = \"127.0.0.1:7444\" }}] }}\n\
         store.path = \"{}\"\nroot.file = \"{}\"\naudit.directory = \"{}\"\n",
        at("store.db"),
        at("root.key"),
        at("audit")
    );
    let raw: RawConfig = toml::from_str(&text).unwrap();
    Config::try_from(raw).unwrap()
}

/// What TLS tells of a connection that shows this certificate.
pub(crate) fn peer(certificate: &Certificate, standing: Standing) -> Arc<PeerInfo> {
    let address = "192.0.2.1:40000".parse().unwrap();
    Arc::new(PeerInfo { certificate: Some(certificate.clone()), standing, address })
}

/// Who calls over that connection.
pub(crate) fn caller(certificate: &Certificate, standing: Standing) -> Caller {
    Caller::from_peer(&peer(certificate, standing)).unwrap()
}

/// A body of which nothing ever comes.
struct Never;

impl hyper::body::Body for Never {
    type Data = axum::body::Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        std::task::Poll::Pending
    }
}
