//! The `descriptor` command from outside: what it makes, it shows and finds sound; what was damaged, it names; and its exit
//! codes tell these apart.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use descriptor::image::{ImageIndex, ImageReader};
use descriptor::vm::HypervisorRecord;
use descriptor::working_set::Merged;
use descriptor::{Descriptor, Gfn, ImageId, PageCount};
use serde_json::Value;

const PAGE: usize = 4096;

fn run(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_descriptor")).args(args).current_dir(folder).output().unwrap()
}

fn run_with_input(folder: &Path, args: &[&str], input: &[u8]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_descriptor"));
    command.args(args).current_dir(folder).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // It may have seen enough before it has read everything.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// A folder with `ram` (three of its eight pages are data) and the pair `web` made of it.
fn made() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let pages = [1, 0, 0, 2, 0, 0, 0, 3].map(|byte| [byte; PAGE]);
    fs::write(folder.path().join("ram"), pages.concat()).unwrap();
    let args = ["make", "raw", "ram", "--region", "low@0:16K", "--region", "high@0x100000:16K", "--name", "web"];
    let output =
        run(folder.path(), &[&args[..], &["--server", "tcp://127.0.0.1:7000", "-o", "web", "--json"]].concat());
    assert!(output.status.success(), "{output:?}");
    let made = json(&output);
    assert_eq!((&made["memory_bytes"], &made["zero_bytes"]), (&(8 * PAGE).into(), &(5 * PAGE).into()));
    folder
}

#[test]
fn what_is_made_can_be_read_and_served() {
    let folder = made();
    let descriptor = Descriptor::read(&folder.path().join("web.snow")).unwrap();
    assert_eq!(descriptor.identity.parent, "web");
    assert_eq!(descriptor.servers.len(), 1);
    let reader = ImageReader::open(&folder.path().join("web.snowidx")).unwrap();
    assert_eq!(reader.index().image, descriptor.identity.image);
    let mut page = [0; PAGE];
    reader.read_page(Gfn::new(0x103), &mut page).unwrap();
    assert_eq!(page, [3; PAGE]);
}

#[test]
fn what_qemu_has_not_written_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("stream"), "QEVM\0\0\0\x03\x07\0\0\0\x02pc").unwrap();
    let cut = run(folder.path(), &["make", "qemu-stream", "stream", "-o", "web"]);
    assert_eq!(cut.status.code(), Some(1));
    let said = String::from_utf8_lossy(&cut.stderr);
    assert!(said.contains("the stream ends at offset 0xf") && said.contains("not complete"), "{said}");
    let alone = run(folder.path(), &["make", "qemu", "--qmp", "nowhere", "-o", "web"]);
    assert_eq!(alone.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&alone.stderr).contains("the QMP socket nowhere"), "{alone:?}");
    let unknown = run(folder.path(), &["make", "qemu", "--qmp", "nowhere", "--method", "magic", "-o", "web"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(!folder.path().join("web.snow").exists() && !folder.path().join("web.qemu").exists());
}

/// What `xl save` of Xen 4.17 wrote of a PVH guest with Linux 6.1, but for its pages, of which three are left: one with the clock
/// of its processor, one of its ACPI tables, and the one that it shares with the store.
const XL_SAVE: &[u8] = include_bytes!("data/xen-4.17-pvh.xl");

#[test]
fn streams_of_xl_become_descriptors_and_clones_streams() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("full.save"), XL_SAVE).unwrap();
    let made = run(folder.path(), &["make", "xl-stream", "full.save", "-o", "file"]);
    assert!(made.status.success() && made.stderr.is_empty(), "{made:?}");
    let made = run_with_input(folder.path(), &["make", "xl-stream", "-", "-o", "pipe"], XL_SAVE);
    assert!(made.status.success(), "{made:?}");
    assert_eq!(fs::read(folder.path().join("pipe.xen")).unwrap(), XL_SAVE);

    let [file, pipe] =
        ["file", "pipe"].map(|name| Descriptor::read(&folder.path().join(name).with_extension("snow")).unwrap());
    assert_eq!((&file.memory, &file.records, &file.eager), (&pipe.memory, &pipe.records, &pipe.eager));
    assert_eq!((file.identity.parent.as_str(), file.identity.machine.as_str()), ("lin", "pvh"));
    assert_eq!(file.eager.runs().map(|run| run.start()).collect::<Vec<_>>(), [Gfn::new(0x7a31)]);
    let reader = ImageReader::open(&folder.path().join("pipe.snowidx")).unwrap();
    let mut page = [0; PAGE];
    reader.read_page(Gfn::new(0x7a31), &mut page).unwrap();
    assert!(XL_SAVE.windows(PAGE).any(|window| window == page));

    let exported = run(folder.path(), &["export", "xl", "file.snow", "-o", "hole.save"]);
    assert!(exported.status.success(), "{exported:?}");
    let hole = fs::read(folder.path().join("hole.save")).unwrap();
    assert_eq!(run(folder.path(), &["export", "xl", "pipe.snow", "-o", "-"]).stdout, hole);
    let at = file.records.iter().position(|record| record.name == "libxc/PAGE_DATA").unwrap();
    let bytes =
        |records: &[HypervisorRecord]| records.iter().flat_map(|record| record.data.clone()).collect::<Vec<_>>();
    let (before, pages, after) = (bytes(&file.records[..at]), &file.records[at].data, bytes(&file.records[at + 1..]));
    assert!(XL_SAVE.starts_with(&before) && XL_SAVE.ends_with(&after));
    assert_eq!(hole, [&before, pages, &after].map(Vec::as_slice).concat());
    assert_eq!(pages.len(), 8 + 8 + 2 * (8 + PAGE));
    assert!(!hole.windows(PAGE).any(|window| window == page));
    let again = run(folder.path(), &["export", "xl", "file.snow", "-o", "hole.save"]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("hole.save exists"), "{again:?}");
}

