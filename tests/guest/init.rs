//! PID 1 of the checking guest: fills memory with a pattern that it can recompute, then keeps
//! checking it, so that a fork of this virtual machine can be judged by what it prints.
//!
//! The lines that it prints and the commands that it obeys are listed at the top of `tests/lab`. Each
//! line is a keyword with `name=value` fields; `errors` counts wrong pages, and pages at whose touch a
//! vector register changed. Linux hands `guest_mib=N` of its command line to PID 1 in the environment.
//!
//! Built with plain `rustc`, by `tests/lab`; no crates, hence the few C declarations.

mod churn;
mod job;
mod sys;
mod vectors;

use std::alloc::{Layout, alloc_zeroed};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use churn::Churn;

const PAGE: usize = 4096;
const DEFAULT_MIB: usize = 96;
const TICK: Duration = Duration::from_millis(100);
const TICK_PAGES: usize = 16;

fn main() {
    let started = Instant::now();
    let mut console = Console::open();
    sys::mount_at("/proc", "proc", "");
    sys::mount_at("/tmp", "tmpfs", "size=16m");
    let mut churn = Churn::new();
    let mut frames = FrameFlags::new();
    let mib = std::env::var("guest_mib").ok().and_then(|value| value.parse().ok()).unwrap_or(DEFAULT_MIB);
    let mut memory = Memory::filled(mib << 20);
    console.say(&format!("READY pages={} fill_ms={}", memory.pages(), started.elapsed().as_millis()));
    let mut random = 1;
    for tick in 1u64.. {
        random = mix(random);
        let first = random as usize % (memory.pages() - TICK_PAGES);
        let errors = (first..first + TICK_PAGES).filter(|&page| !memory.is_right(page)).count();
        let up_ms = started.elapsed().as_millis();
        console.say(&format!("TICK n={tick} errors={errors} up_ms={up_ms}"));
        if let Some(command) = console.command_within(TICK) {
            match command {
                b'K' => frames.tell(&mut console),
                b'C' => churn.start(),
                _ => console.say(&obey(command, &mut memory)),
            }
            let (rounds, errors, ended) = churn.report();
            console.say(&format!("CHURN rounds={rounds} errors={errors} ended={ended}"));
        }
    }
}

