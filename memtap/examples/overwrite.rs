//! A client of a pager's admin socket that says which frames of the guest are about to be overwritten, for VMMs and toolstacks.
//!
//! ```text
//! overwrite /run/clone/admin.sock 0x1000+16 0x2000+512
//! ```
//!
//! Each argument after the socket is a frame number and how many frames from there on, decimal or `0x…`. Once this has returned, the
//! frames may be written: nothing of them is fetched any more, and what was on its way does not land on them.

use std::env::args;
use std::error::Error;
use std::path::{Path, PathBuf};

use memtap::admin::{self, AdminError};
use serde_json::json;

/// What the pager answered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Noted {
    /// Frames that were missing and need no fetch any more.
    pub(crate) frames: u64,
    /// Frames that the clone has already.
    pub(crate) present: u64,
}

/// Tells the pager at `socket` that these frames, each range a frame number and a count, will be wholly overwritten.
///
/// # Errors
/// When nobody answers, or some of the frames are none of the guest's; then the pager takes note of none.
pub(crate) fn announce(socket: &Path, ranges: &[(u64, u64)]) -> Result<Noted, AdminError> {
    let answer = admin::ask(socket, &json!({"cmd": "overwrite", "ranges": ranges}))?;
    let count = |name: &str| answer[name].as_u64().unwrap_or_default();
    Ok(Noted { frames: count("frames"), present: count("present") })
}

/// A range in the words of the command line.
pub(crate) fn range(text: &str) -> Option<(u64, u64)> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let (start, count) = text.split_once('+')?;
    Some((number(start)?, number(count)?))
}

#[allow(dead_code)] // The tests take this file as a module.
fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = args().skip(1);
    let socket = PathBuf::from(arguments.next().ok_or("usage: overwrite SOCKET FRAME+COUNT …")?);
    let parse = |text: String| range(&text).ok_or_else(|| format!("{text:?} is not FRAME+COUNT"));
    let ranges = arguments.map(parse).collect::<Result<Vec<_>, _>>()?;
    let Noted { frames, present } = announce(&socket, &ranges)?;
    println!("{frames} frames need no fetch any more; {present} are there already");
    Ok(())
}
