//! Captures of a QEMU that is played by a thread, so that it can fail as no real one does when asked to.

use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::{fs, thread};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::{Value, json};

use super::*;
use crate::import::qemu::qmp::QmpError;
use crate::import::qemu::stream::testing::{StreamBuilder, sample};

/// What the QEMU is like, and what becomes of it.
struct Fake {
    version: (u32, u32),
    running: bool,
    capabilities: Vec<(String, bool)>,
    bandwidth: u64,
    /// It refuses background snapshots, in these words.
    refuses: Option<&'static str>,
    /// Migrations fail after the vCPUs were stopped.
    fails: bool,
    /// It exits when a migration begins.
    exits: bool,
    /// What migrations write.
    stream: Vec<u8>,
    backend: Option<PathBuf>,
    status: &'static str,
    passed: Option<OwnedFd>,
    commands: Vec<String>,
}

impl Fake {
    fn new(version: (u32, u32)) -> Self {
        let mut capabilities = vec!["background-snapshot", "x-ignore-shared", "events", "xbzrle"];
        if version.0 >= 9 {
            capabilities.push("mapped-ram");
        }
        // A management tool has turned xbzrle on, which must be off in a capture and on again afterwards.
        let capabilities = capabilities.into_iter().map(|name| (name.to_owned(), name == "xbzrle")).collect();
        Self {
            version,
            running: true,
            capabilities,
            bandwidth: 42,
            refuses: None,
            fails: false,
            exits: false,
            stream: sample(),
            backend: None,
            status: "none",
            passed: None,
            commands: Vec::new(),
        }
    }

    fn is_on(&self, name: &str) -> bool {
        self.capabilities.iter().any(|(capability, state)| capability == name && *state)
    }

    /// Plays until the client is gone, and returns what has become of it.
    fn serve(mut self, path: &Path) -> JoinHandle<Self> {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let version = json!({ "major": self.version.0, "minor": self.version.1, "micro": 0 });
            writeln!(socket, "{}", json!({ "QMP": { "version": { "qemu": version } } })).unwrap();
            let mut received = Vec::new();
            while self.receive(&socket, &mut received) {
                while let Some(end) = received.iter().position(|byte| *byte == b'\n') {
                    let line: Value = serde_json::from_slice(&received.drain(..=end).collect::<Vec<u8>>()).unwrap();
                    let command = line["execute"].as_str().unwrap();
                    if !command.starts_with("query-") {
                        self.commands.push(command.to_owned());
                    }
                    if self.exits && command == "migrate" {
                        return self;
                    }
                    let mut answer = match self.execute(command, &line["arguments"], &mut socket) {
                        Ok(value) => json!({ "return": value }),
                        Err(text) => json!({ "error": { "class": "GenericError", "desc": text } }),
                    };
                    answer["id"] = line["id"].clone();
                    writeln!(socket, "{answer}").unwrap();
                }
            }
            self
        })
    }

    fn receive(&mut self, socket: &UnixStream, received: &mut Vec<u8>) -> bool {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let count =
            rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::empty());
        let count = count.map_or(0, |message| message.bytes);
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(mut fds) = message {
                self.passed = fds.next();
            }
        }
        received.extend_from_slice(&bytes[..count]);
        count > 0
    }

    fn execute(&mut self, command: &str, arguments: &Value, socket: &mut UnixStream) -> Result<Value, String> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(match command {
            "query-status" => json!({ "running": self.running }),
            "query-name" => json!({ "name": "parent" }),
            "query-memdev" => match &self.backend {
                Some(path) => json!([{ "id": "pc.ram", "share": true, "size": fs::metadata(path).unwrap().len() }]),
                None => json!([{ "id": "pc.ram", "share": false, "size": 32768 }]),
            },
            "qom-get" if text(&arguments["property"]) == "mem-path" => json!(self.backend.as_ref().unwrap()),
            "qom-get" => return Err("no such property".to_owned()),
            "query-migrate-capabilities" => {
                let entry = |(name, state): &(String, bool)| json!({ "capability": name, "state": state });
                self.capabilities.iter().map(entry).collect()
            }
            "migrate-set-capabilities" => {
                for entry in arguments["capabilities"].as_array().unwrap() {
                    let on = entry["state"] == true;
                    if let Some(words) = self.refuses.filter(|_| on && entry["capability"] == "background-snapshot") {
                        return Err(words.to_owned());
                    }
                    let capability = self.capabilities.iter_mut().find(|(name, _)| entry["capability"] == *name);
                    capability.unwrap().1 = on;
                }
                json!({})
            }
            "query-migrate-parameters" => json!({ "max-bandwidth": self.bandwidth, "tls-creds": "" }),
            "migrate-set-parameters" => {
                self.bandwidth = arguments["max-bandwidth"].as_u64().unwrap();
                json!({})
            }
            "add-fd" => json!({ "fdset-id": 5 }),
            "getfd" | "closefd" | "remove-fd" => json!({}),
            "migrate" => {
                let uri = text(&arguments["uri"]);
                assert_eq!(uri, if self.version.0 < 9 { "fd:snowflock-capture" } else { "file:/dev/fdset/5" });
                assert!(!self.is_on("xbzrle"));
                let mut file = File::from(self.passed.take().unwrap());
                file.write_all(&self.stream).unwrap();
                let ran = std::mem::take(&mut self.running);
                if ran {
                    event(socket, "STOP", 1_000_000);
                }
                self.status = if self.fails { "failed" } else { "completed" };
                if ran && !self.fails && self.is_on("background-snapshot") {
                    self.running = true;
                    event(socket, "RESUME", 1_006_100);
                }
                json!({})
            }
            "cont" => {
                self.running = true;
                event(socket, "RESUME", 1_250_000);
                json!({})
            }
            "query-migrate" => json!({ "status": self.status, "error-desc": "the disk is full" }),
            "qmp_capabilities" => json!({}),
            other => return Err(format!("The command {other} has not been found")),
        })
    }

    /// True when everything is as it was before.
    fn is_restored(&self) -> bool {
        self.bandwidth == 42 && self.capabilities.iter().all(|(name, state)| *state == (name == "xbzrle"))
    }
}

