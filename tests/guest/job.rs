//! What makes the guest a machine that has been in use, and a small piece of work as such a machine is given: for the bench
//! `avoidance`, which counts what a clone fetches for it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::{mix, sys};

const MIB: usize = 1 << 20;

/// Where files stay in memory.
const CACHE: &str = "/cache";

/// Of so many files, one is removed again.
const REMOVED: usize = 3;

/// Processes that the work takes, one after the other, each of them with a file of its own.
const STEPS: usize = 8;

/// The page cache filled with files, a third of it given back; processes that took memory and ended; many small things made and
/// forgotten. Says how many MiB stayed in files, and how many were written and are free now.
pub fn use_machine() -> (usize, usize) {
    let total = memory_mib();
    let files = total * 3 / 10;
    sys::mount_at(CACHE, "tmpfs", "size=50%");
    let mut freed = 0;
    for number in 0..files {
        if number % (files / 4).max(1) == 0 {
            freed += total / 8;
            in_a_process(|| {
                let words = sys::words_of(sys::anonymous(total / 8 * MIB, false));
                fill(words, number as u64);
                0
            });
        }
        fs::write(path(number), bytes(number)).expect("room for a file");
        if number % 16 == 0 {
            small_things(number);
        }
    }
    let removed = (0..files).filter(|number| number % REMOVED == 1);
    removed.clone().for_each(|number| fs::remove_file(path(number)).expect("a file that was written"));
    (files - removed.clone().count(), freed + removed.count())
}

/// A few processes, each of which reads a file, sorts what is in it, talks to a child of its own, and leaves a result. Says how
/// many of them found something wrong.
pub fn work() -> usize {
    let step = |number: &usize| {
        let number = *number;
        in_a_process(|| {
            let mut read = Vec::new();
            let whole = fs::File::open(path(number)).and_then(|mut file| file.read_to_end(&mut read)).is_ok();
            let mut wrong = !whole || read != bytes(number);
            let words = sys::words_of(sys::anonymous(MIB, false));
            words.iter_mut().zip(read.as_chunks::<8>().0).for_each(|(word, bytes)| *word = u64::from_le_bytes(*bytes));
            words.sort_unstable();
            wrong |= words.is_sorted_by(|a, b| a > b);
            wrong |= talked(number) != 0;
            let result: Vec<u8> = words.iter().step_by(4).flat_map(|word| word.to_le_bytes()).collect();
            wrong |= fs::write(format!("{CACHE}/result-{number}"), result).is_err();
            i32::from(wrong)
        })
    };
    // Files that stayed, from all over the cache.
    let files = memory_mib() * 3 / 10;
    (0..STEPS).map(|step| step * files / STEPS / REMOVED * REMOVED).filter(|number| step(number) != 0).count()
}

/// A message there and back, with a process at the other end.
fn talked(number: usize) -> i32 {
    let Ok((ours, theirs)) = UnixStream::pair() else { return 1 };
    let message = [number as u8; 4000];
    match sys::fork_process() {
        0 => {
            drop(ours);
            let mut heard = [0; 4000];
            let echoed = (&theirs).read_exact(&mut heard).and_then(|()| (&theirs).write_all(&heard));
            sys::exit(i32::from(echoed.is_err()))
        }
        child => {
            drop(theirs);
            let mut heard = [0; 4000];
            let echoed = (&ours).write_all(&message).and_then(|()| (&ours).read_exact(&mut heard));
            i32::from(echoed.is_err() || heard != message || sys::wait_for(child) != 0)
        }
    }
}

/// Directories, links and sockets, which the kernel keeps in its slabs.
fn small_things(number: usize) {
    let at = |name: usize| format!("{CACHE}/d{number}-{name}");
    let sockets: Vec<_> = (0..8).filter_map(|_| UnixStream::pair().ok()).collect();
    (0..64).for_each(|name| _ = fs::create_dir(at(name)));
    (0..56).for_each(|name| _ = fs::remove_dir(at(name)));
    drop(sockets);
}

/// Lets a copy of this process do something; its exit status.
fn in_a_process(body: impl FnOnce() -> i32) -> i32 {
    match sys::fork_process() {
        0 => sys::exit(body()),
        child => sys::wait_for(child),
    }
}

fn path(number: usize) -> String {
    format!("{CACHE}/{number}")
}

fn bytes(number: usize) -> Vec<u8> {
    let mut words = vec![0u64; MIB / 8];
    fill(&mut words, number as u64);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn fill(words: &mut [u64], seed: u64) {
    words.iter_mut().zip(0..).for_each(|(word, at)| *word = mix(seed << 32 | at));
}

fn memory_mib() -> usize {
    let text = fs::read_to_string("/proc/meminfo").expect("/proc/meminfo");
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).expect("MemTotal");
    total.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") / 1024
}
