//! Which frames a real Linux holds free, told from its stopped memory: against what its own kernel says, and by overwriting every
//! one of them with garbage, again and again, under processes that churn memory and check it.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use descriptor::image::ImageReader;
use descriptor::import::qemu::qmp::Qmp;
use descriptor::import::raw::{self, RawImage};
use descriptor::introspect::{Class, Fill, Introspection, Refusal, Surveyor, is_note};
use descriptor::vm::Hypervisor;
use descriptor::{Gfn, ImageId, PAGE_SIZE};
use serde_json::{Value, json};

use crate::command::Place;
use crate::guest::{Lab, Parent};
use crate::{LONG, poll};

/// Stops of a guest whose free frames are overwritten each time.
const STOPS: u64 = 20;

/// Where the text of a note begins.
const NOTE_TEXT: usize = 24;

/// Of Linux's include/uapi/linux/kernel-page-flags.h, `KPF_BUDDY`: in a free block; and `KPF_OFFLINE`: taken by a balloon.
const BUDDY: u64 = 1 << 10;
const OFFLINE: u64 = 1 << 23;

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

/// A balloon takes a quarter of the memory, and gives it back: meanwhile its frames need no fetch.
#[test]
fn what_a_balloon_took_holds_nothing() {
    const MIB: u64 = 64;
    let Some(mut guest) = Guest::boot("vmlinuz", &["-device", "virtio-balloon-pci"], "") else { return };
    assert_eq!(guest.parent.console.ask(b'B'), "BALLOON modules=6");
    guest.has_memory(256 - MIB);
    guest.agrees_with_its_kernel();
    guest.parent.console.tell(b'C');
    guest.works_for(300);
    guest.stop();
    let found = guest.introspect();
    assert_eq!(found.counts()[Class::Offline as usize].get(), (MIB << 20) / PAGE_SIZE);
    for frame in found.free.runs().flat_map(|run| run.frames()) {
        guest.memory.write_all_at(&[0xd0; PAGE_SIZE as usize], frame.address()).unwrap();
    }
    guest.go_on();
    guest.has_memory(256);
    guest.works_for(1000);
    guest.parent.console.tell(b'F');
    guest.parent.console.assert_full();
    guest.parent.console.assert_churned(1);
    guest.stop();
    assert_eq!(guest.introspect().counts()[Class::Offline as usize].get(), 0, "all was given back");
}

/// What a capture believes of a machine that runs Linux, and not of one that was reset a moment ago: its memory is the same, but its
/// firmware and its loader use what was free for the kernel that is gone. Once another has booted, what the first has left
/// behind must not mislead.
#[test]
fn a_machine_that_was_reset_has_no_free_frames_until_its_kernel_runs() {
    let Some(mut guest) = Guest::boot("vmlinuz", &["-smp", "2"], "") else { return };
    let place = Place::new();
    let report = guest.capture(&place, "running");
    assert!(report["free_bytes"].as_u64() > Some(1 << 20), "{report}");
    guest.stop();
    let left = guest.notes();
    assert!(!left.is_empty(), "a running kernel has a note");
    guest.qmp.execute("set-action", json!({"reboot": "reset"})).unwrap();
    guest.qmp.execute("system_reset", json!({})).unwrap();
    guest.go_on();
    guest.works_for(50);
    guest.stop();
    assert_eq!(guest.notes(), left, "the old kernel's note is there, as is all that it names");
    assert!(guest.try_introspect().is_ok(), "which memory alone cannot tell from a kernel that runs");
    let report = guest.capture(&place, "reset");
    assert_eq!(report["free_bytes"], 0, "{report}");
    assert!(report["avoidance"].as_str().unwrap().contains("no vCPU uses the page tables of Linux 6.1"), "{report}");
    assert!(report["zero_bytes"].as_u64() > Some(20 << 20), "zero frames are told all the same: {report}");

    guest.go_on();
    guest.parent.console.await_boots(2);
    guest.agrees_with_its_kernel();
    guest.stop();
    // Where the new kernel has by chance overwritten the old note, it is put somewhere else.
    let free = guest.introspect().free;
    let mut places = free.runs().map(|run| run.start());
    for (gfn, note) in &left {
        if !guest.notes().contains(&(*gfn, note.clone())) {
            guest.memory.write_all_at(note, places.next().unwrap().address()).unwrap();
        }
    }
    assert!(guest.notes().len() > left.len(), "the notes of two kernels");
    let found = guest.introspect().free;
    guest.go_on();
    assert_eq!(found, free);
}

