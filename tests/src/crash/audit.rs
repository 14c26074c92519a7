//! What a trial leaves behind in the audit.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

/// The chain of changes: what was intended, and what came of it.
#[derive(Default)]
pub struct AuditView {
    /// Of each change: what was to be done, and the last outcome.
    changes: BTreeMap<String, (String, Option<String>)>,
}

impl AuditView {
    /// Reads the chain without judging it; a torn last line is left out.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn read(directory: &Path) -> anyhow::Result<Self> {
        let mut view = Self::default();
        let mut files: Vec<_> = fs::read_dir(directory)?.collect::<Result<_, _>>()?;
        files.sort_by_key(fs::DirEntry::file_name);
        for file in files {
            let name = file.file_name().to_string_lossy().into_owned();
            if name.starts_with("changes-") && name.ends_with(".jsonl") {
                view.take(&fs::read(file.path())?);
            }
        }
        Ok(view)
    }

    fn take(&mut self, bytes: &[u8]) {
        for line in bytes.split(|byte| *byte == b'\n') {
            let Ok(line) = serde_json::from_slice::<Value>(line) else { continue };
            let text = |field: &str| line.get(field).and_then(Value::as_str).map(str::to_owned);
            let Some(change) = text("change") else { continue };
            let entry = self.changes.entry(change).or_default();
            match text("kind").as_deref() {
                Some("intent") => entry.0 = text("action").unwrap_or_default(),
                Some("outcome") => entry.1 = text("outcome"),
                _ => {}
            }
        }
    }

    /// The changes whose outcome is not recorded.
    pub fn open(&self) -> BTreeSet<String> {
        let open = self.changes.iter().filter(|(_, (_, outcome))| outcome.is_none());
        open.map(|(change, _)| change.clone()).collect()
    }

    /// Whether this change is recorded as done.
    pub fn is_done(&self, change: &str) -> bool {
        self.changes.get(change).is_some_and(|(_, outcome)| outcome.as_deref() == Some("done"))
    }

    /// How many changes of this kind are recorded as done.
    pub fn done(&self, action: &str) -> usize {
        self.changes.values().filter(|(what, end)| what == action && end.as_deref() == Some("done")).count()
    }

    /// How many changes there are, whatever came of them.
    pub fn intents(&self) -> usize {
        self.changes.len()
    }

    /// Names what is not as it must be once an agent has started again.
    ///
    /// # Errors
    /// When the chains cannot be read.
    pub fn violations(&self, directory: &Path) -> anyhow::Result<Vec<String>> {
        let mut found = Vec::new();
        let report = fleet_kms_audit::verify(directory).context("reading the audit")?;
        if !report.is_sound() {
            found.push(format!("the audit does not verify: {report:?}"));
        }
        for (change, (action, outcome)) in &self.changes {
            match outcome.as_deref() {
                Some("done" | "not done") => {}
                other => found.push(format!("{action} {change} has the outcome {other:?}")),
            }
            if action.is_empty() {
                found.push(format!("{change} has an outcome and no intent"));
            }
        }
        Ok(found)
    }
}
