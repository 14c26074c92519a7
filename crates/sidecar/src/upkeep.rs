//! What keeps a node in the fleet without a hand: it enrols when a token
//! appears, renews its certificate for ever, asks for the time, reports its
//! state, and keeps what it is told.
//!
//! It must never give up: every failure is logged, counted and tried again.

mod renewal;

use std::sync::Arc;
use std::time::Duration;

use fleet_kms_identity::{AgentAddress, Directory, JoinToken, JoinTokenError, Name};
use fleet_kms_transport::ClientTls;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::answer::Answers;
use crate::believed_time::BelievedTime;
use crate::enrolment::{self, EnrolmentError, NODE_MISSING, Random};
use crate::errors::chain;
use crate::links::{Links, LinksError};
use crate::metrics::Metrics;
use crate::node_identity::{IdentityError, NodeIdentity, install_first, next_key};
use crate::node_status::NodeStatus;

/// How often the directory is looked at for a token or an identity.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The pause after a token was refused or no agent answered.
const ENROL_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// How often the time is asked for, and how soon again when it was not told or
/// is in doubt.
const ASK_TIME_EVERY: Duration = Duration::from_secs(3_600);
const ASK_TIME_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// The pause before a write that failed is tried again.
const KEEP_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Why this node could not be enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The token is none.
    #[error("the join token cannot be used")]
    Token(#[from] JoinTokenError),
    /// No agent gave a certificate.
    #[error("no agent gave a certificate")]
    Call(#[from] EnrolmentError),
    /// The identity directory cannot be used.
    #[error("the identity cannot be kept")]
    Identity(#[from] IdentityError),
}

/// What upkeep needs of the program.
#[derive(Clone)]
pub struct Upkeep {
    /// Where the identity lives.
    pub directory: Directory,
    /// The agents of the configuration.
    pub agents: Vec<AgentAddress>,
    /// This node's name, for a token that names none.
    pub node: Option<Name>,
    /// The believed time.
    pub time: BelievedTime,
    /// The generator.
    pub random: Random,
}

/// What upkeep moves.
#[derive(Clone)]
pub struct Moved {
    /// The links to the agents.
    pub links: Links,
    /// The node's status.
    pub node_status: NodeStatus,
    /// Told about health.
    pub answers: Answers,
    /// Counts renewals.
    pub metrics: Metrics,
}

impl Upkeep {
    /// Exchanges a token for this node's identity, on disk.
    pub async fn enrol(&self, token: &str) -> Result<(), EnrolError> {
        let token: JoinToken = token.parse()?;
        let key = next_key(&self.directory)?;
        let name = self.node.as_ref().map_or("", Name::as_str);
        let asked = enrolment::enrol(&self.agents, &token, &key, name, &self.time, self.random).await;
        let first = match asked {
            Err(error) if name.is_empty() && error.reason() == Some(NODE_MISSING) => {
                let name = host_name();
                enrolment::enrol(&self.agents, &token, &key, &name, &self.time, self.random).await?
            }
            asked => asked?,
        };
        install_first(&self.directory, &first, &self.time)?;
        Ok(())
    }

    /// Runs for the process's life.
    pub async fn run(self, moved: Moved) {
        loop {
            let identity = self.enrolled(&moved.answers).await;
            let certificate = identity.certificate();
            tracing::info!(id = %certificate.id(), serial = %certificate.serial(), "this node is enrolled");
            let mut tasks = self.start(&identity, &moved);
            self.superseded(&identity).await;
            tasks.abort_all();
            tracing::info!("this node has a new identity");
        }
    }

    /// Waits until there is an identity; enrols when there is a token.
    async fn enrolled(&self, answers: &Answers) -> NodeIdentity {
        let mut said = String::new();
        loop {
            match NodeIdentity::load(&self.directory, &self.agents, &self.time) {
                Ok(Some(identity)) => return identity,
                Ok(None) => say_once(
                    &mut said,
                    "this node is not enrolled; put a join token into its identity directory as the file `token`",
                ),
                Err(error) => say_once(&mut said, &chain(&error)),
            }
            answers.note_health(Some(&LinksError::NotEnrolled.into()));
            sleep(if self.enrol_from_file().await { Duration::ZERO } else { LOOK_EVERY }).await;
        }
    }

    /// Enrols if there is a token; true if that made an identity.
    async fn enrol_from_file(&self) -> bool {
        let token = match self.directory.token() {
            Ok(Some(token)) => token,
            Ok(None) => return false,
            Err(error) => {
                tracing::warn!(error = chain(&error), "the join token cannot be read");
                sleep(ENROL_AGAIN_AFTER).await;
                return false;
            }
        };
        match self.enrol(&token).await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(error = chain(&error), "cannot enrol; the token stays, and is tried again");
                sleep(ENROL_AGAIN_AFTER).await;
                false
            }
        }
    }

    /// Waits until the directory holds another identity than this.
    async fn superseded(&self, identity: &NodeIdentity) {
        let mut seen = identity.chain_written();
        loop {
            sleep(LOOK_EVERY).await;
            let written = identity.chain_written();
            let is_new = written != seen;
            seen = written;
            if self.enrol_from_file().await || is_new && identity.is_superseded() {
                return;
            }
        }
    }

    fn start(&self, identity: &NodeIdentity, moved: &Moved) -> JoinSet<()> {
        let tls = identity.tls();
        let agents = identity.agents();
        moved.links.replace_agents(&tls, agents.iter().map(|agent| agent.data.as_str()));
        moved.node_status.saw_version(identity.highest_version());
        let mut tasks = JoinSet::new();
        let doubt = Arc::clone(&moved.links.context().time_is_doubtful);
        tasks.spawn(moved.node_status.clone().report(moved.answers.clone()));
        tasks.spawn(keep_what_is_learnt(identity.clone(), moved.clone(), tls.clone()));
        tasks.spawn(keep_time(identity.clone(), tls, self.time.clone(), self.random, doubt));
        tasks.spawn(renewal::renew_for_ever(identity.clone(), self.time.clone(), moved.clone(), self.random));
        tasks
    }
}

