//! Reads a program's configuration: defaults in code, one TOML file, then the environment.
//!
//! `[section] key` in the file is `PREFIX__SECTION__KEY` in the environment. Prefix and separator are two
//! underscores: Kubernetes sets variables such as `FLEET_KMS_AGENT_PORT` in every pod, and those are not ours.
//! Every error names the file (or the variable), the key and what to do; it never guesses past one.

mod document;
mod explain;

use crate::config::document::Document;
use crate::config::explain::explain;
use config::{Config, Environment, File, FileFormat};
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

/// The largest file that is read: a configuration is some kilobytes, and a path to a wrong file may be anything.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why a configuration was refused. End with [`crate::exit::CONFIG`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}; {remedy}", file.display())]
    Read {
        /// The file as the operator named it.
        file: PathBuf,
        /// What the operator can do.
        remedy: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The file is no TOML.
    #[error("{}:{line}:{column}: {problem}; correct this line, it is not TOML", file.display())]
    Syntax {
        /// The file as the operator named it.
        file: PathBuf,
        /// Counted from 1.
        line: usize,
        /// In characters, counted from 1.
        column: usize,
        /// What the parser said.
        problem: String,
    },
    /// A key is unknown, missing, or has a value that the program cannot use.
    #[error("{place}: key `{key}`: {problem}; {remedy}")]
    Key {
        /// `file:line:column`, the file alone when it lacks the key, or the environment variable.
        place: String,
        /// The dotted path of the key.
        key: String,
        /// What is wrong with it.
        problem: String,
        /// What the operator can do.
        remedy: String,
    },
}

/// What a program's own `TryFrom<Raw>` says about a value that has the right type and is wrong all the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("key `{key}`: {problem}; {remedy}")]
pub struct InvalidKey {
    /// The dotted path of the key, e.g. `rotation.period`.
    pub key: String,
    /// What is wrong with it.
    pub problem: String,
    /// What the operator can do.
    pub remedy: String,
}

impl InvalidKey {
    /// Puts the three parts together.
    pub fn new(key: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { key: key.into(), problem: problem.into(), remedy: remedy.into() }
    }
}

/// Reads `file` and the environment variables that begin with `prefix` and two underscores into `Raw`, which
/// should say `#[serde(deny_unknown_fields)]` in each of its tables.
///
/// # Errors
/// See [`ConfigError`]; the first error ends the reading.
pub fn load<Raw: DeserializeOwned>(file: &Path, prefix: &str) -> Result<Raw, ConfigError> {
    let document = Document::read(file, prefix, environment(prefix))?;
    parse(&document)
}

/// Reads as [`load`] does and turns `Raw` into the program's own type. What that refuses is reported with its
/// place, like any other error.
///
/// # Errors
/// See [`ConfigError`].
pub fn load_as<Raw, C>(file: &Path, prefix: &str) -> Result<C, ConfigError>
where
    Raw: DeserializeOwned,
    C: TryFrom<Raw, Error = InvalidKey>,
{
    let document = Document::read(file, prefix, environment(prefix))?;
    convert(&document)
}

fn convert<Raw, C>(document: &Document) -> Result<C, ConfigError>
where
    Raw: DeserializeOwned,
    C: TryFrom<Raw, Error = InvalidKey>,
{
    C::try_from(parse(document)?).map_err(|invalid| ConfigError::Key {
        place: document.place_of(&invalid.key),
        key: invalid.key,
        problem: invalid.problem,
        remedy: invalid.remedy,
    })
}

/// The variables of `prefix`. One whose bytes are not UTF-8 is taken with replacement characters, so that it is
/// refused as a value and not overlooked.
fn environment(prefix: &str) -> HashMap<String, String> {
    let start = format!("{prefix}__");
    std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .filter(|(name, _)| name.starts_with(&start))
        .collect()
}

