//! One agent on a disk that a test makes fail and heal while it runs.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use fleet_kms_store::{RowName, SqliteStore, Store, Txn};
use tempfile::TempDir;

use super::audit::AuditView;
use super::evidence::StoreView;
use super::node::{self, Credentials, Node, Wrapped};
use super::operation::Operation;
use super::shim::{Fault, Shim};
use super::template::{self, Scene, Template};
use super::trial;
use crate::child::{Child, Spec};
use crate::fleet::Ports;
use crate::http;
use crate::programs::Program;
use crate::wait;

/// How long an agent may take to start or to give up.
const LIMIT: Duration = Duration::from_secs(20);

/// An agent, its disk and what it serves.
pub struct Stage {
    template: Template,
    directory: TempDir,
    ports: Ports,
    config: PathBuf,
    child: Option<Child>,
    /// The disk.
    pub disk: Shim,
}

/// How a start ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Started {
    /// It serves. Whether it is `recovered-unconfirmed`, and how many keys do not open.
    Serves {
        /// It refuses changes until an operator confirms.
        unconfirmed: bool,
        /// Keys that do not open.
        damaged: u32,
        /// The older DEKs that it does not unwrap.
        unreadable: usize,
    },
    /// It gave up, with this status and this last line.
    Ended {
        /// The exit status.
        code: Option<i32>,
        /// What the operator reads.
        text: String,
    },
}

impl Stage {
    /// Lays out an agent with one cluster whose rotation is far away. It does not run.
    ///
    /// # Errors
    /// When the store cannot be made.
    pub async fn new() -> anyhow::Result<Self> {
        Self::with(Scene::Plain).await
    }

    /// As [`Stage::new`], with another store.
    ///
    /// # Errors
    /// As there.
    pub async fn with(scene: Scene) -> anyhow::Result<Self> {
        let template = Template::new(scene).await?;
        let directory = template::temporary()?;
        let ports = super::ports()?;
        let agent = directory.path().join("agent");
        fs::create_dir_all(&agent)?;
        let config = template.copy_to(&agent, ports)?;
        let disk = Shim::new(&agent, &directory.path().join("control"), Fault::None)?;
        Ok(Self { template, directory, ports, config, child: None, disk })
    }

    /// Puts the prepared store back in place.
    ///
    /// # Errors
    /// When a file cannot be copied.
    pub fn reset(&mut self) -> anyhow::Result<()> {
        self.child = None;
        fs::remove_dir_all(self.path(""))?;
        self.template.copy_to(&self.path(""), self.ports)?;
        Ok(())
    }

    /// A file of the agent.
    pub fn path(&self, name: &str) -> PathBuf {
        let agent = self.directory.path().join("agent");
        if name.is_empty() { agent } else { agent.join(name) }
    }

    /// Starts the agent and waits until it serves or has given up.
    ///
    /// # Errors
    /// When it does neither.
    pub async fn start(&mut self) -> anyhow::Result<Started> {
        let spec = Spec::new("kms-agent", &Program::Agent.path()?, self.directory.path());
        self.start_as(spec.args(["run", "--config"]).arg(&self.config)).await
    }

    /// As [`Stage::start`], with another command line that starts an agent on this stage.
    ///
    /// # Errors
    /// As [`Stage::start`].
    pub async fn start_as(&mut self, spec: Spec) -> anyhow::Result<Started> {
        let log = spec.stderr_path();
        File::create(&log)?;
        let mut child = self.disk.preload(spec).start()?;
        let ops = self.ports.ops;
        let metrics = wait::until("the agent to serve or to end", LIMIT, || {
            if !child.is_running()? {
                return Ok(Some(None));
            }
            let answer = http::get(ops, "/metrics").ok().and_then(|answer| answer.ok().ok());
            Ok(answer.map(Some))
        })?;
        let Some(metrics) = metrics else {
            let code = child.wait_exit(LIMIT)?.code();
            let text = child.stderr()?;
            return Ok(Started::Ended { code, text: text.lines().last().unwrap_or_default().to_owned() });
        };
        self.child = Some(child);
        let gauge = |name: &str| -> anyhow::Result<u32> {
            let line = metrics.lines().find_map(|line| line.strip_prefix(name)).context("a gauge")?;
            Ok(line.trim().parse()?)
        };
        Ok(Started::Serves {
            unconfirmed: gauge("fleet_kms_agent_store_unconfirmed ")? != 0,
            damaged: gauge("fleet_kms_agent_damaged_keys ")?,
            unreadable: self.unreadable().await?,
        })
    }

