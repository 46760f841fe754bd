//! `snowflock capture xl` and `fork xl` against a script that behaves as xl does: what becomes of the capture, and above all of the
//! domain, which must run in the end whatever happens; and by what configuration clones are made. Where there is no Xen a clone's
//! memtap fails, so here they never run, and must all be destroyed again. Real clones of the real xl are those of `tests/xen/run`.
#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod fake;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use descriptor::Descriptor;
use descriptor::import::xen::stream::Stream;
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
    failed(fake.snowflock(&["capture", "xl", "99", "-o", "x"]), "there is no domain \"99\"");
    failed(fake.snowflock(&["capture", "xl", "nobody", "-o", "x"]), "there is no domain \"nobody\"; `xl list` shows");
    failed(fake.snowflock(&["capture", "xl", "-o", "x", "--", "-l"]), "\"-l\" is no name or number of a domain");
    failed(fake.snowflock(&["capture", "xl", "web", "-o", "x", "--xl", "/nowhere/xl"]), "works in dom0 alone");
    fs::write(fake.capture_file("xen"), "").unwrap();
    failed(fake.capture(&[]), "web.xen is there already; --force replaces it");
    fake.set_state("--p---");
    failed(fake.capture(&["--force"]), "web is paused, and cannot be captured; `xl unpause` lets it go on");
    assert_eq!(fake.state(), "--p---");
}

#[test]
fn clones_have_identities_and_are_destroyed_when_they_cannot_run() {
    let fake = Fake::new();
    let output = fake.snowflock(&["fork", "xl", "web", "--clones", "3"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("clone-1: failed, see the logs in") && said.contains("memtap of clone-1 ended with exit code 1"),
        "{said}"
    );
    let names = ["clone-1", "clone-2", "clone-3"];
    let configs: Vec<Value> = names.map(|name| config(&fake.restored_from(name))).into_iter().collect();
    let name = |config: &Value| config["c_info"]["name"].as_str().unwrap().to_owned();
    assert_eq!(configs.iter().map(name).collect::<Vec<_>>(), names);
    let uuids: HashSet<&str> = configs.iter().map(|config| config["c_info"]["uuid"].as_str().unwrap()).collect();
    assert_eq!(uuids.len(), 3);
    assert_eq!(fake.destroyed(), ["11", "12", "13"]);
    assert!(!fake.has_clones() && fake.state() == RUNNING && fake.files().is_empty());
}

#[test]
fn a_template_makes_the_clones() {
    let fake = Fake::new();
    fake.write("web.cfg", "name = 'web'\nvcpus = 1\ndisk = ['/dev/vg/{name},raw,xvda,rw']\nvif = ['bridge=xenbr0']\n");
    let fork = ["fork", "xl", "web", "--clones", "2", "--name", "w-{id}", "--config", "web.cfg", "-o", "kept"];
    assert_eq!(fake.snowflock(&fork).output().unwrap().status.code(), Some(1));
    let text = String::from_utf8(fake.restored_from("w-2")).unwrap();
    assert!(text.contains("\nname = \"w-2\"\n") && text.contains("disk = ['/dev/vg/w-2,raw,xvda,rw']"), "{text}");
    assert!(text.contains("vif = [ \"mac=00:16:3e:") && text.contains(",bridge=xenbr0\" ]"), "{text}");
    assert_eq!(fake.files(), ["kept.snow", "kept.snowidx", "kept.xen", "web.cfg"]);

    let run = ["run", "xl", "--descriptor", "kept.snow", "--server", "unix:/nowhere", "--name", "other-7"];
    assert_eq!(fake.snowflock(&run).output().unwrap().status.code(), Some(1));
    assert_eq!(config(&fake.restored_from("other-7"))["c_info"]["name"], "other-7");
    assert!(!fake.has_clones());
}

#[test]
fn clones_that_would_do_harm_are_refused_before_anything_is_touched() {
    let fake = Fake::new();
    let refused = |arguments: &[&str], words: &str| {
        let fork = [&["fork", "xl", "web", "-o", "kept"], arguments].concat();
        let output = fake.snowflock(&fork).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(words), "{said}");
    };
    fake.write("web.cfg", "vcpus = 2");
    refused(&["--config", "web.cfg"], "vcpus is 2 in web.cfg and 1 in the parent");
    fake.write("web.cfg", "vcpus = ");
    refused(&["--config", "web.cfg"], "web.cfg is no configuration of xl: line 1: expected a number");
    refused(&["--name", "Domain-0"], "there is a domain Domain-0 already");
    refused(&["--name", "a b"], "\"a b\" is no name for a clone");
    refused(&["--name", "same", "--clones", "2"], "\"same\" would be the name of all clones; put {id} into --name");
    refused(&["--name", "{id}"], "\"1\" is no name for a clone");
    fake.set_config(r#", "disks": [{"pdev_path": "/dev/vg/web", "readwrite": 1}]"#);
    refused(&[], "the clones would write to /dev/vg/web together and with their parent");
    fake.set_config(r#", "pcidevs": [{"bus": 3}]"#);
    refused(&["--share-disks"], "devices of the host (PCI)");
    assert_eq!(fake.files(), ["web.cfg"]);
}

#[test]
fn a_clone_that_xl_refuses_takes_the_others_with_it() {
    let fake = Fake::new();
    fake.behave("unrestorable");
    let output = fake.snowflock(&["fork", "xl", "web", "--clones", "2"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("`xl restore` ended with exit code 3") && said.contains("no memory"), "{said}");
    assert_eq!((fake.has_clones(), fake.state().as_str()), (false, RUNNING));
}

#[test]
fn a_clone_whose_number_xl_does_not_tell_is_destroyed_by_its_name() {
    let fake = Fake::new();
    fake.behave("mute");
    let output = fake.snowflock(&["fork", "xl", "web", "--name", "web-7"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("`xl list` ended with exit code 1") && said.contains("no answer"), "{said}");
    assert_eq!((fake.destroyed(), fake.has_clones()), (vec!["web-7".to_owned()], false));
}

/// The configuration in a stream for `xl restore`.
fn config(mut stream: &[u8]) -> Value {
    let stream = Stream::parse(&mut stream).unwrap();
    serde_json::from_str(&stream.config.unwrap()).unwrap()
}
