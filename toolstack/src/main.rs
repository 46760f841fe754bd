//! The `snowflock` command; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    toolstack::cli::main_from(std::env::args_os().collect())
}
