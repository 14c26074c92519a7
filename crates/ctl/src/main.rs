//! `kmsctl`: parses the command line, runs it, ends with its exit code.

use std::process::ExitCode;

use clap::Parser as _;

use fleet_kms_ctl::cli::Cli;
use fleet_kms_ctl::commands;
use fleet_kms_ctl::console::Console;
use fleet_kms_process::runtime;

/// Name resolution and nothing else blocks.
const BLOCKING_THREADS: usize = 1;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut console = Console::of_process();
    let runtime = match runtime::current_thread(BLOCKING_THREADS) {
        Ok(runtime) => runtime,
        Err(error) => {
            console.complain(&format!("no runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    ExitCode::from(runtime.block_on(commands::run(cli, &mut console)))
}
