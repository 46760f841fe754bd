//! Pages that nobody asked for, or that come in another way than they were asked for.

use super::*;

fn hydrating(frames: u64) -> PagerConfig {
    PagerConfig { hydrate: Hydrate::Now, ..config(frames) }
}

fn bulk(output: Option<Output>) -> (Tag, Vec<FrameRange>) {
    match output {
        Some(Output::Request { tag, class: Class::Bulk, ranges }) => (tag, ranges),
        other => panic!("{other:?}"),
    }
}

fn lacks(pager: &Pager, chunk: u64) -> (Vec<u64>, u64) {
    (pager.lacks(PageCount::new(chunk)).collect(), pager.lacking().get())
}

#[test]
fn what_is_pushed_is_not_asked_for() {
    let mut config = hydrating(2000);
    config.prefetch = Prefetch::Fixed(PageCount::new(4));
    config.order = vec![range(100, 10)];
    let mut pager = Pager::new(ms(0), config, 1).unwrap();
    pager.handle(ms(0), Input::Pushed(true));
    pager.handle(ms(0), Input::SourceUp { limits: LIMITS });
    assert_eq!(pager.poll(ms(0)), Some(Output::Ready));
    assert_eq!(bulk(pager.poll(ms(0))), (1, vec![range(100, 10)]), "the order is asked for");
    assert_eq!(pager.poll(ms(0)), None, "the rest is not");
    pager.handle(ms(1), fault(500, 0));
    assert_eq!(pager.poll(ms(1)), demand(2, &[range(500, 1)]), "what is waited for is");
    assert_eq!(bulk(pager.poll(ms(1))), (3, vec![range(501, 4)]), "and what is ahead of it");
    assert_eq!(pager.poll(ms(1)), None);
    assert_eq!(arrive(&mut pager, ms(2), 0, range(0, 1500)), [range(0, 1500)]);
    assert_eq!(pager.poll(ms(2)), resume(500, 0));
    for tag in 1..=3 {
        assert_eq!(pager.owed(tag), []);
        pager.came(ms(2), tag);
    }
    assert_eq!(pager.poll(ms(2)), None);
    assert_eq!(pager.next_timeout(), None, "nothing is waited for");
    pager.handle(ms(3), Input::Pushed(false));
    let (tag, ranges) = bulk(pager.poll(ms(3)));
    assert_eq!(ranges, [range(1500, 500)]);
    arrive(&mut pager, ms(4), tag, ranges[0]);
    assert_eq!(pager.poll(ms(4)), Some(Output::Complete));
    let stats = pager.stats();
    assert_eq!((stats.unasked_pages, stats.demand_pages, stats.hydrate_pages), (1499, 1, 500));
}

#[test]
fn a_push_alone_completes_a_clone() {
    let mut config = hydrating(1000);
    config.zero = set(1000, &[range(0, 100)]);
    config.port.needs_zeros = true;
    let mut pager = ready(config);
    pager.handle(ms(0), Input::Pushed(true));
    assert_eq!(pager.poll(ms(0)), zeros(0, 100), "zeros are installed all the same");
    pager.installed(ms(0), range(0, 100), all(100));
    assert_eq!(pager.poll(ms(0)), None);
    assert_eq!(arrive(&mut pager, ms(1), 0, range(0, 600)), [range(100, 500)]);
    assert_eq!(arrive(&mut pager, ms(1), 0, range(400, 600)), [range(600, 400)]);
    assert_eq!(pager.poll(ms(1)), Some(Output::Complete));
    assert_eq!((pager.stats().duplicates, pager.stats().bulk_requests), (300, 0));
}

#[test]
fn what_a_lost_source_owed_in_the_background_is_left_to_the_push() {
    let mut pager = ready(hydrating(400));
    assert_eq!(bulk(pager.poll(ms(0))).1, [range(0, 400)]);
    pager.handle(ms(1), Input::SourceDown);
    pager.handle(ms(2), Input::Pushed(true));
    pager.handle(ms(2), Input::SourceUp { limits: LIMITS });
    assert_eq!(pager.poll(ms(2)), None);
    arrive(&mut pager, ms(3), 0, range(0, 300));
    pager.handle(ms(4), Input::Pushed(false));
    assert_eq!(bulk(pager.poll(ms(4))).1, [range(300, 100)]);
}

#[test]
fn a_clone_lacks_only_what_it_wants() {
    let mut config = hydrating(1000);
    config.zero = set(1000, &[range(0, 256)]);
    let mut pager = ready(config);
    assert_eq!(lacks(&pager, 256), (vec![1, 2, 3], 744));
    arrive(&mut pager, ms(1), 0, range(256, 255));
    pager.handle(ms(1), discard(512, 256));
    assert_eq!(lacks(&pager, 256), (vec![1, 3], 233));
    arrive(&mut pager, ms(1), 0, range(511, 1));
    assert_eq!(lacks(&pager, 256), (vec![3], 232));
    assert_eq!(lacks(&pager, 1 << 20), (vec![0], 232));
    for hydrate in [Hydrate::Off, Hydrate::Rate(std::num::NonZeroU64::MIN)] {
        pager.set_hydrate(ms(2), hydrate);
        assert_eq!(lacks(&pager, 256), (vec![], 0), "{hydrate:?}");
    }
}

