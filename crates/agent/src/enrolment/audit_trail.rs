//! What the audit says about identities: one function for each kind of line.
//!
//! Names, serials, addresses and reasons; never a token, a CSR or a
//! certificate. A token appears by the first bytes of its hash, which find its
//! row and open nothing.

use data_encoding::HEXLOWER;
use fleet_kms_identity::{Certificate, Serial, SpiffeId};
use fleet_kms_keyring::ClusterId;

use super::issue::{EnrolError, Join, RenewError, RenewRefused, Shown};
use super::limits::Limited;
use crate::authz::Denied;
use crate::records::payload::TokenRecord;
use crate::trail::{Event, Intent};

/// Who asks before it has an identity.
const NOBODY: &str = "nobody";
/// Who promotes what it has seen in use.
const AGENT: &str = "agent";

pub(super) fn token_create(
    who: &str,
    (cluster, cluster_name): (ClusterId, &str),
    hash: &[u8; 32],
    token: &TokenRecord,
) -> Intent {
    Intent::new("token_create", who)
        .cluster(cluster, cluster_name)
        .target(token_name(hash))
        .detail("node", token.node.clone())
        .detail("pattern", token.pattern.clone())
        .detail("network", token.cidr.clone())
        .detail("uses", token.uses.to_string())
        .detail("expires_ms", token.expires_ms.to_string())
}

pub(super) fn enrol(join: &Join, id: &SpiffeId) -> Intent {
    Intent::new("enrol", NOBODY)
        .target(id.to_string())
        .detail("token", token_name(&join.shown().token_sha256))
        .detail("address", join.shown().address.to_string())
}

/// Returns nothing for what is no refusal, or one of thousands.
pub(super) fn enrol_refused(shown: &Shown, error: &EnrolError) -> Option<Event> {
    let event = match error {
        // The failed change has lines of its own; so has a failing store elsewhere.
        EnrolError::Failed(_) | EnrolError::Limited(Limited { first: false, .. }) => return None,
        EnrolError::Csr(_)
        | EnrolError::Token(_)
        | EnrolError::Retired
        | EnrolError::NameTaken
        | EnrolError::Banned
        | EnrolError::Limited(_) => Event::new("enrol_refused", NOBODY),
    };
    // The wanted name is the caller's text: bounded, and nothing but a name.
    let node: String = shown.node.chars().filter(char::is_ascii_graphic).take(63).collect();
    let event = event
        .reason(Some(error.reason()))
        .detail("token", token_name(&shown.token_sha256))
        .detail("node", node)
        .detail("address", shown.address.to_string());
    Some(event)
}

pub(super) fn renew(who: &str, shown: &Certificate) -> Intent {
    Intent::new("renew", who)
        .target(shown.id().to_string())
        .detail("shown_serial", shown.serial().to_string())
}

pub(super) fn renew_refused(shown: &Certificate, error: &RenewError) -> Option<Event> {
    let action = match error {
        RenewError::Failed(_) | RenewError::Limited(Limited { first: false, .. }) => return None,
        // Whoever holds it has a copy of an identity that has moved on.
        RenewError::Refused(RenewRefused::Superseded) => "identity_clone",
        RenewError::Csr(_) | RenewError::Refused(_) | RenewError::Limited(_) => "renew_refused",
    };
    Some(refusal(action, shown, error.reason()))
}

pub(super) fn renew_denied(shown: &Certificate, denied: Denied) -> Event {
    let clone = denied == Denied::Superseded;
    refusal(if clone { "identity_clone" } else { "renew_refused" }, shown, denied.label())
}

pub(super) fn readopt(shown: &Certificate) -> Intent {
    Intent::new("identity_readopt", AGENT)
        .target(shown.id().to_string())
        .detail("serial", shown.serial().to_string())
}

pub(super) fn promote(id: &SpiffeId, serial: &Serial) -> Intent {
    Intent::new("promote", AGENT).target(id.to_string()).detail("serial", serial.to_string())
}

pub(super) fn admin_issue(who: &str, id: &SpiffeId, roles: &[String]) -> Intent {
    Intent::new("admin_issue", who).target(id.to_string()).detail("roles", roles.join(","))
}

pub(super) fn admin_issue_again(who: &str, id: &SpiffeId) -> Intent {
    Intent::new("admin_issue_again", who).target(id.to_string())
}

fn refusal(action: &'static str, shown: &Certificate, reason: &'static str) -> Event {
    Event::new(action, &shown.id().to_string())
        .reason(Some(reason))
        .detail("serial", shown.serial().to_string())
}

pub(crate) fn token_name(hash: &[u8; 32]) -> String {
    let [a, b, c, d, e, f, g, h, ..] = *hash;
    HEXLOWER.encode(&[a, b, c, d, e, f, g, h])
}
