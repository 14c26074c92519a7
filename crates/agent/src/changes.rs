//! A change: intent on disk, store transaction, outcome on disk.
//!
//! A change whose intent cannot be recorded is refused. The transaction
//! carries the change's id, so that after a crash or a lost reply the outcome
//! of each open intent is looked up, never guessed.

use std::fmt::Display;
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use fleet_kms_audit::{ChangeId, ChangeLog, Outcome};
use fleet_kms_store::Revision;
use fleet_kms_transport::Clock;

use crate::ledger::{Changeset, Generator, Ledger, LedgerError, Mark, WriteError};
use crate::trail::{Event, Intent};
use crate::witness::{Seen, Witness};

/// Times a change is decided again because the store changed meanwhile.
const ATTEMPTS: usize = 8;

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
    Audit(#[source] io::Error),
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
    log: Arc<Mutex<ChangeLog>>,
    witness: Witness,
    unconfirmed: Option<Unconfirmed>,
    clock: Clock,
    generator: Generator,
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
        Self { ledger, log: Arc::new(Mutex::new(log)), witness, unconfirmed, clock, generator }
    }

    /// Says why all changes are refused, if they are.
    pub fn unconfirmed(&self) -> Option<Unconfirmed> {
        self.unconfirmed
    }

    /// Returns the ledger.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
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
        if let Some(why) = self.unconfirmed {
            return Err(ChangeError::Unconfirmed(why));
        }
        let change = ChangeId::generate(&mut *(self.generator)());
        let now = self.now();
        let recorded = self
            .with_log(move |log| log.intent(&intent.line(change), now))
            .await
            .map_err(ChangeError::Audit)?;
        let mark = Mark { change, intent: recorded };
        let result = self.attempt(&mark, prepare).await;
        let why;
        let outcome = match &result {
            Ok(_) => Outcome::Done,
            Err(ChangeError::Write(WriteError::Unknown(_))) => Outcome::Unknown,
            Err(error) => {
                why = error.to_string();
                Outcome::NotDone { why: &why }
            }
        };
        self.close(change, outcome).await;
        result
    }

    /// Records something that happened without a change of the store.
    pub async fn event(&self, event: Event) {
        let now = self.now();
        if let Err(error) = self.with_log(move |log| log.event(&event.line(), now)).await {
            report("an event", &error);
        }
    }

    /// Closes the intents that a crash left open: the store says for each
    /// whether it happened.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn close_open_intents(&self) -> Result<usize, LedgerError> {
        let open = self.log.lock().unwrap_or_else(PoisonError::into_inner).open_intents();
        for change in &open {
            let happened = self.ledger.happened(change).await?;
            let why = "the agent stopped before the transaction";
            self.close(*change, if happened { Outcome::Done } else { Outcome::NotDone { why } }).await;
        }
        Ok(open.len())
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
    async fn close(&self, change: ChangeId, outcome: Outcome) {
        let now = self.now();
        let done = matches!(outcome, Outcome::Done);
        match self.with_log(move |log| log.outcome(change, outcome, now)).await {
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
        let witness = self.witness.clone();
        // Under the log's lock, so that an older count never overwrites a newer one.
        let written = self.with_log(move |_| match witness.read()? {
            Some(known) if known.store == seen.store && known.count >= seen.count => Ok(()),
            _ => witness.write(seen),
        });
        if let Err(error) = written.await {
            report("the head's count", &error);
        }
    }

    /// Runs an operation of the log, which waits for the disk, off the
    /// runtime's threads.
    async fn with_log<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut ChangeLog) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let log = Arc::clone(&self.log);
        let run = move || operation(&mut log.lock().unwrap_or_else(PoisonError::into_inner));
        tokio::task::spawn_blocking(run).await.map_err(io::Error::other)?
    }
}

fn report(what: &str, error: &dyn Display) {
    tracing::error!(%error, "{what} could not be recorded in the audit");
}
