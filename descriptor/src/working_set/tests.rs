use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::{FrameRange, Gfn, ImageId, PageCount};

const IMAGE: ImageId = ImageId::from_bytes([7; 16]);
const FRAMES: PageCount = PageCount::new(4096);

fn range(start: u64, count: u64) -> FrameRange {
    FrameRange::new(Gfn::new(start), PageCount::new(count))
}

/// A clone that is told the order, says only what it can see, and comes to its end.
fn clone(merged: &mut Merged, seed: u64, needs: &[FrameRange]) -> PageCount {
    let order = Arc::new(merged.order());
    let ahead = crate::FrameSet::from_ranges(merged.frames(), order.for_clone(seed));
    let mut witness = Witness::new(merged.frames(), order, seed);
    let faults: Vec<FrameRange> = needs.iter().flat_map(|need| ahead.gaps_in(*need).collect::<Vec<_>>()).collect();
    for report in faults.chunks(faults.len() / 3 + 1) {
        merged.touched(&mut witness, report);
    }
    merged.ended(&witness, true);
    faults.iter().map(|fault| fault.count()).sum()
}

#[test]
fn frames_are_kept_once_in_the_order_of_their_first_use() {
    let mut set = WorkingSet::new(PageCount::new(100));
    for wanted in [range(50, 2), range(52, 3), range(10, 1), range(48, 10), range(10, 1), range(98, 10)] {
        set.note(wanted);
    }
    assert_eq!(set.order().collect::<Vec<_>>(), [range(50, 5), range(10, 1), range(48, 2), range(55, 3), range(98, 2)]);
    assert_eq!(set.take(2), [range(50, 5), range(10, 1)]);
    set.note(range(50, 1));
    assert_eq!(set.take(9), [range(48, 2), range(55, 3), range(98, 2)]);
    assert_eq!(set.frames().count(), PageCount::new(13));
}

#[test]
fn the_runs_are_bounded() {
    let mut set = WorkingSet::new(PageCount::new(1 << 20));
    for frame in 0..40_000 {
        set.note(range(frame * 3, 1));
        set.take(1);
    }
    assert_eq!(set.frames().count().get(), WorkingSet::MAX_RUNS as u64);
}

#[test]
fn one_sibling_is_enough_for_an_order() {
    let mut merged = Merged::new(IMAGE, FRAMES);
    let needs = [range(500, 3), range(100, 40), range(2000, 1)];
    clone(&mut merged, 1, &needs);
    let order = merged.order();
    assert_eq!(order.runs(), [range(100, 40), range(500, 3), range(2000, 1)], "one window, by place in memory");
    assert_eq!(merged.entries()[0].range, range(500, 3), "and by need in the set");
    assert_eq!(merged.summary(), Summary { heard: 1, clones: 1, entries: 5, frames: 44, common: 44 });
}

#[test]
fn what_one_clone_of_several_needed_is_chance() {
    let mut merged = Merged::new(IMAGE, FRAMES);
    let (mine, all) = (range(3000, 4), range(64, 32));
    clone(&mut merged, 1, &[all]);
    clone(&mut merged, 2, &[mine, all]);
    assert!(merged.entries().iter().any(|entry| entry.range == range(3000, 4)));
    assert!(merged.order().frames().runs_in(mine).next().is_none(), "one of two");
    clone(&mut merged, 3, &[mine, all]);
    assert!(merged.order().frames().runs_in(mine).next().is_some(), "two of three");
}

#[test]
fn what_is_new_stands_behind_what_was_needed_before_it() {
    let mut merged = Merged::new(IMAGE, FRAMES);
    let order = Arc::new(merged.order());
    let mut first = Witness::new(FRAMES, Arc::clone(&order), 1);
    merged.touched(&mut first, &[range(800, 1), range(400, 1), range(600, 1)]);
    let mut second = Witness::new(FRAMES, order, 2);
    merged.touched(&mut second, &[range(10, 1), range(400, 1), range(0, 1), range(32, 1)]);
    merged.touched(&mut second, &[range(48, 1), range(600, 1)]);
    merged.touched(&mut second, &[range(64, 1)]);
    let starts: Vec<u64> = merged.entries().iter().map(|entry| entry.range.start().index()).collect();
    assert_eq!(starts, [10, 800, 400, 0, 32, 48, 600, 64]);
}

#[test]
fn silence_on_what_was_fetched_ahead_says_nothing() {
    let mut merged = Merged::new(IMAGE, FRAMES);
    let needs: Vec<FrameRange> = (0..200).map(|n| range(n * 16, 5)).collect();
    clone(&mut merged, 0, &needs);
    for seed in 1..400 {
        clone(&mut merged, seed, &needs);
    }
    assert_eq!(merged.order().frames().count().get(), 1000, "all of it is needed still, and nothing else");
    assert!(merged.entries().iter().all(|entry| entry.needed == entry.asked && entry.asked >= 3));
}

#[test]
fn few_faults_are_left_and_noise_goes_away() {
    let mut merged = Merged::new(IMAGE, PageCount::new(1 << 16));
    let needs: Vec<FrameRange> = (0..200).map(|n| range(n * 64, 3)).collect();
    let noisy = |seed: u64| {
        let noise = (0..20).map(|n| range((1 << 14) + (seed * 7919 + n * 104_729) % (1 << 14) * 2 + 1, 1));
        needs.iter().copied().chain(noise).collect::<Vec<_>>()
    };
    clone(&mut merged, 0, &noisy(0));
    for seed in 1..200 {
        let faults = clone(&mut merged, seed, &needs);
        assert!(faults.get() < 600 / 10, "{faults} faults of clone {seed}");
    }
    for seed in 200..400 {
        clone(&mut merged, seed, &noisy(seed));
    }
    let order = merged.order();
    let common = order.frames().count().get();
    assert!((600..615).contains(&common), "{common} frames are common, 600 are needed");
    assert!(merged.entries().len() < 450, "{} entries", merged.entries().len());
}

