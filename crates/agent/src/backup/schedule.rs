//! Scheduled backups: one when the last is older than the period, tried again
//! soon after a failure, for ever.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;

use super::kept::{name_at, prune};
use super::{BackupError, Backups, Verified};
use crate::config;
use crate::errors::chain;

/// The schedule looks so often.
const LOOK_EVERY: Duration = Duration::from_secs(20);
/// A failed backup is tried again after so long.
const RETRY_AFTER: Duration = Duration::from_secs(10 * 60);
/// A last backup further in the future was made under a wrong clock.
const TOLERANCE: Duration = Duration::from_secs(5 * 60);

/// Makes backups on schedule until `stop`; returns at once when none are
/// configured.
pub async fn run(backups: Arc<Backups>, stop: CancellationToken) {
    let Some(config) = backups.config.clone() else { return };
    let mut failed: Option<SystemTime> = None;
    loop {
        let now = backups.changes.now();
        let last = backups.last().map(|(at, _)| at);
        if is_due(last, config.every, now) && is_due(failed, RETRY_AFTER.min(config.every), now) {
            failed = match backups.scheduled(&config).await {
                Ok(_) => None,
                Err(error) => {
                    tracing::error!(error = chain(&error), "no backup was made; it is tried again soon");
                    Some(now)
                }
            };
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

impl Backups {
    /// Makes, verifies and notes a backup in the configured directory, and
    /// removes the oldest beyond those to keep.
    pub(super) async fn scheduled(&self, config: &config::Backup) -> Result<Verified, BackupError> {
        let file = config.directory.join(name_at(self.changes.now()));
        let verified = self.make(&file).await?;
        self.note(&verified).await?;
        // The backup is there and noted: one too many of them is no failure.
        if let Err(error) = prune(&config.directory, config.keep, &file) {
            tracing::warn!(error = chain(&error), "old backups could not be removed");
        }
        tracing::info!(file = %file.display(), versions = verified.held.versions, "made and verified a backup");
        Ok(verified)
    }
}

fn is_due(last: Option<SystemTime>, every: Duration, now: SystemTime) -> bool {
    last.is_none_or(|last| match now.duration_since(last) {
        Ok(age) => age >= every,
        Err(ahead) => ahead.duration() > TOLERANCE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::times::from_ms;

    #[test]
    fn a_backup_is_due_after_its_period_or_when_the_last_is_from_the_future() {
        let day = Duration::from_secs(86_400);
        let now = from_ms(1_795_000_000_000);
        assert!(is_due(None, day, now));
        assert!(is_due(Some(now - day), day, now));
        assert!(!is_due(Some(now - day / 2), day, now));
        assert!(!is_due(Some(now + TOLERANCE), day, now));
        assert!(is_due(Some(now + day), day, now));
    }
}
