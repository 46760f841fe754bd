//! `memtap xen` where there is no Xen: what it says then. With Xen it is tested by tests/xen/run.

mod common;

use std::path::Path;
use std::process::Command;

use memtap::engine::exit_code;

use common::Image;

#[test]
fn without_xen_it_says_what_is_missing() {
    if Path::new("/dev/xen/privcmd").exists() {
        println!("SKIPPED: this machine has /dev/xen/privcmd, so that Xen would answer");
        return;
    }
    let image = Image::new(64);
    for target in [["--domid", "1"], ["--domain", "web"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_memtap"))
            .args(["xen", "--descriptor"])
            .arg(image.descriptor())
            .args(target)
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit_code::SETUP.into()), "{log}");
        let reason = if target[0] == "--domid" { "control domain (dom0)" } else { "no answer from xenstored" };
        assert!(log.contains(reason), "{log}");
    }
}
