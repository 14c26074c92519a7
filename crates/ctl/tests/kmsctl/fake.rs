//! A fake agent: the real TLS port with real certificates, scripted answers,
//! and a record of what was asked. The real agent's API has tests of its own.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use serde::Serialize;
use tempfile::TempDir;

use fleet_kms_admin_api::{Code, Operation, Problem};
use fleet_kms_process::{clock, runtime};
use fleet_kms_transport::{
    ClientAuth, Connections, Drain, LiveIdentity, Roots, ServeLimits, TlsPort, agent_tls, serve,
};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

struct Script {
    method: Method,
    target: String,
    status: StatusCode,
    body: String,
    delay: Duration,
}

#[derive(Default)]
struct State {
    scripts: Mutex<Vec<Script>>,
    asked: Mutex<Vec<Asked>>,
}

/// A fake agent with a folder that holds an admin's context.
pub(crate) struct Fake {
    folder: TempDir,
    state: Arc<State>,
    pub(crate) address: SocketAddr,
}

impl Fake {
    /// Starts it on a free port.
    pub(crate) fn start() -> Self {
        Self::start_with(clock::now() + Duration::from_secs(86_400))
    }

    /// Starts it with an admin certificate that ends at `not_after`.
    pub(crate) fn start_with(not_after: std::time::SystemTime) -> Self {
        let authority = authority();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State::default());
        let folder = tempfile::tempdir().unwrap();
        write_context(folder.path(), &authority, address, not_after);
        serve_on(listener, &authority, Arc::clone(&state));
        Self { folder, state, address }
    }

    /// Answers an operation with `status` and a JSON body; the last script for a target wins.
    pub(crate) fn answer(&self, operation: Operation, path: &[&str], status: u16, body: &impl Serialize) {
        self.answer_late(operation, path, status, body, Duration::ZERO);
    }

    /// The same, after `delay`.
    pub(crate) fn answer_late(
        &self,
        operation: Operation,
        path: &[&str],
        status: u16,
        body: &impl Serialize,
        delay: Duration,
    ) {
        let method = operation.method().as_str().parse().unwrap();
        self.answer_target(
            method,
            operation.path_with(path),
            status,
            serde_json::to_string(body).unwrap(),
            delay,
        );
    }

    /// Answers a method and target, query included, with any text.
    pub(crate) fn answer_target(
        &self,
        method: Method,
        target: String,
        status: u16,
        body: String,
        delay: Duration,
    ) {
        let status = StatusCode::from_u16(status).unwrap();
        self.state.scripts.lock().unwrap().insert(0, Script { method, target, status, body, delay });
    }

    /// Answers an operation with a problem.
    pub(crate) fn refuse(&self, operation: Operation, path: &[&str], code: Code) {
        let mut problem = Problem::new(code, "it went wrong", "do something else");
        problem.request_id = Some("r-17".into());
        self.answer(operation, path, problem.status, &problem);
    }

    /// What was asked so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.state.asked.lock().unwrap().clone()
    }

    /// The contexts file.
    pub(crate) fn config(&self) -> PathBuf {
        self.folder.path().join("kmsctl.toml")
    }

    /// A file beside it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs the real program, without a terminal.
    pub(crate) fn kmsctl(&self, args: &[&str]) -> Ran {
        run(&self.config(), args)
    }
}

/// What the program left behind.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

pub(crate) fn run(config: &Path, args: &[&str]) -> Ran {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_kmsctl"))
        .env_clear()
        .env("KMSCTL_CONFIG", config)
        .args(args)
        .output()
        .unwrap();
    Ran {
        code: status.code().unwrap(),
        out: String::from_utf8(stdout).unwrap(),
        err: String::from_utf8(stderr).unwrap(),
    }
}

type Authority = CertifiedIssuer<'static, KeyPair>;

pub(crate) fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A leaf of `id` in PEM, with its key.
fn leaf(
    authority: &Authority,
    id: &str,
    usage: ExtendedKeyUsagePurpose,
    not_after: std::time::SystemTime,
) -> (String, String) {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    params.serial_number = Some(SerialNumber::from_slice(&[7; 16]));
    params.extended_key_usages = vec![usage];
    params.not_before = (clock::now() - Duration::from_secs(30 * 86_400)).into();
    params.not_after = not_after.into();
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    (certificate.pem(), key.serialize_pem())
}

fn write_context(
    folder: &Path,
    authority: &Authority,
    address: SocketAddr,
    not_after: std::time::SystemTime,
) {
    let id = "spiffe://fleet.example/admin/first";
    let (certificate, key) = leaf(authority, id, ExtendedKeyUsagePurpose::ClientAuth, not_after);
    let context = format!(
        "[[contexts]]\nname = \"first\"\nserver = \"{address}\"\ncertificate = \"first.crt\"\n\
         key = \"first.key\"\nroots = \"roots.crt\"\n"
    );
    let files = [
        ("first.crt", certificate),
        ("first.key", key),
        ("roots.crt", authority.pem()),
        ("kmsctl.toml", context),
    ];
    for (name, text) in files {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }
}

fn serve_on(listener: TcpListener, authority: &Authority, state: Arc<State>) {
    let later = clock::now() + Duration::from_secs(86_400);
    let usage = ExtendedKeyUsagePurpose::ServerAuth;
    let (chain, key) = leaf(authority, "spiffe://fleet.example/agent/fake", usage, later);
    let chain = fleet_kms_identity::split_pem_chain(chain.as_bytes()).unwrap();
    let key = fleet_kms_identity::KeyPair::from_pem(&key).unwrap();
    let roots = fleet_kms_identity::split_pem_chain(authority.pem().as_bytes()).unwrap();
    let tls = agent_tls(
        Arc::new(LiveIdentity::new(chain, &key).unwrap()),
        Arc::new(Roots::new(roots).unwrap()),
        Arc::new(clock::now),
        ClientAuth::Required,
    );
    thread::spawn(move || {
        runtime::current_thread(1).unwrap().block_on(async {
            let port = TlsPort::from_std(listener, tls.with_http1()).unwrap();
            let router = Router::new().fallback(move |method, uri, headers, body| {
                reply(Arc::clone(&state), Asked { method, uri, headers, body: text(body) })
            });
            serve(port, router, ServeLimits::default(), Connections::new(), Drain::new()).await;
        });
    });
}

fn text(body: Bytes) -> String {
    String::from_utf8(body.to_vec()).unwrap()
}

async fn reply(state: Arc<State>, asked: Asked) -> Response {
    let target = asked.uri.path_and_query().unwrap().as_str().to_owned();
    let method = asked.method.clone();
    state.asked.lock().unwrap().push(asked);
    let scripted = {
        let scripts = state.scripts.lock().unwrap();
        // A script without a query answers every query of its path.
        let found = scripts.iter().find(|script| {
            let path = target.split('?').next().unwrap();
            script.method == method && (script.target == target || script.target == path)
        });
        found.map(|script| (script.status, script.body.clone(), script.delay))
    };
    let Some((status, body, delay)) = scripted else {
        let problem = Problem::new(Code::NoSuchRoute, format!("{target} is not scripted"), "");
        let body = serde_json::to_string(&problem).unwrap();
        return (StatusCode::NOT_FOUND, body).into_response();
    };
    tokio::time::sleep(delay).await;
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}
