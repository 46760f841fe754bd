//! The `memtap` command, a thin shell over the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    memtap::cli::main_from(std::env::args_os())
}
