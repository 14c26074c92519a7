//! A fleet of ours: one real agent, clusters, and a real sidecar for each node, all on free ports of loopback.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::child::{Child, Spec, run};
use crate::http::{self, Answer};
use crate::ports::free_port;
use crate::programs::Program;
use crate::wait::{self, START_LIMIT};

/// The trust domain of test fleets.
pub const TRUST_DOMAIN: &str = "fleet.test";
/// The name of the one agent of a test fleet.
pub const AGENT: &str = "agent-1";

/// The agent's ports.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    /// Wrap, Unwrap, Status.
    pub data: u16,
    /// Enrol, Renew, Time.
    pub enrolment: u16,
    /// The admin API.
    pub admin: u16,
    /// Health and metrics.
    pub ops: u16,
}

/// A fleet with one agent.
pub struct Fleet {
    dir: TempDir,
    /// The agent.
    pub agent: Agent,
}

/// The agent, running or not.
pub struct Agent {
    spec: Spec,
    child: Option<Child>,
    /// Where it listens.
    pub ports: Ports,
    /// Its configuration file.
    pub config: PathBuf,
    /// Its directory: store, root key, audit, logs.
    pub directory: PathBuf,
}

/// A cluster of the fleet.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
}

/// A sidecar, running or not.
pub struct Sidecar {
    spec: Spec,
    child: Option<Child>,
    /// Where it serves the API server.
    pub socket: PathBuf,
    /// Its ops port.
    pub ops: u16,
    /// Its configuration file.
    pub config: PathBuf,
    /// Its identity directory.
    pub identity: PathBuf,
}

impl Fleet {
    /// Initialises an agent in a new directory and starts it.
    ///
    /// # Errors
    /// When a program is not built, refuses, or does not get ready.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with("")
    }

    /// As [`Fleet::start`], with more lines of the agent's configuration.
    ///
    /// # Errors
    /// As [`Fleet::start`].
    pub fn start_with(extra: &str) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("fleet-kms-").tempdir()?;
        let mut agent = Agent::init(&dir.path().join("agent"), extra)?;
        agent.start()?;
        Ok(Self { dir, agent })
    }

    /// Where the fleet keeps everything.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Runs kmsctl as the first admin and returns its standard output.
    ///
    /// # Errors
    /// When it ends with another status than 0.
    pub fn kmsctl(&self, args: &[&str]) -> anyhow::Result<String> {
        run(self.kmsctl_command(args)?.stdin(Stdio::null()))
    }

    /// Runs kms-agent on the agent's host and returns its standard output.
    ///
    /// # Errors
    /// When it ends with another status than 0.
    pub fn host(&self, args: &[&str]) -> anyhow::Result<String> {
        run(self.host_command(args)?.stdin(Stdio::null()))
    }

    /// A kms-agent command on the agent's host.
    ///
    /// # Errors
    /// When kms-agent is not built.
    pub fn host_command(&self, args: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(Program::Agent.path()?);
        command.arg("--config").arg(&self.agent.config).args(args);
        Ok(command)
    }

    /// Runs kmsctl as the first admin, whatever its exit status.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn kmsctl_output(&self, args: &[&str]) -> anyhow::Result<Output> {
        Ok(self.kmsctl_command(args)?.stdin(Stdio::null()).output()?)
    }

    /// A kmsctl command as the first admin.
    ///
    /// # Errors
    /// When kmsctl is not built.
    pub fn kmsctl_command(&self, args: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(Program::Ctl.path()?);
        command.args(args).env("KMSCTL_CONFIG", self.agent.directory.join("admin/kmsctl.toml"));
        Ok(command)
    }

    /// Runs kmsctl with `-o json`.
    ///
    /// # Errors
    /// When it fails or does not print JSON.
    pub fn kmsctl_json(&self, args: &[&str]) -> anyhow::Result<Value> {
        let mut all = args.to_vec();
        all.extend(["-o", "json"]);
        let text = self.kmsctl(&all)?;
        serde_json::from_str(&text).with_context(|| text)
    }

    /// Makes a cluster.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn cluster(&self, name: &str) -> anyhow::Result<Cluster> {
        let created = self.kmsctl_json(&["cluster", "create", name])?;
        let id = created.pointer("/result/id").and_then(Value::as_str).context("the id of a new cluster")?;
        Ok(Cluster { name: name.to_owned(), id: id.to_owned() })
    }

    /// A cluster that was made before.
    ///
    /// # Errors
    /// When there is none.
    pub fn cluster_named(&self, name: &str) -> anyhow::Result<Cluster> {
        let shown = self.kmsctl_json(&["cluster", "show", name])?;
        let id = shown.get("id").and_then(Value::as_str).context("the cluster's id")?;
        Ok(Cluster { name: name.to_owned(), id: id.to_owned() })
    }

    /// Makes a join token.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn token(&self, cluster: &Cluster, node: &str) -> anyhow::Result<String> {
        self.token_for(&cluster.name, node)
    }

    /// As [`Fleet::token`], by the cluster's name.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn token_for(&self, cluster: &str, node: &str) -> anyhow::Result<String> {
        let token = self.kmsctl(&["node", "token", "--cluster", cluster, "--node", node])?;
        Ok(token.trim().to_owned())
    }

    /// Enrols a node as an operator would and starts its sidecar.
    ///
    /// # Errors
    /// When the agent refuses or the sidecar does not get ready.
    pub fn sidecar(&self, cluster: &Cluster, node: &str) -> anyhow::Result<Sidecar> {
        let mut sidecar = self.unenrolled_sidecar(cluster, node)?;
        let token = self.token(cluster, node)?;
        sidecar.enrol(&token)?;
        sidecar.start()?;
        sidecar.wait_ready()?;
        Ok(sidecar)
    }

    /// Lays out a node that has no identity yet; its sidecar does not run.
    ///
    /// # Errors
    /// When its files cannot be written.
    pub fn unenrolled_sidecar(&self, cluster: &Cluster, node: &str) -> anyhow::Result<Sidecar> {
        let directory = self.dir.path().join(format!("{}-{node}", cluster.name));
        Sidecar::lay_out(&directory, &[self.agent.ports])
    }
}

