//! The peers that we measure ourselves against: programs of the distribution, started for the bench on loopback.

mod nbd;
mod redis;
mod udpcast;
mod uftp;

use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

pub use nbd::NbdClient;
pub use redis::RedisClient;
pub use udpcast::udpcast;
pub use uftp::uftp;

/// Someone who can be asked for 4 KiB blocks, many at a time.
pub trait BlockSource {
    /// Asks for block `index`. Requests go out together when [`BlockSource::receive`] has to wait for an answer.
    fn request(&mut self, index: u64) -> io::Result<()>;

    /// Waits for one answer: the block's index and its bytes.
    fn receive(&mut self) -> io::Result<(u64, &[u8])>;
}

/// A peer that runs for the bench, ended when dropped.
pub struct Server {
    child: Child,
    /// The port on loopback where it listens.
    pub port: u16,
}

impl Server {
    /// `nbdkit`, serving `file`; `None` when it is not installed.
    pub fn nbdkit(file: &Path) -> anyhow::Result<Option<Self>> {
        Self::start("nbdkit", |command, port| {
            command.args(["--foreground", "--ipaddr", "127.0.0.1", "--port", &port.to_string(), "--readonly", "file"]);
            command.arg(file);
        })
    }

    /// `qemu-nbd`, serving `file`; `None` when it is not installed.
    pub fn qemu_nbd(file: &Path) -> anyhow::Result<Option<Self>> {
        Self::start("qemu-nbd", |command, port| {
            command.args([
                "--bind=127.0.0.1",
                &format!("--port={port}"),
                "--read-only",
                "--format=raw",
                "--persistent",
            ]);
            command.args(["--cache=writeback", "--shared=0"]).arg(file);
        })
    }

    /// `redis-server`, empty; `None` when it is not installed.
    pub fn redis() -> anyhow::Result<Option<Self>> {
        Self::start("redis-server", |command, port| {
            command.args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", "", "--appendonly", "no"]);
        })
    }

    fn start(program: &str, arguments: impl FnOnce(&mut Command, u16)) -> anyhow::Result<Option<Self>> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = Command::new(program);
        arguments(&mut command, port);
        let child = match command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            child => child.with_context(|| format!("starting {program}"))?,
        };
        let server = Self { child, port };
        server.connect().with_context(|| format!("{program} does not listen"))?;
        Ok(Some(server))
    }

    /// A connection to the server, once it listens.
    pub fn connect(&self) -> io::Result<TcpStream> {
        let give_up = Instant::now() + Duration::from_secs(10);
        loop {
            match TcpStream::connect(("127.0.0.1", self.port)) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Err(error) if Instant::now() > give_up => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).exists())
}
