//! `[audit]`: how calls are recorded, what happens when they cannot be, and how long records are kept.

use std::path::PathBuf;
use std::time::Duration;

use fleet_kms_audit::{DataMode, DataOptions, MAX_FILE, OnFull, Retention};
use fleet_kms_process::config::InvalidKey;
use serde::Deserialize;

/// Sums are written so often unless the configuration says otherwise.
const SUMMARY_EVERY: Duration = Duration::from_secs(10);
/// Shorter would be a record for each call at the price of sums.
const SHORTEST_SUMMARY_EVERY: Duration = Duration::from_secs(1);
/// A crash loses what was counted since the last sums.
const LONGEST_SUMMARY_EVERY: Duration = Duration::from_secs(10 * 60);
/// Data calls are kept so long unless the configuration says otherwise: one year and a month to look back.
const DATA_KEPT: Duration = Duration::from_secs(396 * 86_400);
/// Data calls take no more room than this unless the configuration says otherwise, in MiB.
const DATA_MIB: u64 = 4096;
/// A restore takes bans from the changes; those of the last backups must be there.
const SHORTEST_CHANGES_KEPT: Duration = Duration::from_secs(30 * 86_400);
const MIB: u64 = 1 << 20;

/// How the audit works.
#[derive(Debug, Clone, Copy)]
pub struct AuditOptions {
    /// How data calls are recorded.
    pub data: DataOptions,
    /// How often sums are written.
    pub summary_every: Duration,
    /// How much is kept of the changes.
    pub keep_changes: Retention,
    /// How much is kept of the data calls.
    pub keep_data: Retention,
}

/// The section as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAudit {
    pub(super) directory: PathBuf,
    #[serde(default)]
    data: Option<String>,
    #[serde(default)]
    each: Option<String>,
    #[serde(default)]
    on_full: Option<String>,
    #[serde(default, with = "humantime_serde")]
    summary_every: Option<Duration>,
    #[serde(default)]
    file_mib: Option<u64>,
    #[serde(default, with = "humantime_serde")]
    keep_changes_for: Option<Duration>,
    #[serde(default)]
    keep_changes_mib: Option<u64>,
    #[serde(default, with = "humantime_serde")]
    keep_data_for: Option<Duration>,
    #[serde(default)]
    keep_data_mib: Option<u64>,
}

impl RawAudit {
    pub(super) fn options(&self) -> Result<AuditOptions, InvalidKey> {
        let file_mib = between("audit.file_mib", self.file_mib.unwrap_or(MAX_FILE / MIB), 1, 1024)?;
        let every = self.summary_every.unwrap_or(SUMMARY_EVERY);
        if !(SHORTEST_SUMMARY_EVERY..=LONGEST_SUMMARY_EVERY).contains(&every) {
            return Err(InvalidKey::new("audit.summary_every", "is not 1s to 10m", "use 10s"));
        }
        if self.keep_changes_for.is_some_and(|kept| kept < SHORTEST_CHANGES_KEPT) {
            let problem = "is shorter than 30days: a restore could not replay bans";
            return Err(InvalidKey::new("audit.keep_changes_for", problem, "leave it out, or use 3650days"));
        }
        let keep_changes_mib = self.keep_changes_mib;
        let keep_changes_mib = keep_changes_mib.map(|mib| kept_mib("audit.keep_changes_mib", mib, file_mib));
        let keep_data_mib =
            kept_mib("audit.keep_data_mib", self.keep_data_mib.unwrap_or(DATA_MIB), file_mib)?;
        Ok(AuditOptions {
            data: DataOptions { mode: self.mode()?, on_full: self.on_full()?, max_file: file_mib * MIB },
            summary_every: every,
            keep_changes: Retention {
                max_bytes: keep_changes_mib.transpose()?.map(|mib| mib * MIB),
                max_age: self.keep_changes_for,
            },
            keep_data: Retention {
                max_bytes: Some(keep_data_mib * MIB),
                max_age: Some(self.keep_data_for.unwrap_or(DATA_KEPT)),
            },
        })
    }

