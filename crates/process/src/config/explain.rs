//! Turns the errors of the merge into file, key, problem and remedy. serde says some of them only as text.

use crate::config::ConfigError;
use crate::config::document::Document;

/// Turns what `config` and serde say into file, key, problem and remedy.
pub(super) fn explain(document: &Document, path: &str, error: &config::ConfigError) -> ConfigError {
    let mut key = path.trim_matches('.').to_owned();
    let (problem, remedy) = match innermost(error) {
        config::ConfigError::Type { unexpected, expected, .. } => {
            let text = format!("expected {expected}, found {unexpected}");
            let remedy = correct(&text);
            (text, remedy)
        }
        config::ConfigError::NotFound(name) => {
            match name.strip_prefix(&key) {
                Some(_) => key.clone_from(name),
                None => extend(&mut key, name),
            }
            ("is missing".to_owned(), "add it".to_owned())
        }
        other => {
            let text = other.to_string();
            match (field_of(&text, "unknown field"), field_of(&text, "missing field")) {
                (Some((name, rest)), _) => {
                    extend(&mut key, name);
                    ("is unknown".to_owned(), format!("remove it or correct its name{}", known(rest)))
                }
                (_, Some((name, _))) => {
                    extend(&mut key, name);
                    ("is missing".to_owned(), "add it".to_owned())
                }
                _ => {
                    let remedy = correct(&text);
                    (text, remedy)
                }
            }
        }
    };
    ConfigError::Key { place: document.place_of(&key), key, problem, remedy }
}

/// What to write instead, as far as the problem's text tells what was wanted.
fn correct(problem: &str) -> String {
    let remedy = match problem {
        text if text.contains("socket address") => "write an IP address and a port, such as 127.0.0.1:7443",
        text if text.contains("a duration") => "write a number and a unit, such as 30s, 12h or 30days",
        text if text.ends_with("expected a sequence") => "a list can only be set in the file",
        _ => "correct the value",
    };
    remedy.to_owned()
}

fn innermost(error: &config::ConfigError) -> &config::ConfigError {
    match error {
        config::ConfigError::At { error, .. } => innermost(error),
        other => other,
    }
}

/// Appends `name` to the dotted path unless the path already ends with it.
fn extend(key: &mut String, name: &str) {
    let ends = key == name || key.strip_suffix(name).is_some_and(|head| head.ends_with('.'));
    if !ends {
        if !key.is_empty() {
            key.push('.');
        }
        key.push_str(name);
    }
}

/// Takes serde's "unknown field `x`, expected …" apart into `x` and the rest.
fn field_of<'a>(text: &'a str, what: &str) -> Option<(&'a str, &'a str)> {
    let (_, after) = text.split_once(what)?;
    after.strip_prefix(" `")?.split_once('`')
}

/// serde's ", expected one of `a`, `b`" as the end of a remedy.
fn known(rest: &str) -> String {
    match rest.split_once("expected ") {
        Some((_, names)) => format!(": this table knows {}", names.trim_start_matches("one of ")),
        None => String::new(),
    }
}
