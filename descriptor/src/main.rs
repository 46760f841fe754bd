//! The `descriptor` command, see [`descriptor::cli`].
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    descriptor::cli::main_from(std::env::args_os())
}
