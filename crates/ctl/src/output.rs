//! How an answer is shown: as a table for people, as JSON or YAML for programs.
//!
//! JSON and YAML are what the admin API answered; tables choose and shorten.

pub mod table;
pub mod time;

use serde::Serialize;

use crate::cli::Format;
use crate::console::Console;
use crate::failure::Failure;

pub use table::Table;

/// Prints an answer in the wanted form; `table` is called for the two tables,
/// with whether all columns are wanted.
///
/// # Errors
/// When the output is closed.
pub fn show<T: Serialize>(
    console: &mut Console,
    format: Format,
    answer: &T,
    table: impl FnOnce(bool) -> String,
) -> Result<(), Failure> {
    let text = match format {
        Format::Table => table(false),
        Format::Wide => table(true),
        Format::Json => serde_json::to_string_pretty(answer)
            .map_err(|source| Failure::Form { form: "JSON", source: source.into() })?,
        Format::Yaml => serde_saphyr::to_string(answer)
            .map_err(|source| Failure::Form { form: "YAML", source: source.into() })?
            .trim_end()
            .to_owned(),
    };
    console.print(&text)?;
    Ok(())
}
