//! A change: intent on disk, store transaction, outcome on disk.
//!
//! A change whose intent cannot be recorded is refused. The transaction
//! carries the change's id, so that after a crash or a lost reply the outcome
//! of each open intent is looked up, never guessed.

use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use fleet_kms_audit::{ChangeId, ChangeLog, LogError, Outcome};
use fleet_kms_store::Revision;
use fleet_kms_transport::Clock;

use crate::errors::chain;
use crate::ledger::{Changeset, Generator, HeadError, Ledger, LedgerError, Mark, WriteError};
use crate::trail::{Event, Intent};
use crate::witness::{Seen, Witness};

mod tally;

pub use tally::Tally;

/// Times a change is decided again because the store changed meanwhile.
const ATTEMPTS: usize = 8;

tokio::task_local! {
    /// There in the task of a recovery, as long as it runs.
    static RECOVERY: ();
}

/// Why a change did not happen, or may not have.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError<E: std::error::Error + 'static> {
    /// The change was refused for a reason of its own.
    #[error(transparent)]
    Refused(E),
    /// Other changes kept getting in first.
    #[error("other changes to the same thing kept getting in first; try again")]
    Contended,
    /// The store did not take it, or its reply was lost.
    #[error(transparent)]
    Write(WriteError),
    /// The store may be a copy from before: nothing is changed until an
    /// operator has confirmed it.
    #[error("{0}; changes are refused until you run kms-agent restore --confirm on the agent's host")]
    Unconfirmed(Unconfirmed),
    /// The intent could not be recorded.
    #[error("the change cannot be recorded in the audit, so it was refused; look at the audit's disk")]
    Audit(#[source] LogError),
}

/// Why the store was not confirmed.
#[derive(Debug, thiserror::Error)]
pub enum ConfirmError {
    /// The store does not take the new head.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The witness cannot be read or written.
    #[error("the witness beside the audit cannot be used")]
    Witness(#[source] LogError),
}

/// Why the agent serves but changes nothing: `recovered-unconfirmed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unconfirmed {
    /// The witness has seen later transactions.
    #[error("the store is older than its witness: {store} transactions, where {witness} were seen")]
    Older { store: u64, witness: u64 },
    /// Rows and head differ.
    #[error("rows of the store were edited, replayed or deleted behind the agent's back")]
    Edited,
}

/// Makes changes.
pub struct Changes {
    ledger: Arc<Ledger>,
    log: Arc<ChangeLog>,
    /// Locked while it is read and written, so that its count only rises.
    witness: Arc<Mutex<Witness>>,
    unconfirmed: Mutex<Option<Unconfirmed>>,
    /// Held by each change; taken whole to lock the agent between two changes.
    locked: tokio::sync::RwLock<bool>,
    /// The audit could not be written the last time.
    audit_failing: AtomicBool,
    /// Changes refused because they could not be recorded.
    refused: AtomicU64,
    clock: Clock,
    generator: Generator,
    tally: Tally,
}

impl Changes {
    /// Makes the only maker of changes over a ledger. `unconfirmed` says why it
    /// must refuse all of them.
    pub fn new(
        ledger: Arc<Ledger>,
        log: ChangeLog,
        witness: Witness,
        unconfirmed: Option<Unconfirmed>,
        clock: Clock,
        generator: Generator,
    ) -> Self {
        let (log, witness) = (Arc::new(log), Arc::new(Mutex::new(witness)));
        Self {
            ledger,
            log,
            witness,
            unconfirmed: Mutex::new(unconfirmed),
            locked: tokio::sync::RwLock::new(false),
            audit_failing: AtomicBool::new(false),
            refused: AtomicU64::new(0),
            clock,
            generator,
            tally: Tally::default(),
        }
    }

