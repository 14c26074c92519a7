//! Renews the certificate for ever, expired or not.

use std::time::{Duration, SystemTime};

use fleet_kms_identity::{Renewal, renewal_due};
use tokio::time::timeout;

use super::{EnrolError, Moved};
use crate::believed_time::BelievedTime;
use crate::enrolment::{self, Random};
use crate::errors::chain;
use crate::metrics::{FAILED, OK};
use crate::node_identity::NodeIdentity;

/// The longest sleep towards a date: the believed time may jump meanwhile.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// The pauses between attempts, from the first to the longest. A fleet that
/// comes back after an outage must not ask as one.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

pub(super) async fn renew_for_ever(identity: NodeIdentity, time: BelievedTime, moved: Moved, random: Random) {
    let mut seed = seed(random);
    let mut pause = FIRST_PAUSE;
    loop {
        let not_after = identity.certificate().not_after();
        let seconds = not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        moved.node_status.set_certificate_not_after(seconds);
        let life = identity.leaf_life();
        let renewal = match life.is_zero() {
            // The state is lost: only the next certificate tells how long one lives.
            true => Renewal::Due,
            false => renewal_due(not_after, life, time.now(), seed),
        };
        match renewal {
            Renewal::In(wait) => sleep_or_told(wait.min(LOOK_EVERY), &time).await,
            Renewal::Due => match renew(&identity).await {
                Ok(()) => {
                    moved.metrics.renewed(OK);
                    tracing::info!(serial = %identity.certificate().serial(), "renewed the certificate");
                    (seed, pause) = (self::seed(random), FIRST_PAUSE);
                    if identity.certificate().not_after() <= time.now() {
                        // The agent has set its clock back since it told the time.
                        moved.links.context().time_is_doubtful.notify_one();
                    }
                    // Whatever the clocks say, nobody needs two certificates at once.
                    sleep_or_told(FIRST_PAUSE, &time).await;
                }
                Err(error) => {
                    moved.metrics.renewed(FAILED);
                    tracing::warn!(error = chain(&error), "cannot renew the certificate; it is tried again");
                    sleep_or_told(jittered(pause, self::seed(random)), &time).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            },
        }
    }
}

/// Sleeps, but not on when an agent tells the time: the wait may be a wrong
/// clock's, and the failure a date's.
async fn sleep_or_told(wait: Duration, time: &BelievedTime) {
    let _ = timeout(wait, time.told()).await;
}

async fn renew(identity: &NodeIdentity) -> Result<(), EnrolError> {
    let key = identity.next_key().await?;
    let answer = enrolment::renew(&identity.agents(), &identity.tls(), &key).await?;
    identity.install(answer).await?;
    Ok(())
}

fn seed(random: Random) -> u64 {
    random().first_chunk().map_or(0, |seed| u64::from_le_bytes(*seed))
}

/// Between half of a pause and all of it.
fn jittered(pause: Duration, seed: u64) -> Duration {
    let part = u32::try_from(seed % 1_000).unwrap_or(0);
    pause / 2 + pause / 2 * part / 1_000
}
