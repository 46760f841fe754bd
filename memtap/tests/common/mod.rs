//! What the tests share: an image on disk, a page server that speaks the fetch protocol, and the `memtap` command.
//!
//! The server is a model, written from the protocol's documentation alone: `memtap` never depends on `memserver`, not even in
//! its tests. The two are tested together from the root package.
#![allow(dead_code, unreachable_pub, unused_imports)] // Each test file uses a part of it.
#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod channel;
mod server;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use descriptor::image::{ExtentTableBuilder, ImageFile, ImageIndex};
use descriptor::memory::{MemoryMap, PageSize, Region, RegionKind};
use descriptor::vm::{Descriptor, Hypervisor, Identity};
use descriptor::{Endpoint, FrameRange, FrameSet, Gfn, ImageId, PAGE_SIZE, PageCount};
use serde_json::Value;

pub use channel::{ChannelBehaviour, ModelChannel};
pub use server::{Behaviour, ModelServer};

/// Long enough for any step of a test on a machine that does much else.
pub const LONG: Duration = Duration::from_secs(60);

/// An image in a folder of its own: two regions with a gap between them, a quarter of the pages zero, a quarter text.
pub struct Image {
    pub folder: tempfile::TempDir,
    pub id: ImageId,
    pub memory: MemoryMap,
    /// The pages of all regions end to end.
    pub bytes: Arc<Vec<u8>>,
    pub zero: FrameSet,
}

