//! The way to the agents, step by step, and a DEK that goes there and back.
//!
//! Each agent is asked for itself: a fleet with one dead agent works, and yet
//! somebody should know. The DEK is random and forgotten.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use fleet_kms_identity::AgentAddress;
use fleet_kms_proto::agent::StatusRequest;
use fleet_kms_transport::{
    ClientTls, ConnectError, ConnectOptions, PeerInfo, Stage, Whose, connect, first_contact_tls,
};
use futures_util::future::join_all;
use prometheus_client::registry::Registry;
use zeroize::Zeroizing;

use super::identity::ENROL;
use super::report::{Check, CheckId};
use crate::agent_calls;
use crate::agent_link::LinkContext;
use crate::believed_time::BelievedTime;
use crate::enrolment::Random;
use crate::errors::chain;
use crate::grpc_code::CallError;
use crate::links::{Links, LinksError};
use crate::metrics::Metrics;
use crate::node_identity::NodeIdentity;

/// The time of one connection, and of one call.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const CALL_WITHIN: Duration = Duration::from_secs(5);

pub(super) const SEE_AGENT: &str = "see kms-agent's log on that host";

/// Goes the whole way to every agent's data port.
pub(super) async fn data_ports(node: &NodeIdentity, agents: &[AgentAddress], random: Random) -> Vec<Check> {
    let tls = node.tls();
    join_all(agents.iter().map(|agent| data_port(&agent.data, &tls, node, random))).await.concat()
}

async fn data_port(address: &str, tls: &ClientTls, node: &NodeIdentity, random: Random) -> Vec<Check> {
    let connected = connect(address, tls, options()).await.map(|link| link.peer);
    let mut checks = steps(address, connected.as_ref());
    if connected.is_ok() {
        checks.extend(calls(address, tls, node, random).await);
    }
    checks
}

/// How far a node without an identity gets: an agent must at least answer TLS.
pub(super) async fn enrolment_ports(
    agents: &[AgentAddress],
    root: Option<[u8; 32]>,
    time: &BelievedTime,
) -> Vec<Check> {
    let tls = first_contact_tls(root.unwrap_or_default(), time.clock());
    let asked = agents.iter().map(|AgentAddress { enrolment, .. }| async {
        let connected = connect(enrolment, &tls, options()).await.map(|link| link.peer);
        match connected {
            // Without a root there is nothing to judge the agent's by.
            Err(ConnectError::AgentRefused(_)) if root.is_none() => {
                passed(enrolment, CheckId::AgentAdmission, None)
            }
            connected => steps(enrolment, connected.as_ref()),
        }
    });
    join_all(asked).await.concat()
}

fn options() -> ConnectOptions {
    ConnectOptions { timeout: CONNECT_WITHIN, ..ConnectOptions::default() }
}

/// The steps of a connection up to the one that failed.
fn steps(address: &str, connected: Result<&PeerInfo, &ConnectError>) -> Vec<Check> {
    let error = match connected {
        Ok(agent) => {
            let mut checks = passed(address, CheckId::AgentAdmission, Some(agent));
            checks.push(Check::ok(CheckId::AgentAdmission, address, "lets this node in"));
            return checks;
        }
        Err(error) => error,
    };
    let failed = match error {
        ConnectError::Dns(_) | ConnectError::Timeout(Stage::Dns) => CheckId::AgentDns,
        ConnectError::Tcp(_) | ConnectError::Timeout(Stage::Tcp) => CheckId::AgentTcp,
        ConnectError::AgentRefused(_)
        | ConnectError::Tls(_)
        | ConnectError::Timeout(Stage::Tls)
        | ConnectError::CertificateDates { whose: Whose::Agents } => CheckId::AgentTls,
        ConnectError::RefusedByAgent { .. }
        | ConnectError::Http2(_)
        | ConnectError::Timeout(Stage::Admission)
        | ConnectError::CertificateDates { whose: Whose::Own } => CheckId::AgentAdmission,
    };
    let mut checks = passed(address, failed, None);
    checks.push(Check::fail(failed, address, chain(error), connect_remedy(error)));
    checks
}

