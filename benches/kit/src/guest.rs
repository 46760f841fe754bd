//! A real Linux guest in QEMU, of `tests/lab`: a parent that is captured by our own command, and clones of it behind our own pager.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use descriptor::import::qemu::qmp::Qmp;
use memtap::admin;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::roles;

/// Longer than any step takes on a machine that does ten times as much else.
const LONG: Duration = Duration::from_secs(300);

/// How often it is looked whether something is there.
const LOOK: Duration = Duration::from_millis(2);

/// The laboratory, and what machines of it have.
pub struct Lab {
    dir: PathBuf,
    mib: u64,
}

impl Lab {
    /// The laboratory for machines with so much memory; why it cannot be used, where it is not there.
    pub fn find(mib: u64) -> Result<Self, String> {
        let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
        let target = target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"));
        let dir = std::env::var_os("LAB_DIR").map_or_else(|| target.join("lab"), PathBuf::from);
        for part in ["qemu-10/run", "vmlinuz", "initramfs", "cmdline"] {
            if !dir.join(part).exists() {
                return Err(format!("no {part} in the laboratory; tests/lab fetches it"));
            }
        }
        Ok(Self { dir, mib })
    }

    /// A machine whose console and monitor are in `place`. An eighth of its memory holds what the guest checks.
    fn machine(&self, place: &Path) -> anyhow::Result<Command> {
        let socket = |name: &str| format!("path={},server=on,wait=off", place.join(name).display());
        let cmdline = fs::read_to_string(self.dir.join("cmdline"))?;
        let mut command = Command::new(self.dir.join("qemu-10/run"));
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-accel", "tcg"]);
        command.args(["-machine", "pc-i440fx-7.2", "-m", &self.mib.to_string(), "-serial", "chardev:console"]);
        command.arg("-chardev").arg(format!("socket,id=console,{}", socket("console")));
        command.arg("-chardev").arg(format!("socket,id=qmp,{}", socket("qmp"))).args(["-qmp", "chardev:qmp"]);
        command.arg("-kernel").arg(self.dir.join("vmlinuz")).arg("-initrd").arg(self.dir.join("initramfs"));
        command.arg("-append").arg(format!("{} guest_mib={}", cmdline.trim(), self.mib / 8));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(place.join("qemu.log"))?);
        Ok(command)
    }
}

/// A machine that was in use for a while, captured.
pub struct Capture {
    /// Its descriptor.
    pub descriptor: PathBuf,
    /// The index of its image.
    pub index: PathBuf,
    /// What the capture said.
    pub report: Value,
    _place: TempDir,
}

impl Capture {
    /// Boots a machine, has it used, and captures it.
    pub fn of_a_used_machine(lab: &Lab) -> anyhow::Result<Self> {
        // A short path, for sockets.
        let place = tempfile::tempdir_in("/tmp")?;
        let parent = Killed(lab.machine(place.path())?.spawn().context("starting QEMU")?);
        let mut console = Console::open(&place.path().join("console"))?;
        console.wait("READY")?;
        console.tell(b'U')?;
        println!("the parent: {}", console.wait("USED")?.1);
        // What it does in passing, it has done.
        (0..5).try_for_each(|_| console.wait("TICK").map(drop))?;
        let mut capture = roles::command("snowflock")?;
        capture.args(["capture", "qemu", "--json", "--qmp"]).arg(place.path().join("qmp"));
        let output = capture.arg("-o").arg(place.path().join("used")).output().context("capturing")?;
        ensure!(output.status.success(), "the capture failed: {}", String::from_utf8_lossy(&output.stderr));
        drop(parent);
        let at = |name: &str| place.path().join(name);
        let report = serde_json::from_slice(&output.stdout).context("what the capture says")?;
        Ok(Self { descriptor: at("used.snow"), index: at("used.snowidx"), report, _place: place })
    }
}

/// A clone: a QEMU and its memtap.
pub struct Clone {
    qmp: Qmp,
    console: Console,
    admin: PathBuf,
    /// When QEMU was there, and its memtap was started.
    forked: Instant,
    memtap: Killed,
    _qemu: Killed,
    place: TempDir,
}

/// What a clone did with a piece of work.
#[derive(Clone, Debug)]
pub struct Work {
    /// From the moment when the guest went on to the end of the work.
    pub took: Duration,
    /// From the fork to the end of the work.
    pub since_fork: Duration,
    /// What memtap said then; null where it was done before.
    pub status: Value,
}

