//! `snowflock capture xl` against a script that behaves as xl does: what becomes of the capture, and above all of the domain, which
//! must run in the end whatever happens. The real xl is used by `tests/xen/run`.
#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod fake;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use descriptor::Descriptor;
use serde_json::Value;

use self::fake::{Fake, RUNNING};

#[test]
fn a_domain_is_captured_live() {
    let fake = Fake::new();
    let output = fake.capture(&["--json", "--server", "tcp://10.0.0.1:7700"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["method"], &report["parent"]), (&"migrate".into(), &"web".into()));
    let pause = report["pause_us"].as_u64().unwrap();
    assert!(report["suspending_us"].is_u64() && (1..60_000_000).contains(&pause), "{report}");

    let descriptor = Descriptor::read(&fake.capture_file("snow")).unwrap();
    assert_eq!((descriptor.identity.pause_us, descriptor.servers.len()), (Some(pause), 1));
    let stream = fake.capture_file("xen");
    assert_eq!(fs::read(&stream).unwrap(), fake.stream());
    assert_eq!(fs::metadata(&stream).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fake.files(), ["web.snow", "web.snowidx", "web.xen"]);
    assert_eq!(fake.state(), RUNNING);
}

#[test]
fn what_cannot_be_migrated_is_saved() {
    let fake = Fake::new();
    fake.behave("broken");
    let output = fake.capture(&["--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["method"], "save");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("not by migrate: `xl migrate` ended with exit code 1") && said.contains("no logdirty"),
        "{said}"
    );
    assert_eq!(fs::read(fake.capture_file("xen")).unwrap(), fake.stream());
    assert_eq!(fake.state(), RUNNING);

    let refused = fake.capture(&["--method", "migrate", "--force"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(fake.state(), RUNNING);
}

#[test]
fn whoever_breaks_off_leaves_a_domain_that_runs() {
    for method in ["migrate", "save"] {
        let fake = Fake::new();
        fake.behave("slow");
        let mut capture = fake.start(&["--method", method]);
        fake.wait_for("the stream to begin", || fake.taken() > 1000);
        capture.interrupt();
        assert_eq!(capture.end().code(), Some(130), "{method}");
        assert_eq!(fake.state(), RUNNING, "{method}");
        assert!(fake.files().is_empty(), "{method}: {:?}", fake.files());
    }
}

#[test]
fn a_capture_that_is_killed_leaves_a_domain_that_runs() {
    for method in ["migrate", "save"] {
        let fake = Fake::new();
        fake.behave("slow");
        let mut capture = fake.start(&["--method", method]);
        fake.wait_for("the stream to begin", || fake.taken() > 1000);
        capture.kill();
        fake.wait_for("xl to give up", || !fake.is_busy());
        assert_eq!(fake.state(), RUNNING, "{method}");
    }
}

#[test]
fn a_domain_that_was_left_suspended_is_resumed() {
    for method in ["migrate", "save"] {
        let fake = Fake::new();
        fake.behave("crashing");
        let output = fake.capture(&["--method", method]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("web was left suspended, having xl resume it"), "{said}");
        assert_eq!((output.status.code(), fake.state().as_str()), (Some(1), RUNNING), "{said}");
    }
}

#[test]
fn errors_say_what_to_do() {
    let fake = Fake::new();
    let failed = |mut command: std::process::Command, words: &str| {
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(words), "{said}");
    };
    failed(fake.snowflock(&["capture", "xl", "nobody", "-o", "x"]), "there is no domain \"nobody\"; `xl list` shows");
    failed(fake.snowflock(&["capture", "xl", "-o", "x", "--", "-l"]), "\"-l\" is no name or number of a domain");
    failed(fake.snowflock(&["capture", "xl", "web", "-o", "x", "--xl", "/nowhere/xl"]), "works in dom0 alone");
    fs::write(fake.capture_file("xen"), "").unwrap();
    failed(fake.capture(&[]), "web.xen is there already; --force replaces it");
    fake.set_state("--p---");
    failed(fake.capture(&["--force"]), "web is paused, and cannot be captured; `xl unpause` lets it go on");
    assert_eq!(fake.state(), "--p---");
}