impl Agent {
    /// Lays out an agent's directory and runs `kms-agent init` in it.
    ///
    /// # Errors
    /// When init fails.
    pub fn init(directory: &Path, extra: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(directory)?;
        let ports =
            Ports { data: free_port()?, enrolment: free_port()?, admin: free_port()?, ops: free_port()? };
        let config = directory.join("agent.toml");
        fs::write(&config, agent_config(directory, ports, extra))?;
        let program = Program::Agent.path()?;
        let admin = directory.join("admin");
        let mut init = Command::new(&program);
        init.args(["init", "--single-slot"])
            .arg("--config")
            .arg(&config)
            .arg("--admin-directory")
            .arg(&admin);
        run(&mut init)?;
        let spec = Spec::new("kms-agent", &program, directory).args(["run", "--config"]).arg(&config);
        Ok(Self { spec, child: None, ports, config, directory: directory.to_owned() })
    }

    /// Changes how the program is started from now on.
    pub fn respec(&mut self, change: impl FnOnce(Spec) -> Spec) {
        self.spec = change(self.spec.clone());
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// When it ends or does not get ready.
    pub fn start(&mut self) -> anyhow::Result<()> {
        self.start_unready()?;
        self.wait_ready()
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it runs already or cannot be started.
    pub fn start_unready(&mut self) -> anyhow::Result<()> {
        if self.child.is_some() {
            bail!("the agent runs already");
        }
        self.child = Some(self.spec.start()?);
        Ok(())
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// When it ends or does not get ready.
    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        let ops = self.ports.ops;
        self.running()?.wait_ready("/readyz", START_LIMIT, || ready(ops))
    }

    /// Stops it with SIGTERM.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let status = self.child.take().context("the agent does not run")?.stop()?;
        if !status.success() {
            bail!("the agent ended with {status}");
        }
        Ok(())
    }

    /// Kills it.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill9(&mut self) -> anyhow::Result<()> {
        self.child.take().context("the agent does not run")?.kill9()
    }

