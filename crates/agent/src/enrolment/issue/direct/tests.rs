use std::time::Duration;

use fleet_kms_identity::split_pem_chain;
use fleet_kms_keyring::ClusterId;

use super::*;
use crate::enrolment::rig::{CLUSTER, DAY, Rig, leaf};
use crate::identities::SerialStanding;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

#[tokio::test]
async fn an_admin_gets_a_certificate_for_30_days_and_its_roles_from_the_store() {
    let rig = Rig::new().await;
    let scope = Scope::Clusters(vec![CLUSTER]);
    let bundle = rig.issuer.issue_admin("init", &name("ada"), &[Role::Operator], &scope).await.unwrap();
    let certificate = leaf(&bundle.certified);
    assert_eq!(certificate.id().to_string(), "spiffe://fleet.test/admin/ada");
    assert_eq!(certificate.not_after(), rig.now() + 30 * DAY);
    assert!(!certificate.has_server_auth());
    let live = rig.identities.find(certificate.id()).unwrap();
    assert_eq!((live.roles.as_slice(), &live.scope), ([Role::Operator].as_slice(), &scope));
    assert_eq!(live.standing_of(&certificate), SerialStanding::Current);
    assert!(rig.audit().contains("admin_issue"));
}

#[tokio::test]
async fn an_admin_issued_again_has_the_new_roles_and_the_old_certificate_is_superseded() {
    let rig = Rig::new().await;
    let issue =
        async |role| rig.issuer.issue_admin("host", &name("ada"), &[role], &Scope::All).await.unwrap();
    let old = leaf(&issue(Role::Operator).await.certified);
    let new = leaf(&issue(Role::Auditor).await.certified);
    let live = rig.identities.find(new.id()).unwrap();
    assert_eq!(live.roles, [Role::Auditor]);
    assert_eq!(live.standing_of(&old), SerialStanding::Superseded);
    assert_eq!(live.standing_of(&new), SerialStanding::Current);
}

#[tokio::test]
async fn an_admin_without_a_role_or_with_an_empty_scope_or_banned_is_refused() {
    let rig = Rig::new().await;
    let issue = async |roles: &[Role], scope: Vec<ClusterId>| {
        rig.issuer.issue_admin("host", &name("ada"), roles, &Scope::Clusters(scope)).await
    };
    assert!(matches!(issue(&[], vec![CLUSTER]).await, Err(DirectError::NoRole)));
    assert!(matches!(issue(&[Role::Operator], vec![]).await, Err(DirectError::EmptyScope)));
    let ada = issue(&[Role::Operator], vec![CLUSTER]).await.unwrap();
    rig.ban(&ada.certified.id).await;
    assert!(matches!(issue(&[Role::Operator], vec![CLUSTER]).await, Err(DirectError::Banned)));
}

#[tokio::test]
async fn an_admins_bundle_reads_back_from_pem() {
    let rig = Rig::new().await;
    let bundle = rig.issuer.issue_admin("init", &name("ada"), &[Role::Operator], &Scope::All).await.unwrap();
    let chain = split_pem_chain(bundle.chain_pem().as_bytes()).unwrap();
    assert_eq!(chain.iter().map(|der| der.to_vec()).collect::<Vec<_>>(), bundle.certified.chain);
    let roots = split_pem_chain(bundle.roots_pem().as_bytes()).unwrap();
    assert_eq!(roots.iter().map(|der| der.to_vec()).collect::<Vec<_>>(), bundle.roots);
    let key = KeyPair::from_pem(&bundle.key.to_pem()).unwrap();
    assert_eq!(&key.spki_sha256(), leaf(&bundle.certified).spki_sha256());
}

#[test]
fn an_agents_certificate_is_due_when_less_than_two_thirds_of_its_life_are_left() {
    let now = SystemTime::UNIX_EPOCH + 20_000 * DAY;
    let end = now + LEAF_LIFE;
    assert!(!agent_certificate_due(end, now));
    assert!(!agent_certificate_due(end, end - LEAF_LIFE / 3 * 2 - Duration::from_secs(1)));
    assert!(agent_certificate_due(end, end - LEAF_LIFE / 3 * 2));
    assert!(agent_certificate_due(end, end + 365 * DAY));
}
