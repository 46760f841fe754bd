//! The checking guest of `tests/lab`: its QEMU's command line, and talking to it over its serial console.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tempfile::TempDir;

use crate::command::Killed;
use crate::poll;

/// The least memory in which the guest's kernel finds room for its pattern with some to spare.
const MEMORY_MIB: &str = "256";
const PATTERN_MIB: &str = "64";

/// The generation id of the parent.
const PARENT_ID: &str = "8f8b4f5a-4a0e-4a34-9a35-0d5a9d8d8c11";

const CONSOLE: &str = "console";
const CONSOLE_LOG: &str = "console.log";

/// The laboratory with one of its QEMUs.
pub(crate) struct Lab {
    dir: PathBuf,
    qemu: String,
}

impl Lab {
    /// The laboratory, where it was fetched; why not otherwise.
    pub(crate) fn find(qemu: &str) -> Result<Self, String> {
        let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
        let target = target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"));
        let dir = std::env::var_os("LAB_DIR").map_or_else(|| target.join("lab"), PathBuf::from);
        for part in [&format!("{qemu}/run"), "vmlinuz", "initramfs", "cmdline"] {
            if !dir.join(part).exists() {
                return Err(format!("no {part} in the laboratory; tests/lab fetches it"));
            }
        }
        // What else QEMU lacks (7.2 needs root or CAP_SYS_PTRACE for userfaultfd) is a failure, and not a reason to skip.
        Ok(Self { dir, qemu: qemu.to_owned() })
    }

    /// The command line of a machine, program first, with its console in `dir`.
    pub(crate) fn machine(&self, dir: &str, generation_id: &str) -> Vec<String> {
        let at = |part: &str| self.dir.join(part).display().to_string();
        let cmdline = fs::read_to_string(self.dir.join("cmdline")).unwrap();
        let console = format!("socket,id=console,path={dir}/{CONSOLE},server=on,wait=off,logfile={dir}/{CONSOLE_LOG}");
        let mut words = vec![at(&format!("{}/run", self.qemu))];
        words.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
        for (option, value) in [
            ("-display", "none"),
            ("-machine", "pc-i440fx-7.2"),
            ("-accel", "tcg"),
            ("-m", MEMORY_MIB),
            ("-chardev", &console),
            ("-serial", "chardev:console"),
            ("-device", &format!("vmgenid,guid={generation_id}")),
            ("-kernel", &at("vmlinuz")),
            ("-initrd", &at("initramfs")),
            ("-append", &format!("{} guest_mib={PATTERN_MIB}", cmdline.trim())),
        ] {
            words.extend([option.to_owned(), value.to_owned()]);
        }
        words
    }
}

/// The machine that is forked.
pub(crate) struct Parent {
    pub(crate) console: Console,
    process: Killed,
    dir: TempDir,
}

impl Parent {
    /// Boots it, and waits until its memory is filled.
    pub(crate) fn boot(lab: &Lab) -> Self {
        // A short path, for sockets.
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let words = lab.machine(&dir.path().display().to_string(), PARENT_ID);
        let mut command = std::process::Command::new(&words[0]);
        command.args(&words[1..]).arg("-qmp").arg(format!("unix:{}/qmp,server=on,wait=off", dir.path().display()));
        let mut process = Killed::start(command.stdin(Stdio::null()));
        let ready = poll(|| {
            assert!(process.is_running(), "the parent's QEMU ended");
            Console::has(dir.path(), "READY").then_some(())
        });
        assert!(ready.is_some(), "the parent's guest did not boot");
        Self { console: Console::open(dir.path()), process, dir }
    }

    pub(crate) fn qmp(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    /// Waits for another sign of life.
    pub(crate) fn goes_on(&self) {
        self.console.await_line("TICK", self.console.lines().len());
    }

    pub(crate) fn assert_alive(&mut self) {
        assert!(self.process.is_running(), "the parent ended");
    }
}

/// The serial console of a guest: its log, and a connection for commands.
pub(crate) struct Console {
    log: PathBuf,
    socket: UnixStream,
    /// The lines of the log before the last command.
    before: usize,
}

impl Console {
    /// Connects to the console in `dir`.
    pub(crate) fn open(dir: &Path) -> Self {
        let socket = UnixStream::connect(dir.join(CONSOLE)).unwrap();
        let mut reader = socket.try_clone().unwrap();
        // An unread console stands still, and its log with it.
        std::thread::spawn(move || while reader.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {});
        Self { log: dir.join(CONSOLE_LOG), socket, before: 0 }
    }

    /// Whether the guest with its console in `dir` has printed a whole line of this kind.
    pub(crate) fn has(dir: &Path, keyword: &str) -> bool {
        lines(&dir.join(CONSOLE_LOG)).iter().any(|line| is_of(line, keyword))
    }

    /// Gives the guest a command.
    pub(crate) fn tell(&mut self, command: u8) {
        self.before = self.lines().len();
        self.socket.write_all(&[command]).unwrap();
    }

    /// Gives the guest a command and waits for the line that answers it.
    pub(crate) fn ask(&mut self, command: u8) -> String {
        self.tell(command);
        let keyword = match command {
            b'R' => "RANDOM",
            b'W' => "WROTE",
            other => panic!("what does the guest answer to {other:?}?"),
        };
        self.await_line(keyword, self.before)
    }

    /// Whether the last command was answered by a line of this kind.
    pub(crate) fn has_answered(&self, keyword: &str) -> bool {
        self.lines().iter().skip(self.before).any(|line| is_of(line, keyword))
    }

    /// Waits for what the full check says that was asked for, and that no check ever found a wrong page.
    pub(crate) fn assert_full(&self) {
        let full = self.await_line("FULL", self.before);
        let pages = PATTERN_MIB.parse::<u64>().unwrap() * 256;
        assert!(full.starts_with(&format!("FULL errors=0 pages={pages} ")), "{full}");
        for line in self.lines() {
            assert!(!is_of(&line, "TICK") || line.contains(" errors=0 "), "{}: {line}", self.log.display());
        }
    }

    fn await_line(&self, keyword: &str, after: usize) -> String {
        let found = poll(|| self.lines().into_iter().skip(after).find(|line| is_of(line, keyword)));
        found.unwrap_or_else(|| {
            let lines = self.lines();
            let last = &lines[lines.len().saturating_sub(5)..];
            panic!("{} has no {keyword} after line {after}; its last lines: {last:#?}", self.log.display())
        })
    }

    fn lines(&self) -> Vec<String> {
        lines(&self.log)
    }
}

/// The whole lines of a log.
fn lines(log: &Path) -> Vec<String> {
    let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let end = text.rfind('\n').map_or(0, |end| end + 1);
    text[..end].lines().map(str::to_owned).collect()
}

fn is_of(line: &str, keyword: &str) -> bool {
    line.strip_prefix(keyword).is_some_and(|rest| rest.starts_with(' '))
}
