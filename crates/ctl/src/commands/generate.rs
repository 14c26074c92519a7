//! Completions and manual pages, made from the command line's own definition.

use std::path::Path;

use clap::CommandFactory as _;

use crate::cli::Cli;
use crate::commands::Session;
use crate::failure::Failure;

pub(super) fn completions(session: &mut Session<'_>, shell: clap_complete::Shell) -> Result<(), Failure> {
    // Into memory first: clap_complete panics when a pipe closes early.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "kmsctl", &mut script);
    session.console.print_raw(&script)?;
    Ok(())
}

pub(super) fn man(folder: &Path) -> Result<(), Failure> {
    clap_mangen::generate_to(Cli::command(), folder)?;
    Ok(())
}