/// The steps that went well before this one.
fn passed(address: &str, before: CheckId, agent: Option<&PeerInfo>) -> Vec<Check> {
    let is_ip = address.parse::<SocketAddr>().is_ok();
    let name = if is_ip { "an IP address" } else { "the name is resolved" };
    let agent = agent.and_then(|agent| agent.certificate.as_ref());
    let tls = agent.map_or_else(|| "answers TLS 1.3".to_owned(), |agent| format!("is {}", agent.id()));
    [(CheckId::AgentDns, name), (CheckId::AgentTcp, "is reached"), (CheckId::AgentTls, &tls)]
        .into_iter()
        .take_while(|(id, _)| *id != before)
        .map(|(id, message)| Check::ok(id, address, message))
        .collect()
}

pub(super) fn connect_remedy(error: &ConnectError) -> String {
    match error {
        ConnectError::Dns(_) | ConnectError::Timeout(Stage::Dns) => {
            "correct the name or this node's resolver, or use the agent's IP address: an agent is known by its SPIFFE ID, \
             never by its name"
        }
        ConnectError::Tcp(_) | ConnectError::Timeout(Stage::Tcp) => {
            "start kms-agent on that host, correct agents.addresses, or open the port in the firewalls between"
        }
        ConnectError::CertificateDates { whose: Whose::Agents } => {
            "see clock; an agent renews its own certificate: if the clocks are right, see kms-agent's log"
        }
        ConnectError::CertificateDates { whose: Whose::Own } => {
            "see certificate_dates: kms-sidecar renews an expired certificate by itself on the enrolment port"
        }
        ConnectError::AgentRefused(_) => {
            "correct agents.addresses if that is no agent of this fleet; a proxy must not end TLS; if the fleet's root was \
             replaced while this node was off, enrol it again (kms-sidecar enrol)"
        }
        ConnectError::Tls(_) | ConnectError::Timeout(Stage::Tls) => {
            "something that is no kms-agent answers there, or a proxy that ends TLS: correct agents.addresses (7443 data, \
             7444 enrolment), or restart the agent if it hangs"
        }
        ConnectError::RefusedByAgent { .. } => {
            "the agent does not know this certificate's CA: is it of another fleet? If not, enrol this node again \
             (kms-sidecar enrol)"
        }
        ConnectError::Http2(_) | ConnectError::Timeout(Stage::Admission) => SEE_AGENT,
    }
    .to_owned()
}

/// Status, Wrap, Unwrap, over a link as `kms-sidecar run` has them.
async fn calls(address: &str, tls: &ClientTls, node: &NodeIdentity, random: Random) -> Vec<Check> {
    let context = LinkContext::new(0);
    let links = Links::new(context, CALL_WITHIN, Metrics::register(&mut Registry::default()));
    links.set_agents(tls, [address]);
    let mut checks = vec![authorization(address, &links, node).await];
    let dek = Zeroizing::new(random().to_vec());
    let wrapped = match agent_calls::wrap(&links, &dek, None, deadline()).await {
        Ok(wrapped) => wrapped,
        Err(error) => {
            checks.push(refused(CheckId::AgentWrap, address, &error));
            return checks;
        }
    };
    let message = format!("a random DEK, under version {}", wrapped.header.version);
    checks.push(Check::ok(CheckId::AgentWrap, address, message));
    let unwrapped = agent_calls::unwrap(&links, wrapped.bytes, deadline()).await.map(Zeroizing::new);
    checks.push(match unwrapped {
        Ok(unwrapped) if unwrapped == dek => {
            Check::ok(CheckId::AgentUnwrap, address, "the same DEK came back")
        }
        Ok(_) => Check::fail(CheckId::AgentUnwrap, address, "another DEK came back", SEE_AGENT),
        Err(error) => refused(CheckId::AgentUnwrap, address, &error),
    });
    checks
}

