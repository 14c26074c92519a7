//! The changes that trials interrupt. To add one: a variant, its template, how it is driven, what must hold.

use std::time::Duration;

use anyhow::{Context, bail};
use fleet_kms_identity::Certificate;

use super::audit::AuditView;
use super::evidence::StoreView;
use super::node::{self, Credentials, Node, Wrapped};
use super::site::{CommandsDisk, Site};
use super::template::{Scene, Template};

mod backup;
mod store_key;

/// How long the schedule may take to look once more.
const ARMED_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks of a driver.
const POLL: Duration = Duration::from_millis(2);

/// A change that is interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The schedule rotates a cluster that is due.
    Rotation,
    /// A node gets its first certificate.
    Enrolment,
    /// A backup is made; the agent is interrupted.
    Backup,
    /// A backup takes the place of an older one; the command on the host is interrupted.
    BackupCommand,
    /// A root slot is removed, and the store key renewed.
    StoreKeyRotation,
}

/// Which program a trial interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The agent.
    Agent,
    /// A command on its host.
    Command,
}

/// What has been acknowledged in a trial.
#[derive(Default)]
pub struct Acknowledged {
    /// Wrapped DEKs.
    pub wrapped: Vec<Wrapped>,
    /// The highest version seen.
    pub version: u32,
    /// The new node's certificate.
    pub enrolled: Option<Credentials>,
    /// The command on the host said that all is well.
    pub command: bool,
    /// What came to light before the next agent started.
    pub violations: Vec<String>,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Rotation, Self::Enrolment, Self::Backup, Self::BackupCommand, Self::StoreKeyRotation];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rotation => "rotation",
            Self::Enrolment => "enrolment",
            Self::Backup => "backup",
            Self::BackupCommand => "backup (its command)",
            Self::StoreKeyRotation => "store-key rotation",
        }
    }

    /// The program that is interrupted.
    pub fn victim(self) -> Victim {
        match self {
            Self::BackupCommand => Victim::Command,
            Self::Rotation | Self::Enrolment | Self::Backup | Self::StoreKeyRotation => Victim::Agent,
        }
    }

    /// Makes the store that trials of it start from.
    ///
    /// # Errors
    /// When it cannot be made.
    pub async fn template(self) -> anyhow::Result<Template> {
        Template::new(match self {
            Self::Rotation => Scene::Due,
            Self::Enrolment | Self::Backup => Scene::Plain,
            Self::BackupCommand => Scene::WithBackup,
            Self::StoreKeyRotation => Scene::WithSecondSlot,
        })
        .await
    }

    /// Drives it against a running agent, noting what is acknowledged. A command on the host works on `disk`.
    ///
    /// # Errors
    /// When the agent dies or refuses, which is what trials are for.
    pub async fn drive(
        self,
        site: &Site<'_>,
        disk: CommandsDisk<'_>,
        acknowledged: &mut Acknowledged,
    ) -> anyhow::Result<()> {
        let mut node = Node::connect(site.ports.data, &site.template.node).await?;
        wrap(&mut node, acknowledged).await?;
        match self {
            Self::Rotation => loop {
                acknowledged.version = acknowledged.version.max(node.version().await?);
                wrap(&mut node, acknowledged).await?;
                if acknowledged.version > 1 {
                    return Ok(());
                }
                tokio::time::sleep(POLL).await;
            },
            Self::Enrolment => {
                let template = site.template;
                let answer = node::enrol(site.ports.enrolment, &template.token, &template.new_key).await?;
                acknowledged.enrolled = Some(answer.clone());
                let mut new = Node::connect(site.ports.data, &answer).await?;
                wrap(&mut new, acknowledged).await
            }
            Self::Backup | Self::BackupCommand => backup::make(site, disk, acknowledged).await,
            Self::StoreKeyRotation => {
                store_key::rotate(site, disk, acknowledged).await?;
                wrap(&mut node, acknowledged).await
            }
        }
    }

    /// Looks at what a crash has left, before any agent starts on it again.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn look(self, site: &Site<'_>, acknowledged: &mut Acknowledged) -> anyhow::Result<Left> {
        match self {
            Self::Rotation | Self::Enrolment => Ok(Left::default()),
            Self::Backup | Self::BackupCommand => backup::look(site, acknowledged).await,
            Self::StoreKeyRotation => store_key::look(site, acknowledged).await,
        }
    }

    /// Finishes it against an agent that has started again, as time or the caller's next attempt would.
    ///
    /// # Errors
    /// When it cannot be finished: the schedule is not armed, or a lost reply has a price.
    pub async fn finish(
        self,
        site: &Site<'_>,
        left: Left,
        acknowledged: &mut Acknowledged,
    ) -> anyhow::Result<()> {
        let mut node = Node::connect(site.ports.data, &site.template.node).await?;
        match self {
            Self::Rotation => {
                let waited = tokio::time::timeout(ARMED_LIMIT, rotated(&mut node)).await;
                waited.context("the schedule is not armed: the due rotation did not happen")??;
            }
            Self::Enrolment => {
                let template = site.template;
                let answer = node::enrol(site.ports.enrolment, &template.token, &template.new_key).await?;
                if let Some(first) = &acknowledged.enrolled
                    && first.chain != answer.chain
                {
                    bail!("the same token and key got another certificate than was acknowledged");
                }
                let mut new = Node::connect(site.ports.data, &answer).await?;
                wrap(&mut new, acknowledged).await?;
                acknowledged.enrolled = Some(answer);
            }
            Self::Backup | Self::BackupCommand => backup::finish(site).await?,
            Self::StoreKeyRotation => store_key::finish(site, left).await?,
        }
        wrap(&mut node, acknowledged).await
    }

    /// Names what does not hold at the end of a trial: the change has happened exactly once, and is recorded so.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub async fn violations(
        self,
        site: &Site<'_>,
        store: &StoreView,
        audit: &AuditView,
    ) -> anyhow::Result<Vec<String>> {
        let mut found = self.counts(site.template, store, audit);
        match self {
            Self::Rotation | Self::Enrolment => {}
            Self::Backup | Self::BackupCommand => found.extend(backup::violations(site, store, audit).await?),
            Self::StoreKeyRotation => {
                found.extend(store_key::violations(site, store, audit).await?);
            }
        }
        Ok(found)
    }

    /// Names what was done more or less often than it should.
    pub fn counts(self, template: &Template, store: &StoreView, audit: &AuditView) -> Vec<String> {
        let before = &template.before;
        let rotated = store.active(&template.cluster).unwrap_or_default()
            - before.active(&template.cluster).unwrap_or_default();
        let enrolled = store.identities.len() - before.identities.len();
        let used = before.uses_left - store.uses_left;
        let recorded = (audit.done("key_rotate_scheduled"), audit.done("enrol"));
        let (rotations, enrolments) = match self {
            Self::Rotation => (1, 0),
            Self::Enrolment => (0, 1),
            Self::Backup | Self::BackupCommand | Self::StoreKeyRotation => (0, 0),
        };
        // The template's own node was enrolled as well.
        let expected = (rotations, enrolments + 1);
        let mut found = Vec::new();
        if (rotated as usize, enrolled, used as usize) != (rotations, enrolments, enrolments) {
            found.push(format!("{rotated} rotations, {enrolled} new identities, {used} uses of tokens"));
        }
        if recorded != expected {
            found.push(format!("the audit says (rotations, enrolments) {recorded:?}, expected {expected:?}"));
        }
        if self != Self::StoreKeyRotation && store.epochs != before.epochs {
            found.push(format!("rows are under the store keys {:?}", store.epochs));
        }
        found
    }
}

/// What a crash has left to do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Left {
    /// The root slot that was to be removed is there.
    slot: bool,
    /// The store key is in the middle of its rotation.
    rotating: bool,
}

impl Acknowledged {
    /// Names certificates that were handed out and cannot be read.
    pub fn violations(&self) -> Vec<String> {
        let leaf = self.enrolled.as_ref().and_then(|enrolled| enrolled.chain.first());
        let bad = leaf.and_then(|leaf| Certificate::from_der(leaf).err());
        bad.map(|error| format!("the new certificate does not parse: {error}")).into_iter().collect()
    }
}

async fn rotated(node: &mut Node) -> anyhow::Result<()> {
    while node.version().await? < 2 {
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

async fn wrap(node: &mut Node, acknowledged: &mut Acknowledged) -> anyhow::Result<()> {
    let number = u8::try_from(acknowledged.wrapped.len() % 256)?;
    let wrapped = node.wrap(&[number ^ 0x5a; 32]).await?;
    acknowledged.version = acknowledged.version.max(wrapped.version);
    acknowledged.wrapped.push(wrapped);
    Ok(())
}
