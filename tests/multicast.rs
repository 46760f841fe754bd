//! The multicast channel under a virtual clock, by seed: each another group of clones, another network, other mishaps.
//!
//! What is simulated and checked is told in `sim::multicast`. A failure names its seed; `MCAST_SEED=N` runs that one alone,
//! `MCAST_SEEDS=FROM..TO` others than the usual ones. The figures of plain groups are compared with `tests/multicast.table`,
//! which `MCAST_TABLE=write` writes anew, to be reviewed like code. Run it with `--release`.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use sim::multicast::sparse::{self, Sparse};
use sim::multicast::{self, Report, table};

/// The seeds of a usual run.
const SEEDS: Range<u64> = if cfg!(debug_assertions) { 0..80 } else { 0..2000 };

#[test]
fn clones_complete_by_seed() {
    let seeds = seeds();
    let next = AtomicU64::new(seeds.start);
    let workers = thread::available_parallelism().map_or(1, |count| count.get());
    let work = || {
        let mut total = Report::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return total;
            }
            total.add(multicast::run(seed));
        }
    };
    let total = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let mut total = Report::default();
        for worker in workers {
            total.add(worker.join().expect("a seed failed; it is named above"));
        }
        total
    });
    println!("{}", total.summary());
    if seeds == SEEDS {
        // The mishaps must happen, or the test tests nothing.
        let sender = total.sender;
        let happened = [
            total.lost,
            total.given_up,
            total.recovered,
            total.spared,
            total.dropped,
            total.clones.fallbacks,
            total.clones.silences,
            sender.nacked,
            sender.repaired,
            sender.suppressed,
            sender.refused,
            sender.expelled,
        ];
        assert!(happened.iter().all(|count| *count > 0), "something never happened: {}", total.summary());
    }
}

/// Unoptimised, only the smaller groups are compared.
#[test]
fn figures_are_those_of_the_table() {
    const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/multicast.table");
    if std::env::var("MCAST_TABLE").is_ok_and(|mode| mode == "write") {
        return std::fs::write(TABLE, table::file()).expect("the table can be written");
    }
    let file = std::fs::read_to_string(TABLE).expect("the table is there");
    let most = if cfg!(debug_assertions) { 1 } else { usize::MAX };
    for line in table::lines(most) {
        assert!(file.lines().any(|there| there == line), "not in the table, see the head of this file:\n{line}");
    }
}

/// Ten thousand receivers get an image for little more than one copy of it, and none of their NACKs is one too many.
#[test]
fn thousands_are_served_at_the_cost_of_one() {
    let receivers = if cfg!(debug_assertions) { 300 } else { 10_000 };
    let report = sparse::run(Sparse { receivers, frames: 1024, loss: 0.01, seed: 1 });
    println!("{receivers} receivers: {report:?}");
    assert!(report.bytes_ratio <= 1.3, "{report:?}");
    assert!(report.nacked <= 3 * report.lost, "{report:?}");
    // What a server takes in without effort, whatever the size of the group: 40,000 messages a second.
    assert!(report.feedback_peak <= 400 && report.nacks_peak <= 200, "{report:?}");
    assert_eq!(report.expelled, 0, "{report:?}");
}

fn seeds() -> Range<u64> {
    let number = |text: &str| text.parse().expect("MCAST_SEED is a number, MCAST_SEEDS two with .. between");
    if let Ok(seed) = std::env::var("MCAST_SEED") {
        let seed: u64 = number(&seed);
        return seed..seed + 1;
    }
    match std::env::var("MCAST_SEEDS").ok().as_deref().and_then(|seeds| seeds.split_once("..")) {
        Some((from, to)) => number(from)..number(to),
        None => SEEDS,
    }
}
