//! The `memserver` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    memserver::cli::main_from(std::env::args_os())
}
