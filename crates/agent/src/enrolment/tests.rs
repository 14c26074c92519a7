use std::time::Duration;

use fleet_kms_identity::{Certificate, KeyPair};
use fleet_kms_proto::agent::AgentAddress;
use prometheus_client::registry::Registry;
use rustls_pki_types::CertificateDer;
use tonic::Code;

use super::rig::{Rig, secret};
use super::*;
use crate::authz::{Role, Scope};
use crate::grpc_code::REASON;
use crate::records::payload::IdentityRecord;

struct Port {
    rig: Rig,
    service: EnrolmentService,
    agent_key: [u8; 32],
}

impl Port {
    async fn new() -> Self {
        let rig = Rig::new().await;
        let key = KeyPair::generate().unwrap();
        let chain = rig.agent_chain("a1", &key).into_iter().map(CertificateDer::from).collect();
        let serving = LiveIdentity::new(chain, &key).unwrap();
        let address = AgentAddress { data: "a1:7443".to_owned(), enrolment: "a1:7444".to_owned() };
        let roots = rig.authorities.load().trusted_roots(crate::ca::Port::Enrolment, rig.now());
        let service = EnrolmentService::new(
            Arc::clone(&rig.issuer),
            Arc::clone(&rig.policy),
            Arc::new(Bulletin::new(vec![address], roots)),
            Arc::new(serving),
            Arc::new(Metrics::register(&mut Registry::default())),
            fleet_kms_process::clock::monotonic,
        );
        Self { rig, service, agent_key: key.spki_sha256() }
    }

    fn request<T>(&self, message: T, shown: Option<&Certificate>) -> Request<T> {
        let mut request = Request::new(message);
        request.extensions_mut().insert(Arc::new(self.rig.peer(shown)));
        request
    }

    async fn enrol(&self, token: Vec<u8>, csr: Vec<u8>, node: &str) -> Result<CertificateResponse, Status> {
        let message = EnrolRequest { token, csr, node: node.to_owned() };
        Ok(self.service.enrol(self.request(message, None)).await?.into_inner())
    }

    async fn renew(&self, shown: Option<&Certificate>, csr: Vec<u8>) -> Result<CertificateResponse, Status> {
        Ok(self.service.renew(self.request(RenewRequest { csr }, shown)).await?.into_inner())
    }

    async fn time(&self, nonce: Vec<u8>) -> Result<TimeResponse, Status> {
        Ok(self.service.time(self.request(TimeRequest { nonce }, None)).await?.into_inner())
    }
}

fn csr() -> Vec<u8> {
    KeyPair::generate().unwrap().csr_der().unwrap()
}

fn leaf(response: &CertificateResponse) -> Certificate {
    Certificate::from_der(&response.chain[0]).unwrap()
}

