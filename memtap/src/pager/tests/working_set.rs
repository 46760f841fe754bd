use super::*;

fn recording() -> PagerConfig {
    PagerConfig { record: true, ..config(1000) }
}

fn bulk(tag: Tag, ranges: &[FrameRange]) -> Option<Output> {
    Some(Output::Request { tag, class: Class::Bulk, ranges: ranges.to_vec() })
}

#[test]
fn what_had_to_be_fetched_is_noted_once_in_the_order_of_need() {
    let mut config = recording();
    config.zero = set(1000, &[range(500, 10)]);
    let mut pager = ready(config);
    for (gfn, waiter) in [(7, 0), (505, 1), (6, 2), (7, 3), (8, 4)] {
        pager.handle(ms(1), fault(gfn, waiter));
    }
    assert!(pager.has_touched());
    assert_eq!(pager.take_touched(1), [range(7, 1)]);
    assert_eq!(pager.take_touched(9), [range(6, 1), range(8, 1)]);
    assert!(!pager.has_touched());
    assert_eq!(pager.stats().demand_faults, 3, "zeros and pages that were waited for already do not count");
    assert!(pager.saw_every_need());
}

#[test]
fn what_a_stream_used_is_noted_and_what_it_has_not_come_to_is_not() {
    let mut config = recording();
    config.prefetch = Prefetch::Adaptive { max: PageCount::new(64) };
    let mut pager = ready(config);
    for gfn in [100, 101, 106] {
        pager.handle(ms(1), fault(gfn, 0));
    }
    assert_eq!(pager.take_touched(9), [range(100, 2), range(106, 1), range(102, 4)]);
}

#[test]
fn what_siblings_needed_comes_before_the_order_of_the_descriptor() {
    let mut config = recording();
    config.order = vec![range(10, 5), range(300, 5)];
    config.prefetch = Prefetch::Adaptive { max: PageCount::new(64) };
    let mut pager = ready(config);
    pager.follow(vec![range(700, 3), range(12, 2), range(990, 50)]);
    assert_eq!(pager.poll(ms(1)), bulk(1, &[range(700, 3), range(12, 2), range(990, 10)]));
    arrive(&mut pager, ms(1), 1, range(700, 3));
    pager.answered(ms(1), 1);
    assert_eq!(pager.poll(ms(1)), bulk(2, &[range(10, 2), range(14, 1), range(300, 5)]));
    arrive(&mut pager, ms(2), 2, range(300, 5));
    assert_eq!((pager.stats().order_pages, pager.stats().prefetch_pages), (3, 5));
    pager.handle(ms(3), fault(12, 0));
    assert_eq!(pager.take_touched(9), [range(12, 1)], "needed, though it was on its way");
}

#[test]
fn a_head_start_lasts_until_what_siblings_needed_is_there() {
    let mut pager = Pager::new(ms(0), PagerConfig { head_start: ms(100), ..recording() }, 1).unwrap();
    assert_eq!(pager.poll(ms(0)), None);
    pager.handle(ms(50), Input::SourceUp { limits: LIMITS });
    assert_eq!((pager.poll(ms(50)), pager.next_timeout()), (None, Some(ms(150))));
    pager.follow(vec![range(20, 4)]);
    assert_eq!(pager.poll(ms(60)), bulk(1, &[range(20, 4)]));
    assert_eq!(pager.poll(ms(60)), None);
    assert_eq!(arrive(&mut pager, ms(70), 1, range(20, 4)), [range(20, 4)]);
    pager.answered(ms(70), 1);
    assert_eq!(pager.poll(ms(70)), Some(Output::Ready));
}

#[test]
fn a_push_fetches_what_siblings_needed_by_itself() {
    let mut pager = ready(recording());
    pager.follow(vec![range(20, 4)]);
    pager.handle(ms(0), Input::Pushed(true));
    assert_eq!(pager.poll(ms(1)), None);
    pager.handle(ms(2), Input::Pushed(false));
    assert_eq!(pager.poll(ms(2)), bulk(1, &[range(20, 4)]));
}

#[test]
fn over_huge_pages_silence_says_nothing() {
    let port = PortTraits { granule: PageCount::new(512), needs_zeros: false };
    let pager = ready(PagerConfig { record: true, port, ..config(1024) });
    assert!(!pager.saw_every_need());
}

#[test]
fn a_head_start_ends_in_time_or_where_nothing_is_known() {
    let held = || {
        let mut pager = Pager::new(ms(0), PagerConfig { head_start: ms(100), ..recording() }, 1).unwrap();
        pager.handle(ms(0), Input::SourceUp { limits: LIMITS });
        assert_eq!(pager.poll(ms(0)), None);
        pager
    };
    assert_eq!(held().poll(ms(100)), Some(Output::Ready), "no order came");
    let mut pager = held();
    pager.follow(Vec::new());
    assert_eq!(pager.poll(ms(1)), Some(Output::Ready), "nothing is known");
    let mut pager = held();
    pager.follow(vec![range(1, 1)]);
    assert_eq!(pager.poll(ms(1)), bulk(1, &[range(1, 1)]));
    assert_eq!(pager.poll(ms(100)), Some(Output::Ready), "it did not come");
}

#[test]
fn what_came_by_other_ways_may_have_been_needed_too() {
    let mut pager = ready(PagerConfig { hydrate: Hydrate::Now, ..recording() });
    assert!(!pager.saw_every_need());
    pager.set_hydrate(ms(1), Hydrate::Off);
    assert!(pager.saw_every_need());
    arrive(&mut pager, ms(1), 99, range(5, 1));
    assert!(!pager.saw_every_need(), "it came unasked");
}