impl Image {
    /// An image of about `pages` pages; its regions consist of whole 2 MiB pieces.
    pub fn new(pages: u64) -> Self {
        let low = pages.div_ceil(1024) * 512;
        let regions = [("low", 0, low), ("high", 2 * low, low)];
        let region = |(name, start, count): (&str, u64, u64)| Region {
            name: name.to_owned(),
            frames: FrameRange::new(Gfn::new(start), PageCount::new(count)),
            kind: RegionKind::Ram,
            page_size: PageSize::Base,
        };
        let memory = MemoryMap::new(regions.map(region).into()).unwrap();
        let mut zero = FrameSet::empty(memory.universe());
        let mut bytes = Vec::with_capacity((2 * low * PAGE_SIZE) as usize);
        for gfn in memory.regions().iter().flat_map(|region| region.frames.frames()) {
            match gfn.index() / 3 % 4 {
                0 => {
                    zero.insert(gfn);
                    bytes.resize(bytes.len() + 4096, 0);
                }
                1 => bytes.extend(format!("page {:>10} ", gfn.index()).bytes().cycle().take(4096)),
                _ => bytes.extend((0..512).flat_map(|word| noise(gfn.index() * 512 + word).to_le_bytes())),
            }
        }
        let image = Self {
            folder: tempfile::tempdir().unwrap(),
            id: ImageId::from_bytes(*b"an image of test"),
            memory,
            bytes: Arc::new(bytes),
            zero,
        };
        image.write();
        image
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn descriptor(&self) -> PathBuf {
        self.path("image.snow")
    }

    pub fn index(&self) -> PathBuf {
        self.path("image.snowidx")
    }

    pub fn memory_file(&self) -> PathBuf {
        self.path("memory")
    }

    /// The page of `gfn`, if there is one.
    pub fn page(&self, gfn: Gfn) -> Option<&[u8]> {
        let mut before = 0;
        for region in self.memory.regions() {
            if region.frames.contains(gfn) {
                let at = ((before + (gfn - region.frames.start()).get()) * PAGE_SIZE) as usize;
                return self.bytes.get(at..at + PAGE_SIZE as usize);
            }
            before += region.frames.count().get();
        }
        None
    }

    fn write(&self) {
        std::fs::write(self.memory_file(), &*self.bytes).unwrap();
        let length = self.bytes.len() as u64;
        let mut extents = ExtentTableBuilder::default();
        let mut offset = 0;
        for region in self.memory.regions() {
            extents.run(region.frames, 0, offset);
            offset += region.frames.count().bytes();
        }
        let index = ImageIndex {
            image: self.id,
            memory: self.memory.clone(),
            files: vec![ImageFile { path: "memory".into(), length }],
            extents: extents.finish(&[length]).unwrap(),
            zero: self.zero.clone(),
        };
        index.write(&self.index()).unwrap();
        let universe = self.memory.universe();
        let descriptor = Descriptor {
            identity: Identity {
                image: self.id,
                parent: "test".into(),
                hypervisor: Hypervisor::Raw,
                hypervisor_version: String::new(),
                machine: String::new(),
                captured_unix_ns: 0,
                pause_us: None,
            },
            memory: self.memory.clone(),
            records: vec![],
            eager: FrameSet::from_ranges(universe, [FrameRange::new(Gfn::new(3), PageCount::new(40))]),
            zero: self.zero.clone(),
            free: FrameSet::empty(universe),
            prefetch: vec![],
            servers: vec![],
        };
        descriptor.write(&self.descriptor()).unwrap();
    }
}

/// The `memtap` command.
pub fn memtap(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memtap"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// `memtap embedded` as a clone of `image`.
pub fn embedded(image: &Image, server: &Endpoint, more: &[&str]) -> Command {
    let (descriptor, index) = (image.descriptor(), image.index());
    let mut command = memtap(&["embedded", "--descriptor", text(&descriptor), "--verify", text(&index)]);
    command.args(["--server", &server.to_string()]).args(more);
    command
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Waits for a process, and kills it when it does not end.
pub fn wait(mut child: Child) -> Output {
    let deadline = Instant::now() + LONG;
    let readers = (child.stdout.take().map(reader), child.stderr.take().map(reader));
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            let status = child.wait().unwrap();
            let log = readers.1.map(|reader| reader.join().unwrap()).unwrap_or_default();
            panic!("the process did not end within {LONG:?} ({status}): {}", String::from_utf8_lossy(&log));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let read = |reader: Option<std::thread::JoinHandle<Vec<u8>>>| reader.map(|r| r.join().unwrap()).unwrap_or_default();
    Output { status, stdout: read(readers.0), stderr: read(readers.1) }
}

fn reader(mut stream: impl std::io::Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Runs to the end, and returns the exit code, the JSON on stdout, and the log.
pub fn run(mut command: Command) -> (i32, Value, String) {
    finish(command.spawn().unwrap())
}

pub fn finish(child: Child) -> (i32, Value, String) {
    let output = wait(child);
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    let json = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    let code = output.status.code().unwrap_or_else(|| panic!("{}: {log}", output.status));
    (code, json, log)
}

/// Asserts that a clone of `image` found every page right.
pub fn assert_verified(image: &Image, (code, report, log): &(i32, Value, String)) {
    assert_eq!(*code, 0, "{report}\n{log}");
    assert_eq!(report["mismatches"], 0, "{report}\n{log}");
    assert_eq!(report["verified"], image.memory.frame_count().get(), "{report}\n{log}");
}

/// Waits until `condition` holds.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Asks an admin socket for the status.
pub fn status(admin: &Path) -> Option<Value> {
    let answer = memtap::admin::ask(admin, &serde_json::json!({"cmd": "status"})).ok()?;
    Some(answer["status"].clone())
}

/// The mode of a file, without its kind.
pub fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Reserves 2 MiB pages for a test, or says why that cannot be.
pub fn reserve_huge_pages(count: u64) -> Result<(), String> {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let read = |name: &str| -> Result<u64, String> {
        let text = std::fs::read_to_string(format!("{path}/{name}")).map_err(|error| error.to_string())?;
        text.trim().parse().map_err(|_| format!("{name} is {text:?}"))
    };
    if read("free_hugepages")? < count {
        let wanted = read("nr_hugepages")? + count;
        std::fs::write(format!("{path}/nr_hugepages"), wanted.to_string()).map_err(|error| error.to_string())?;
    }
    match read("free_hugepages")? {
        free if free < count => Err(format!("{count} are needed, {free} could be had")),
        _ => Ok(()),
    }
}

/// A number without a pattern.
pub fn noise(number: u64) -> u64 {
    let z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 27)
}
