use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use descriptor::Descriptor;
use serde_json::json;

use super::CliError;
use super::embedded::GuestOptions;
use super::options::print_json;
use crate::admin;
use crate::engine::exit_code;
use crate::guest::embedded::{Announce, EmbeddedGuest};
use crate::port::firecracker::hand_over;

/// Run a guest of threads that hands its memory over to a `memtap uffd`, as a VMM does.
///
/// It stands in for Firecracker where none can run. Like a VMM it waits for ever when its pager is gone. Prints one line of
/// JSON when its work is done.
#[derive(Debug, Args)]
pub(super) struct GuestArgs {
    /// Where the pager listens.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The descriptor of the clone.
    #[arg(long, value_name = "X.snow")]
    descriptor: PathBuf,
    /// The pager's admin socket, where the guest says what it is about to overwrite.
    #[arg(long, value_name = "PATH")]
    admin: Option<PathBuf>,
    #[command(flatten)]
    guest: GuestOptions,
}

pub(super) fn run(arguments: &GuestArgs, epoch: Instant) -> Result<u8, CliError> {
    let descriptor = Descriptor::read(&arguments.descriptor)?;
    let plan = arguments.guest.plan(descriptor.free.clone(), arguments.admin.clone().map(announce), epoch)?;
    let (guest, port, life) = EmbeddedGuest::new(&descriptor.memory, arguments.guest.backing)?;
    let connection = hand_over(&arguments.socket, &port, &descriptor.memory)
        .map_err(|error| CliError::Start("cannot hand the memory over", error))?;
    life.open();
    let report = guest.work(&plan)?;
    print_json(&json!({
        "verified": report.verified,
        "mismatches": report.mismatches,
        "unchecked": report.unchecked,
        "fault_us": report.fault_us,
        "guest": report,
    }))?;
    drop((connection, port));
    Ok(if report.mismatches > 0 { exit_code::MISMATCH } else { exit_code::DONE })
}

fn announce(admin: PathBuf) -> Announce {
    Box::new(move |range| {
        let command = json!({"cmd": "overwrite", "ranges": [[range.start().index(), range.count().get()]]});
        admin::ask(&admin, &command).is_ok()
    })
}
