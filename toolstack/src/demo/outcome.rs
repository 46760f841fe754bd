//! What came of the demonstration, for people and for programs.

use std::fs;
use std::path::Path;
use std::time::Duration;

use descriptor::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use super::{Lane, Options};
use crate::error::ToolError;
use crate::table::{Table, bytes, grouped, micros};

/// What `memtap embedded` prints at the end; of that the part that is told here.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct CloneOutcome {
    done: bool,
    first_touch_ms: f64,
    fault_us: Percentiles,
    verified: u64,
    mismatches: u64,
    unchecked: u64,
    pages_fetched: u64,
    pages_avoided: u64,
    bytes_received: u64,
    guest: Guest,
}

#[derive(Clone, Debug, Deserialize)]
struct Guest {
    touches: u64,
}

#[derive(Clone, Debug, Deserialize)]
struct Percentiles {
    count: u64,
    p50_us: f64,
    p99_us: f64,
}

/// What came of all clones.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Outcome {
    clones: u32,
    image_mib: u32,
    lane: &'static str,
    /// Every page of every clone equals the image, the guest's own changes included.
    pub(super) verified: bool,
    pages_verified: u64,
    pages_wrong: u64,
    touches: u64,
    /// From the start of the clone's process to the first touch that had its page.
    first_touch_ms: FirstTouch,
    /// How long the guests waited for pages: the median of the clones' medians, and the worst clone's 99th percentile.
    fault_us: Faults,
    pages_fetched: u64,
    pages_avoided: u64,
    bytes_sent: u64,
    /// Of these the ones that were multicast, once for all clones.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_multicast: Option<u64>,
    /// One copy of the whole image over the same kind of socket.
    full_copy_ms: f64,
    total_ms: f64,
    #[serde(skip)]
    each: Vec<CloneOutcome>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct FirstTouch {
    p50: f64,
    max: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Faults {
    count: u64,
    p50: f64,
    p99: f64,
}

impl CloneOutcome {
    /// Reads what a memtap printed.
    pub(super) fn read(output: &Path) -> Result<Self, ToolError> {
        let text = fs::read(output).map_err(ToolError::file("read", output))?;
        serde_json::from_slice(&text).map_err(|error| ToolError::file("understand", output)(error.into()))
    }

    fn is_verified(&self, pages: u64) -> bool {
        self.done && self.mismatches == 0 && self.verified + self.unchecked == pages
    }
}

impl Outcome {
    /// What came of the clones; `full_copy` is how long one copy of the image took, `took` the whole fork.
    pub(super) fn of(
        options: &Options,
        each: &[CloneOutcome],
        bytes_multicast: Option<u64>,
        full_copy: Duration,
        took: Duration,
    ) -> Self {
        let sum = |number: fn(&CloneOutcome) -> u64| each.iter().map(number).sum();
        let sorted = |number: fn(&CloneOutcome) -> f64| {
            let mut numbers: Vec<f64> = each.iter().map(number).collect();
            numbers.sort_by(f64::total_cmp);
            numbers
        };
        let pages = u64::from(options.mem) * ((1 << 20) / PAGE_SIZE);
        let first_touch = sorted(|clone| clone.first_touch_ms);
        let p50 = sorted(|clone| clone.fault_us.p50_us);
        let p99 = sorted(|clone| clone.fault_us.p99_us);
        Self {
            clones: options.clones,
            image_mib: options.mem,
            lane: options.lane.name(),
            verified: each.len() == options.clones as usize && each.iter().all(|clone| clone.is_verified(pages)),
            pages_verified: sum(|clone| clone.verified),
            pages_wrong: sum(|clone| clone.mismatches),
            touches: sum(|clone| clone.guest.touches),
            first_touch_ms: FirstTouch { p50: median(&first_touch), max: last(&first_touch) },
            fault_us: Faults { count: sum(|clone| clone.fault_us.count), p50: median(&p50), p99: last(&p99) },
            pages_fetched: sum(|clone| clone.pages_fetched),
            pages_avoided: sum(|clone| clone.pages_avoided),
            bytes_sent: sum(|clone| clone.bytes_received) + bytes_multicast.unwrap_or_default(),
            bytes_multicast,
            full_copy_ms: full_copy.as_secs_f64() * 1e3,
            total_ms: took.as_secs_f64() * 1e3,
            each: each.to_vec(),
        }
    }

    /// For programs.
    pub(super) fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        const COLUMNS: usize = 8;
        let mut table = Table::default();
        let shown = if self.each.len() > COLUMNS { &[][..] } else { &self.each[..] };
        let names = (1..=shown.len()).map(|id| format!("clone {id}"));
        table.row([String::new()].into_iter().chain(names).chain(["all".to_owned()]));
        let mut row = |name: &str, each: fn(&CloneOutcome) -> String, all: String| {
            let cells = shown.iter().map(each);
            table.row([name.to_owned()].into_iter().chain(cells).chain([all]));
        };
        row("first touch after", |clone| micros(clone.first_touch_ms * 1e3), micros(self.first_touch_ms.max * 1e3));
        row("fault, median", |clone| micros(clone.fault_us.p50_us), micros(self.fault_us.p50));
        row("fault, 99 %", |clone| micros(clone.fault_us.p99_us), micros(self.fault_us.p99));
        row("pages fetched", |clone| grouped(clone.pages_fetched), grouped(self.pages_fetched));
        row("pages avoided", |clone| grouped(clone.pages_avoided), grouped(self.pages_avoided));
        let by_connections = self.bytes_sent - self.bytes_multicast.unwrap_or_default();
        row("on the wire", |clone| bytes(clone.bytes_received), bytes(by_connections));
        if let Some(sent) = self.bytes_multicast {
            row("by multicast", |_| String::new(), bytes(sent));
        }
        row("pages compared", |clone| grouped(clone.verified), grouped(self.pages_verified));
        row("pages wrong", |clone| grouped(clone.mismatches), grouped(self.pages_wrong));

        let Self { clones, image_mib, lane, full_copy_ms, .. } = self;
        let sooner = full_copy_ms / self.first_touch_ms.p50.max(f64::MIN_POSITIVE);
        let verdict = if self.verified {
            "Every page of every clone is right."
        } else {
            "NOT every page of every clone is right."
        };
        format!(
            "\n{clones} clones of {image_mib} MiB over the {lane} lane, in {}\n\n{table}\n\
             A full copy of the memory takes {}; a clone was at work after {}, {sooner:.0} times sooner.\n{verdict}",
            micros(self.total_ms * 1e3),
            micros(full_copy_ms * 1e3),
            micros(self.first_touch_ms.p50 * 1e3),
        )
    }
}

impl Lane {
    fn name(self) -> &'static str {
        match self {
            Lane::Tcp => "tcp",
            Lane::Unix => "unix",
            Lane::Local => "local",
        }
    }
}

fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

fn last(sorted: &[f64]) -> f64 {
    sorted.last().copied().unwrap_or_default()
}
