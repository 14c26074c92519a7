use fleet_kms_identity::KeyPair;

use super::*;
use crate::authz::{Role, Scope};
use crate::enrolment::rig::{CLUSTER, DAY, Rig, leaf};
use crate::identities::SerialStanding;
use crate::max_offline::MaxOffline;
use crate::records::payload::ClusterRecord;
use crate::records::rows;

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

async fn refused(rig: &Rig, shown: &Certificate, key: &KeyPair) -> RenewRefused {
    match rig.renew(shown, key).await {
        Err(RenewError::Refused(refused)) => refused,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_renewal_gives_the_next_certificate_of_the_same_name_and_leaves_the_current_one() {
    let rig = Rig::new().await;
    let old = rig.enrol("cp1", &key()).await.unwrap();
    rig.pass(3 * DAY);
    let new_key = key();
    let new = rig.renew(&old, &new_key).await.unwrap();
    assert_eq!(new.id(), old.id());
    assert_eq!(new.spki_sha256(), &new_key.spki_sha256());
    assert_eq!(new.not_after(), rig.now() + 7 * DAY);
    assert!(new.serial() > old.serial());
    let live = rig.identities.find(old.id()).unwrap();
    assert_eq!(live.standing_of(&old), SerialStanding::Current);
    assert_eq!(live.standing_of(&new), SerialStanding::Next);
}

#[tokio::test]
async fn a_lost_reply_is_answered_with_the_same_certificate() {
    let rig = Rig::new().await;
    let old = rig.enrol("cp1", &key()).await.unwrap();
    let new_key = key();
    let first = rig.renew(&old, &new_key).await.unwrap();
    let lines = rig.audit().lines().count();
    assert_eq!(rig.renew(&old, &new_key).await.unwrap(), first);
    assert_eq!(rig.audit().lines().count(), lines);
}

#[tokio::test]
async fn a_repeat_after_the_next_certificate_has_expired_gets_one_that_is_valid() {
    let rig = Rig::new().await;
    let old = rig.enrol("cp1", &key()).await.unwrap();
    let new_key = key();
    let first = rig.renew(&old, &new_key).await.unwrap();
    rig.pass(20 * DAY);
    let again = rig.renew(&old, &new_key).await.unwrap();
    assert!(again.serial() > first.serial());
    assert_eq!(again.not_after(), rig.now() + 7 * DAY);
}

#[tokio::test]
async fn a_client_that_lost_its_new_key_renews_with_another() {
    let rig = Rig::new().await;
    let old = rig.enrol("cp1", &key()).await.unwrap();
    let lost = rig.renew(&old, &key()).await.unwrap();
    let new = rig.renew(&old, &key()).await.unwrap();
    let live = rig.identities.find(old.id()).unwrap();
    assert_eq!(live.standing_of(&lost), SerialStanding::Superseded);
    assert_eq!(live.standing_of(&new), SerialStanding::Next);
}

#[tokio::test]
async fn the_next_certificate_renews_too_and_becomes_current_by_it() {
    let rig = Rig::new().await;
    let first = rig.enrol("cp1", &key()).await.unwrap();
    let second = rig.renew(&first, &key()).await.unwrap();
    let third = rig.renew(&second, &key()).await.unwrap();
    let live = rig.identities.find(first.id()).unwrap();
    assert_eq!(live.standing_of(&first), SerialStanding::Superseded);
    assert_eq!(live.standing_of(&second), SerialStanding::Current);
    assert_eq!(live.standing_of(&third), SerialStanding::Next);
}

#[tokio::test]
async fn an_expired_certificate_renews_until_max_offline_and_not_a_moment_longer() {
    let rig = Rig::new().await;
    let old = rig.enrol("cp1", &key()).await.unwrap();
    let max_offline = MaxOffline::DEFAULT.time();
    rig.set(old.not_after() + max_offline);
    assert!(rig.permit(&old).is_ok());
    let new = rig.renew(&old, &key()).await.unwrap();
    assert_eq!(new.not_after(), rig.now() + 7 * DAY);
    rig.set(old.not_after() + max_offline + Duration::from_millis(1));
    assert_eq!(refused(&rig, &old, &key()).await, RenewRefused::OffTooLong);
    assert!(rig.audit().contains("off_too_long"));
}

#[tokio::test]
async fn the_clusters_own_max_offline_decides_and_a_change_counts_at_once() {
    let rig = Rig::new().await;
    let old = rig.enrol("cp1", &key()).await.unwrap();
    let set = async |days: u64| {
        let edit = move |cluster: &mut ClusterRecord| cluster.max_offline_seconds = days * 86_400;
        rig.edit(rows::cluster(&CLUSTER), edit).await;
    };
    rig.set(old.not_after() + 100 * DAY);
    set(99).await;
    assert_eq!(refused(&rig, &old, &key()).await, RenewRefused::OffTooLong);
    set(100).await;
    rig.renew(&old, &key()).await.unwrap();
    rig.set(old.not_after() + 250 * DAY);
    assert_eq!(refused(&rig, &old, &key()).await, RenewRefused::OffTooLong);
    set(251).await;
    rig.renew(&old, &key()).await.unwrap();
    // What no release wrote is no reason to let anybody in.
    set(0).await;
    assert!(matches!(rig.renew(&old, &key()).await, Err(RenewError::Failed(_))));
}

#[tokio::test]
async fn a_superseded_certificate_is_refused_raises_identity_clone_and_harms_nobody() {
    let rig = Rig::new().await;
    let old = rig.enrol("cp1", &key()).await.unwrap();
    let new = rig.renew(&old, &key()).await.unwrap();
    rig.issuer.promote(new.id(), &new.serial()).await.unwrap();
    assert_eq!(refused(&rig, &old, &key()).await, RenewRefused::Superseded);
    assert!(rig.audit().contains("identity_clone"));
    assert_eq!(rig.identity(new.id()).await.banned_ms, 0);
    rig.renew(&new, &key()).await.unwrap();
}

#[tokio::test]
async fn the_current_key_is_not_renewed() {
    let rig = Rig::new().await;
    let (first_key, second_key) = (key(), key());
    let first = rig.enrol("cp1", &first_key).await.unwrap();
    assert_eq!(refused(&rig, &first, &first_key).await, RenewRefused::SameKey);
    let second = rig.renew(&first, &second_key).await.unwrap();
    assert_eq!(refused(&rig, &second, &second_key).await, RenewRefused::SameKey);
    assert_eq!(refused(&rig, &second, &first_key).await, RenewRefused::SameKey);
    assert!(RenewRefused::SameKey.to_string().contains("new key"));
}

#[tokio::test]
async fn the_right_serial_with_another_key_on_record_is_refused() {
    let rig = Rig::new().await;
    let shown = rig.enrol("cp1", &key()).await.unwrap();
    let other = |record: &mut IdentityRecord| {
        if let Some(current) = &mut record.current {
            current.spki_sha256 = vec![0; 32];
        }
    };
    rig.edit(rows::identity(shown.id()), other).await;
    assert_eq!(refused(&rig, &shown, &key()).await, RenewRefused::ForeignKey);
}

#[tokio::test]
async fn a_ban_that_memory_has_not_seen_yet_stops_a_renewal() {
    let rig = Rig::new().await;
    let shown = rig.enrol("cp1", &key()).await.unwrap();
    rig.ban(shown.id()).await;
    assert_eq!(refused(&rig, &shown, &key()).await, RenewRefused::Banned);
    assert!(rig.audit().contains("renew_refused"));
}

#[tokio::test]
async fn an_identity_that_was_removed_does_not_renew() {
    let rig = Rig::new().await;
    let shown = rig.enrol("cp1", &key()).await.unwrap();
    let elsewhere = Rig::new().await;
    assert_eq!(refused(&elsewhere, &shown, &key()).await, RenewRefused::Unknown);
}

#[tokio::test]
async fn only_a_nodes_certificate_renews_after_it_has_expired() {
    let rig = Rig::new().await;
    let ada = "ada".parse().unwrap();
    let bundle = rig.issuer.issue_admin("host", &ada, &[Role::Operator], &Scope::All).await.unwrap();
    let shown = leaf(&bundle.certified);
    let record = rig.identity(shown.id()).await;
    let judge = |now| judge(&record, &shown, &[0; 32], now, MaxOffline::DEFAULT.time());
    assert_eq!(judge(shown.not_after()), Ok(Verdict::New { promote: false }));
    assert_eq!(judge(shown.not_after() + DAY), Err(RenewRefused::ExpiredKind));
}
