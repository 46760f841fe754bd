//! The checking guest of `tests/lab`: its QEMU's command line, and talking to it over its serial console.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use tempfile::TempDir;

use crate::command::Killed;
use crate::poll;

/// The least memory in which the guest's kernel finds room for its pattern with some to spare.
const MEMORY_MIB: &str = "256";
const PATTERN_MIB: &str = "64";

/// The generation id of the parent.
const PARENT_ID: &str = "8f8b4f5a-4a0e-4a34-9a35-0d5a9d8d8c11";

/// The guest's memory, where it is a file.
const MEMORY: &str = "memory";

/// Its second monitor, where it has one.
const PILOT: &str = "pilot";

const CONSOLE: &str = "console";
const CONSOLE_LOG: &str = "console.log";

/// The laboratory with one of its QEMUs.
pub(crate) struct Lab {
    dir: PathBuf,
    qemu: String,
    kernel: String,
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
        Ok(Self { dir, qemu: qemu.to_owned(), kernel: "vmlinuz".to_owned() })
    }

    /// The same with another kernel; why not, where it was not fetched.
    pub(crate) fn with_kernel(self, kernel: &str) -> Result<Self, String> {
        if self.dir.join(kernel).exists() {
            return Ok(Self { kernel: kernel.to_owned(), ..self });
        }
        Err(format!("no {kernel} in the laboratory; tests/lab fetches it"))
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
            ("-kernel", &at(&self.kernel)),
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
        Self::start(lab.machine("{dir}", PARENT_ID))
    }

    /// The same with its memory in a file, with more arguments and more words on the kernel's command line.
    pub(crate) fn boot_with_memory_file(lab: &Lab, machine: &[&str], cmdline: &str) -> Self {
        let mut words = lab.machine("{dir}", PARENT_ID);
        for option in ["-machine", "-append"] {
            let at = words.iter().position(|word| word == option).unwrap() + 1;
            words[at] += &if option == "-append" { format!(" {cmdline}") } else { ",memory-backend=memory".to_owned() };
        }
        let memory = format!("memory-backend-file,id=memory,size={MEMORY_MIB}M,mem-path={{dir}}/{MEMORY},share=on");
        let pilot = format!("unix:{{dir}}/{PILOT},server=on,wait=off");
        let more = ["-object", &memory, "-qmp", &pilot].into_iter().chain(machine.iter().copied());
        words.extend(more.map(str::to_owned));
        Self::start(words)
    }

    /// A monitor for the test alone, where its memory is a file.
    pub(crate) fn pilot(&self) -> PathBuf {
        self.dir.path().join(PILOT)
    }

    /// The file that is its memory.
    pub(crate) fn memory_file(&self) -> PathBuf {
        self.dir.path().join(MEMORY)
    }

    fn start(words: Vec<String>) -> Self {
        // A short path, for sockets.
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let words: Vec<String> =
            words.iter().map(|word| word.replace("{dir}", &dir.path().display().to_string())).collect();
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
    /// What came through the socket. The log has bytes twice where QEMU found the socket full.
    heard: Arc<Mutex<Vec<u8>>>,
    /// The lines of the log before the last command.
    before: usize,
}

impl Console {
    /// Connects to the console in `dir`.
    pub(crate) fn open(dir: &Path) -> Self {
        let socket = UnixStream::connect(dir.join(CONSOLE)).unwrap();
        let mut reader = socket.try_clone().unwrap();
        // An unread console stands still, and its log with it.
        let heard = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&heard);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                all.lock().unwrap().extend_from_slice(&bytes[..count]);
            }
        });
        Self { log: dir.join(CONSOLE_LOG), socket, heard, before: 0 }
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
            b'D' => "DROPPED",
            b'K' => "FRAMES read=1",
            b'B' => "BALLOON",
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
        for line in self.lines().iter().filter(|line| is_of(line, "TICK")) {
            // By its place and not by its name: a serial port that is stopped while it sends may send a byte twice.
            let errors = line.split_whitespace().nth(2).and_then(|field| field.rsplit('=').next()?.parse::<u64>().ok());
            assert_eq!(errors, Some(0), "{}: {line}", self.log.display());
        }
    }

    /// Lets the guest go on that has read its kernel's flags of all frames, and takes them.
    pub(crate) fn frame_flags(&mut self) -> Vec<u64> {
        let heard = self.heard.lock().unwrap().len();
        self.tell(b' ');
        let text = poll(|| {
            let text = String::from_utf8_lossy(&self.heard.lock().unwrap()[heard..]).into_owned();
            text.contains("FRAMES count=").then_some(text)
        });
        let text = text.expect("the guest tells its flags");
        let runs = text.lines().filter_map(|line| line.strip_prefix("FLAGS "));
        let numbers =
            |run: &str| -> Vec<u64> { run.split(' ').map(|number| u64::from_str_radix(number, 16).unwrap()).collect() };
        let mut flags = Vec::new();
        for run in runs.map(numbers) {
            let [first, count, value] = run[..] else { panic!("a run of flags is {run:x?}") };
            assert_eq!(flags.len() as u64, first);
            flags.resize(flags.len() + count as usize, value);
        }
        flags
    }

    /// Waits until the guest has booted so many times.
    pub(crate) fn await_boots(&self, times: usize) {
        // A line that the reset cut off may stand before.
        let booted = || (self.lines().iter().filter(|line| line.contains("READY ")).count() >= times).then_some(());
        poll(booted).expect("the guest boots again");
    }

    /// Asserts that the processes which churn memory went on and found nothing wrong.
    pub(crate) fn assert_churned(&self, least: u64) {
        let line = self.await_line("CHURN", self.before);
        let rounds = line.split(['=', ' ']).nth(2).and_then(|rounds| rounds.parse::<u64>().ok()).unwrap();
        assert!(rounds >= least && line.ends_with(" errors=0 ended=0"), "{line}");
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
    line.strip_prefix(keyword).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '=']))
}