    /// Stops it, waits for `gap`, and starts it.
    ///
    /// # Errors
    /// As [`Agent::stop`] and [`Agent::start`].
    pub fn restart_after(&mut self, gap: Duration) -> anyhow::Result<()> {
        self.stop()?;
        std::thread::sleep(gap);
        self.start()
    }

    /// The running program.
    ///
    /// # Errors
    /// When it does not run.
    pub fn running(&mut self) -> anyhow::Result<&mut Child> {
        self.child.as_mut().context("the agent does not run")
    }

    /// Asks its ops port.
    ///
    /// # Errors
    /// When nothing answers.
    pub fn ops(&self, path: &str) -> anyhow::Result<Answer> {
        http::get(self.ports.ops, path)
    }

    /// All audit lines of one chain (`changes` or `data`), in order.
    ///
    /// # Errors
    /// When a file cannot be read or a line is not JSON.
    pub fn audit(&self, chain: &str) -> anyhow::Result<Vec<Value>> {
        let mut files: Vec<PathBuf> = fs::read_dir(self.directory.join("audit"))?
            .map(|entry| Ok(entry?.path()))
            .collect::<anyhow::Result<_>>()?;
        files.retain(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(chain)));
        files.sort();
        let mut lines = Vec::new();
        for file in files {
            for line in fs::read_to_string(&file)?.lines() {
                lines.push(serde_json::from_str(line).with_context(|| line.to_owned())?);
            }
        }
        Ok(lines)
    }

    /// What it logged.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn log(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(self.spec.stderr_path())?)
    }
}