    /// Returns how changes ended.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Says why all changes are refused, if they are.
    pub fn unconfirmed(&self) -> Option<Unconfirmed> {
        *self.unconfirmed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a recovery that an operator has confirmed: the changes that it makes
    /// itself pass although the store is unconfirmed, and nobody else's do.
    pub(crate) async fn as_recovery<F: Future>(&self, recovery: F) -> F::Output {
        RECOVERY.scope((), recovery).await
    }

    /// Ends `recovered-unconfirmed`: takes the rows as they are under a head
    /// that is newer than anything the witness, or `count`, has seen.
    ///
    /// # Errors
    ///
    /// When the store or the witness's disk says no.
    pub(crate) async fn confirm(&self, count: u64) -> Result<u64, ConfirmError> {
        let witness = Arc::clone(&self.witness);
        let read = move || Ok(witness.lock().unwrap_or_else(PoisonError::into_inner).read()?);
        let seen = off_runtime(read).await.map_err(ConfirmError::Witness)?;
        let store = self.ledger.codec().store();
        let seen = seen.filter(|seen| seen.store == store).map_or(0, |seen| seen.count);
        let count = self.ledger.accept_rows(seen.max(count)).await?;
        let witness = Arc::clone(&self.witness);
        let write = move || {
            Ok(witness.lock().unwrap_or_else(PoisonError::into_inner).write(Seen { store, count })?)
        };
        off_runtime(write).await.map_err(ConfirmError::Witness)?;
        *self.unconfirmed.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(count)
    }

    /// Does something while no change is under way.
    pub(crate) async fn between_changes<F: Future<Output = ()>>(&self, act: impl FnOnce() -> F) {
        let _all = self.locked.write().await;
        act().await;
    }

    /// Refuses all changes from now on and wipes the ledger's keys, after the
    /// changes that are under way.
    pub(crate) async fn lock(&self) {
        let mut locked = self.locked.write().await;
        *locked = true;
        self.ledger.lock().await;
    }

    /// Does something that reads or counts beside the changes, while the keys
    /// stay as they are; `None` when the agent is locked or the store is not
    /// confirmed.
    pub(crate) async fn beside_changes<T, F: Future<Output = T>>(
        &self,
        act: impl FnOnce() -> F,
    ) -> Option<T> {
        let locked = self.locked.read().await;
        if *locked || self.unconfirmed().is_some() {
            return None;
        }
        Some(act().await)
    }

    /// Returns the ledger.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Returns the chain of changes.
    pub fn log(&self) -> &Arc<ChangeLog> {
        &self.log
    }

    /// Says whether the chain of changes could not be written the last time.
    pub fn audit_is_failing(&self) -> bool {
        self.audit_failing.load(Ordering::Relaxed)
    }

    /// Returns how many changes were refused since the start because they could
    /// not be recorded.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Returns the time.
    pub fn now(&self) -> SystemTime {
        (self.clock)()
    }

    /// Makes one change. `prepare` reads what it needs and decides; it is
    /// called again when the store changed meanwhile.
    ///
    /// # Errors
    ///
    /// When `prepare` refuses, or the change cannot be recorded or stored.
    pub async fn run<T, E, F, P>(&self, intent: Intent, prepare: P) -> Result<T, ChangeError<E>>
    where
        E: std::error::Error + 'static,
        F: Future<Output = Result<(Changeset, T), E>> + Send,
        P: Fn() -> F + Send + Sync,
    {
        self.run_with_revision(intent, prepare).await.map(|(value, _)| value)
    }

    /// Like [`Self::run`]; also returns the revision that the written rows
    /// have now.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub async fn run_with_revision<T, E, F, P>(
        &self,
        intent: Intent,
        prepare: P,
    ) -> Result<(T, Revision), ChangeError<E>>
    where
        E: std::error::Error + 'static,
        F: Future<Output = Result<(Changeset, T), E>> + Send,
        P: Fn() -> F + Send + Sync,
    {
        self.run_applied(intent, prepare, |value, revision| (value, revision)).await
    }

