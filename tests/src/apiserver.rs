//! A real kube-apiserver on a real etcd, encrypting Secrets as the given EncryptionConfiguration says.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::child::{self, Child, Spec};
use crate::encryption_config::EncryptionConfig;
use crate::etcd::Etcd;
use crate::http::{self, Answer};
use crate::peers::peers;
use crate::{ports, wait};

/// The one user, in the group that may do everything.
const TOKEN: &str = "the-token-of-the-test-user";

/// A running kube-apiserver, with a kubeconfig for kubectl and a `kubectl proxy` for plain HTTP.
pub struct ApiServer {
    spec: Spec,
    child: Option<Child>,
    /// Held so that it runs.
    _proxy: Child,
    proxy_port: u16,
    dir: PathBuf,
}

impl ApiServer {
    /// Starts it with its files and logs under `dir` and waits for `/readyz`.
    ///
    /// # Errors
    /// When it does not become ready, with the end of its log and the failing checks.
    pub fn start(dir: &Path, etcd: &Etcd, encryption: &EncryptionConfig) -> anyhow::Result<Self> {
        let mut server = Self::start_unready(dir, etcd, encryption)?;
        server.wait_ready()?;
        Ok(server)
    }

    /// As [`ApiServer::start`], but waits only until it can create objects, not until its KMS plugin answers.
    ///
    /// # Errors
    /// When it does not answer, with the end of its log.
    pub fn start_unready(dir: &Path, etcd: &Etcd, encryption: &EncryptionConfig) -> anyhow::Result<Self> {
        let port = ports::free_port()?;
        fs::create_dir_all(dir)?;
        fs::write(dir.join("tokens.csv"), format!("{TOKEN},tester,1,system:masters\n"))?;
        fs::write(dir.join("encryption.yaml"), encryption.to_yaml())?;
        fs::write(dir.join("kubeconfig"), kubeconfig(dir, port))?;
        let spec = spec(dir, port, &etcd.url())?;
        let mut child = spec.start()?;
        // The proxy wants the certificate, which kube-apiserver makes at its first start.
        child.wait_ready("a certificate", wait::START_LIMIT, || certificate(dir).exists().then_some(()))?;
        let (proxy, proxy_port) = start_proxy(dir)?;
        let mut last = None;
        child
            .wait_ready("a namespace to write to", wait::START_LIMIT, || {
                last = http::get(proxy_port, "/api/v1/namespaces/default").ok();
                last.as_ref().filter(|answer| answer.status == 200).map(drop)
            })
            .with_context(|| format!("last answer: {last:?}"))?;
        Ok(Self { spec, child: Some(child), _proxy: proxy, proxy_port, dir: dir.to_owned() })
    }