fn parse<Raw: DeserializeOwned>(document: &Document) -> Result<Raw, ConfigError> {
    let merged = Config::builder()
        .add_source(File::from_str(document.text(), FileFormat::Toml))
        .add_source(
            Environment::with_prefix(document.prefix())
                .prefix_separator("__")
                .separator("__")
                .source(Some(document.environment().clone())),
        )
        .build()
        .map_err(|error| explain(document, "", &error))?;
    serde_path_to_error::deserialize(merged)
        .map_err(|error| explain(document, &error.path().to_string(), error.inner()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Raw {
        #[serde(default)]
        log: Log,
        listen: Listen,
        #[serde(default)]
        peers: Vec<Peer>,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Log {
        format: Format,
        filter: String,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Format {
        #[default]
        Text,
        Json,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Listen {
        port: u16,
        mode: Option<String>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Peer {
        data: String,
    }

    fn document(text: &str, environment: &[(&str, &str)]) -> Result<Document, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Document::read(file.path(), "APP", environment)
    }

    fn read(text: &str, environment: &[(&str, &str)]) -> Result<Raw, ConfigError> {
        parse(&document(text, environment)?)
    }

    /// The error's text with the file's name cut down to `FILE`.
    fn refusal(text: &str, environment: &[(&str, &str)]) -> String {
        let error = read(text, environment).unwrap_err().to_string();
        match error.find("/.tmp") {
            Some(start) => {
                let end = error[start..].find(':').unwrap() + start;
                format!("FILE{}", &error[end..])
            }
            None => error,
        }
    }

    #[test]
    fn the_environment_wins_over_the_file_and_the_file_over_the_defaults() {
        let raw = read("[listen]\nport = 1\nmode = '0600'\n", &[("APP__LISTEN__PORT", "2")]).unwrap();
        assert_eq!(raw.listen, Listen { port: 2, mode: Some("0600".to_owned()) });
        assert_eq!(raw.log, Log::default());
    }

    #[test]
    fn a_text_from_the_environment_stays_a_text() {
        let raw = read("[listen]\nport = 1\n", &[("APP__LISTEN__MODE", "0660")]).unwrap();
        assert_eq!(raw.listen.mode.as_deref(), Some("0660"));
    }

    #[test]
    fn a_variable_that_kubernetes_sets_is_not_ours() {
        read("[listen]\nport = 1\n", &[("APP_LISTEN_PORT", "tcp://10.0.0.1:80")]).unwrap();
    }

    #[test]
    fn a_syntax_error_names_file_line_and_column() {
        assert_eq!(
            refusal("[listen]\nport = \n", &[]),
            "FILE:2:8: string values must be quoted, expected literal string; correct this line, it is not TOML"
        );
    }

    #[test]
    fn a_key_twice_is_a_syntax_error() {
        assert!(refusal("[listen]\nport = 1\nport = 2\n", &[]).starts_with("FILE:3:1: duplicate key"));
    }

    #[test]
    fn a_misspelt_key_is_named_with_its_place_and_its_neighbours() {
        assert_eq!(
            refusal("[log]\nfitler = 'info'\n[listen]\nport = 1\n", &[]),
            "FILE:2:1: key `log.fitler`: is unknown; remove it or correct its name: this table knows `format` or `filter`"
        );
    }

    #[test]
    fn a_misspelt_table_is_named() {
        assert!(
            refusal("[logs]\nfilter = 'info'\n[listen]\nport = 1\n", &[])
                .starts_with("FILE:1:2: key `logs`: is unknown; ")
        );
    }

    #[test]
    fn a_misspelt_variable_is_named() {
        assert!(
            refusal("[listen]\nport = 1\n", &[("APP__LISTEN__PROT", "2")])
                .starts_with("environment variable APP__LISTEN__PROT: key `listen.prot`: is unknown; ")
        );
    }

    #[test]
    fn a_missing_key_is_named() {
        assert_eq!(
            refusal("[listen]\nmode = '0600'\n", &[]),
            "FILE:1:2: key `listen.port`: is missing; add it"
        );
        assert_eq!(refusal("", &[]), "FILE: key `listen`: is missing; add it");
    }

    #[test]
    fn a_wrong_type_is_named_with_its_place() {
        assert_eq!(
            refusal("[listen]\nport = 'x'\n", &[]),
            "FILE:2:1: key `listen.port`: expected an integer, found string \"x\"; correct the value"
        );
        assert!(
            refusal("[log]\nformat = 'xml'\n[listen]\nport = 1\n", &[])
                .starts_with("FILE:2:1: key `log.format`: ")
        );
        assert!(refusal("[listen]\nport = 70000\n", &[]).starts_with("FILE:2:1: key `listen.port`: "));
    }

    #[test]
    fn a_value_of_the_wrong_form_says_which_form_is_right() {
        #[derive(Debug, Deserialize)]
        struct Forms {
            #[serde(default)]
            _address: Option<std::net::SocketAddr>,
            #[serde(default)]
            _peers: Vec<String>,
        }
        let refusal = |text: &str, environment: &[(&str, &str)]| {
            parse::<Forms>(&document(text, environment).unwrap()).unwrap_err().to_string()
        };
        let address = refusal("_address = '10.0.0.1'\n", &[]);
        assert!(address.ends_with("; write an IP address and a port, such as 127.0.0.1:7443"), "{address}");
        let list = refusal("", &[("APP___PEERS", "a,b")]);
        assert!(list.ends_with("; a list can only be set in the file"), "{list}");
    }

    #[test]
    fn an_error_in_a_list_names_its_element() {
        assert!(
            refusal("peers = [{ data = 'a' }, { date = 'b' }]\n[listen]\nport = 1\n", &[])
                .starts_with("FILE:1:28: key `peers[1].date`: is unknown; ")
        );
    }

    #[test]
    fn a_missing_file_says_what_to_do() {
        let error = load::<Raw>(Path::new("/nonexistent/a.toml"), "APP").unwrap_err().to_string();
        assert_eq!(
            error,
            "cannot read the configuration /nonexistent/a.toml; create it, or name another file with --config"
        );
    }

    #[test]
    fn what_the_program_refuses_is_placed_too() {
        #[derive(Debug)]
        struct Checked;
        impl TryFrom<Raw> for Checked {
            type Error = InvalidKey;
            fn try_from(_: Raw) -> Result<Self, InvalidKey> {
                Err(InvalidKey::new("listen.port", "must not be 1", "choose a free port"))
            }
        }
        let document = document("[listen]\nport = 1\n", &[]).unwrap();
        let error = convert::<Raw, Checked>(&document).unwrap_err().to_string();
        assert!(error.ends_with(":2:1: key `listen.port`: must not be 1; choose a free port"), "{error}");
    }
}
