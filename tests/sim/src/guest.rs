//! Threads of a guest, and what each page must hold.

use std::time::Duration;

use descriptor::{FrameRange, FrameSet, Gfn, PageCount};
use fastrand::Rng;

use crate::image::{Image, WORDS};
use crate::port::Port;

/// A guest: its threads, and what its memory must hold.
#[derive(Debug)]
pub struct Guest {
    image: Image,
    present: FrameSet,
    threads: Vec<Thread>,
    pages: Vec<Page>,
    rng: Rng,
}

/// What a page must hold.
#[derive(Clone, Debug, Default)]
struct Page {
    /// Zeros rather than the image's bytes.
    blank: bool,
    /// A thread gives it up or is about to overwrite it at this moment: it may hold anything.
    in_doubt: bool,
    /// It was wholly overwritten with this number and those that follow.
    filled: Option<u64>,
    written: Vec<(u64, u64)>,
}

#[derive(Debug)]
struct Thread {
    pattern: Pattern,
    left: u32,
    position: u64,
    /// What it tries to do until it succeeds.
    access: Option<Access>,
    since: Duration,
}

#[derive(Clone, Copy, Debug)]
enum Pattern {
    Strided(u64),
    Random,
    Hot,
}

#[derive(Clone, Copy, Debug)]
enum Access {
    Read(Gfn),
    Write(Gfn, u64),
    Discard(FrameRange),
    /// Say that the page will be overwritten.
    Announce(Gfn, u64),
    /// Overwrite all of it.
    Fill(Gfn, u64),
}

/// What a guest does besides reading and writing, in a thousand accesses each.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// Giving memory up, whole granules.
    pub discards: u32,
    /// Saying that a page will be overwritten, and overwriting it.
    pub overwrites: u32,
    /// The frames of a granule.
    pub granule: u64,
}

/// What came of a step of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It goes on after a while.
    Again(Duration),
    /// It waits for a page.
    Blocked,
    /// It waits until a range was taken.
    Discards(FrameRange),
    /// It says that it will overwrite all of a page, and goes on after a while.
    Announces(Gfn, Duration),
    /// It came to its end.
    Done,
}

impl Guest {
    /// A guest whose `threads` make `accesses` each; `discards` when they also give memory up.
    pub fn draw(image: &Image, threads: u32, accesses: u32, mut rng: Rng) -> Self {
        let universe = image.memory.universe().get();
        let page = |gfn| Page { blank: image.is_blank(Gfn::new(gfn)), ..Page::default() };
        let thread = |rng: &mut Rng| Thread {
            pattern: match rng.u8(0..6) {
                0 | 1 => Pattern::Strided(1),
                2 => Pattern::Strided(rng.u64(2..9)),
                3 => Pattern::Hot,
                _ => Pattern::Random,
            },
            left: accesses,
            position: rng.u64(0..universe),
            access: None,
            since: Duration::ZERO,
        };
        let threads = (0..threads).map(|_| thread(&mut rng)).collect();
        let present = image.memory.present();
        Self { threads, present, pages: (0..universe).map(page).collect(), image: image.clone(), rng }
    }

    /// The number of threads.
    pub fn threads(&self) -> u32 {
        self.threads.len() as u32
    }

    /// Since when a thread tries what it tries.
    pub fn waits_since(&self, thread: u32) -> Duration {
        self.threads[thread as usize].since
    }

