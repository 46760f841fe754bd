//! Processes that keep the guest's allocators busy and check all that they get from them: anonymous memory, also in huge pages,
//! files in memory, copies by fork, buffers of sockets. What they find wrong they count.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{mix, sys};

const WORKERS: usize = 3;
/// Mappings of a worker at one time, and the bytes that they take together on average.
const REGIONS: usize = 24;
const BUDGET: usize = 12 << 20;
const FILES: u64 = 6;
const HUGE: usize = 2 << 20;

/// Workers, and their counters in memory that they share with us.
pub struct Churn {
    counters: &'static [Counters; WORKERS],
    workers: Vec<i32>,
    ended: usize,
}

#[derive(Default)]
struct Counters {
    rounds: AtomicU64,
    errors: AtomicU64,
}

impl Churn {
    pub fn new() -> Self {
        let memory = sys::anonymous(size_of::<[Counters; WORKERS]>(), true);
        // SAFETY: fresh zeroed memory, larger than the counters, which are valid as zeros and are only touched atomically.
        let counters = unsafe { &*memory.as_mut_ptr().cast::<[Counters; WORKERS]>() };
        Self { counters, workers: Vec::new(), ended: 0 }
    }

    /// Starts the workers, unless they work.
    pub fn start(&mut self) {
        while self.workers.len() < WORKERS {
            let number = self.workers.len();
            match sys::fork_process() {
                0 => work(number, &self.counters[number]),
                pid => self.workers.push(pid),
            }
        }
    }

    /// Rounds done and errors found by all workers, and how many of them have ended, which none of them should.
    pub fn report(&mut self) -> (u64, u64, usize) {
        self.ended += self.workers.extract_if(.., |pid| sys::has_ended(*pid)).count();
        let sum =
            |count: fn(&Counters) -> &AtomicU64| self.counters.iter().map(|all| count(all).load(Relaxed)).sum::<u64>();
        (sum(|all| &all.rounds), sum(|all| &all.errors), self.ended)
    }
}

struct Region {
    words: &'static mut [u64],
    seed: u64,
}

fn work(number: usize, counters: &Counters) -> ! {
    let mut random = mix(number as u64);
    let mut regions: [Option<Region>; REGIONS] = [const { None }; REGIONS];
    for round in 0u64.. {
        random = mix(random);
        let errors = anonymous(&mut regions, random)
            + if round % 5 == 0 { file(number, random) } else { 0 }
            + if round % 7 == 0 { forked(&mut regions) } else { 0 }
            + if round % 3 == 0 { sockets(random) } else { 0 };
        counters.errors.fetch_add(errors, Relaxed);
        counters.rounds.fetch_add(1, Relaxed);
    }
    unreachable!("rounds do not end")
}

/// Checks a region and gives it back, or fills a new one, which must have been zero.
fn anonymous(regions: &mut [Option<Region>; REGIONS], random: u64) -> u64 {
    let slot = &mut regions[random as usize % REGIONS];
    if let Some(Region { words, seed }) = slot.take() {
        let wrong = words.iter().zip(0..).filter(|(word, at)| **word != pattern(seed, *at)).count();
        sys::unmap(words);
        return u64::from(wrong > 0);
    }
    let size = if random >> 32 & 15 == 0 { HUGE } else { (mix(random) as usize % (2 * BUDGET / REGIONS)) | 4095 } + 1;
    let words = sys::words_of(sys::anonymous(size, false));
    let wrong = words.iter().any(|word| *word != 0);
    words.iter_mut().zip(0..).for_each(|(word, at)| *word = pattern(random, at));
    *slot = Some(Region { words, seed: random });
    u64::from(wrong)
}

/// Checks a file in memory and removes it, or writes a new one.
fn file(number: usize, random: u64) -> u64 {
    let path = format!("/tmp/{number}.{}", random % FILES);
    if let Ok(mut file) = File::open(&path) {
        let mut bytes = Vec::new();
        let read = file.read_to_end(&mut bytes);
        let _ = fs::remove_file(&path);
        let seed = bytes.first_chunk().map_or(0, |head| u64::from_le_bytes(*head));
        let right = bytes.chunks_exact(8).skip(1).zip(1..).all(|(word, at)| *word == pattern(seed, at).to_le_bytes());
        return u64::from(read.is_err() || !right);
    }
    let words = 1 + mix(random) % 60_000;
    let mut bytes = random.to_le_bytes().to_vec();
    bytes.extend((1..words).flat_map(|at| pattern(random, at).to_le_bytes()));
    u64::from(File::create(&path).and_then(|mut file| file.write_all(&bytes)).is_err())
}

/// A copy of this process checks all regions, and writes to its own copies of them.
fn forked(regions: &mut [Option<Region>; REGIONS]) -> u64 {
    match sys::fork_process() {
        0 => {
            let mut wrong = false;
            for Region { words, seed } in regions.iter_mut().flatten() {
                let last = words.len() - 1;
                wrong |= words[0] != pattern(*seed, 0) || words[last] != pattern(*seed, last as u64);
                words[last / 2] ^= 1;
            }
            sys::exit(i32::from(wrong))
        }
        pid => u64::from(sys::wait_for(pid) != 0),
    }
}

fn sockets(random: u64) -> u64 {
    let message = [random as u8; 3000];
    let pairs: Vec<(UnixStream, UnixStream)> = (0..16).filter_map(|_| UnixStream::pair().ok()).collect();
    for (from, _) in &pairs {
        let mut from = from;
        let _ = from.write_all(&message);
    }
    let wrong = |(_, to): &&(UnixStream, UnixStream)| {
        let (mut to, mut got) = (to, [0; 3000]);
        to.read_exact(&mut got).is_err() || got != message
    };
    pairs.iter().filter(wrong).count() as u64
}

fn pattern(seed: u64, at: u64) -> u64 {
    mix(seed.wrapping_add(at))
}