fn judged<T: std::fmt::Debug>(result: Result<T, Status>) -> (Code, String) {
    let status = result.unwrap_err();
    (status.code(), status.metadata().get(REASON).unwrap().to_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_node_enrols_renews_and_learns_roots_and_agents() {
    let port = Port::new().await;
    let token = port.rig.token("cp1").await;
    let enrolled = port.enrol(secret(&token), csr(), "").await.unwrap();
    let renewed = port.renew(Some(&leaf(&enrolled)), csr()).await.unwrap();
    assert_eq!(leaf(&renewed).id(), leaf(&enrolled).id());
    for response in [&enrolled, &renewed] {
        assert_eq!(response.chain.len(), 2);
        assert_eq!(response.roots, [port.rig.authorities.load().root()]);
        assert_eq!(response.agents.len(), 1);
    }
}

#[tokio::test]
async fn every_refusal_carries_its_code_and_reason() {
    let port = Port::new().await;
    let token = secret(&port.rig.token("cp1").await);
    let bad = |code, reason: &str| (code, reason.to_owned());
    assert_eq!(judged(port.enrol(vec![0; 31], csr(), "").await), bad(Code::InvalidArgument, "bad_request"));
    let long = "x".repeat(64);
    assert_eq!(
        judged(port.enrol(token.clone(), csr(), &long).await),
        bad(Code::InvalidArgument, "bad_request")
    );
    assert_eq!(judged(port.enrol(token.clone(), vec![0], "").await), bad(Code::InvalidArgument, "csr"));
    assert_eq!(
        judged(port.enrol(token.clone(), csr(), "cp2").await),
        bad(Code::PermissionDenied, "token_node")
    );
    assert_eq!(judged(port.enrol(vec![0; 32], csr(), "").await), bad(Code::Unauthenticated, "token_unknown"));
    assert_eq!(judged(port.renew(None, csr()).await), bad(Code::Unauthenticated, "no_certificate"));
    assert_eq!(judged(port.time(vec![0; 31]).await), bad(Code::InvalidArgument, "bad_request"));
    let enrolled = port.enrol(token, csr(), "").await.unwrap();
    assert_eq!(judged(port.renew(Some(&leaf(&enrolled)), vec![]).await), bad(Code::InvalidArgument, "csr"));
}

#[tokio::test]
async fn a_superseded_certificate_is_denied_and_raises_identity_clone() {
    let port = Port::new().await;
    let key = KeyPair::generate().unwrap();
    let old = port.rig.enrol("cp1", &key).await.unwrap();
    let new = port.rig.enrol("cp1", &KeyPair::generate().unwrap()).await.unwrap();
    let denied = judged(port.renew(Some(&old), csr()).await);
    assert_eq!(denied, (Code::PermissionDenied, "superseded".to_owned()));
    assert!(port.rig.audit().contains("identity_clone"));
    port.renew(Some(&new), csr()).await.unwrap();
}

#[tokio::test]
async fn a_ban_by_another_agent_is_seen_by_the_next_renewal() {
    let port = Port::new().await;
    let node = port.rig.enrol("cp1", &KeyPair::generate().unwrap()).await.unwrap();
    let row = crate::records::rows::identity(node.id());
    port.rig.edit(row, |record: &mut IdentityRecord| record.banned_ms = 1).await;
    let denied = judged(port.renew(Some(&node), csr()).await);
    assert_eq!(denied, (Code::PermissionDenied, "banned".to_owned()));
}

#[tokio::test]
async fn only_nodes_renew_here() {
    let port = Port::new().await;
    let ada = "ada".parse().unwrap();
    let admin = port.rig.issuer.issue_admin("host", &ada, &[Role::Operator], &Scope::All).await.unwrap();
    let shown = Certificate::from_der(&admin.certified.chain[0]).unwrap();
    let denied = judged(port.renew(Some(&shown), csr()).await);
    assert_eq!(denied, (Code::PermissionDenied, "wrong_kind".to_owned()));
    assert!(port.rig.audit().contains("renew_refused"));
    let agent = port.rig.agent_chain("a2", &KeyPair::generate().unwrap());
    let shown = Certificate::from_der(&agent[0]).unwrap();
    let denied = judged(port.renew(Some(&shown), csr()).await);
    assert_eq!(denied, (Code::PermissionDenied, "wrong_kind".to_owned()));
}

#[tokio::test]
async fn a_node_that_renews_in_a_loop_is_slowed_down() {
    let port = Port::new().await;
    let node = port.rig.enrol("cp1", &KeyPair::generate().unwrap()).await.unwrap();
    let mut granted = 0;
    let last = loop {
        match port.renew(Some(&node), csr()).await {
            Ok(_) => granted += 1,
            Err(status) => break status,
        }
    };
    assert_eq!((granted, last.code()), (10, Code::ResourceExhausted));
}

#[tokio::test]
async fn the_time_is_bound_to_the_key_that_this_port_serves_with() {
    let port = Port::new().await;
    let answer = port.time(vec![7; 32]).await.unwrap();
    assert_eq!(answer.unix_ms, to_ms(port.rig.now()));
    assert_eq!(answer.live_key_sha256, port.agent_key);
    assert_eq!(answer.issuers, port.rig.authorities.load().issuers(port.rig.now()));
    assert!(!answer.signature.is_empty());
}

/// The client is gone at some await of the handler, another one each time.
#[tokio::test]
async fn a_caller_that_hangs_up_half_way_leaves_nothing_unpublished() {
    let port = Port::new().await;
    for polls in 1..10 {
        let name = format!("cp{polls}");
        let token = secret(&port.rig.token(&name).await);
        let mut call = Box::pin(port.enrol(token, csr(), ""));
        for _ in 0..polls {
            if tokio::time::timeout(Duration::ZERO, &mut call).await.is_ok() {
                break;
            }
        }
        drop(call);
        let id = format!("spiffe://fleet.test/cluster/{}/node/{name}", rig::CLUSTER).parse().unwrap();
        let ended = || {
            let audit = port.rig.audit();
            let lines = |kind: &str| audit.matches(&format!("\"kind\":\"{kind}\"")).count();
            port.rig.identities.find(&id).is_some() && lines("intent") == lines("outcome")
        };
        for _ in 0..500 {
            if ended() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(ended(), "{name}'s enrolment was left half-way");
    }
}