fn event(socket: &mut UnixStream, name: &str, at_us: u64) {
    let timestamp = json!({ "seconds": at_us / 1_000_000, "microseconds": at_us % 1_000_000 });
    writeln!(socket, "{}", json!({ "event": name, "timestamp": timestamp })).unwrap();
}

/// Captures `fake`: what came of it, what became of the parent, what was said, and which files there are.
fn run_capture(fake: Fake, method: Option<Method>) -> (Result<Captured, CaptureError>, Fake, Vec<String>, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let qmp = folder.path().join("qmp");
    let served = fake.serve(&qmp);
    fs::create_dir(folder.path().join("out")).unwrap();
    let options = CaptureOptions { qmp, method, name: folder.path().join("out/x.y"), replace: false, disks: vec![] };
    let mut said = Vec::new();
    let captured = capture(&options, ImageId::from_bytes([1; 16]), &mut |progress| {
        match progress {
            Progress::FellBack(method, error) => said.push(format!("not {method}: {error}")),
            Progress::Method(method) => said.push(method.to_string()),
            _ => {}
        }
        ControlFlow::Continue(())
    });
    if let Ok(captured) = &captured {
        let scan = |image: &_, frames: &_| crate::image::zero_frames(image, frames, &|_| ());
        super::super::import(&captured.files, captured.origin.clone(), &folder.path().join("out"), scan).unwrap();
    }
    let mut files: Vec<String> = fs::read_dir(folder.path().join("out"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    (captured, served.join().unwrap(), said, files)
}

#[test]
fn the_parent_goes_on_as_before() {
    for version in [(7, 2), (10, 0)] {
        let (captured, parent, _, files) = run_capture(Fake::new(version), Some(Method::BackgroundSnapshot));
        let captured = captured.unwrap();
        assert_eq!(captured.origin.pause, Some(Duration::from_micros(6100)));
        assert_eq!(captured.origin.captured, SystemTime::UNIX_EPOCH + Duration::from_secs(1));
        assert_eq!(
            (captured.origin.parent.as_str(), captured.origin.version.as_str()),
            ("parent", &*format!("{}.{}.0", version.0, version.1))
        );
        assert!(parent.running && parent.is_restored());
        assert!(!parent.commands.contains(&"cont".to_owned()));
        assert_eq!(files, ["x.y.qemu"]);
    }
}

#[test]
fn the_next_method_is_tried_where_one_is_refused() {
    let refuses = Some("Background-snapshot is not supported by host kernel");
    let (captured, parent, said, files) = run_capture(Fake { refuses, ..Fake::new((10, 0)) }, None);
    let captured = captured.unwrap();
    assert_eq!(captured.method, Method::Precopy);
    assert_eq!(captured.origin.pause, Some(Duration::from_millis(250)));
    assert!(parent.running && parent.is_restored());
    assert_eq!(files, ["x.y.qemu"]);
    let beginnings =
        ["mapped-ram", "not mapped-ram: QEMU cannot track", "background-snapshot", "not background-snapshot: "];
    assert!(said.iter().zip(beginnings).all(|(line, beginning)| line.starts_with(beginning)), "{said:#?}");
    assert!(said[1].contains("vm.unprivileged_userfaultfd"));

    let (captured, parent, _, files) = run_capture(Fake { refuses, ..Fake::new((10, 0)) }, Some(Method::MappedRam));
    assert!(matches!(captured, Err(CaptureError::WriteTracking { .. })), "what was asked for is not replaced");
    assert!(parent.running && parent.is_restored() && files.is_empty());
}

#[test]
fn a_failed_migration_leaves_nothing_behind() {
    let (captured, parent, _, files) = run_capture(Fake { fails: true, ..Fake::new((7, 2)) }, Some(Method::Precopy));
    let error = captured.unwrap_err();
    assert!(error.to_string().contains("the disk is full"), "{error}");
    assert!(parent.running && parent.is_restored() && files.is_empty());
}

#[test]
fn shared_memory_is_copied_while_the_parent_stands_still() {
    let folder = tempfile::tempdir().unwrap();
    let memory = folder.path().join("memory");
    fs::write(&memory, [3; 8 * 4096]).unwrap();
    let stream = StreamBuilder::new(&["x-ignore-shared"]).ram_start(8).block("pc.ram", 8).be64(0);
    let stream = stream.end_of_section().devices().bytes;
    let fake = Fake { stream, backend: Some(memory), ..Fake::new((7, 2)) };
    let (captured, parent, _, files) = run_capture(fake, Some(Method::IgnoreShared));
    assert_eq!(captured.unwrap().files.ram.len(), 1);
    assert!(parent.running && parent.is_restored());
    assert_eq!(files, ["x.y.qemu", "x.y.ram"]);
}

#[test]
fn a_parent_that_stood_still_is_not_started() {
    let (captured, parent, ..) = run_capture(Fake { running: false, ..Fake::new((10, 0)) }, None);
    let captured = captured.unwrap();
    assert_eq!((captured.method, captured.origin.pause), (Method::MappedRam, None));
    assert!(!parent.running && parent.is_restored());
    let (captured, parent, ..) = run_capture(Fake { running: false, ..Fake::new((7, 2)) }, None);
    assert_eq!(captured.unwrap().method, Method::Precopy);
    assert!(!parent.running && parent.is_restored());
}

#[test]
fn a_parent_that_exits_is_reported() {
    let (captured, _, _, files) = run_capture(Fake { exits: true, ..Fake::new((7, 2)) }, Some(Method::Precopy));
    let error = captured.unwrap_err();
    let CaptureError::FailedAndNotRestored { restore: QmpError::Closed { .. }, .. } = error else {
        panic!("{error}");
    };
    assert!(files.is_empty());
}

#[test]
fn a_parent_in_migration_and_files_in_the_way_are_left_alone() {
    let (captured, parent, ..) = run_capture(Fake { status: "active", ..Fake::new((7, 2)) }, None);
    assert!(matches!(captured, Err(CaptureError::Busy(status)) if status == "active"));
    assert!(parent.running && parent.commands == ["qmp_capabilities"]);

    let folder = tempfile::tempdir().unwrap();
    let (qmp, name) = (folder.path().join("qmp"), folder.path().join("x"));
    fs::write(folder.path().join("x.qemu"), "precious").unwrap();
    let served = Fake::new((7, 2)).serve(&qmp);
    let options = CaptureOptions { qmp, method: None, name, replace: false, disks: vec![] };
    let refused = capture(&options, ImageId::from_bytes([1; 16]), &mut |_| ControlFlow::Continue(()));
    assert!(matches!(refused, Err(CaptureError::Write { .. })));
    assert_eq!(fs::read(folder.path().join("x.qemu")).unwrap(), b"precious");
    assert!(served.join().unwrap().running);
}

#[test]
fn a_capture_that_is_broken_off_lets_the_parent_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let (qmp, memory) = (folder.path().join("qmp"), folder.path().join("memory"));
    fs::write(&memory, [3; 4096]).unwrap();
    let served = Fake { backend: Some(memory), ..Fake::new((7, 2)) }.serve(&qmp);
    let options = CaptureOptions {
        qmp,
        method: Some(Method::IgnoreShared),
        name: folder.path().join("x"),
        replace: false,
        disks: vec![],
    };
    let broken_off = capture(&options, ImageId::from_bytes([1; 16]), &mut |progress| match progress {
        Progress::Copying { .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert!(matches!(broken_off, Err(CaptureError::BrokenOff)));
    let parent = served.join().unwrap();
    assert!(parent.running && parent.is_restored());
    assert!(!folder.path().join("x.qemu").exists() && !folder.path().join("x.ram").exists());
}