impl Sidecar {
    /// Writes a node's files: configuration and empty directories.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn lay_out(directory: &Path, agents: &[Ports]) -> anyhow::Result<Self> {
        let run_directory = directory.join("run");
        let identity = directory.join("identity");
        fs::create_dir_all(&run_directory)?;
        fs::create_dir_all(&identity)?;
        let socket = run_directory.join("kms.sock");
        let ops = free_port()?;
        let config = directory.join("sidecar.toml");
        fs::write(&config, sidecar_config(&socket, &identity, agents, ops))?;
        let program = Program::Sidecar.path()?;
        let spec = Spec::new("kms-sidecar", &program, directory).args(["run", "--config"]).arg(&config);
        Ok(Self { spec, child: None, socket, ops, config, identity })
    }

    /// Runs `kms-sidecar enrol` with the token in a file, as an operator would.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn enrol(&self, token: &str) -> anyhow::Result<()> {
        let output = self.enrol_output(token)?;
        if !output.status.success() {
            bail!("enrol ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// As [`Sidecar::enrol`], whatever the exit status.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn enrol_output(&self, token: &str) -> anyhow::Result<Output> {
        let file = self.identity.with_file_name("token");
        fs::write(&file, token)?;
        let mut enrol = Command::new(Program::Sidecar.path()?);
        enrol.arg("enrol").arg("--config").arg(&self.config).arg("--token-file").arg(&file);
        let output = enrol.stdin(Stdio::null()).output()?;
        if file.exists() {
            fs::remove_file(&file)?;
        }
        Ok(output)
    }

    /// Changes how the program is started from now on.
    pub fn respec(&mut self, change: impl FnOnce(Spec) -> Spec) {
        self.spec = change(self.spec.clone());
    }

    /// Starts it and waits until it accepts on the socket.
    ///
    /// # Errors
    /// When it runs already, ends, or does not accept.
    pub fn start(&mut self) -> anyhow::Result<()> {
        if self.child.is_some() {
            bail!("the sidecar runs already");
        }
        let mut child = self.spec.start()?;
        let socket = self.socket.clone();
        child.wait_ready("its socket", START_LIMIT, || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok().then_some(())
        })?;
        self.child = Some(child);
        Ok(())
    }

    /// Gives it another ops port: while it was off, another program may have taken its own.
    ///
    /// # Errors
    /// When none is free, or its configuration cannot be written.
    pub fn move_ops(&mut self) -> anyhow::Result<()> {
        let address = |port: u16| format!("address = \"127.0.0.1:{port}\"");
        let (text, port) = (fs::read_to_string(&self.config)?, free_port()?);
        fs::write(&self.config, text.replace(&address(self.ops), &address(port)))?;
        self.ops = port;
        Ok(())
    }

    /// Waits until it can reach an agent.
    ///
    /// # Errors
    /// When it ends or does not get ready.
    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        let ops = self.ops;
        self.running()?.wait_ready("/readyz", START_LIMIT, || ready(ops))
    }

    /// Stops it with SIGTERM.
    ///
    /// # Errors
    /// When it does not run or does not end well.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let status = self.child.take().context("the sidecar does not run")?.stop()?;
        if !status.success() {
            bail!("the sidecar ended with {status}");
        }
        Ok(())
    }

    /// Kills it.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill9(&mut self) -> anyhow::Result<()> {
        self.child.take().context("the sidecar does not run")?.kill9()
    }

    /// Stops and starts it.
    ///
    /// # Errors
    /// As [`Sidecar::stop`] and [`Sidecar::start`].
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.stop()?;
        self.start()
    }

    /// The running program.
    ///
    /// # Errors
    /// When it does not run.
    pub fn running(&mut self) -> anyhow::Result<&mut Child> {
        self.child.as_mut().context("the sidecar does not run")
    }

    /// Asks its ops port.
    ///
    /// # Errors
    /// When nothing answers.
    pub fn ops(&self, path: &str) -> anyhow::Result<Answer> {
        http::get(self.ops, path)
    }

    /// What it logged.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn log(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(self.spec.stderr_path())?)
    }
}

fn ready(ops: u16) -> Option<()> {
    http::get(ops, "/readyz").ok()?.ok().ok().map(drop)
}

/// An agent's configuration on these ports of loopback, with everything below one directory.
pub(crate) fn agent_config(directory: &Path, ports: Ports, extra: &str) -> String {
    let Ports { data, enrolment, admin, ops } = ports;
    let directory = directory.display();
    format!(
        r#"[agent]
name = "{AGENT}"
trust_domain = "{TRUST_DOMAIN}"
addresses = [{{ data = "127.0.0.1:{data}", enrolment = "127.0.0.1:{enrolment}" }}]
[listen]
data = "127.0.0.1:{data}"
enrolment = "127.0.0.1:{enrolment}"
admin = "127.0.0.1:{admin}"
ops = "127.0.0.1:{ops}"
[store]
path = "{directory}/store.db"
[root]
file = "{directory}/root.key"
[audit]
directory = "{directory}/audit"
{extra}
"#
    )
}

fn sidecar_config(socket: &Path, identity: &Path, agents: &[Ports], ops: u16) -> String {
    let agents: Vec<String> = agents
        .iter()
        .map(|ports| {
            let Ports { data, enrolment, .. } = ports;
            format!(r#"{{ data = "127.0.0.1:{data}", enrolment = "127.0.0.1:{enrolment}" }}"#)
        })
        .collect();
    format!(
        r#"[socket]
path = "{}"
[identity]
directory = "{}"
[agents]
addresses = [{}]
[ops]
address = "127.0.0.1:{ops}"
"#,
        socket.display(),
        identity.display(),
        agents.join(", ")
    )
}

/// Waits until `look` says yes.
///
/// # Errors
/// When the limit passes or `look` fails.
pub fn until_true(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    wait::until(what, limit, || Ok(look()?.then_some(())))
}