#[test]
fn pages_that_come_in_another_way_end_their_request() {
    let mut pager = ready(config(100));
    pager.handle(ms(1), fault(7, 0));
    pager.handle(ms(1), fault(20, 1));
    assert_eq!(pager.poll(ms(1)), demand(1, &[range(7, 1), range(20, 1)]));
    assert_eq!(arrive(&mut pager, ms(2), 0, range(0, 10)), [range(0, 10)]);
    assert_eq!(pager.owed(1), [range(20, 1)]);
    assert_eq!(arrive(&mut pager, ms(40), 0, range(20, 1)), [range(20, 1)]);
    pager.came(ms(40), 1);
    assert_eq!(pager.poll(ms(40)), resume(7, 0));
    assert_eq!(pager.poll(ms(40)), resume(20, 1));
    assert_eq!((pager.poll(ms(40)), pager.next_timeout()), (None, None));
    // The same pages from the source after all.
    assert_eq!(arrive(&mut pager, ms(41), 1, range(20, 1)), []);
    pager.answered(ms(41), 1);
    assert_eq!((pager.stats().duplicates, pager.stats().demand_pages), (1, 2));
}

#[test]
fn only_the_sources_own_answers_tell_how_long_they_take() {
    let trusts = |pager: &mut Pager, now| {
        // A page that is about to arrive as bulk is trusted for twice the time of a demand request.
        pager.set_hydrate(now, Hydrate::Now);
        let (tag, ranges) = bulk(pager.poll(now));
        arrive(pager, now, tag, range(ranges[0].start().index(), 1));
        pager.handle(now, fault(ranges[0].start().index() + 1, 9));
        assert_eq!(pager.poll(now), None);
        pager.next_timeout().unwrap() - now
    };
    let asked = |config| {
        let mut pager = ready(config);
        pager.handle(ms(0), fault(7, 0));
        assert_eq!(pager.poll(ms(0)), demand(1, &[range(7, 1)]));
        pager
    };
    let mut pager = asked(config(400));
    pager.came(ms(500), 1);
    assert_eq!(trusts(&mut pager, ms(500)), ms(2), "nothing was learnt");
    let mut pager = asked(config(400));
    pager.redirected(ms(400), 1);
    arrive(&mut pager, ms(500), 1, range(7, 1));
    pager.answered(ms(500), 1);
    assert_eq!(pager.poll(ms(500)), resume(7, 0));
    assert_eq!(trusts(&mut pager, ms(500)), ms(2), "nothing was learnt");
    let mut pager = asked(config(400));
    arrive(&mut pager, ms(8), 1, range(7, 1));
    pager.answered(ms(8), 1);
    assert_eq!(pager.poll(ms(8)), resume(7, 0));
    assert_eq!(trusts(&mut pager, ms(500)), ms(16));
}

#[test]
fn a_redirected_request_gets_the_time_of_a_new_one() {
    let mut config = config(100);
    config.retry = Retry { min: ms(100), max: ms(100), attempts: 3 };
    let mut pager = ready(config);
    pager.handle(ms(0), fault(7, 0));
    assert_eq!(pager.poll(ms(0)), demand(1, &[range(7, 1)]));
    pager.redirected(ms(90), 1);
    assert_eq!(pager.poll(ms(150)), None);
    assert!(pager.next_timeout().unwrap() >= ms(190));
    let due = pager.next_timeout().unwrap();
    assert_eq!(pager.poll(due), demand(2, &[range(7, 1)]));
    assert_eq!(pager.owed(1), [], "the later request has them now");
}

#[test]
fn pushed_parts_of_huge_pages_are_staged_within_bounds() {
    let granules = 40;
    let mut config = hydrating(granules * 512);
    config.port.granule = PageCount::new(512);
    let mut pager = ready(config);
    pager.set_hydrate(ms(0), Hydrate::Off);
    assert_eq!(arrive(&mut pager, ms(0), 0, range(0, 256)), [], "neither asked for nor pushed");
    pager.set_hydrate(ms(0), Hydrate::Now);
    pager.handle(ms(0), Input::Pushed(true));
    let halves: Vec<_> = (0..granules).map(|granule| range(granule * 512, 256)).collect();
    let staged: usize = halves.iter().map(|half| arrive(&mut pager, ms(1), 0, *half).len()).sum();
    assert_eq!(staged, 16);
    assert_eq!(arrive(&mut pager, ms(1), 0, range(256, 256)), [range(256, 256)]);
    assert_eq!(pager.poll(ms(1)), Some(Output::InstallStaged { range: range(0, 512) }));
    pager.installed(ms(1), range(0, 512), all(512));
    assert_eq!(pager.poll(ms(1)), None);
    // What the push left, in parts, is asked for.
    pager.handle(ms(2), Input::Pushed(false));
    let mut now = ms(2);
    loop {
        match pager.poll(now) {
            Some(Output::Request { tag, ranges, .. }) => {
                ranges.iter().for_each(|range| drop(arrive(&mut pager, now, tag, *range)));
                pager.answered(now, tag);
            }
            Some(Output::InstallStaged { range }) => drop(pager.installed(now, range, all(512))),
            Some(Output::Complete) => break,
            None => now = pager.next_timeout().unwrap(),
            other => panic!("{other:?}"),
        }
    }
}
