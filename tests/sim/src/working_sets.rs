//! Clones that say anything of what they need: what fuzzing and property tests share.
//!
//! Several clones at a time are told orders, report ranges in any order, decline, break off or come to their end. What is merged
//! must fit together at every moment, come back from its file, and not depend on what is said twice.

use std::collections::BTreeMap;
use std::sync::Arc;

use arbitrary::{Arbitrary, Result, Unstructured};
use descriptor::working_set::{Merged, Witness};
use descriptor::{FrameRange, FrameSet, Gfn, PageCount};

use crate::server::IMAGE;

/// Operations of one run.
const MAX_OPERATIONS: usize = 300;

#[derive(Arbitrary, Debug)]
enum Operation {
    Join { clone: u8 },
    Decline { clone: u8 },
    Touched { clone: u8, ranges: [(u16, u8); 3], again: bool },
    Left { clone: u8, whole: bool },
}

/// Runs the clones that `bytes` stand for.
///
/// # Panics
/// When what is merged does not fit together.
pub fn run(bytes: &[u8]) {
    // Bytes that end too early make a shorter run.
    let _ended = run_unstructured(&mut Unstructured::new(bytes));
}

fn run_unstructured(u: &mut Unstructured<'_>) -> Result<()> {
    let frames = PageCount::new(u.int_in_range(1..=20_000)?);
    let mut merged = Merged::new(IMAGE, frames);
    let mut witnesses: BTreeMap<u8, Witness> = BTreeMap::new();
    for seed in 0..MAX_OPERATIONS as u64 {
        if u.is_empty() {
            break;
        }
        match u.arbitrary()? {
            Operation::Join { clone } => {
                let order = Arc::new(merged.order());
                check_order(&merged, &order.for_clone(seed), &order.runs());
                witnesses.insert(clone % 8, Witness::new(frames, order, seed));
            }
            Operation::Decline { clone } => {
                if let Some(witness) = witnesses.get_mut(&(clone % 8)) {
                    witness.declines();
                }
            }
            Operation::Touched { clone, ranges, again } => {
                let Some(witness) = witnesses.get_mut(&(clone % 8)) else { continue };
                let range = |(start, count): (u16, u8)| {
                    FrameRange::new(Gfn::new(start.into()), PageCount::new(u64::from(count) + 1))
                };
                let ranges = ranges.map(range);
                merged.touched(witness, &ranges);
                if again {
                    let before = merged.clone();
                    merged.touched(witness, &ranges);
                    assert_eq!(merged, before, "what is said twice counts twice");
                }
            }
            Operation::Left { clone, whole } => {
                if let Some(witness) = witnesses.remove(&(clone % 8)) {
                    merged.ended(&witness, whole);
                }
            }
        }
        let again = Merged::from_parts(IMAGE, frames, merged.heard(), merged.witnesses(), merged.entries().to_vec());
        assert_eq!(again.as_ref(), Ok(&merged));
    }
    assert_eq!(Merged::decode(&merged.encode()), Ok(merged));
    Ok(())
}

/// Checks that what a clone is told is some of the order, that of what is common, and each frame once.
fn check_order(merged: &Merged, told: &[FrameRange], all: &[FrameRange]) {
    let frames = merged.frames();
    let common = merged.entries().iter().filter(|entry| entry.is_common()).map(|entry| entry.range);
    let common = FrameSet::from_ranges(frames, common);
    assert_eq!(FrameSet::from_ranges(frames, all.iter().copied()), common);
    let mut seen = FrameSet::empty(frames);
    for run in told {
        assert!(!run.is_empty() && common.count_in(*run) == run.count(), "{run} is told and not common");
        assert_eq!(seen.insert_range(*run), run.count(), "{run} is told twice");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_reports_make_a_sound_set(bytes in proptest::collection::vec(any::<u8>(), 0..1500)) {
            super::run(&bytes);
        }
    }
}