    /// Connects as the node that the store knows.
    ///
    /// # Errors
    /// When the agent does not let it in.
    pub async fn node(&self) -> anyhow::Result<Node> {
        Node::connect(self.ports.data, &self.template.node).await
    }

    /// The DEKs that nodes hold already.
    pub fn old_deks(&self) -> &[Wrapped] {
        &self.template.wrapped
    }

    /// Wraps and unwraps, and counts older DEKs that do not unwrap any more.
    ///
    /// # Errors
    /// When the agent does not serve.
    pub async fn unreadable(&self) -> anyhow::Result<usize> {
        let mut node = self.node().await?;
        let mut unreadable = 0;
        for wrapped in &self.template.wrapped {
            // A key that does not open fails the whole call, so one at a time.
            let read = node.unreadable(std::slice::from_ref(wrapped)).await;
            unreadable += read.map_or(1, |bad| bad.len());
        }
        match node.wrap(&[7; 32]).await {
            Ok(new) => Ok(unreadable + node.unreadable(&[new]).await?.len()),
            Err(_) if unreadable > 0 => Ok(unreadable),
            Err(error) => Err(error),
        }
    }

    /// Shows the token of the second node, as often as one likes.
    ///
    /// # Errors
    /// With the agent's refusal.
    pub async fn enrol(&self) -> anyhow::Result<Credentials> {
        node::enrol(self.ports.enrolment, &self.template.token, &self.template.new_key).await
    }

    /// Enrols the second node against all odds; returns what the node reads otherwise.
    pub async fn refusal(&self) -> Option<String> {
        self.enrol().await.err().map(|error| format!("{error:#}"))
    }

    /// The agent's metrics.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metrics(&self) -> anyhow::Result<String> {
        http::get(self.ports.ops, "/metrics")?.ok()
    }

    /// What the agent logged since its start.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn log(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(self.directory.path().join("kms-agent.stderr"))?)
    }

    /// Kills the agent as a crash would.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.take().context("the agent does not run")?.kill9()
    }

    /// Stops the agent as an operator would.
    ///
    /// # Errors
    /// When it does not run or does not end well.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        // Not by a wait that blocks: this end of its connections must answer while it drains.
        trial::stop(self.child.take().context("the agent does not run")?).await
    }

    /// Judges store and audit of an agent that has stopped after the second node was enrolled.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn violations(&self) -> anyhow::Result<Vec<String>> {
        let config = template::load(&self.config)?;
        let store = StoreView::read(&config.store, &config.root).await?;
        let audit = AuditView::read(&config.audit)?;
        let mut found = store.violations(&self.template.before);
        found.extend(Operation::Enrolment.counts(&self.template, &store, &audit));
        found.extend(audit.violations(&config.audit)?);
        Ok(found)
    }

    /// Inverts one bit behind the agent's back in the first row whose name starts so, `place` eighths into its bytes.
    ///
    /// # Errors
    /// When there is no such row.
    pub async fn flip(&self, prefix: &str, place: usize) -> anyhow::Result<RowName> {
        let store = SqliteStore::open(self.path("store.db"))?;
        let row = store.page_rows(prefix, None, 1).await?.pop().with_context(|| prefix.to_owned())?;
        let mut bytes = row.bytes;
        let at = ((bytes.len() - 1) * place).div_ceil(8);
        *bytes.get_mut(at).context("a byte")? ^= 0x10;
        store.commit(Txn::new().put(row.name.clone(), bytes)).await?;
        Ok(row.name)
    }
}
