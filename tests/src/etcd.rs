//! A real etcd of one member, and its raw bytes: what a thief of the disk would read.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use data_encoding::BASE64;
use serde_json::{Value, json};

use crate::child::{self, Child, Spec};
use crate::peers::peers;
use crate::{http, ports, wait};

/// A running etcd. Its data lives in the given directory and survives [`Etcd::restart`].
pub struct Etcd {
    spec: Spec,
    child: Option<Child>,
    client_port: u16,
    data: PathBuf,
}

impl Etcd {
    /// Starts etcd with its data and logs under `dir`.
    ///
    /// It does not wait for the disk: no test here is about etcd's own durability.
    ///
    /// # Errors
    /// When it does not become healthy.
    pub fn start(dir: &Path) -> anyhow::Result<Self> {
        Self::start_with(dir, &[])
    }

    /// Stops it and starts another one under `dir` on a copy of its data, as new machines are started on a snapshot of
    /// old ones.
    ///
    /// # Errors
    /// When the data cannot be copied, or the copy does not become healthy.
    pub fn move_to(mut self, dir: &Path) -> anyhow::Result<Self> {
        self.child.take().context("etcd does not run")?.stop()?;
        fs::create_dir_all(dir)?;
        child::run(Command::new("cp").arg("-a").arg(&self.data).arg(dir))?;
        Self::start_with(dir, &["--force-new-cluster"])
    }

    fn start_with(dir: &Path, args: &[&str]) -> anyhow::Result<Self> {
        let (client_port, peer_port) = (ports::free_port()?, ports::free_port()?);
        let client_url = format!("http://127.0.0.1:{client_port}");
        let peer_url = format!("http://127.0.0.1:{peer_port}");
        let data = dir.join("etcd");
        let spec = Spec::new("etcd", &peers()?.etcd, dir)
            .arg("--name=tests")
            .arg(format!("--data-dir={}", data.display()))
            .args(["--unsafe-no-fsync", "--log-level=warn"])
            .arg(format!("--listen-client-urls={client_url}"))
            .arg(format!("--advertise-client-urls={client_url}"))
            .arg(format!("--listen-peer-urls={peer_url}"))
            .arg(format!("--initial-advertise-peer-urls={peer_url}"))
            .arg(format!("--initial-cluster=tests={peer_url}"))
            .args(args);
        let mut etcd = Self { spec, child: None, client_port, data };
        etcd.run()?;
        Ok(etcd)
    }

    /// The URL for `--etcd-servers`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// Kills it and starts it again on the same data and ports.
    ///
    /// # Errors
    /// When it does not become healthy.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.child = None;
        self.run()
    }

    /// The value under `key`, byte for byte.
    ///
    /// # Errors
    /// When there is none.
    pub fn value(&self, key: &str) -> anyhow::Result<Vec<u8>> {
        let answer = self.call("/v3/kv/range", &json!({ "key": base64(key) }))?;
        let value = answer.pointer("/kvs/0/value").and_then(Value::as_str);
        decode(value.with_context(|| format!("etcd has no {key}"))?)
    }

    /// The value of the Secret `name` in `namespace`.
    ///
    /// # Errors
    /// When there is none.
    pub fn secret(&self, namespace: &str, name: &str) -> anyhow::Result<Vec<u8>> {
        self.value(&format!("/registry/secrets/{namespace}/{name}"))
    }

    /// Writes `value` under `key`, past any API server.
    ///
    /// # Errors
    /// When etcd does not take it.
    pub fn put(&self, key: &str, value: &[u8]) -> anyhow::Result<()> {
        let request = json!({ "key": base64(key), "value": BASE64.encode(value) });
        self.call("/v3/kv/put", &request).map(drop)
    }

    /// Deletes `key`, past any API server.
    ///
    /// # Errors
    /// When etcd does not.
    pub fn delete(&self, key: &str) -> anyhow::Result<()> {
        self.call("/v3/kv/deleterange", &json!({ "key": base64(key) })).map(drop)
    }

    /// All keys that begin with `prefix`.
    ///
    /// # Errors
    /// When etcd does not answer.
    pub fn keys(&self, prefix: &str) -> anyhow::Result<Vec<String>> {
        let request =
            json!({ "key": base64(prefix), "range_end": BASE64.encode(&after(prefix)), "keys_only": true });
        let answer = self.call("/v3/kv/range", &request)?;
        let found = answer.get("kvs").and_then(Value::as_array).cloned().unwrap_or_default();
        found
            .iter()
            .map(|entry| {
                let key = entry.get("key").and_then(Value::as_str).context("a key")?;
                Ok(String::from_utf8(decode(key)?)?)
            })
            .collect()
    }

    fn run(&mut self) -> anyhow::Result<()> {
        let mut child = self.spec.start()?;
        let port = self.client_port;
        child.wait_ready("healthy", wait::START_LIMIT, || {
            let health = http::get(port, "/health").ok()?;
            health.body.contains("true").then_some(())
        })?;
        self.child = Some(child);
        Ok(())
    }

    fn call(&self, path: &str, request: &Value) -> anyhow::Result<Value> {
        let answer = http::request(self.client_port, "POST", path, "application/json", &request.to_string())?;
        Ok(serde_json::from_str(&answer.ok()?)?)
    }
}

fn base64(text: &str) -> String {
    BASE64.encode(text.as_bytes())
}

fn decode(text: &str) -> anyhow::Result<Vec<u8>> {
    Ok(BASE64.decode(text.as_bytes())?)
}

/// The first key after all keys with this prefix.
fn after(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    end
}
