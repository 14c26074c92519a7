//! A node that comes into the fleet by a token and stays in it by itself.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code; clippy knows #[test] functions only"
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fleet_kms_identity::{AgentAddress, Directory};
use fleet_kms_proto::v1beta1::EncryptRequest;
use fleet_kms_sidecar::believed_time::{BelievedTime, TimeProofError};
use fleet_kms_sidecar::enrolment::{EnrolmentError, ask_time};
use fleet_kms_sidecar::node_identity::NodeIdentity;
use fleet_kms_sidecar::upkeep::{Moved, Upkeep};
use rand_core::Rng;

use support::agent::{Agent, Brain};
use support::ca::Ca;
use support::enrolment::Desk;
use support::node::Node;

const WEEK: Duration = Duration::from_secs(7 * 86_400);
const NOT_AHEAD: Duration = Duration::ZERO;

fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    rand_core::UnwrapErr(getrandom::SysRng).fill_bytes(&mut bytes);
    bytes
}

struct Fleet {
    node: Node,
    upkeep: Upkeep,
    desk: Arc<Desk>,
    agent: Agent,
    directory: tempfile::TempDir,
}

impl Fleet {
    fn new(life: Duration, ahead: Duration) -> Self {
        let desk = Desk::new(Ca::new(), life, ahead);
        let agent = Agent::start(&desk.ca, "one", Brain::at_version(4));
        let directory = tempfile::tempdir().unwrap();
        let upkeep = Upkeep {
            directory: Directory::open(directory.path()).unwrap(),
            agents: vec![AgentAddress { data: agent.address.clone(), enrolment: desk.open() }],
            node: Some("cp-1".parse().unwrap()),
            time: BelievedTime::default(),
            random,
        };
        Self { node: Node::start(Duration::from_secs(10)), upkeep, desk, agent, directory }
    }

    fn run(&self) {
        let moved = Moved {
            links: self.node.links.clone(),
            node_status: self.node.node_status.clone(),
            answers: self.node.answers.clone(),
            metrics: self.node.metrics.clone(),
        };
        tokio::spawn(self.upkeep.clone().run(moved));
    }

    fn put_token(&self, text: &str) {
        std::fs::write(self.directory.path().join("token"), text).unwrap();
    }