#[test]
fn what_xl_has_not_written_is_refused() {
    let folder = made();
    let failed = |args: &[&str], input: &[u8], words: &str| {
        let output = run_with_input(folder.path(), args, input);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(words), "{said}");
    };
    let make = ["make", "xl-stream", "-", "-o", "x"];
    failed(
        &make,
        b"something else, and long enough to be the header of a stream",
        "there is no xl header at offset 0x0",
    );
    failed(&make, &XL_SAVE[..9000], "the capture is not complete");
    failed(&["make", "xl-stream", "ram", "-o", "x"], b"", "there is no xl header");
    failed(&["make", "xl-stream", "none", "-o", "x"], b"", "cannot look at none");
    failed(&["export", "xl", "web.snow", "-o", "-"], b"", "the descriptor is of Raw, not of Xen");
    fs::write(folder.path().join("x.xen"), "").unwrap();
    failed(&make, XL_SAVE, "x.xen exists");
    assert!(!folder.path().join("x.snow").exists());
}

#[test]
fn memory_that_is_no_linux_has_no_classes() {
    let folder = made();
    for file in ["web.snow", "web.snowidx"] {
        let refused = run(folder.path(), &["inspect", file, "--classes"]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("no VMCOREINFO note"), "{refused:?}");
    }
}

