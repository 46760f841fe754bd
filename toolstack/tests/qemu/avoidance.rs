//! Which frames a real Linux holds free, told from its stopped memory: against what its own kernel says, and by overwriting every
//! one of them with garbage, again and again, under processes that churn memory and check it.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use descriptor::image::ImageReader;
use descriptor::import::qemu::qmp::Qmp;
use descriptor::import::raw::{self, RawImage};
use descriptor::introspect::{Class, Fill, Introspection, Surveyor};
use descriptor::vm::Hypervisor;
use descriptor::{ImageId, PAGE_SIZE};
use serde_json::json;

use crate::LONG;
use crate::guest::{Lab, Parent};

/// Stops of a guest whose free frames are overwritten each time.
const STOPS: u64 = 20;

/// `KPF_BUDDY` of Linux's include/uapi/linux/kernel-page-flags.h: in a free block.
const BUDDY: u64 = 1 << 10;

#[test]
fn free_frames_of_linux_6_1_hold_nothing() {
    checked("vmlinuz", &["-smp", "2"], "", 0xd0);
}

#[test]
fn free_frames_of_linux_6_12_hold_nothing() {
    checked("vmlinuz-6.12", &[], "", 0xd0);
}

/// A kernel that zeroes pages when it frees them does not when it takes them, so clones must find zeros there, as they do.
#[test]
fn free_frames_are_zero_where_the_kernel_relies_on_it() {
    checked("vmlinuz-6.12", &[], "init_on_free=1", 0);
}

#[test]
fn poison_in_free_frames_is_noticed() {
    let Some(mut guest) = Guest::boot("vmlinuz", &[], "page_poison=1") else { return };
    guest.stop();
    let found = guest.introspect();
    assert_eq!(found.fill, Fill::Poison(0xaa));
}

fn checked(kernel: &str, machine: &[&str], cmdline: &str, filling: u8) {
    let Some(mut guest) = Guest::boot(kernel, machine, cmdline) else { return };
    guest.agrees_with_its_kernel();
    guest.parent.console.tell(b'C');
    guest.works_for(300);
    let garbage = [filling; PAGE_SIZE as usize];
    let mut avoided = 0;
    for stop in 0..STOPS {
        // Not at the same point of the workers' rounds.
        guest.works_for(20 + stop * 37 % 190);
        guest.stop();
        let found = guest.introspect();
        for frame in found.free.runs().flat_map(|run| run.frames()) {
            guest.memory.write_all_at(&garbage, frame.address()).unwrap();
        }
        avoided += found.free.count().get();
        guest.go_on();
    }
    assert!(avoided > STOPS * 1000, "{avoided} free frames in {STOPS} stops");
    guest.works_for(1000);
    guest.parent.console.tell(b'F');
    guest.parent.console.assert_full();
    guest.parent.console.assert_churned(STOPS);
}

/// A guest whose memory is a file that we can read and write.
struct Guest {
    parent: Parent,
    qmp: Qmp,
    memory: File,
    path: PathBuf,
}

impl Guest {
    fn boot(kernel: &str, machine: &[&str], cmdline: &str) -> Option<Self> {
        let lab = match Lab::find("qemu-10").and_then(|lab| lab.with_kernel(kernel)) {
            Ok(lab) => lab,
            Err(reason) => {
                let _ = writeln!(io::stderr(), "SKIPPED free frames of {kernel}: {reason}");
                return None;
            }
        };
        let parent = Parent::boot_with_memory_file(&lab, machine, cmdline);
        let path = parent.memory_file();
        let memory = File::options().read(true).write(true).open(&path).unwrap();
        let qmp = Qmp::connect(&parent.qmp(), LONG).unwrap();
        Some(Self { parent, qmp, memory, path })
    }

    fn stop(&mut self) {
        self.qmp.execute("stop", json!({})).unwrap();
    }

    fn go_on(&mut self) {
        self.qmp.execute("cont", json!({})).unwrap();
    }

    fn works_for(&self, milliseconds: u64) {
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
    }

    /// What its memory says while it is stopped.
    fn introspect(&self) -> Introspection {
        let raw = RawImage {
            file: self.path.clone(),
            regions: Vec::new(),
            image: ImageId::from_bytes([7; 16]),
            parent: String::new(),
            servers: Vec::new(),
        };
        let mut surveyor = Surveyor::default();
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let (_, index) =
            raw::import(&raw, folder, |image, frames| surveyor.zero_frames(image, frames, &|_| ())).unwrap();
        let image = ImageReader::new(index, folder).unwrap();
        surveyor.introspect(&image, Hypervisor::Raw).unwrap_or_else(|refusal| panic!("refused: {refusal}"))
    }

    /// Compares with the kernel's own flags, which the guest has read just before it is stopped.
    fn agrees_with_its_kernel(&mut self) {
        self.parent.console.ask(b'D');
        self.parent.console.ask(b'W');
        self.parent.console.ask(b'K');
        self.stop();
        let found = self.introspect();
        self.go_on();
        let flags = self.parent.console.frame_flags();
        let classes: Vec<Class> = found.classes().flat_map(|(_, classes)| classes.to_vec()).collect();
        assert!(flags.len() >= classes.len(), "{} flags of {} frames", flags.len(), classes.len());
        let mut missed = 0;
        for (frame, (class, flags)) in classes.iter().zip(flags).enumerate() {
            match class {
                Class::Free => assert!(flags & BUDDY != 0, "frame {frame:#x} is not free: flags {flags:#x}"),
                // On a list of a processor: no flag says so, but any would say something else.
                Class::PerCpuFree => assert_eq!(flags, 0, "frame {frame:#x} is not free: flags {flags:#x}"),
                _ => missed += usize::from(flags & BUDDY != 0),
            }
        }
        assert_eq!(missed, 0, "free frames that were not found");
        assert!(found.counts()[Class::PerCpuFree as usize].get() > 0, "no processor had a free page");
    }
}