    async fn until(&self, what: &str, mut look: impl FnMut(&Self) -> bool) {
        for _ in 0..200 {
            if look(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("not in time: {what}");
    }
}

#[tokio::test]
async fn a_token_file_enrols_the_node_and_is_deleted() {
    let ahead = Duration::from_secs(600);
    let fleet = Fleet::new(WEEK, ahead);
    fleet.run();
    fleet
        .until("health tells", |fleet| {
            fleet.node.answers.readiness().is_err_and(|why| why.contains("not enrolled"))
        })
        .await;
    fleet.put_token(&format!("{}\n", *fleet.desk.token.to_text()));
    fleet.until("ready", |fleet| fleet.node.answers.readiness().is_ok()).await;
    assert!(!fleet.directory.path().join("token").exists());
    let ping = EncryptRequest { version: "v1beta1".to_owned(), plain: b"ping".to_vec() };
    fleet.node.v1().await.encrypt(ping).await.unwrap();

    fleet
        .until("the time and the version are kept", |fleet| {
            let state = fleet.upkeep.directory.state().unwrap();
            state.last_good_time > 1_700_000_000 && state.highest_version == 4
        })
        .await;
    let wall = fleet_kms_process::clock::now();
    let believed = fleet.upkeep.time.now().duration_since(wall).expect("the agent's clock is believed");
    assert!(believed > ahead - Duration::from_secs(5) && believed < ahead + Duration::from_secs(5));
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_with_the_same_key() {
    let fleet = Fleet::new(WEEK, NOT_AHEAD);
    fleet.desk.lose.store(1, Ordering::SeqCst);
    let token = fleet.desk.token.to_text();
    fleet.upkeep.enrol(&token).await.unwrap_err();
    assert!(fleet.upkeep.directory.load().unwrap().is_none());
    fleet.upkeep.enrol(&token).await.unwrap();
    let keys = fleet.desk.keys.lock().unwrap().clone();
    assert_eq!(keys.len(), 2);
    assert_eq!(keys[0], keys[1]);
}

#[tokio::test]
async fn a_token_is_shown_to_nobody_but_its_own_root() {
    let fleet = Fleet::new(WEEK, NOT_AHEAD);
    let other = Desk::new(Ca::new(), WEEK, NOT_AHEAD);
    let error = fleet.upkeep.enrol(&other.token.to_text()).await.unwrap_err();
    assert_eq!(fleet.desk.enrolments.load(Ordering::SeqCst), 0);
    let text = fleet_kms_sidecar::errors::chain(&error);
    assert!(text.contains("does not show the root certificate that the join token names"), "{text}");
}

#[tokio::test]
async fn a_token_that_names_no_node_gets_the_hosts_name() {
    let mut fleet = Fleet::new(WEEK, NOT_AHEAD);
    fleet.upkeep.node = None;
    fleet.upkeep.enrol(&fleet.desk.token.to_text()).await.unwrap();
    assert_eq!(fleet.desk.enrolments.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_refused_token_leaves_the_node_as_it_was() {
    let fleet = Fleet::new(WEEK, NOT_AHEAD);
    let mut rng = rand_core::UnwrapErr(getrandom::SysRng);
    let root = *fleet.desk.token.root_sha256();
    let unknown = fleet_kms_identity::JoinToken::generate(root, fleet.desk.token.issued(), &mut rng);
    let error = fleet.upkeep.enrol(&unknown.to_text()).await.unwrap_err();
    assert!(fleet_kms_sidecar::errors::chain(&error).contains("token_unknown"));
    assert!(fleet.upkeep.directory.load().unwrap().is_none());
    assert!(fleet.upkeep.enrol("no token").await.is_err());
}

#[tokio::test]
async fn a_certificate_is_renewed_with_a_new_key_when_a_third_of_its_life_is_over() {
    let fleet = Fleet::new(Duration::from_secs(6), NOT_AHEAD);
    fleet.upkeep.enrol(&fleet.desk.token.to_text()).await.unwrap();
    *fleet.desk.life.lock().unwrap() = WEEK;
    fleet.run();
    fleet.until("renewed", |fleet| fleet.desk.renewals.load(Ordering::SeqCst) == 1).await;
    fleet
        .until("the new pair is on disk", |fleet| {
            let stored = fleet.upkeep.directory.load().unwrap().unwrap();
            stored.certificate.spki_sha256()
                == fleet_kms_identity::fingerprint(&fleet.desk.keys.lock().unwrap()[1]).as_slice()
        })
        .await;
    let state = fleet.upkeep.directory.state().unwrap();
    assert!(state.leaf_life() > WEEK - Duration::from_secs(60));
    fleet.until("ready", |fleet| fleet.node.answers.readiness().is_ok()).await;
}

#[tokio::test]
async fn an_expired_certificate_still_renews_and_the_node_serves_again() {
    let fleet = Fleet::new(Duration::from_secs(1), NOT_AHEAD);
    fleet.upkeep.enrol(&fleet.desk.token.to_text()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    *fleet.desk.life.lock().unwrap() = WEEK;
    fleet.run();
    fleet.until("ready", |fleet| fleet.node.answers.readiness().is_ok()).await;
    assert_eq!(fleet.desk.renewals.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_time_told_after_the_agent_renewed_its_certificate_is_asked_for_again_at_once_and_once_only() {
    let fleet = Fleet::new(WEEK, Duration::from_secs(600));
    fleet.upkeep.enrol(&fleet.desk.token.to_text()).await.unwrap();
    let Upkeep { directory, agents, time, .. } = &fleet.upkeep;
    let identity = NodeIdentity::load(directory, agents, time).unwrap().unwrap();
    let (tls, roots) = (identity.tls(), identity.roots());
    fleet.desk.renew_first.store(1, Ordering::SeqCst);
    ask_time(agents, &tls, &roots, time, random).await.unwrap();
    assert!(time.is_proven());
    // A relay names another key each time.
    fleet.desk.renew_first.store(2, Ordering::SeqCst);
    let refused = ask_time(agents, &tls, &roots, time, random).await.unwrap_err();
    assert!(matches!(refused, EnrolmentError::Time { source: TimeProofError::OtherKey, .. }), "{refused:?}");
}

#[tokio::test]
async fn a_renewal_does_not_sleep_on_when_the_time_turns_out_to_be_another() {
    let fleet = Fleet::new(Duration::from_secs(1_200), Duration::from_secs(900));
    fleet.upkeep.enrol(&fleet.desk.token.to_text()).await.unwrap();
    fleet.run();
    // By this machine's clock, nothing is due for minutes.
    fleet.until("renewed", |fleet| fleet.desk.renewals.load(Ordering::SeqCst) > 0).await;
}

#[tokio::test]
async fn a_certificate_that_is_over_by_the_time_that_is_believed_is_not_renewed_in_a_loop() {
    let fleet = Fleet::new(Duration::from_secs(1), Duration::from_secs(900));
    fleet.upkeep.enrol(&fleet.desk.token.to_text()).await.unwrap();
    fleet.run();
    fleet.until("renewed", |fleet| fleet.desk.renewals.load(Ordering::SeqCst) > 0).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let renewals = fleet.desk.renewals.load(Ordering::SeqCst);
    assert!(renewals <= 3, "{renewals} certificates in seconds");
}

#[tokio::test]
async fn a_second_token_gives_an_enrolled_node_another_identity() {
    let fleet = Fleet::new(WEEK, NOT_AHEAD);
    fleet.upkeep.enrol(&fleet.desk.token.to_text()).await.unwrap();
    fleet.run();
    fleet.until("ready", |fleet| fleet.node.answers.readiness().is_ok()).await;
    fleet.put_token(&fleet.desk.token.to_text());
    fleet.until("enrolled again", |fleet| fleet.desk.keys.lock().unwrap().len() == 2).await;
    fleet.until("the token is gone", |fleet| !fleet.directory.path().join("token").exists()).await;
    let ping = EncryptRequest { version: "v1beta1".to_owned(), plain: b"ping".to_vec() };
    fleet.node.v1().await.encrypt(ping).await.unwrap();
}

#[tokio::test]
async fn what_the_enrol_command_writes_is_used_at_once() {
    let fleet = Fleet::new(WEEK, NOT_AHEAD);
    fleet.upkeep.enrol(&fleet.desk.token.to_text()).await.unwrap();
    fleet.run();
    fleet.until("ready", |fleet| fleet.node.answers.readiness().is_ok()).await;
    // As another process would.
    fleet.upkeep.enrol(&fleet.desk.token.to_text()).await.unwrap();
    let second = fleet.desk.keys.lock().unwrap()[1].clone();
    let second = fleet_kms_identity::fingerprint(&second);
    fleet.until("the second certificate is shown", |fleet| fleet.agent.peers().contains(&second)).await;
}

#[tokio::test]
async fn a_lost_state_file_is_learnt_again() {
    let fleet = Fleet::new(WEEK, NOT_AHEAD);
    fleet.upkeep.enrol(&fleet.desk.token.to_text()).await.unwrap();
    std::fs::write(fleet.directory.path().join("state.json"), "{torn").unwrap();
    fleet.run();
    fleet.until("renewed", |fleet| fleet.desk.renewals.load(Ordering::SeqCst) == 1).await;
    fleet
        .until("learnt", |fleet| fleet.upkeep.directory.state().is_ok_and(|state| state.highest_version == 4))
        .await;
}