impl Clone {
    /// Starts a clone of `descriptor`, which stands still where it is to be `paused`.
    pub fn start(lab: &Lab, descriptor: &Path, server: &str, memtap: &[&str], paused: bool) -> anyhow::Result<Self> {
        let place = tempfile::tempdir_in("/tmp")?;
        let at = |name: &str| place.path().join(name);
        let mut command = lab.machine(place.path())?;
        command.arg("-incoming").arg(format!("unix:{}", at("migration").display()));
        command.args(["-global", "migration.x-postcopy-ram=on"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", at("pager").display()));
        command.args(paused.then_some("-S"));
        let qemu = Killed(command.spawn().context("starting QEMU")?);
        let console = Console::open(&at("console"))?;
        // A connection would be taken for the migration.
        let began = Instant::now();
        while !at("migration").exists() {
            ensure!(began.elapsed() < LONG, "QEMU does not listen for its migration");
            std::thread::sleep(LOOK);
        }
        let qmp = Qmp::connect(&at("qmp"), LONG)?;
        let forked = Instant::now();
        let mut command = roles::command("memtap")?;
        command.args(["qemu", "--lane", "socket", "--server", server, "--descriptor"]).arg(descriptor);
        command.arg("--connect").arg(at("migration")).arg("--qmp").arg(at("pager")).arg("--admin").arg(at("admin"));
        command.args(memtap).env("RUST_LOG", "warn").stderr(File::create(at("memtap.log"))?);
        let memtap = Killed(command.spawn().context("starting memtap")?);
        Ok(Self { qmp, console, admin: at("admin"), forked, memtap, _qemu: qemu, place })
    }

    /// Waits until it has all of its memory; how long that took since the fork.
    pub fn complete(&mut self) -> anyhow::Result<Duration> {
        let deadline = self.forked + LONG;
        loop {
            if let Some(status) = self.memtap.0.try_wait()? {
                ensure!(status.success(), "memtap ended with {status}: {}", self.said());
                return Ok(self.forked.elapsed());
            }
            ensure!(Instant::now() < deadline, "the clone does not become complete: {}", self.said());
            std::thread::sleep(LOOK);
        }
    }

    /// Lets a paused guest go on.
    pub fn go_on(&mut self) -> anyhow::Result<()> {
        self.qmp.execute("cont", json!({})).map(drop).with_context(|| format!("continuing the guest; {}", self.said()))
    }

    /// Has the guest do its piece of work as soon as it runs.
    pub fn work(&mut self) -> anyhow::Result<Work> {
        let deadline = Instant::now() + LONG;
        let resumed = loop {
            match self.qmp.next_event(Duration::from_millis(100)).with_context(|| self.said())? {
                // It may be told late by a QEMU that has much else to do.
                Some(event) if event.name == "RESUME" => {
                    break Instant::now() - event.at.elapsed().unwrap_or_default();
                }
                _ => ensure!(Instant::now() < deadline, "the clone does not run: {}", self.said()),
            }
        };
        self.console.tell(b'J')?;
        let (done, line) = self.console.wait("JOB").with_context(|| self.said())?;
        ensure!(line.starts_with("JOB errors=0 "), "{line}");
        let status = admin::ask(&self.admin, &json!({"cmd": "status"})).map_or(Value::Null, |it| it["status"].clone());
        Ok(Work { took: done - resumed, since_fork: done - self.forked, status })
    }

    /// Ends the guest, and waits for its memtap, which has something to tell its server at the end.
    pub fn end(mut self) -> anyhow::Result<()> {
        // QEMU may be gone before it has answered.
        let _ = self.qmp.execute("quit", json!({}));
        self.complete().map(drop)
    }

    fn said(&self) -> String {
        let log = |name: &str| fs::read_to_string(self.place.path().join(name)).unwrap_or_default();
        format!("memtap said: {:?}; QEMU said: {:?}", log("memtap.log"), log("qemu.log"))
    }
}

/// The serial console of a guest.
struct Console {
    socket: UnixStream,
    lines: Receiver<(Instant, String)>,
}

impl Console {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let socket = await_socket(path)?;
        let reader = BufReader::new(socket.try_clone()?);
        let (sender, lines) = channel();
        // Ends with the guest, or with whoever listens.
        std::thread::spawn(move || {
            for line in reader.lines() {
                let Ok(line) = line else { return };
                if sender.send((Instant::now(), line.trim_end().to_owned())).is_err() {
                    return;
                }
            }
        });
        Ok(Self { socket, lines })
    }

    fn tell(&mut self, command: u8) -> anyhow::Result<()> {
        self.socket.write_all(&[command]).context("the console")
    }

    /// The next line of this kind, and when it came.
    fn wait(&self, keyword: &str) -> anyhow::Result<(Instant, String)> {
        let deadline = Instant::now() + LONG;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((at, line)) if line.starts_with(keyword) => return Ok((at, line)),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("the guest says no {keyword} within {LONG:?}"),
                Err(RecvTimeoutError::Disconnected) => bail!("the guest ended without {keyword}"),
            }
        }
    }
}

/// Waits until somebody listens at `path`.
fn await_socket(path: &Path) -> anyhow::Result<UnixStream> {
    let deadline = Instant::now() + LONG;
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(error) => ensure!(Instant::now() < deadline, "nobody listens at {}: {error}", path.display()),
        }
        std::thread::sleep(LOOK);
    }
}

/// A child that does not outlive the bench.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