#[test]
fn nothing_is_replaced_without_force() {
    let folder = made();
    let again = run(folder.path(), &["make", "raw", "ram", "-o", "web"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("web.snow exists"), "{again:?}");
    let forced = run(folder.path(), &["make", "raw", "ram", "-o", "web", "--force"]);
    assert!(forced.status.success(), "{forced:?}");
    let said = String::from_utf8_lossy(&forced.stdout).into_owned();
    assert!(said.contains("37.5 %") && said.contains("no VMCOREINFO note"), "{said}");
}

#[test]
fn both_files_can_be_inspected() {
    let folder = made();
    let shown = json(&run(folder.path(), &["inspect", "web.snow", "--json"]));
    assert_eq!(shown["kind"], "descriptor");
    assert_eq!(shown["regions"][1]["name"], "high");
    assert_eq!((&shown["pages"], &shown["data_pages"], &shown["zero_pages"]), (&8.into(), &3.into(), &5.into()));
    let shown = json(&run(folder.path(), &["inspect", "web.snowidx", "--json"]));
    assert_eq!((&shown["kind"], &shown["extents"]), (&"image-index".into(), &2.into()));
    for file in ["web.snow", "web.snowidx"] {
        let text = run(folder.path(), &["inspect", file]);
        let text = String::from_utf8(text.stdout).unwrap();
        assert!(text.contains("62.5 %") && text.contains("high") && text.contains("SECTION"), "{text}");
    }
}

#[test]
fn sound_files_verify() {
    let folder = made();
    for file in ["web.snow", "web.snowidx"] {
        let output = run(folder.path(), &["verify", file, "--image", "--json"]);
        let verified = json(&output);
        assert!(output.status.success() && verified["ok"] == true, "{verified:#}");
        let checks: Vec<&Value> = verified["checks"].as_array().unwrap().iter().map(|check| &check["check"]).collect();
        assert_eq!(checks, ["checksums", "contents", "checksums", "contents", "pair", "files", "image"]);
    }
}

#[test]
fn a_working_set_belongs_to_one_image() {
    let folder = made();
    let index = ImageIndex::read(&folder.path().join("web.snowidx")).unwrap();
    let file = folder.path().join("web.snowws");
    Merged::new(index.image, index.memory.universe()).write(&file).unwrap();
    for given in ["web.snow", "web.snowidx", "web.snowws"] {
        let output = run(folder.path(), &["verify", given, "--json"]);
        let verified = json(&output);
        assert!(output.status.success(), "{verified:#}");
        let is_pair = |check: &&Value| check["check"] == "pair" && check["file"].as_str().unwrap().ends_with("snowws");
        assert_eq!(verified["checks"].as_array().unwrap().iter().filter(is_pair).count(), 1, "{verified:#}");
    }
    for (image, frames) in [
        (ImageId::from_bytes([9; 16]), index.memory.universe()),
        (index.image, PageCount::new(index.memory.universe().get() + 1)),
    ] {
        let write = |folder: &Path| {
            let image = if image == index.image { image_of(folder) } else { image };
            Merged::new(image, frames).write(&folder.join("web.snowws")).unwrap();
        };
        let (check, detail) = fault(write, "web.snow");
        assert!(check == "pair" && detail.contains("the working set is of image"), "{check}: {detail}");
    }
}

fn image_of(folder: &Path) -> ImageId {
    ImageIndex::read(&folder.join("web.snowidx")).unwrap().image
}

/// The check that finds a fault after `damage`, and what it says.
fn fault(damage: impl FnOnce(&Path), file: &str) -> (String, String) {
    let folder = made();
    damage(folder.path());
    let output = run(folder.path(), &["verify", file, "--image", "--json"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let verified = json(&output);
    assert_eq!(verified["ok"], false);
    let checks = verified["checks"].as_array().unwrap();
    let fault = checks.iter().find(|check| check["verdict"] == "FAULT").unwrap();
    let word = |field: &str| fault[field].as_str().unwrap().to_owned();
    (word("check"), word("detail"))
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

#[test]
fn faults_are_found_and_named() {
    let (check, detail) = fault(|folder| change(&folder.join("web.snow"), |bytes| bytes[200] ^= 1), "web.snow");
    assert!(check == "checksums" && detail.contains("section identity"), "{check}: {detail}");

    let (check, detail) = fault(|folder| change(&folder.join("web.snow"), |bytes| bytes.truncate(100)), "web.snow");
    assert!(check == "checksums" && detail.contains("cut short"), "{check}: {detail}");

    let (check, detail) = fault(|folder| change(&folder.join("ram"), |bytes| bytes.truncate(PAGE)), "web.snow");
    assert!(check == "files" && detail.contains("4096 bytes, but 32768"), "{check}: {detail}");

    let (check, detail) = fault(|folder| change(&folder.join("ram"), |bytes| bytes[PAGE + 7] = 1), "web.snowidx");
    assert!(check == "image" && detail.contains("1 frames are called zero"), "{check}: {detail}");

    let others = |folder: &Path| {
        let output = run(folder, &["make", "raw", "ram", "-o", "other"]);
        assert!(output.status.success(), "{output:?}");
        fs::rename(folder.join("other.snowidx"), folder.join("web.snowidx")).unwrap();
    };
    let (check, detail) = fault(others, "web.snow");
    assert!(check == "pair" && detail.contains("the index is of image"), "{check}: {detail}");

    let without_index = |folder: &Path| fs::remove_file(folder.join("web.snowidx")).unwrap();
    let (check, detail) = fault(without_index, "web.snow");
    assert!(check == "image" && detail.contains("without its index"), "{check}: {detail}");

    let wrong_zero = |folder: &Path| {
        let path = folder.join("web.snowidx");
        let mut index = ImageIndex::read(&path).unwrap();
        index.zero.remove(Gfn::new(1));
        index.write(&path).unwrap();
    };
    let (check, detail) = fault(wrong_zero, "web.snowidx");
    assert!(check == "pair" && detail.contains("frame 0x1 is zero in the descriptor"), "{check}: {detail}");
}

#[test]
fn errors_say_what_and_where() {
    let folder = made();
    let failed = |args: &[&str], code: i32, words: &str| {
        let output = run(folder.path(), args);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(words) && output.stdout.is_empty(), "{output:?}");
    };
    failed(&["inspect", "none.snow"], 1, "cannot open none.snow: No such file");
    failed(&["inspect", "ram"], 1, "cannot use ram: not a SnowFlock file");
    failed(&["inspect", "."], 1, "is not a regular file");
    failed(&["make", "raw", "none", "-o", "x"], 1, "cannot open none");
    failed(&["make", "raw", "ram", "--region", "a@0:4K", "-o", "x"], 1, "the regions given take 4096");
    failed(&["make", "raw", "ram", "-o", "none/x"], 1, "none");
    failed(&["make", "raw", "ram", "--region", "a", "-o", "x"], 2, "is not NAME@START:SIZE");
    failed(&["make", "raw", "ram", "--server", "here", "-o", "x"], 2, "neither tcp://HOST:PORT nor unix:PATH");
    failed(&["frobnicate"], 2, "frobnicate");
    assert!(!folder.path().join("x.snow").exists());
    assert!(run(folder.path(), &["--help"]).status.success());
}
