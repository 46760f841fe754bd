//! Frames that someone says will be wholly overwritten.

use super::*;

fn noted(frames: u64, present: u64) -> Result<Overwritten, NotMemory> {
    Ok(Overwritten { frames: PageCount::new(frames), present: PageCount::new(present) })
}

#[test]
fn a_late_answer_never_lands_on_an_overwrite() {
    let mut pager = ready(config(100));
    pager.handle(ms(1), fault(10, 0));
    pager.handle(ms(1), fault(11, 1));
    assert_eq!(pager.poll(ms(1)), demand(1, &[range(10, 2)]));
    assert_eq!(pager.overwrite(&[range(11, 3), range(13, 3)]), noted(5, 0));
    assert_eq!(pager.poll(ms(2)), zeros(11, 5), "all that will be overwritten, at once");
    pager.installed(ms(2), range(11, 5), all(5));
    assert_eq!(pager.poll(ms(2)), resume(11, 1));
    assert_eq!(arrive(&mut pager, ms(3), 1, range(10, 6)), [range(10, 1)]);
    assert_eq!(pager.poll(ms(3)), resume(10, 0));
    assert_eq!(pager.overwrite(&[range(9, 3)]), noted(1, 2));
    assert_eq!((pager.stats().overwritten, pager.stats().zeros_installed), (6, 5));
}

#[test]
fn what_is_overwritten_completes_a_clone() {
    let mut config = config(100);
    config.hydrate = Hydrate::Now;
    config.eager = set(100, &[range(0, 4)]);
    config.port.needs_zeros = true;
    let mut pager = Pager::new(ms(0), config, 1).unwrap();
    pager.handle(ms(0), Input::SourceUp { limits: LIMITS });
    assert_eq!(pager.poll(ms(0)), demand(1, &[range(0, 4)]));
    assert_eq!(pager.overwrite(&[range(0, 100)]), noted(100, 0));
    assert_eq!(pager.poll(ms(0)), Some(Output::Ready), "nothing of the eager frames is needed any more");
    assert_eq!(pager.poll(ms(0)), zeros(0, 100), "as the port needs");
    pager.installed(ms(0), range(0, 100), all(100));
    assert_eq!(pager.poll(ms(0)), Some(Output::Complete));
    assert_eq!(arrive(&mut pager, ms(1), 1, range(0, 4)), []);
    assert_eq!(pager.overwrite(&[range(0, 100)]), noted(0, 100));
}

#[test]
fn frames_outside_refuse_all() {
    let mut pager = ready(config(100));
    assert_eq!(pager.overwrite(&[range(1, 5), range(98, 4)]), Err(NotMemory(range(100, 2))));
    assert_eq!(pager.overwrite(&[range(500, 1)]), Err(NotMemory(range(500, 1))));
    assert_eq!(pager.progress().missing, PageCount::new(100));
    assert_eq!(pager.overwrite(&[]), noted(0, 0));
    assert_eq!(pager.overwrite(&[range(7, 0), range(900, 0)]), noted(0, 0));
}

#[test]
fn of_a_huge_page_the_rest_is_fetched() {
    let mut config = config(1024);
    config.port.granule = PageCount::new(512);
    let mut pager = ready(config);
    pager.handle(ms(1), fault(5, 0));
    assert_eq!(pager.poll(ms(1)), demand(1, &[range(0, 512)]));
    assert_eq!(arrive(&mut pager, ms(1), 1, range(0, 256)), [range(0, 256)]);
    assert_eq!(pager.poll(ms(1)), None);
    assert_eq!(pager.overwrite(&[range(200, 200)]), noted(200, 0), "staged frames count as missing");
    assert_eq!(arrive(&mut pager, ms(2), 1, range(256, 200)), [range(400, 56)]);
    assert_eq!(pager.overwrite(&[range(456, 56)]), noted(56, 0));
    assert_eq!(pager.poll(ms(2)), Some(Output::InstallStaged { range: range(0, 512) }), "nothing more is to come");
    pager.installed(ms(2), range(0, 512), all(512));
    assert_eq!(pager.poll(ms(2)), resume(5, 0));
}

#[test]
fn a_huge_page_that_is_wholly_overwritten_needs_no_fetch() {
    let mut config = config(1024);
    config.port.granule = PageCount::new(512);
    let mut pager = ready(config);
    pager.handle(ms(1), fault(600, 0));
    assert_eq!(pager.poll(ms(1)), demand(1, &[range(512, 512)]));
    assert_eq!(arrive(&mut pager, ms(1), 1, range(512, 10)), [range(512, 10)]);
    assert_eq!(pager.overwrite(&[range(512, 512)]), noted(512, 0));
    assert_eq!(pager.poll(ms(1)), zeros(512, 512));
    assert_eq!(pager.poll(ms(1)), Some(Output::DropStaged { range: range(512, 512) }));
    pager.installed(ms(1), range(512, 512), all(512));
    assert_eq!(arrive(&mut pager, ms(2), 1, range(522, 502)), []);
    assert_eq!(pager.poll(ms(2)), resume(600, 0));
    assert_eq!(pager.poll(ms(2)), None);
}