    /// Waits until all checks of `/readyz` pass.
    ///
    /// # Errors
    /// When they do not in time, with the checks.
    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        let port = self.proxy_port;
        let child = self.child.as_mut().context("kube-apiserver was stopped")?;
        let mut checks = String::new();
        child
            .wait_ready("ready", wait::START_LIMIT, || {
                checks = http::get(port, "/readyz?verbose").ok()?.body;
                checks.contains("readyz check passed").then_some(())
            })
            .with_context(|| checks.clone())
    }

    /// Kills it and starts it again with empty caches; does not wait until it answers.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn restart_unready(&mut self) -> anyhow::Result<()> {
        self.stop();
        self.child = Some(self.spec.start()?);
        Ok(())
    }

    /// Kills it and starts it again with empty caches; returns when it is ready.
    ///
    /// # Errors
    /// As [`ApiServer::start`].
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.restart_unready()?;
        self.wait_ready()
    }

    /// Kills it. Its files stay for [`ApiServer::restart`].
    pub fn stop(&mut self) {
        self.child = None;
    }

    /// Replaces the EncryptionConfiguration. kube-apiserver looks at the file once a minute; a restart is faster.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set_encryption(&self, encryption: &EncryptionConfig) -> anyhow::Result<()> {
        Ok(fs::write(self.dir.join("encryption.yaml"), encryption.to_yaml())?)
    }

    /// Runs kubectl as the user that may do everything, and returns what it printed.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn kubectl<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> anyhow::Result<String> {
        let mut command = Command::new(peers()?.kubectl);
        child::run(command.env("KUBECONFIG", self.kubeconfig()).args(args))
    }

    /// Runs a shell command line in which `kubectl` is the right one: for commands that users know with a pipe in it.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn shell(&self, line: &str) -> anyhow::Result<String> {
        let mut command = Command::new("bash");
        command.args(["-c", &format!("set -o pipefail; kubectl() {{ \"$KUBECTL\" \"$@\"; }}; {line}")]);
        child::run(command.env("KUBECONFIG", self.kubeconfig()).env("KUBECTL", peers()?.kubectl))
    }

    /// GETs a path of the API, for example `/readyz?verbose`.
    ///
    /// # Errors
    /// When there was no answer; an answer of any status is one.
    pub fn raw(&self, path: &str) -> anyhow::Result<Answer> {
        http::get(self.proxy_port, path)
    }

    /// Creates a Secret in the namespace `default` with one key named `key`.
    ///
    /// # Errors
    /// When there was no answer; an answer of any status is one.
    pub fn create_secret(&self, name: &str, value: &str) -> anyhow::Result<Answer> {
        let body = serde_json::json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": { "name": name }, "stringData": { "key": value },
        });
        let path = "/api/v1/namespaces/default/secrets";
        http::request(self.proxy_port, "POST", path, "application/json", &body.to_string())
    }

    /// The value under `key` of a Secret in the namespace `default`.
    ///
    /// # Errors
    /// When the API server does not give it, with its message.
    pub fn read_secret(&self, name: &str) -> anyhow::Result<String> {
        let body = self.raw(&format!("/api/v1/namespaces/default/secrets/{name}"))?.ok()?;
        let secret: serde_json::Value = serde_json::from_str(&body)?;
        let value = secret.pointer("/data/key").and_then(serde_json::Value::as_str).context("no such key")?;
        Ok(String::from_utf8(data_encoding::BASE64.decode(value.as_bytes())?)?)
    }

    /// The kubeconfig of the user that may do everything.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// What it wrote to its log so far.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn log(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(self.spec.stderr_path())?)
    }

    /// The port of the proxy, which outlives a restart of the API server.
    pub fn proxy_port(&self) -> u16 {
        self.proxy_port
    }
}

fn spec(dir: &Path, port: u16, etcd_url: &str) -> anyhow::Result<Spec> {
    let certificates = dir.join("certificates");
    // kube-apiserver makes this key pair at its first start; it signs service account tokens with it as well, which
    // saves the test a key of its own.
    let key = certificates.join("apiserver.key");
    let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
    Ok(Spec::new("kube-apiserver", &peers()?.kube_apiserver, dir)
        .arg(format!("--etcd-servers={etcd_url}"))
        .arg(format!("--secure-port={port}"))
        .args([
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
        ])
        .arg(file("cert-dir", &certificates))
        .arg(file("service-account-key-file", &key))
        .arg(file("service-account-signing-key-file", &key))
        .arg("--service-account-issuer=https://kubernetes.default.svc")
        .arg("--service-cluster-ip-range=10.0.0.0/24")
        .arg(file("token-auth-file", &dir.join("tokens.csv")))
        .args(["--authorization-mode=AlwaysAllow", "--disable-admission-plugins=ServiceAccount"])
        .arg(file("encryption-provider-config", &dir.join("encryption.yaml")))
        .args(["--encryption-provider-config-automatic-reload=true", "--feature-gates=KMSv1=true"]))
}

/// What kube-apiserver proves itself with, made by itself, its issuer included.
fn certificate(dir: &Path) -> PathBuf {
    dir.join("certificates/apiserver.crt")
}

fn start_proxy(dir: &Path) -> anyhow::Result<(Child, u16)> {
    let port = ports::free_port()?;
    let mut proxy = Spec::new("kubectl-proxy", &peers()?.kubectl, dir)
        .env("KUBECONFIG", dir.join("kubeconfig"))
        .arg("proxy")
        .arg(format!("--port={port}"))
        .start()?;
    proxy.wait_ready("listening", wait::START_LIMIT, || TcpStream::connect(("127.0.0.1", port)).ok())?;
    Ok((proxy, port))
}

fn kubeconfig(dir: &Path, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: tests\n\
         clusters:\n- name: tests\n  cluster:\n    server: https://127.0.0.1:{port}\n    certificate-authority: {}\n\
         contexts:\n- name: tests\n  context: {{cluster: tests, user: tester}}\n\
         users:\n- name: tester\n  user: {{token: {TOKEN}}}\n",
        certificate(dir).display()
    )
}