    /// Like [`Self::run`]; `apply` takes the change into memory as soon as it
    /// is durable, before the audit has the outcome and before anything that
    /// waits for the end of this change, such as the end of a store-key epoch,
    /// goes on.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub async fn run_applied<T, R, E, F, P>(
        &self,
        intent: Intent,
        prepare: P,
        apply: impl FnOnce(T, Revision) -> R + Send,
    ) -> Result<R, ChangeError<E>>
    where
        E: std::error::Error + 'static,
        F: Future<Output = Result<(Changeset, T), E>> + Send,
        P: Fn() -> F + Send + Sync,
    {
        let ended = self.recorded(intent, prepare, apply).await;
        self.tally.note(&ended);
        ended
    }

    async fn recorded<T, R, E, F, P>(
        &self,
        intent: Intent,
        prepare: P,
        apply: impl FnOnce(T, Revision) -> R + Send,
    ) -> Result<R, ChangeError<E>>
    where
        E: std::error::Error + 'static,
        F: Future<Output = Result<(Changeset, T), E>> + Send,
        P: Fn() -> F + Send + Sync,
    {
        if let Some(why) = self.unconfirmed()
            && RECOVERY.try_with(|()| ()).is_err()
        {
            return Err(ChangeError::Unconfirmed(why));
        }
        let locked = self.locked.read().await;
        if *locked {
            return Err(ChangeError::Write(WriteError::Head(HeadError::Locked)));
        }
        let mut id = [0; 16];
        (self.generator)().fill_bytes(&mut id);
        let change = ChangeId::from_bytes(id);
        let now = self.now();
        let log = Arc::clone(&self.log);
        let recorded = self.written(off_runtime(move || log.intent(&intent.line(change), now)).await);
        let recorded = recorded.map_err(|error| {
            self.refused.fetch_add(1, Ordering::Relaxed);
            ChangeError::Audit(error)
        })?;
        let mark = Mark { change, intent: recorded };
        let result = self.attempt(&mark, prepare).await;
        let result = result.map(|(value, revision)| apply(value, revision));
        let outcome = match &result {
            Ok(_) => Closed::Done,
            Err(ChangeError::Write(WriteError::Unknown(_))) => Closed::Unknown,
            Err(error) => Closed::NotDone(error.to_string()),
        };
        self.close(change, outcome).await;
        result
    }

    /// Records something that happened without a change of the store.
    pub async fn event(&self, event: Event) {
        let now = self.now();
        let log = Arc::clone(&self.log);
        if let Err(error) = self.written(off_runtime(move || log.event(&event.line(), now)).await) {
            report("an event", &error);
        }
    }

    /// As [`Self::event`], for what must not happen unrecorded.
    ///
    /// # Errors
    ///
    /// When it cannot be recorded.
    pub(crate) async fn event_first(&self, event: Event) -> Result<(), LogError> {
        let now = self.now();
        let log = Arc::clone(&self.log);
        self.written(off_runtime(move || log.event(&event.line(), now)).await).map(drop)
    }

    /// Takes note whether the chain can be written, and says so in the log when
    /// that changes: callers come back every second.
    fn written<T>(&self, result: Result<T, LogError>) -> Result<T, LogError> {
        let failure = result.as_ref().err().filter(|error| matches!(error, LogError::Io(_)));
        let was_failing = self.audit_failing.swap(failure.is_some(), Ordering::Relaxed);
        match failure {
            Some(error) if !was_failing => {
                let error = chain(error);
                tracing::error!(error, "the audit takes no record: changes are refused; look at its disk");
            }
            None if was_failing => tracing::info!("the audit takes records again: changes are taken again"),
            Some(_) | None => {}
        }
        result
    }

    /// Closes the intents that a crash left open: the store says for each
    /// whether it happened.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn close_open_intents(&self) -> Result<usize, LedgerError> {
        let open = self.log.open_intents();
        for intent in &open {
            let happened = self.ledger.happened(&intent.change).await?;
            let why = "the agent stopped before the transaction".to_owned();
            self.close(intent.change, if happened { Closed::Done } else { Closed::NotDone(why) }).await;
        }
        if self.log.open_intents().is_empty() {
            self.ledger.settle_all().await?;
        }
        Ok(open.len())
    }

    /// As [`Self::close_open_intents`], for a store that was restored: what it
    /// does not have may have been in the lost one, so nobody knows.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn close_lost_intents(&self) -> Result<(), LedgerError> {
        for intent in self.log.open_intents() {
            let happened = self.ledger.happened(&intent.change).await?;
            self.close(intent.change, if happened { Closed::Done } else { Closed::Unknown }).await;
        }
        Ok(())
    }

    async fn attempt<T, E, F, P>(&self, mark: &Mark, prepare: P) -> Result<(T, Revision), ChangeError<E>>
    where
        E: std::error::Error + 'static,
        F: Future<Output = Result<(Changeset, T), E>> + Send,
        P: Fn() -> F + Send + Sync,
    {
        for _ in 0..ATTEMPTS {
            let (changeset, value) = prepare().await.map_err(ChangeError::Refused)?;
            match self.ledger.commit(changeset, mark).await {
                Ok(revision) => return Ok((value, revision)),
                Err(WriteError::Conflict) => {}
                Err(error) => return Err(ChangeError::Write(error)),
            }
        }
        Err(ChangeError::Contended)
    }

    /// Records the outcome. If that fails the intent stays open and the next
    /// start closes it from the store.
    async fn close(&self, change: ChangeId, outcome: Closed) {
        let now = self.now();
        let done = matches!(outcome, Closed::Done);
        let log = Arc::clone(&self.log);
        match self.written(off_runtime(move || log.outcome(&change, outcome.line(), now)).await) {
            Ok(_) if done => {
                if let Err(error) = self.ledger.settle(&change).await {
                    report("a settled change", &error);
                }
                self.remember().await;
            }
            Ok(_) => {}
            Err(error) => report("an outcome", &error),
        }
    }

    /// Lets the witness see the head. It may trail: a later change catches up.
    async fn remember(&self) {
        let seen = Seen { store: self.ledger.codec().store(), count: self.ledger.head_count().await };
        let witness = Arc::clone(&self.witness);
        let written = off_runtime(move || {
            let witness = witness.lock().unwrap_or_else(PoisonError::into_inner);
            match witness.read()? {
                Some(known) if known.store == seen.store && known.count >= seen.count => Ok(()),
                _ => Ok(witness.write(seen)?),
            }
        });
        if let Err(error) = written.await {
            report("the head's count", &error);
        }
    }
}