/// Notes in a real memory that are blanked, lack something, or name other layouts than the kernel's.
#[test]
fn a_note_that_is_not_true_of_the_memory_refuses_the_whole() {
    let Some(mut guest) = Guest::boot("vmlinuz", &[], "") else { return };
    guest.stop();
    let free = guest.introspect().free;
    let notes = guest.notes();
    let refused = |what: &str, change: &dyn Fn(&mut String)| {
        for (gfn, note) in &notes {
            // Any text without changing its length, which stands before it.
            let text = std::str::from_utf8(&note[NOTE_TEXT..]).unwrap().trim_end_matches('\0');
            let mut changed = text.to_owned();
            change(&mut changed);
            assert!(changed != text, "{what}: that is what it says");
            let changed = [&note[..NOTE_TEXT], changed.as_bytes()].concat();
            guest.memory.write_all_at(&changed[..note.len().min(changed.len())], gfn.address()).unwrap();
        }
        let result = guest.try_introspect();
        for (gfn, note) in &notes {
            guest.memory.write_all_at(note, gfn.address()).unwrap();
        }
        match result {
            Ok(found) => panic!("{what}: believed, with {} free frames", found.free.count()),
            Err(refusal) => refusal,
        }
    };
    let set = |key: &'static str, value: &'static str| {
        move |text: &mut String| {
            let at = text.find(&format!("{key}=")).unwrap_or_else(|| panic!("no {key}")) + key.len() + 1;
            text.replace_range(at..at + value.len(), value);
        }
    };
    let lacking = refused("a key is lacking", &|text| *text = text.replace("SIZE(zone)", "SIZE(zoo!)"));
    assert!(matches!(lacking, Refusal::MissingKey(_)), "{lacking}");
    let release = refused("another release", &set("OSRELEASE", "5.4"));
    assert!(matches!(release, Refusal::Release { .. }), "{release}");
    let pages = refused("larger pages", &set("PAGESIZE", "8192"));
    assert!(matches!(pages, Refusal::PageSize(_)), "{pages}");
    for (key, value) in [
        ("SYMBOL(init_top_pgt)", "ffffffffdead1000"),
        ("SYMBOL(mem_section)", "ffffffffdead2000"),
        ("SYMBOL(node_data)", "ffffffffdead3000"),
        ("SIZE(page)", "72"),
        ("OFFSET(page._mapcount)", "40"),
        ("OFFSET(page.private)", "16"),
        ("OFFSET(zone.free_area)", "9"),
        ("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", "-130"),
        ("NUMBER(SECTION_SIZE_BITS)", "25"),
        ("LENGTH(zone.free_area)", "10"),
    ] {
        refused(&format!("{key}={value}"), &set(key, value));
    }
    for (gfn, note) in &notes {
        guest.memory.write_all_at(&vec![0; note.len()], gfn.address()).unwrap();
    }
    assert!(matches!(guest.try_introspect(), Err(Refusal::NoNote)));
    for (gfn, note) in &notes {
        guest.memory.write_all_at(note, gfn.address()).unwrap();
    }
    assert_eq!(guest.introspect().free, free);
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
        let qmp = Qmp::connect(&parent.pilot(), LONG).unwrap();
        Some(Self { parent, qmp, memory, path })
    }

    fn stop(&mut self) {
        self.qmp.execute("stop", json!({})).unwrap();
    }

    fn go_on(&mut self) {
        self.qmp.execute("cont", json!({})).unwrap();
    }

    /// Has the balloon leave so many MiB to the guest.
    fn has_memory(&mut self, mib: u64) {
        self.qmp.execute("balloon", json!({"value": mib << 20})).unwrap();
        let mut actual = || self.qmp.execute("query-balloon", json!({})).unwrap()["actual"].as_u64().unwrap();
        poll(|| (actual() == mib << 20).then_some(())).expect("the balloon has its size");
    }

    fn works_for(&self, milliseconds: u64) {
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
    }

    /// What its memory says while it is stopped.
    fn introspect(&self) -> Introspection {
        self.try_introspect().unwrap_or_else(|refusal| panic!("refused: {refusal}"))
    }

    /// What its memory says while it is stopped, or why that is not believed.
    fn try_introspect(&self) -> Result<Introspection, Refusal> {
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
        surveyor.introspect(&image, Hypervisor::Raw)
    }

    /// The pages with which notes begin, with what they hold.
    fn notes(&self) -> Vec<(Gfn, Vec<u8>)> {
        let mut page = vec![0; PAGE_SIZE as usize];
        let frames = self.memory.metadata().unwrap().len() / PAGE_SIZE;
        let read = |gfn: u64| {
            self.memory.read_exact_at(&mut page, gfn * PAGE_SIZE).unwrap();
            is_note(&page).then(|| (Gfn::new(gfn), page.clone()))
        };
        (0..frames).filter_map(read).collect()
    }

    /// Captures it by the command, whether it runs or stands still; what that says.
    fn capture(&self, place: &Place, name: &str) -> Value {
        let mut capture = place.command(["capture", "qemu", "--json", "-o"]);
        let output = capture.arg(place.scratch().join(name)).arg("--qmp").arg(self.parent.qmp()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
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
                Class::Offline => assert!(flags & OFFLINE != 0, "frame {frame:#x} is not offline: flags {flags:#x}"),
                _ => missed += usize::from(flags & (BUDDY | OFFLINE) != 0),
            }
        }
        assert_eq!(missed, 0, "free or offline frames that were not found");
        assert!(found.counts()[Class::PerCpuFree as usize].get() > 0, "no processor had a free page");
    }
}
