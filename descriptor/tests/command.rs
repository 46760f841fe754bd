//! The `descriptor` command from outside: what it makes, it shows and finds sound; what was damaged, it names; and its exit
//! codes tell these apart.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use descriptor::image::{ImageIndex, ImageReader};
use descriptor::{Descriptor, Gfn};
use serde_json::Value;

const PAGE: usize = 4096;

fn run(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_descriptor")).args(args).current_dir(folder).output().unwrap()
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
