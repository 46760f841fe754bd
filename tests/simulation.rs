//! Whole forks under a virtual clock: ten thousand seeds, each another image, network, guest and set of mishaps.
//!
//! What is simulated and checked is told in the crate `sim`. A failure names its seed; `SIM_SEED=N` runs that one alone,
//! `SIM_SEEDS=FROM..TO` others than the usual ones. Run it with `--release`: unoptimised it would take many minutes, so it
//! then stops after some hundreds, which arithmetic overflow and debug assertions can stop too.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// The seeds of a usual run.
const SEEDS: Range<u64> = if cfg!(debug_assertions) { 0..500 } else { 0..10_000 };

#[test]
fn simulation_by_seed() {
    let seeds = seeds();
    let next = AtomicU64::new(seeds.start);
    let workers = thread::available_parallelism().map_or(1, |count| count.get());
    let work = || {
        let mut total = Total::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return total;
            }
            total.add(&sim::run(seed));
        }
    };
    let total = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let totals = workers.into_iter().map(|worker| worker.join().expect("a seed failed; it is named above"));
        totals.fold(Total::default(), Total::and)
    });
    println!("{total:?}");
    if seeds == SEEDS {
        // The mishaps must happen, or the test tests nothing.
        let Total { faults, avoided, covered, retried, stale, duplicates, promoted, failed, .. } = total;
        let Total { discarded, overwritten, .. } = total;
        for count in [faults, avoided, covered, retried, stale, duplicates, promoted, failed, discarded, overwritten] {
            assert!(count > 0, "something never happened: {total:?}");
        }
    }
}

/// A clone that is told what its sibling needed asks for little: for what is left out to see whether it is needed still, and, where
/// it does not wait, for what is not there yet when it begins.
#[test]
fn siblings_have_few_faults() {
    let seeds = if cfg!(debug_assertions) { 0..200 } else { 0..2000 };
    let total = |head_start| {
        let runs = seeds.clone().map(|seed| sim::siblings(seed, head_start));
        runs.fold([0, 0], |total, run| [total[0] + run[0], total[1] + run[1]])
    };
    let [first, second] = total(Duration::from_secs(60));
    println!("{first} demand faults of clones, {second} of their siblings that wait for what they need");
    assert!(first > 500 && second * 10 <= first, "{first} demand faults, then {second}");
    let [first, second] = total(Duration::ZERO);
    println!("{first} demand faults of clones, {second} of their siblings that begin at once");
    assert!(second * 4 <= first * 3, "{first} demand faults, then {second}");
}

#[derive(Clone, Copy, Debug, Default)]
struct Total {
    runs: u64,
    events: u64,
    failed: u64,
    faults: u64,
    coalesced: u64,
    avoided: u64,
    covered: u64,
    late: u64,
    promoted: u64,
    retried: u64,
    stale: u64,
    duplicates: u64,
    discarded: u64,
    overwritten: u64,
    given_up: u64,
}

impl Total {
    fn add(&mut self, report: &sim::Report) {
        self.runs += 1;
        self.events += report.events;
        self.failed += report.failed as u64;
        for stats in &report.pagers {
            self.faults += stats.faults;
            self.coalesced += stats.coalesced;
            self.avoided += stats.avoided;
            self.covered += stats.covered;
            self.late += stats.late;
            self.promoted += stats.promoted;
            self.retried += stats.retried;
            self.stale += stats.stale;
            self.duplicates += stats.duplicates;
            self.discarded += stats.discarded;
            self.overwritten += stats.overwritten;
            self.given_up += stats.given_up;
        }
    }

    fn and(self, other: Total) -> Total {
        Total {
            runs: self.runs + other.runs,
            events: self.events + other.events,
            failed: self.failed + other.failed,
            faults: self.faults + other.faults,
            coalesced: self.coalesced + other.coalesced,
            avoided: self.avoided + other.avoided,
            covered: self.covered + other.covered,
            late: self.late + other.late,
            promoted: self.promoted + other.promoted,
            retried: self.retried + other.retried,
            stale: self.stale + other.stale,
            duplicates: self.duplicates + other.duplicates,
            discarded: self.discarded + other.discarded,
            overwritten: self.overwritten + other.overwritten,
            given_up: self.given_up + other.given_up,
        }
    }
}

fn seeds() -> Range<u64> {
    let number = |text: &str| text.parse().expect("SIM_SEED is a number, SIM_SEEDS two with .. between");
    if let Ok(seed) = std::env::var("SIM_SEED") {
        let seed: u64 = number(&seed);
        return seed..seed + 1;
    }
    match std::env::var("SIM_SEEDS").ok().as_deref().and_then(|seeds| seeds.split_once("..")) {
        Some((from, to)) => number(from)..number(to),
        None => SEEDS,
    }
}
