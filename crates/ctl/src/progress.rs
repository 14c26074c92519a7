//! Shows on a terminal that something takes long. What is done within two
//! seconds shows nothing, and what is no terminal never sees any of it.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::JoinHandle;

/// How long a person waits without wondering.
const AFTER: Duration = Duration::from_secs(2);
/// Between two movements.
const TICK: Duration = Duration::from_millis(100);

/// Something that may take long; it is over when this is dropped.
pub(crate) struct Progress {
    bar: ProgressBar,
    shows: JoinHandle<()>,
}

impl Progress {
    /// Begins; `what` is said once it takes long.
    pub(crate) fn begin(what: &'static str) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()).with_message(what);
        bar.set_style(
            ProgressStyle::with_template("{spinner} {msg} ({elapsed})").expect("the template is well formed"),
        );
        let shown = bar.clone();
        let shows = tokio::spawn(async move {
            tokio::time::sleep(AFTER).await;
            // indicatif hides itself when standard error is no terminal, and knows NO_COLOR.
            shown.set_draw_target(ProgressDrawTarget::stderr());
            shown.enable_steady_tick(TICK);
        });
        Self { bar, shows }
    }

    /// Says how far it has come.
    pub(crate) fn items(&self, read: usize) {
        self.bar.set_message(format!("reading the list: {read} so far"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.shows.abort();
        self.bar.finish_and_clear();
    }
}