#[test]
fn another_habit_is_learnt_and_the_old_one_forgotten() {
    let mut merged = Merged::new(IMAGE, FRAMES);
    let (old, new) = (range(0, 64), range(1024, 64));
    for seed in 0..40 {
        clone(&mut merged, seed, &[old]);
    }
    let mut seed = 40;
    while clone(&mut merged, seed, &[new]) > PageCount::new(16) {
        seed += 1;
    }
    assert!(seed <= 43, "known after {} clones", seed - 40);
    while merged.order().frames().runs_in(old).next().is_some() {
        seed += 1;
        clone(&mut merged, seed, &[new]);
        assert!(seed < 2000, "never forgotten");
    }
}

#[test]
fn a_clone_that_broke_off_or_declined() {
    let mut merged = Merged::new(IMAGE, FRAMES);
    let needs = range(0, 16);
    clone(&mut merged, 1, &[needs]);
    let witness = Witness::new(FRAMES, Arc::new(merged.order()), 2);
    merged.ended(&witness, false);
    assert_eq!((merged.witnesses(), merged.entries()[0].asked), (1, 1));
    let mut witness = Witness::new(FRAMES, Arc::new(merged.order()), 2);
    witness.declines();
    merged.ended(&witness, true);
    assert_eq!((merged.witnesses(), merged.entries()[0].asked, merged.entries()[0].needed), (2, 2, 1));
}

#[test]
fn chance_is_told_from_need_where_every_clone_breaks_off() {
    let (all, late) = (range(64, 40), range(1024, 8));
    let chance = [range(3000, 4), range(3100, 4)];
    // Forked at the same time, so that neither is told anything.
    let mut merged = Merged::new(IMAGE, FRAMES);
    let order = Arc::new(merged.order());
    let mut clones = [1, 2].map(|seed| Witness::new(FRAMES, Arc::clone(&order), seed));
    merged.touched(&mut clones[0], &[all, chance[0], late]);
    merged.touched(&mut clones[1], &[all, chance[1]]);
    merged.touched(&mut clones[1], &[late]);
    clones.iter().for_each(|clone| merged.ended(clone, false));
    assert_eq!((merged.heard(), merged.witnesses()), (2, 0));
    assert_eq!(merged.order().frames().runs().collect::<Vec<_>>(), [all, late]);
    // One after the other: the second follows what the first needed, and what it needs besides is chance.
    let mut merged = Merged::new(IMAGE, FRAMES);
    let mut first = Witness::new(FRAMES, Arc::new(merged.order()), 1);
    merged.touched(&mut first, &[all]);
    let mut second = Witness::new(FRAMES, Arc::new(merged.order()), 2);
    merged.touched(&mut second, &[chance[1]]);
    assert_eq!(merged.order().frames().runs().collect::<Vec<_>>(), [all]);
    // And a third that needs it too makes it common.
    let mut third = Witness::new(FRAMES, Arc::new(merged.order()), 3);
    merged.touched(&mut third, &[chance[1]]);
    assert_eq!(merged.order().frames().runs().collect::<Vec<_>>(), [all, chance[1]]);
}

#[test]
fn a_clone_that_names_nothing_is_heard_at_its_end() {
    let mut merged = Merged::new(IMAGE, FRAMES);
    let order = Arc::new(merged.order());
    let mut silent = Witness::new(FRAMES, order, 1);
    merged.touched(&mut silent, &[]);
    merged.touched(&mut silent, &[range(FRAMES.get(), 9)]);
    assert_eq!(merged.heard(), 0);
    merged.ended(&silent, true);
    assert_eq!((merged.heard(), merged.witnesses()), (1, 1), "it needed nothing, and said so");
}

#[test]
fn hostile_reports_cost_little() {
    let frames = PageCount::new(1 << 26);
    let mut merged = Merged::new(IMAGE, frames);
    let mut witness = Witness::new(frames, Arc::new(merged.order()), 0);
    let everything = vec![range(0, frames.get() - 1); 256];
    for _ in 0..3 {
        merged.touched(&mut witness, &everything);
    }
    assert_eq!(merged.entries().len(), Merged::MAX_ENTRIES);
    merged.ended(&witness, true);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_merged_always_fits_together(
        clones in proptest::collection::vec((proptest::collection::vec((0..5000u64, 1..60u64), 0..20), any::<bool>(), any::<bool>()), 1..12)
    ) {
        let mut merged = Merged::new(IMAGE, FRAMES);
        for (seed, (needs, whole, declines)) in clones.into_iter().enumerate() {
            let order = Arc::new(merged.order());
            let mut witness = Witness::new(FRAMES, Arc::clone(&order), seed as u64);
            if declines {
                witness.declines();
            }
            let needs: Vec<FrameRange> = needs.into_iter().map(|(start, count)| range(start, count)).collect();
            for report in needs.chunks(5) {
                merged.touched(&mut witness, report);
                // Said again it changes nothing.
                let before = merged.clone();
                merged.touched(&mut witness, report);
                prop_assert_eq!(&merged, &before);
            }
            merged.ended(&witness, whole);
            let (heard, whole) = (merged.heard(), merged.witnesses());
            let again = Merged::from_parts(IMAGE, FRAMES, heard, whole, merged.entries().to_vec());
            prop_assert_eq!(again, Ok(merged.clone()));
            let told = crate::FrameSet::from_ranges(FRAMES, order.for_clone(seed as u64));
            prop_assert_eq!(told.runs().filter(|run| !order.frames().runs_in(*run).eq([*run])).count(), 0);
        }
    }
}