/// How a change ended, owned.
enum Closed {
    Done,
    NotDone(String),
    Unknown,
}

impl Closed {
    fn line(&self) -> Outcome<'_> {
        match self {
            Self::Done => Outcome::Done,
            Self::NotDone(why) => Outcome::NotDone { why },
            Self::Unknown => Outcome::Unknown,
        }
    }
}

/// Runs what waits for the disk off the runtime's threads.
async fn off_runtime<T: Send + 'static>(
    operation: impl FnOnce() -> Result<T, LogError> + Send + 'static,
) -> Result<T, LogError> {
    let joined = tokio::task::spawn_blocking(operation).await;
    joined.map_err(|error| LogError::Io(io::Error::other(error)))?
}

fn report(what: &str, error: &dyn std::error::Error) {
    tracing::error!(error = chain(error), "{what} could not be recorded in the audit's directory");
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use fleet_kms_store::MemoryStore;
    use tokio::sync::oneshot;

    use super::*;
    use crate::enrolment::rig;

    #[tokio::test]
    async fn while_a_recovery_runs_only_its_own_changes_pass() {
        let directory = tempfile::tempdir().unwrap();
        let changes = rig::unconfirmed_changes(directory.path(), Arc::new(MemoryStore::new())).await;
        let attempt = || async {
            let prepare = || async { Ok::<_, Infallible>((changes.ledger().changeset(), ())) };
            changes.run(Intent::new("node_ban", "admin"), prepare).await
        };
        let (begun, has_begun) = oneshot::channel();
        let (end, may_end) = oneshot::channel();
        let recovery = changes.as_recovery(async {
            let own = attempt().await;
            begun.send(()).unwrap();
            may_end.await.unwrap();
            own
        });
        let others = async {
            has_begun.await.unwrap();
            let other = attempt().await;
            end.send(()).unwrap();
            other
        };
        let (own, other) = tokio::join!(recovery, others);
        own.unwrap();
        assert!(matches!(other, Err(ChangeError::Unconfirmed(Unconfirmed::Edited))), "{other:?}");
        assert!(matches!(attempt().await, Err(ChangeError::Unconfirmed(_))), "nor after it");
    }
}