    fn mode(&self) -> Result<DataMode, InvalidKey> {
        match (self.data.as_deref().unwrap_or("summary"), self.each.as_deref()) {
            ("summary", None) => Ok(DataMode::Summary),
            ("summary", Some(_)) => {
                let problem = "says how each call is recorded, but audit.data is \"summary\"";
                Err(InvalidKey::new("audit.each", problem, "leave it out, or set audit.data = \"each\""))
            }
            ("each", None | Some("written")) => Ok(DataMode::EachWritten),
            ("each", Some("durable")) => Ok(DataMode::EachDurable),
            ("each", Some(other)) => Err(no_word("audit.each", other, "write \"written\" or \"durable\"")),
            (other, _) => Err(no_word("audit.data", other, "write \"summary\" or \"each\"")),
        }
    }

    fn on_full(&self) -> Result<OnFull, InvalidKey> {
        match self.on_full.as_deref().unwrap_or("serve") {
            "serve" => Ok(OnFull::Serve),
            "refuse" => Ok(OnFull::Refuse),
            other => Err(no_word("audit.on_full", other, "write \"serve\" or \"refuse\"")),
        }
    }
}

fn no_word(key: &'static str, word: &str, remedy: &'static str) -> InvalidKey {
    InvalidKey::new(key, format!("{word:?} is no choice"), remedy)
}

fn between(key: &'static str, value: u64, least: u64, most: u64) -> Result<u64, InvalidKey> {
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(InvalidKey::new(key, format!("{value} is not {least} to {most}"), "leave it out for the default"))
}

/// Less than two files could never be removed.
fn kept_mib(key: &'static str, mib: u64, file_mib: u64) -> Result<u64, InvalidKey> {
    between(key, mib, 2 * file_mib, 1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(lines: &[(&str, &str)]) -> Result<AuditOptions, InvalidKey> {
        let member = |(key, value): &(&str, &str)| format!("{key:?}: {value}");
        let lines: Vec<_> = [("directory", "\"/a\"")].iter().chain(lines).map(member).collect();
        let raw: RawAudit = serde_json::from_str(&format!("{{{}}}", lines.join(","))).expect("it parses");
        raw.options()
    }

    #[test]
    fn the_words_choose_the_mode_and_wrong_ones_are_named() {
        let mode = |lines: &[_]| options(lines).map(|options| options.data.mode).ok();
        assert_eq!(mode(&[]), Some(DataMode::Summary));
        assert_eq!(mode(&[("data", "\"each\"")]), Some(DataMode::EachWritten));
        let durable = [("data", "\"each\""), ("each", "\"durable\"")];
        assert_eq!(mode(&durable), Some(DataMode::EachDurable));
        for (bad, key) in [
            (vec![("data", "\"all\"")], "audit.data"),
            (vec![("each", "\"written\"")], "audit.each"),
            (vec![("data", "\"each\""), ("each", "\"fsync\"")], "audit.each"),
            (vec![("on_full", "\"stop\"")], "audit.on_full"),
            (vec![("file_mib", "0")], "audit.file_mib"),
            (vec![("keep_data_mib", "16")], "audit.keep_data_mib"),
            (vec![("keep_changes_for", "\"1day\"")], "audit.keep_changes_for"),
            (vec![("summary_every", "\"1h\"")], "audit.summary_every"),
        ] {
            let error = options(&bad).expect_err(key).to_string();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn changes_are_kept_for_ever_and_data_for_a_year_unless_said_otherwise() {
        let options = options(&[]).expect("the defaults are good");
        assert_eq!(options.keep_changes, Retention::default());
        assert_eq!(options.keep_data, Retention { max_bytes: Some(4 << 30), max_age: Some(DATA_KEPT) });
    }
}