/// What the kernel says of every frame, in /proc/kpageflags.
struct FrameFlags(&'static mut [u8]);

impl FrameFlags {
    /// Room for the flags of 16 GiB.
    fn new() -> Self {
        Self(sys::anonymous(32 << 20, false))
    }

    /// Reads the flags and says `FRAMES`; then spins, so that nothing changes while the machine is stopped and looked at,
    /// until another character comes; then prints the flags in runs.
    fn tell(&mut self, console: &mut Console) {
        let mut length = 0;
        // What the first reading allocates, the second finds allocated.
        for _ in 0..2 {
            let mut file = File::open("/proc/kpageflags").expect("/proc/kpageflags");
            length = 0;
            while let Ok(count @ 1..) = file.read(&mut self.0[length..]) {
                length += count;
            }
        }
        console.say("FRAMES read=1");
        while console.command_within(Duration::ZERO).is_none() {}
        let flags: Vec<u64> = self.0[..length].as_chunks().0.iter().map(|flags| u64::from_le_bytes(*flags)).collect();
        let mut first = 0;
        for run in flags.chunk_by(|a, b| a == b) {
            console.say(&format!("FLAGS {first:x} {:x} {:x}", run.len(), run[0]));
            first += run.len();
        }
        console.say(&format!("FRAMES count={}", flags.len()));
    }
}

fn obey(command: u8, memory: &mut Memory) -> String {
    let started = Instant::now();
    match command {
        b'F' => {
            let mut wrong = (0..memory.pages()).filter(|&page| !memory.is_right(page));
            let first = wrong.next();
            let errors = wrong.count() + usize::from(first.is_some());
            let first = first.map_or("-".to_string(), |page| page.to_string());
            let (pages, ms) = (memory.pages(), started.elapsed().as_millis());
            format!("FULL errors={errors} pages={pages} first={first} ms={ms}")
        }
        b'R' => {
            let hex: String = kernel_random().iter().map(|byte| format!("{byte:02x}")).collect();
            format!("RANDOM {hex}")
        }
        b'W' => {
            let pages = memory.rewrite();
            format!("WROTE pages={pages} generation={}", memory.generation)
        }
        b'D' => format!("DROPPED pages={}", memory.drop_tail()),
        b'U' => {
            let (files_mib, freed_mib) = job::use_machine();
            format!("USED files_mib={files_mib} freed_mib={freed_mib} ms={}", started.elapsed().as_millis())
        }
        b'J' => format!("JOB errors={} ms={}", job::work(), started.elapsed().as_millis()),
        b'B' => format!("BALLOON modules={}", load_modules()),
        b'S' => stop(),
        other => format!("UNKNOWN {other:#04x}"),
    }
}

/// The checked memory. Page `p` has the content of generation 0, save the rewritten quarter, which
/// has that of the present generation, and the tail, which is of `tail` or zero when dropped.
struct Memory {
    bytes: &'static mut [u8],
    generation: u64,
    /// Generation of the last eighth, `None` while it is dropped.
    tail: Option<u64>,
}

impl Memory {
    fn filled(size: usize) -> Self {
        let layout = Layout::from_size_align(size, PAGE).expect("guest_mib is too large");
        assert!(size >= 1 << 20, "guest_mib must be at least 1");
        // SAFETY: the layout's size is not zero; zeroed bytes are valid `u8`s; the block is never freed.
        let bytes = unsafe {
            let start = alloc_zeroed(layout);
            assert!(!start.is_null(), "not enough memory for guest_mib");
            std::slice::from_raw_parts_mut(start, size)
        };
        let mut memory = Self { bytes, generation: 0, tail: Some(0) };
        memory.write(0..memory.pages());
        memory
    }

    fn pages(&self) -> usize {
        self.bytes.len() / PAGE
    }

    fn tail_pages(&self) -> std::ops::Range<usize> {
        self.pages() - self.pages() / 8..self.pages()
    }

    fn rewritten_pages(&self) -> std::ops::Range<usize> {
        self.pages() / 4..self.pages() / 2
    }

    fn generation_of(&self, page: usize) -> Option<u64> {
        if self.rewritten_pages().contains(&page) {
            Some(self.generation)
        } else if self.tail_pages().contains(&page) {
            self.tail
        } else {
            Some(0)
        }
    }

    /// True when the page holds what it should, and no vector register changed at its first touch.
    fn is_right(&self, page: usize) -> bool {
        let bytes = &self.bytes[page * PAGE..][..PAGE];
        let held = vectors::survive_reading(&bytes[page % PAGE], page as u64);
        held && self.is_content(page, bytes)
    }

    fn is_content(&self, page: usize, bytes: &[u8]) -> bool {
        match self.generation_of(page) {
            Some(generation) => *bytes == content(page, generation),
            None => bytes.iter().all(|&byte| byte == 0),
        }
    }

    fn rewrite(&mut self) -> usize {
        self.generation += 1;
        let mut written = self.rewritten_pages().len();
        self.write(self.rewritten_pages());
        if self.tail.is_none() {
            self.tail = Some(self.generation);
            written += self.tail_pages().len();
            self.write(self.tail_pages());
        }
        written
    }

    fn write(&mut self, pages: std::ops::Range<usize>) {
        for page in pages {
            if let Some(generation) = self.generation_of(page) {
                self.bytes[page * PAGE..][..PAGE].copy_from_slice(&content(page, generation));
            }
        }
    }

    fn drop_tail(&mut self) -> usize {
        let pages = self.tail_pages();
        let tail = &mut self.bytes[pages.start * PAGE..];
        // SAFETY: `tail` is whole pages of memory that only we refer to; they read as zeros afterwards.
        let result = unsafe { sys::madvise(tail.as_mut_ptr(), tail.len(), sys::MADV_DONTNEED) };
        assert_eq!(result, 0, "madvise");
        self.tail = None;
        pages.len()
    }
}

/// What `page` holds in `generation`: by turns two pages of text, a random one and one of sixteen
/// that occur again and again, so that compression and deduplication have something to find.
fn content(page: usize, generation: u64) -> [u8; PAGE] {
    const WORDS: [&[u8; 8]; 16] = [
        b"memory  ",
        b"machine ",
        b"page    ",
        b"arrives ",
        b"while   ",
        b"it      ",
        b"works   ",
        b"on      ",
        b"nothing ",
        b"is lost ",
        b"of what ",
        b"clones  ",
        b"have    ",
        b"written ",
        b"\tso far ",
        b"today.\n\n",
    ];
    let mut bytes = [0; PAGE];
    let mut state = mix(page as u64 ^ generation << 40);
    let words = bytes.as_chunks_mut::<8>().0;
    match page % 4 {
        0 | 1 => {
            for word in words {
                state = step(state);
                *word = *WORDS[(state >> 60) as usize];
            }
        }
        2 => {
            for word in words {
                state = step(state);
                *word = mix(state).to_le_bytes();
            }
        }
        _ => words.fill((mix(page as u64 / 4 % 16) ^ generation).to_le_bytes()),
    }
    bytes
}

/// One step of a linear congruential generator (Knuth's MMIX constants): good in its upper bits.
fn step(state: u64) -> u64 {
    state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407)
}

