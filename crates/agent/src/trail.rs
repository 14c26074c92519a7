//! What goes into the audit's chain of changes, owned, so that it can be
//! written off the runtime's threads.

use fleet_kms_audit as audit;
use fleet_kms_keyring::ClusterId;
use serde_json::{Map, Value};

pub mod heads;
pub mod retention;
pub mod upkeep;

/// What every line says.
#[derive(Debug, Clone)]
struct About {
    action: &'static str,
    who: String,
    cluster: Option<(ClusterId, String)>,
    target: Option<String>,
    reason: Option<String>,
    details: Map<String, Value>,
}

/// A change that is about to be made.
#[derive(Debug, Clone)]
pub struct Intent(About);

/// Something that happened without being a change.
#[derive(Debug, Clone)]
pub struct Event(About);

impl About {
    fn new(action: &'static str, who: &str) -> Self {
        let who = who.to_owned();
        Self { action, who, cluster: None, target: None, reason: None, details: Map::new() }
    }

    fn cluster(&self) -> Option<audit::ClusterRef<'_>> {
        self.cluster.as_ref().map(|(id, name)| audit::ClusterRef { id: id.as_bytes(), name })
    }
}

macro_rules! builders {
    ($($line:ident),*) => {$(
        impl $line {
            /// Starts a line: what, and who asked for it or noticed it.
            pub fn new(action: &'static str, who: &str) -> Self {
                Self(About::new(action, who))
            }

            /// Names the cluster, with the name it has now.
            #[must_use]
            pub fn cluster(mut self, id: ClusterId, name: &str) -> Self {
                self.0.cluster = Some((id, name.to_owned()));
                self
            }

            /// Names what in the cluster is concerned.
            #[must_use]
            pub fn target(mut self, target: impl Into<String>) -> Self {
                self.0.target = Some(target.into());
                self
            }

            /// Says why.
            #[must_use]
            pub fn reason(mut self, reason: Option<&str>) -> Self {
                self.0.reason = reason.map(str::to_owned);
                self
            }

            /// Adds what else an auditor needs; never a secret.
            #[must_use]
            pub fn detail(mut self, name: &'static str, value: impl Into<String>) -> Self {
                self.0.details.insert(name.to_owned(), Value::String(value.into()));
                self
            }
        }
    )*};
}

builders!(Intent, Event);

impl Intent {
    /// Returns the line for the log.
    pub(crate) fn line(&self, change: audit::ChangeId) -> audit::Intent<'_> {
        let About { action, who, target, reason, details, .. } = &self.0;
        audit::Intent {
            change,
            action,
            who,
            cluster: self.0.cluster(),
            target: target.as_deref(),
            reason: reason.as_deref(),
            details: details.clone(),
        }
    }
}

impl Event {
    /// Returns the line for the log.
    pub(crate) fn line(&self) -> audit::Event<'_> {
        let About { action, who, target, reason, details, .. } = &self.0;
        let mut details = details.clone();
        if let Some(reason) = reason {
            details.insert("reason".to_owned(), Value::String(reason.clone()));
        }
        audit::Event { action, who, cluster: self.0.cluster(), target: target.as_deref(), details }
    }
}
