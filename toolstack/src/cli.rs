//! The command line, and the roles.
//!
//! `snowflock memserver …`, `snowflock memtap …` and `snowflock descriptor …` are the commands of those names: the roles in
//! which this program starts itself.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::ToolError;
use crate::{demo, qemu, status, working_set, xl};

const EXIT_CODES: &str = "\
Exit codes: 0 all went well; 1 something failed, and the message says what; 2 the command line is wrong; \
128 + N ended by signal N (130 after Ctrl-C).

The parts are here too: `snowflock descriptor`, `snowflock memserver` and `snowflock memtap` are the commands of those names.";

const EXAMPLES: &str = "\
Examples:
  snowflock demo
  snowflock fork qemu --qmp /run/parent.qmp --clones 4 -- qemu-system-x86_64 -m 4G -name '{name}' ...
  snowflock fork xl web --clones 4 --name 'web-{id}'
  snowflock status";

/// Forks running virtual machines: clones start at once, and their memory arrives when they touch it.
#[derive(Parser)]
#[command(name = "snowflock", version, after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Options),
    /// Capture a running virtual machine: a descriptor for clones, an image for the page server; the parent goes on
    #[command(subcommand)]
    Capture(Capture),
    /// Start clones of a captured virtual machine, whose image a memserver serves, here or elsewhere
    #[command(subcommand)]
    Run(Run),
    /// Fork a running virtual machine on this host: capture, serve and run in one
    #[command(subcommand)]
    Fork(Fork),
    Status(status::Options),
    #[command(subcommand, name = "workingset")]
    WorkingSet(working_set::Action),
}

#[derive(Subcommand)]
enum Capture {
    Qemu(qemu::CaptureOptions),
    Xl(xl::CaptureOptions),
}

#[derive(Subcommand)]
enum Run {
    Qemu(qemu::RunOptions),
    Xl(xl::RunOptions),
}

#[derive(Subcommand)]
enum Fork {
    Qemu(qemu::ForkOptions),
    Xl(xl::ForkOptions),
}

/// Runs the command line `args`, the program's name first.
pub fn main_from(args: Vec<OsString>) -> ExitCode {
    match args.get(1).and_then(|role| role.to_str()) {
        Some("descriptor") => return descriptor::cli::main_from(args.into_iter().skip(1)),
        Some("memserver") => return memserver::cli::main_from(args.into_iter().skip(1)),
        Some("memtap") => return memtap::cli::main_from(args.into_iter().skip(1)),
        Some(xl::RECEIVER_ROLE) => return xl::receive(&args[2..]),
        _ => {}
    }
    let Cli { command } = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are "errors" too, to standard output and with exit code 0. A closed pipe is no failure.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("snowflock: {}", descriptor::Report(&error));
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(command: Command) -> Result<(), ToolError> {
    match command {
        Command::Demo(options) => demo::run(&options),
        Command::Capture(Capture::Qemu(options)) => qemu::capture(&options),
        Command::Capture(Capture::Xl(options)) => xl::capture(&options),
        Command::Run(Run::Qemu(options)) => qemu::run(&options),
        Command::Run(Run::Xl(options)) => xl::run(&options),
        Command::Fork(Fork::Qemu(options)) => qemu::fork(&options),
        Command::Fork(Fork::Xl(options)) => xl::fork(&options),
        Command::Status(options) => status::run(&options),
        Command::WorkingSet(action) => working_set::run(&action),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