/// The finaliser of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

/// The serial console, unbuffered and raw: no echo, no line editing, commands without a newline.
struct Console(File);

impl Console {
    fn open() -> Self {
        let file = File::options().read(true).write(true).open("/dev/console").expect("/dev/console");
        let mut mode = sys::Termios::default();
        // SAFETY: an open terminal, and a `mode` at least as large as C's `struct termios`.
        unsafe {
            sys::tcgetattr(file.as_raw_fd(), &mut mode);
            sys::cfmakeraw(&mut mode);
            sys::tcsetattr(file.as_raw_fd(), 0, &mode);
        }
        Self(file)
    }

    /// Prints a line with a single write, so that a clone's output begins with a whole line or not at all.
    fn say(&mut self, line: &str) {
        let line = format!("{line}\n");
        self.0.write_all(line.as_bytes()).expect("/dev/console");
    }

    fn command_within(&mut self, time: Duration) -> Option<u8> {
        let mut wanted = sys::PollFd { fd: self.0.as_raw_fd(), events: sys::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd, as the count says.
        let ready = unsafe { sys::poll(&mut wanted, 1, time.as_millis() as i32) };
        let mut byte = [0];
        (ready == 1 && matches!(self.0.read(&mut byte), Ok(1))).then_some(byte[0])
    }
}

fn kernel_random() -> [u8; 16] {
    let mut bytes = [0; 16];
    // SAFETY: the buffer is as long as said.
    let got = unsafe { sys::getrandom(bytes.as_mut_ptr(), bytes.len(), 0) };
    assert_eq!(got, bytes.len() as isize, "getrandom");
    bytes
}

/// Loads what lies in /modules, in the order of its names; how many were taken.
fn load_modules() -> usize {
    let files = std::fs::read_dir("/modules").expect("/modules");
    let mut paths: Vec<_> = files.map(|file| file.expect("a module").path()).collect();
    paths.sort();
    paths.iter().filter(|path| File::open(path).is_ok_and(|file| sys::load_module(&file))).count()
}

/// Restarts the machine, which ends a QEMU that was told `-no-reboot`: every machine type can do that, but not
/// each of them can power off.
fn stop() -> ! {
    // SAFETY: no memory is involved; the machine ends here.
    unsafe { sys::reboot(sys::RB_AUTOBOOT) };
    panic!("the machine could not be restarted");
}
