//! The states of a key version and the one table of moves between them.
//!
//! ```text
//! Next → Active → DecryptOnly ⇄ Disabled ⇄ DestroyScheduled → Destroyed
//!   └──────────────────↑ only by a fresh rotation
//! ```
//!
//! No other move exists. Nothing leaves `Destroyed`, nothing becomes `Active` twice, and no version is
//! destroyed except through `DestroyScheduled`, which an operator orders.

use std::fmt;
use std::time::SystemTime;

/// What a key version may be used for now.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// Made ahead, becomes Active by the next rotation. Not used for wraps yet, but backups hold it by then.
    Next,
    /// The one version that wraps.
    Active,
    /// Was Active, or was retired before it could be; unwraps only.
    DecryptOnly,
    /// Refused for every use, kept for the day when that was a mistake.
    Disabled,
    /// Disabled, and may be destroyed from this time on.
    DestroyScheduled {
        /// Before this time the version is not destroyed.
        not_before: SystemTime,
    },
    /// A tombstone: the key is gone, its number and id stay taken.
    Destroyed,
}

/// A move of one version from state to state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Operation {
    /// By a rotation.
    Activate,
    /// By a rotation.
    Retire,
    /// By an operator.
    Disable,
    /// By an operator; undoes `Disable`.
    Enable,
    /// By an operator.
    ScheduleDestruction {
        /// Before this time the version is not destroyed.
        not_before: SystemTime,
    },
    /// By an operator; undoes `ScheduleDestruction`.
    CancelDestruction,
    /// When the scheduled time has come and the evidence is there.
    Destroy,
}

impl State {
    /// The state after `operation`; `None` where the move does not exist.
    pub fn after(self, operation: Operation) -> Option<Self> {
        match (self, operation) {
            (Self::Next, Operation::Activate) => Some(Self::Active),
            (Self::Next | Self::Active, Operation::Retire) => Some(Self::DecryptOnly),
            (Self::DecryptOnly, Operation::Disable) => Some(Self::Disabled),
            (Self::Disabled, Operation::Enable) => Some(Self::DecryptOnly),
            (Self::Disabled, Operation::ScheduleDestruction { not_before }) => {
                Some(Self::DestroyScheduled { not_before })
            }
            (Self::DestroyScheduled { .. }, Operation::CancelDestruction) => Some(Self::Disabled),
            (Self::DestroyScheduled { .. }, Operation::Destroy) => Some(Self::Destroyed),
            _ => None,
        }
    }

    /// What an operator can do so that a refused `operation` becomes possible, or why it never will.
    pub(crate) fn remedy(self, operation: Operation) -> &'static str {
        match (self, operation) {
            (Self::Destroyed, _) => "its key is gone for good",
            (Self::Active, _) => "rotate first",
            (Self::Next, _) => "it is not in use yet; a fresh rotation retires it",
            (Self::DecryptOnly, Operation::ScheduleDestruction { .. }) => "disable it first",
            (Self::DecryptOnly | Self::Disabled, Operation::Destroy) => "schedule its destruction first",
            (Self::DestroyScheduled { .. }, Operation::Enable) => "cancel its destruction first",
            _ => "there is nothing to do",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Next => "next",
            Self::Active => "active",
            Self::DecryptOnly => "decrypt-only",
            Self::Disabled => "disabled",
            Self::DestroyScheduled { .. } => "scheduled for destruction",
            Self::Destroyed => "destroyed",
        })
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Activate => "activate",
            Self::Retire => "retire",
            Self::Disable => "disable",
            Self::Enable => "enable",
            Self::ScheduleDestruction { .. } => "schedule the destruction of",
            Self::CancelDestruction => "cancel the destruction of",
            Self::Destroy => "destroy",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATER: SystemTime = SystemTime::UNIX_EPOCH;
    const SCHEDULED: State = State::DestroyScheduled { not_before: LATER };
    const SCHEDULE: Operation = Operation::ScheduleDestruction { not_before: LATER };

    #[test]
    fn every_pair_of_state_and_operation_moves_as_the_table_says() {
        use Operation::*;
        use State::{Active, DecryptOnly, Destroyed, Disabled, Next};

        let operations = [Activate, Retire, Disable, Enable, SCHEDULE, CancelDestruction, Destroy];
        #[rustfmt::skip]
        let table = [
            //            Activate      Retire             Disable         Enable             Schedule         Cancel          Destroy
            (Next,        [Some(Active), Some(DecryptOnly), None,           None,              None,            None,           None]),
            (Active,      [None,         Some(DecryptOnly), None,           None,              None,            None,           None]),
            (DecryptOnly, [None,         None,              Some(Disabled), None,              None,            None,           None]),
            (Disabled,    [None,         None,              None,           Some(DecryptOnly), Some(SCHEDULED), None,           None]),
            (SCHEDULED,   [None,         None,              None,           None,              None,            Some(Disabled), Some(Destroyed)]),
            (Destroyed,   [None,         None,              None,           None,              None,            None,           None]),
        ];
        for (state, row) in table {
            for (operation, expected) in operations.into_iter().zip(row) {
                assert_eq!(state.after(operation), expected, "{operation} a version that is {state}");
            }
        }
    }
}
