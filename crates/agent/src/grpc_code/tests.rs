//! The table of reasons in `docs/wire-format.md` against what the code sends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fleet_kms_audit::LogError;
use fleet_kms_identity::CsrError;
use fleet_kms_keyring::Version;

use super::*;
use crate::ca::SignError;
use crate::changes::Unconfirmed;
use crate::enrolment::EnrolmentError;
use crate::enrolment::issue::{EnrolError, IssueFailure, RenewError, RenewRefused};
use crate::enrolment::limits::Limited;
use crate::enrolment::tokens::TokenRefused;

const DOCUMENT: &str = include_str!("../../../../docs/wire-format.md");

/// Where reasons are written down; a new file with some belongs here.
const SOURCES: [&str; 7] = [
    include_str!("../grpc_code.rs"),
    include_str!("../authz.rs"),
    include_str!("../enrolment/status.rs"),
    include_str!("../enrolment/issue.rs"),
    include_str!("../enrolment/issue/join.rs"),
    include_str!("../enrolment/issue/renew.rs"),
    include_str!("../enrolment/tokens.rs"),
];

/// Labels of the admin API, which answers JSON: no gRPC caller can get them.
const ADMIN_ONLY: [&str; 3] = ["no_cluster", "role", "scope"];

type Reasons = BTreeMap<String, BTreeSet<String>>;

fn data_errors() -> Vec<(Code, &'static str)> {
    let version = Version::FIRST;
    let denied = [
        Denied::NoCertificate,
        Denied::Expired,
        Denied::UnknownIdentity,
        Denied::Banned,
        Denied::Superseded,
        Denied::ForeignKey,
        Denied::WrongKind,
        Denied::ClusterRetired,
    ];
    let versions = [
        WrapRefused::UnknownKeyId,
        WrapRefused::NotYetActive { version },
        WrapRefused::Retired { version },
        WrapRefused::Disabled { version },
        WrapRefused::Destroyed { version },
    ];
    let keys = [KeysError::Locked, KeysError::UnknownCluster, KeysError::Damaged];
    let deks = [DekError::Empty, DekError::TooLong { len: 1_025 }];
    let request = DataError::Request { field: "wrapped", problem: "" };
    let all = denied.map(DataError::from).into_iter().chain([request]);
    let all = all.chain(versions.map(|refused| DataError::Wrap(refused.into())));
    let all = all.chain(deks.map(|refused| DataError::Wrap(refused.into()))).chain(keys.map(DataError::from));
    let all = all.chain([DataError::Audit(NotRecorded)]);
    all.map(|error| error.code()).collect()
}

fn enrolment_errors() -> Vec<(Code, &'static str)> {
    let limited = || Limited { retry_after: Duration::ZERO, first: true };
    let tokens = [
        TokenRefused::Unknown,
        TokenRefused::Expired,
        TokenRefused::UsedUp,
        TokenRefused::Address,
        TokenRefused::NodeMissing,
        TokenRefused::Node,
        TokenRefused::NodeForm,
        TokenRefused::Damaged,
    ];
    let renewals = [
        RenewRefused::Unknown,
        RenewRefused::Banned,
        RenewRefused::Superseded,
        RenewRefused::ForeignKey,
        RenewRefused::OffTooLong,
        RenewRefused::ExpiredKind,
        RenewRefused::SameKey,
    ];
    let failures = [
        IssueFailure::Sign(SignError::Clock),
        IssueFailure::NoIssueNumber,
        IssueFailure::IssueNumbers,
        IssueFailure::Contended,
        IssueFailure::Ledger(fleet_kms_store::ReadError::page_limit(0).expect_err("no rows").into()),
        IssueFailure::Unconfirmed(Unconfirmed::Edited),
        IssueFailure::Audit(LogError::TooLong(1)),
    ];
    let enrol = [
        EnrolError::Csr(CsrError::Malformed),
        EnrolError::Retired,
        EnrolError::NameTaken,
        EnrolError::Banned,
        EnrolError::Limited(limited()),
    ];
    let other = [
        EnrolmentError::Request { field: "token", problem: "" },
        EnrolmentError::NoPeer,
        EnrolmentError::Denied(Denied::NoCertificate),
        EnrolmentError::Limited(limited()),
        EnrolmentError::Sign(SignError::Clock),
        EnrolmentError::Renew(CsrError::Malformed.into()),
        EnrolmentError::Renew(RenewError::Limited(limited())),
    ];
    let all = tokens.map(EnrolError::from).into_iter().chain(enrol).chain(failures.map(EnrolError::from));
    let renewals = renewals.map(|refused| EnrolmentError::Renew(refused.into()));
    let all = all.map(EnrolmentError::from).chain(renewals).chain(other);
    all.map(|error| error.code()).collect()
}

fn sent() -> Reasons {
    let mut sent = Reasons::new();
    for (code, reason) in data_errors().into_iter().chain(enrolment_errors()) {
        sent.entry(reason.to_owned()).or_default().insert(format!("{code:?}"));
    }
    for code in (0..=16).map(Code::from_i32) {
        let answer = with_reason(Status::new(code, "").into_http::<()>());
        if let Some(reason) = answer.headers().get(REASON) {
            let reason = reason.to_str().unwrap().to_owned();
            sent.entry(reason).or_default().insert(format!("{code:?}"));
        }
    }
    sent
}

#[test]
fn a_handlers_own_reason_stays_and_what_another_agent_may_answer_has_none() {
    let own = with_reason(status(Code::InvalidArgument, "bad_request", "x").into_http::<()>());
    assert_eq!(own.headers()[REASON], "bad_request");
    for code in [Code::DeadlineExceeded, Code::Unimplemented, Code::Unavailable, Code::Ok] {
        assert!(!with_reason(Status::new(code, "").into_http::<()>()).headers().contains_key(REASON));
    }
}

/// `` | `reason` | Code, Code | meaning | ``
fn documented() -> Reasons {
    let (_, section) = DOCUMENT.split_once("## `fleet-kms-reason`").expect("the section");
    let section = section.split_once("\n## ").map_or(section, |(section, _)| section);
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    rows.map(|(reason, rest)| {
        let codes = rest.split(" | ").next().unwrap_or_default();
        (reason.to_owned(), codes.split(", ").map(str::to_owned).collect())
    })
    .collect()
}

/// Every `=> "label"` and `(Code::X, "label")` of the sources.
fn written() -> BTreeSet<String> {
    let after = |source: &'static str, mark: &'static str| source.split(mark).skip(1);
    let labels = SOURCES.into_iter().flat_map(|source| {
        let plain = after(source, "=> \"");
        plain.chain(after(source, "(Code::").filter_map(|rest| rest.split_once(", \"").map(|(_, rest)| rest)))
    });
    let labels = labels.filter_map(|rest| rest.split_once('"').map(|(label, _)| label));
    let is_label = |label: &&str| label.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    labels.filter(is_label).filter(|label| !ADMIN_ONLY.contains(label)).map(str::to_owned).collect()
}

#[test]
fn the_documented_reasons_are_those_that_the_code_sends() {
    assert_eq!(documented(), sent());
}

#[test]
fn no_reason_in_the_sources_is_missing_from_this_test() {
    assert_eq!(written(), sent().into_keys().collect());
}