    /// Lets a thread try its next access, or the one at hand again.
    pub fn step(&mut self, now: Duration, thread: u32, port: &mut Port, habits: Habits) -> Step {
        let index = thread as usize;
        let access = match self.threads[index].access {
            Some(access) => access,
            None if self.threads[index].left == 0 => return Step::Done,
            None => {
                self.threads[index].left -= 1;
                self.threads[index].since = now;
                self.choose(index, habits)
            }
        };
        self.threads[index].access = Some(access);
        match access {
            Access::Read(gfn) | Access::Write(gfn, _) | Access::Fill(gfn, _) if !port.is_present(gfn) => {
                port.fault(gfn, thread, !matches!(access, Access::Read(_)));
                return Step::Blocked;
            }
            Access::Read(gfn) => {
                let word = self.rng.u64(0..WORDS);
                self.check(gfn, port, word);
                if let Some((written, _)) = self.pages[gfn.index() as usize].written.last() {
                    self.check(gfn, port, *written);
                }
            }
            Access::Write(gfn, value) => {
                let word = value % WORDS;
                port.write(gfn, word, value);
                let page = &mut self.pages[gfn.index() as usize];
                page.written.retain(|(written, _)| *written != word);
                page.written.push((word, value));
            }
            Access::Announce(gfn, value) => {
                let page = &mut self.pages[gfn.index() as usize];
                if page.in_doubt {
                    self.threads[index].access = None;
                    return Step::Again(Duration::from_micros(1));
                }
                page.in_doubt = true;
                self.threads[index].access = Some(Access::Fill(gfn, value));
                // Others may read what is there meanwhile, and late answers come.
                return Step::Announces(gfn, Duration::from_nanos(self.rng.u64(100..200_000)));
            }
            Access::Fill(gfn, value) => {
                (0..WORDS).for_each(|word| port.write(gfn, word, value.wrapping_add(word)));
                self.pages[gfn.index() as usize] = Page { filled: Some(value), ..Page::default() };
            }
            Access::Discard(range) => {
                if range.frames().any(|gfn| self.pages[gfn.index() as usize].in_doubt) {
                    self.threads[index].access = None;
                    return Step::Again(Duration::from_micros(1));
                }
                for gfn in range.frames() {
                    self.pages[gfn.index() as usize].in_doubt = true;
                }
                port.discard(range);
                return Step::Discards(range);
            }
        }
        self.threads[index].access = None;
        Step::Again(Duration::from_nanos(self.rng.u64(100..20_000)))
    }

    /// A range that a thread gave up was taken; the thread can go on.
    pub fn taken(&mut self, thread: u32, range: FrameRange) {
        for gfn in range.frames() {
            self.pages[gfn.index() as usize] = Page { blank: true, ..Page::default() };
        }
        self.threads[thread as usize].access = None;
    }

    /// Checks every word of every page that is there.
    ///
    /// # Panics
    /// When one is not what it must be.
    pub fn check_all(&self, port: &Port) {
        for gfn in self.present.runs().flat_map(FrameRange::frames) {
            if port.is_present(gfn) {
                (0..WORDS).for_each(|word| self.check(gfn, port, word));
            }
        }
    }

    fn check(&self, gfn: Gfn, port: &Port, word: u64) {
        let page = &self.pages[gfn.index() as usize];
        if page.in_doubt {
            return;
        }
        let base = match page.filled {
            Some(value) => value.wrapping_add(word),
            None if page.blank => 0,
            None => self.image.word(gfn, word),
        };
        let written = page.written.iter().find(|(index, _)| *index == word);
        let expected = written.map_or(base, |(_, value)| *value);
        let found = port.word(gfn, word);
        assert_eq!(found, expected, "word {word} of page {gfn}");
    }

    fn choose(&mut self, thread: usize, habits: Habits) -> Access {
        let granule = habits.granule;
        let memory = &self.image.memory;
        let universe = memory.universe().get();
        let rng = &mut self.rng;
        let thread = &mut self.threads[thread];
        let gfn = loop {
            thread.position = match thread.pattern {
                Pattern::Strided(stride) => (thread.position + stride) % universe,
                Pattern::Random => rng.u64(0..universe),
                Pattern::Hot => rng.u64(0..universe.div_ceil(8)),
            };
            if memory.region_of(Gfn::new(thread.position)).is_some() {
                break Gfn::new(thread.position);
            }
        };
        if habits.overwrites > 0 && rng.u32(0..1000) < habits.overwrites {
            return Access::Announce(gfn, rng.u64(..));
        }
        if rng.u32(0..1000) < habits.discards {
            let start = gfn.index() / granule * granule;
            let count = (granule << rng.u32(0..5)).min(universe - start);
            let range = FrameRange::new(Gfn::new(start), PageCount::new(count));
            return self.present.runs_in(range).next().map_or(Access::Read(gfn), Access::Discard);
        }
        match rng.u8(0..3) {
            0 => Access::Write(gfn, rng.u64(..)),
            _ => Access::Read(gfn),
        }
    }
}