async fn keep_what_is_learnt(identity: NodeIdentity, moved: Moved, tls: ClientTls) {
    let mut learnt = moved.node_status.learnt();
    loop {
        let news = learnt.borrow_and_update().clone();
        let kept = identity.learn(news).await;
        let agents = identity.agents();
        moved.links.set_agents(&tls, agents.iter().map(|agent| agent.data.as_str()));
        let again = match kept {
            Ok(()) => Duration::MAX,
            Err(error) => {
                tracing::warn!(error = chain(&error), "cannot keep what the fleet tells; it is tried again");
                KEEP_AGAIN_AFTER
            }
        };
        if let Ok(Err(_)) = timeout(again, learnt.changed()).await {
            return;
        }
    }
}

async fn keep_time(
    identity: NodeIdentity,
    tls: ClientTls,
    time: BelievedTime,
    random: Random,
    doubt: Arc<Notify>,
) {
    loop {
        let roots = identity.roots();
        let asked = enrolment::ask_time(&identity.agents(), &tls, &roots, &time, random).await;
        let told = asked.is_ok();
        match asked {
            Ok(proven) => {
                if let Err(error) = identity.note_time(proven).await {
                    tracing::warn!(error = chain(&error), "cannot keep the last good time");
                }
            }
            Err(error) => tracing::debug!(error = chain(&error), "no agent tells the time"),
        }
        if told {
            sleep(ASK_TIME_AGAIN_AFTER).await;
            let _ = timeout(ASK_TIME_EVERY, doubt.notified()).await;
        } else {
            // Doubt means that an agent is back.
            let _ = timeout(ASK_TIME_AGAIN_AFTER, doubt.notified()).await;
        }
    }
}

/// The host's name as a node name: lower case, without what a name cannot hold.
fn host_name() -> String {
    let name = rustix::system::uname();
    let name = name.nodename().to_string_lossy().to_ascii_lowercase();
    name.chars().filter(|char| char.is_ascii_alphanumeric() || matches!(char, '.' | '-')).take(63).collect()
}

fn say_once(said: &mut String, what: &str) {
    if said != what {
        tracing::warn!("{what}");
        what.clone_into(said);
    }
}
