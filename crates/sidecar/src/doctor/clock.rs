//! The time that agents prove, and how far this node's clock is from it.
//!
//! Whatever follows in the report judges certificates by that time, as
//! `kms-sidecar run` does.

use std::time::{Duration, Instant, SystemTime};

use fleet_kms_identity::AgentAddress;
use fleet_kms_process::clock;
use futures_util::future::join_all;

use super::about;
use super::agents::{SEE_AGENT, connect_remedy};
use super::report::{Check, CheckId};
use crate::believed_time::BelievedTime;
use crate::enrolment::{self, EnrolmentError, Random};
use crate::errors::chain;
use crate::node_identity::NodeIdentity;

/// How far two clocks may be apart before it is said. An answer may have taken
/// most of it.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(10);

/// An agent's proven time, and this node's clocks at that moment.
struct Told {
    proven: SystemTime,
    wall: SystemTime,
    at: Instant,
}

impl Told {
    /// How far this node's clock is ahead; negative if it is behind.
    fn ahead_ms(&self) -> i128 {
        match self.wall.duration_since(self.proven) {
            Ok(ahead) => ahead.as_millis().cast_signed(),
            Err(behind) => -behind.duration().as_millis().cast_signed(),
        }
    }
}

/// Asks all agents for the time, and believes the first that proves it.
pub(super) async fn ask_agents(
    node: &NodeIdentity,
    agents: &[AgentAddress],
    time: &BelievedTime,
    random: Random,
) -> Vec<Check> {
    let (tls, roots) = (node.tls(), node.roots());
    let answers = join_all(agents.iter().map(|agent| async {
        let own = BelievedTime::default();
        let asked = enrolment::ask_time(std::slice::from_ref(agent), &tls, &roots, &own, random).await;
        asked.map(|proven| Told { proven, wall: clock::now(), at: clock::monotonic() })
    }))
    .await;
    let first = answers.iter().find_map(|answer| answer.as_ref().ok());
    let mut checks: Vec<Check> = agents
        .iter()
        .zip(&answers)
        .map(|(agent, answer)| time_of(&agent.enrolment, answer.as_ref(), first))
        .collect();
    checks.push(clock_of_this_node(first));
    if let Some(first) = first {
        time.believe(first.proven, first.at);
    }
    checks
}

fn time_of(address: &str, answer: Result<&Told, &EnrolmentError>, first: Option<&Told>) -> Check {
    let id = CheckId::AgentTime;
    match (answer, first) {
        (Ok(told), Some(first)) if apart(told.ahead_ms() - first.ahead_ms()) => {
            let message = format!(
                "proves a time that is {} from the first agent's",
                span(told.ahead_ms() - first.ahead_ms())
            );
            Check::warn(id, address, message, "set the clocks of the agents' hosts: run NTP there")
        }
        (Ok(_), _) => Check::ok(id, address, "proves the time"),
        (Err(EnrolmentError::Connect { source, .. }), _) => {
            Check::fail(id, address, chain(source), connect_remedy(source))
        }
        (Err(error), _) => Check::fail(id, address, chain(error), SEE_AGENT),
    }
}

fn clock_of_this_node(first: Option<&Told>) -> Check {
    let (id, subject) = (CheckId::Clock, "this node");
    let Some(told) = first else {
        let message =
            "cannot be compared: no agent tells the time; certificates are judged by this node's clock";
        return Check::warn(id, subject, message, "see agent_time");
    };
    let ahead = told.ahead_ms();
    match apart(ahead) {
        false => Check::ok(id, subject, "agrees with the agents"),
        true => {
            let side = if ahead > 0 { "ahead" } else { "behind" };
            let message =
                format!("the clock is {} {side}; fleet-kms believes the agents instead", span(ahead));
            let remedy =
                "set this node's clock (run NTP): kube-apiserver and kubelet judge their certificates by it";
            Check::warn(id, subject, message, remedy)
        }
    }
}

fn apart(ms: i128) -> bool {
    ms.unsigned_abs() > CLOCK_TOLERANCE.as_millis()
}

fn span(ms: i128) -> String {
    about(Duration::from_millis(u64::try_from(ms.unsigned_abs()).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::*;

    fn told(ahead: i64) -> Told {
        let proven = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let wall = match u64::try_from(ahead) {
            Ok(ahead) => proven + Duration::from_secs(ahead),
            Err(_) => proven - Duration::from_secs(ahead.unsigned_abs()),
        };
        Told { proven, wall, at: clock::monotonic() }
    }

    #[test]
    fn a_wrong_clock_is_told_with_its_side_and_span() {
        assert_eq!(clock_of_this_node(Some(&told(3))).status, Status::Ok);
        let ahead = clock_of_this_node(Some(&told(400 * 86_400)));
        assert!(ahead.status == Status::Warn && ahead.message.contains("400 days ahead"), "{ahead:?}");
        assert!(clock_of_this_node(Some(&told(-7_200))).message.contains("2 hours behind"));
        assert_eq!(clock_of_this_node(None).status, Status::Warn);
    }

    #[test]
    fn an_agent_whose_time_differs_from_the_first_is_named() {
        let (first, same, other) = (told(5), told(6), told(-600));
        assert_eq!(time_of("a", Ok(&same), Some(&first)).status, Status::Ok);
        assert_eq!(time_of("b", Ok(&other), Some(&first)).status, Status::Warn);
    }
}
