//! Logs to stderr through a bounded queue that never makes a caller wait.
//!
//! A stuck reader of stderr (a full pipe, a frozen journal) costs log lines and nothing else: a line that finds
//! the queue full is dropped and counted, and the count is logged once the reader is back. It must never write
//! what other crates trace below INFO: h2, hyper and rustls see the bytes that pass through.

mod writer;

use crate::logging::writer::Queue;
use std::fmt;
use std::io;
use std::str::FromStr;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{EnvFilter, FilterExt, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, Registry};

pub use crate::logging::writer::Guard;

/// How a log line looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// One line for people.
    #[default]
    Text,
    /// One JSON object for machines.
    Json,
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        match name {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(UnknownFormat),
        }
    }
}

/// The format's name is neither `text` nor `json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the log format is `text` or `json`")]
pub struct UnknownFormat;

/// Which lines are written, parsed: `info`, or levels by module such as `info,fleet_kms_agent::caller=debug`.
#[derive(Debug)]
pub struct Filter(EnvFilter);

impl FromStr for Filter {
    type Err = InvalidFilter;

    fn from_str(directives: &str) -> Result<Self, InvalidFilter> {
        EnvFilter::builder()
            .with_default_directive(LevelFilter::INFO.into())
            .parse(directives)
            .map(Self)
            .map_err(|source| InvalidFilter { source: Box::new(source) })
    }
}

impl Default for Filter {
    fn default() -> Self {
        Self(EnvFilter::new("info"))
    }
}

/// The filter cannot be parsed.
#[derive(Debug, thiserror::Error)]
#[error(
    "the log filter cannot be parsed; write a level (error, warn, info, debug, trace) or module=level, with commas between"
)]
pub struct InvalidFilter {
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// Why logging did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitError {
    /// The writer's thread could not be started.
    #[error("cannot start the log writer")]
    Thread(#[source] io::Error),
    /// This process logs already.
    #[error("logging was started twice")]
    Twice,
}

/// Starts the writer's thread and sends this process's events to it. Call it after [`crate::hardening::apply`].
///
/// # Errors
/// See [`InitError`].
pub fn init(format: Format, filter: Filter) -> Result<Guard, InitError> {
    let (queue, guard) = writer::start(io::stderr(), format).map_err(InitError::Thread)?;
    tracing::subscriber::set_global_default(subscriber(format, filter, queue))
        .map_err(|_| InitError::Twice)?;
    Ok(guard)
}

fn subscriber(format: Format, filter: Filter, queue: Queue) -> impl tracing::Subscriber + Send + Sync {
    let lines = tracing_subscriber::fmt::layer().with_writer(queue).with_ansi(false);
    let lines = match format {
        Format::Text => lines.boxed(),
        Format::Json => lines.json().flatten_event(true).boxed(),
    };
    let outside_at_info =
        filter_fn(|metadata| ours(metadata.target()) || metadata.level() <= &tracing::Level::INFO);
    Registry::default().with(lines.with_filter(filter.0.and(outside_at_info)))
}

/// Whether a target is one of this workspace's crates or programs.
fn ours(target: &str) -> bool {
    let krate = target.split("::").next().unwrap_or(target);
    krate.starts_with("fleet_kms") || matches!(krate, "kms_agent" | "kms_sidecar" | "kmsctl")
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logging::writer::tests::Sink;

    fn logged(format: Format, filter: &str, log: impl FnOnce()) -> String {
        let sink = Sink::default();
        let (queue, guard) = writer::start(sink.clone(), format).unwrap();
        tracing::subscriber::with_default(subscriber(format, filter.parse().unwrap(), queue), log);
        drop(guard);
        sink.text()
    }

    #[test]
    fn a_line_of_text_ends_in_its_fields() {
        let text = logged(Format::Text, "info", || tracing::info!(version = 3, "rotated"));
        assert!(text.ends_with(" INFO fleet_kms_process::logging::tests: rotated version=3\n"), "{text}");
    }

    #[test]
    fn a_json_line_is_one_object() {
        let text = logged(Format::Json, "info", || tracing::info!(version = 3, "rotated"));
        assert!(text.starts_with('{') && text.ends_with("}\n"), "{text}");
        assert!(text.contains(r#""message":"rotated","version":3"#), "{text}");
    }

    #[test]
    fn the_filter_decides_by_level_and_module() {
        let log = || {
            tracing::debug!("quiet");
            tracing::debug!(target: "kms_agent::caller", "loud");
        };
        let text = logged(Format::Text, "info,kms_agent::caller=debug", log);
        assert!(!text.contains("quiet") && text.contains("loud"), "{text}");
    }

    #[test]
    fn other_crates_stay_at_info_even_at_trace() {
        let log = || {
            tracing::trace!(target: "h2::codec", "bytes");
            tracing::info!(target: "h2", "connection");
            tracing::trace!("own");
        };
        let text = logged(Format::Text, "trace,h2=trace", log);
        assert!(!text.contains("bytes") && text.contains("connection") && text.contains("own"), "{text}");
    }

    #[test]
    fn a_wrong_filter_is_refused() {
        assert!("kms_agent=loud".parse::<Filter>().is_err());
        assert!("xml".parse::<Format>().is_err());
    }
}