async fn authorization(address: &str, links: &Links, node: &NodeIdentity) -> Check {
    let id = CheckId::AgentAuthorization;
    let not_after = node.certificate().not_after().duration_since(SystemTime::UNIX_EPOCH);
    let request = StatusRequest {
        build: env!("CARGO_PKG_VERSION").to_owned(),
        errors: 0,
        certificate_not_after: not_after.unwrap_or_default().as_secs(),
        highest_version: node.highest_version(),
    };
    match agent_calls::status(links, &request, deadline()).await {
        Ok(status) if status.version < node.highest_version() => {
            let message = format!(
                "serves this node, but its active version is {} and this node has seen {}",
                status.version,
                node.highest_version()
            );
            Check::warn(
                id,
                address,
                message,
                "this agent's store may be an old copy: `kmsctl status`, then kms-agent's log",
            )
        }
        Ok(status) => {
            Check::ok(id, address, format!("serves this node; the active version is {}", status.version))
        }
        Err(error) => refused(id, address, &error),
    }
}

fn deadline() -> tokio::time::Instant {
    tokio::time::Instant::now() + CALL_WITHIN
}

fn refused(id: CheckId, address: &str, error: &CallError) -> Check {
    let remedy = match error {
        CallError::Links(LinksError::Refused(refusal)) => refusal_remedy(&refusal.reason),
        _ => SEE_AGENT.to_owned(),
    };
    Check::fail(id, address, chain(error), remedy)
}

/// docs/wire-format.md has all reasons.
fn refusal_remedy(reason: &str) -> String {
    match reason {
        "banned" => "an operator has banned this node; if that was a mistake: `kmsctl node unban NODE --cluster CLUSTER`".to_owned(),
        "superseded" => format!(
            "another copy of this identity has renewed since: was this disk cloned or restored? Find that copy, then {ENROL}"
        ),
        "cluster_retired" => "an operator has retired this cluster; if that was a mistake: `kmsctl cluster restore CLUSTER`, then a join token for each node".to_owned(),
        "unknown_identity" => format!("the fleet does not know this node (removed?): {ENROL}"),
        "expired" => "see certificate_dates and clock".to_owned(),
        "wrong_kind" => format!("this certificate is no node's: {ENROL}"),
        "unknown_cluster" => {
            "the cluster is not in that agent's store: is it the right agent? `kmsctl cluster list`"
                .to_owned()
        }
        "locked" => "that agent's keys are locked: unlock it, or restart it with its root key".to_owned(),
        "damaged" => "a key of this cluster does not open: `kms-agent check-store`; do not delete any Secret"
            .to_owned(),
        "version_disabled" | "version_destroyed" => {
            "`kmsctl key versions CLUSTER` says who disabled it".to_owned()
        }
        _ => SEE_AGENT.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::super::report::Status;
    use super::*;

    fn statuses(checks: &[Check]) -> Vec<(&'static str, Status)> {
        checks.iter().map(|check| (check.id.as_str(), check.status)).collect()
    }

    #[test]
    fn the_steps_before_the_failed_one_are_ok_and_those_after_it_are_left_out() {
        let tcp = ConnectError::Tcp(io::Error::from(io::ErrorKind::ConnectionRefused));
        assert_eq!(
            statuses(&steps("10.0.0.7:7443", Err(&tcp))),
            [("agent_dns", Status::Ok), ("agent_tcp", Status::Fail)]
        );
        let dns = ConnectError::Timeout(Stage::Dns);
        assert_eq!(statuses(&steps("agent:7443", Err(&dns))), [("agent_dns", Status::Fail)]);
        let refused = ConnectError::RefusedByAgent { alert: "UnknownCA".to_owned() };
        assert_eq!(statuses(&steps("10.0.0.7:7443", Err(&refused))).len(), 4);
    }
}
