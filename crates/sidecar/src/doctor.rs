//! `kms-sidecar doctor`: what is wrong on this node, and what to do about it.
//!
//! It looks at everything between kube-apiserver's configuration and an agent's
//! keys, and needs neither a running API server nor a running sidecar. It must
//! never change anything on the node, and never print what is secret: no key,
//! no token, and no line of a file that may hold one.

mod report;
mod socket;
mod identity;
mod clock;
mod certificate;
mod agents;
mod apiserver;
mod encryption;
mod endpoint;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

pub use self::report::{Check, CheckId, Report, Status};

use crate::believed_time::BelievedTime;
use crate::config::Config;
use crate::enrolment::Random;

/// The remedy for what this user may not see.
const AS_ROOT: &str = "run doctor as root, or as the sidecar's user";

/// Where the kernel shows processes.
const PROCESSES: &str = "/proc";

/// Looks at this node. `manifest` is kube-apiserver's static pod, if it is not
/// where kubeadm puts it.
pub async fn examine(config: &Config, manifest: Option<PathBuf>, random: Random) -> Report {
    let time = BelievedTime::default();
    let (mut checks, listener) = socket::examine(&config.socket).await;
    let (found, node) = identity::examine(config, listener.as_ref(), &time);
    checks.extend(found);

    let known = node.identity.as_ref().map_or_else(|| config.agents.clone(), |identity| identity.agents());
    if known.is_empty() {
        let remedy = "set agents.addresses: the data and the enrolment port of at least one agent";
        checks.push(Check::fail(CheckId::Agents, "agents.addresses", "no agent is known", remedy));
    }
    match &node.identity {
        Some(identity) => {
            // First of all: whatever follows judges certificates by it.
            checks.extend(clock::ask_agents(identity, &known, &time, random).await);
            checks.extend(certificate::examine(&node, time.now()));
            checks.extend(agents::data_ports(identity, &known, random).await);
        }
        None => checks.extend(agents::enrolment_ports(&known, node.token_root, &time).await),
    }

    match apiserver::find(manifest.as_deref(), Path::new(PROCESSES)) {
        Ok(found) => {
            let examined = found.iter().map(|apiserver| encryption::examine(apiserver, &config.socket.path));
            checks.extend(examined.flatten());
        }
        Err(check) => checks.push(check),
    }
    Report { checks }
}

/// A duration as people say it.
fn about(duration: Duration) -> String {
    const UNITS: [(u64, &str); 3] = [(86_400, "days"), (3_600, "hours"), (60, "minutes")];
    let seconds = duration.as_secs();
    match UNITS.into_iter().find(|(unit, _)| seconds >= 2 * unit) {
        Some((unit, name)) => format!("{} {name}", seconds / unit),
        None => format!("{seconds} seconds"),
    }
}

/// RFC 3339, to the second.
fn date(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_rounded_down_to_what_matters() {
        let said = |seconds| about(Duration::from_secs(seconds));
        assert_eq!(said(400 * 86_400 + 7_000), "400 days");
        assert_eq!(said(86_400 + 3_600), "25 hours");
        assert_eq!(said(7_199), "119 minutes");
        assert_eq!(said(119), "119 seconds");
    }
}
