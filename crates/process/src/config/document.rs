//! The file and the environment as text, so that an error found after they were merged still has its place.

use crate::config::{ConfigError, MAX_FILE_BYTES};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use toml::de::{DeArray, DeTable, DeValue};

/// One configuration file, known to be TOML, and the variables beside it.
pub(super) struct Document {
    file: PathBuf,
    text: String,
    prefix: String,
    environment: HashMap<String, String>,
}

impl Document {
    /// Reads the file and checks that it is TOML.
    pub(super) fn read(
        file: &Path,
        prefix: &str,
        environment: HashMap<String, String>,
    ) -> Result<Self, ConfigError> {
        let text = read_text(file).map_err(|source| ConfigError::Read {
            file: file.to_owned(),
            remedy: remedy(source.kind()),
            source,
        })?;
        if let Err(error) = DeTable::parse(&text) {
            let (line, column) = line_column(&text, error.span().map_or(0, |span| span.start));
            let problem = error.message().replace('\n', ", ");
            return Err(ConfigError::Syntax { file: file.to_owned(), line, column, problem });
        }
        Ok(Self { file: file.to_owned(), text, prefix: prefix.to_owned(), environment })
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(super) fn environment(&self) -> &HashMap<String, String> {
        &self.environment
    }

    /// Where the operator finds `key`: the variable that sets it, else the line of the key, or of the table
    /// that should hold it, else the file.
    pub(super) fn place_of(&self, key: &str) -> String {
        let variable = format!("{}__{}", self.prefix, key.replace('.', "__"));
        if let Some(name) = self.environment.keys().find(|name| name.eq_ignore_ascii_case(&variable)) {
            return format!("environment variable {name}");
        }
        let file = self.file.display();
        match self.offset_of(key) {
            Some(offset) => {
                let (line, column) = line_column(&self.text, offset);
                format!("{file}:{line}:{column}")
            }
            None => file.to_string(),
        }
    }

    /// The byte at which the deepest part of the path that exists begins.
    fn offset_of(&self, path: &str) -> Option<usize> {
        let root = DeTable::parse(&self.text).ok()?;
        let mut table = Some(root.get_ref());
        let mut list: Option<&DeArray<'_>> = None;
        let mut found = None;
        for step in path.split(['.', '[']).filter(|step| !step.is_empty()) {
            let value: &DeValue<'_> = if let Some(index) = step.strip_suffix(']') {
                let Some(item) = index.parse().ok().and_then(|index: usize| list?.get(index)) else { break };
                found = Some(item.span().start);
                item.get_ref()
            } else {
                let entry =
                    table.and_then(|table: &DeTable<'_>| table.iter().find(|(k, _)| k.get_ref() == step));
                let Some((name, value)) = entry else { break };
                found = Some(name.span().start);
                value.get_ref()
            };
            table = value.as_table();
            list = value.as_array();
        }
        found
    }
}

fn read_text(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(file)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if read as u64 > MAX_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the file is longer than 1 MiB"));
    }
    Ok(text)
}

fn remedy(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::NotFound => "create it, or name another file with --config",
        io::ErrorKind::PermissionDenied => "make it readable for the user that runs this program",
        io::ErrorKind::IsADirectory => "name a file, not a directory",
        io::ErrorKind::InvalidData => "save it as UTF-8",
        io::ErrorKind::FileTooLarge => "name a configuration file; this is something else",
        _ => "name a readable file with --config",
    }
}

fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset.min(text.len())).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    let column = before.get(line_start..).unwrap_or("").chars().count() + 1;
    (before.matches('\n').count() + 1, column)
}
