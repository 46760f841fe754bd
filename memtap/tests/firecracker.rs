//! The handshake of Firecracker's page-fault handlers, between processes.
//!
//! Goal: a VMM that hands its memory over gets every page right; whoever sends the wrong things is refused with a reason; no VMM
//! is left frozen in silence. Method: `memtap guest` plays the VMM in a process of its own, hand-made clients send nonsense.

#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod common;

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{
    Behaviour, Image, ModelServer, assert_verified, finish, memtap, mode, reserve_huge_pages, status, text, until,
};
use descriptor::Endpoint;
use memtap::engine::exit_code;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

/// `memtap uffd`, once it listens.
fn pager(image: &Image, server: &Endpoint, more: &[&str]) -> (Child, PathBuf) {
    let socket = image.path("handshake");
    let mut command = memtap(&["uffd", "--socket", text(&socket), "--descriptor", text(&image.descriptor())]);
    let child = command.args(["--server", &server.to_string()]).args(more).spawn().unwrap();
    until("the pager listens", || listens(&socket));
    assert_eq!(mode(&socket), 0o600);
    (child, socket)
}

/// Whether connections are taken, which they are a moment after the socket is there.
fn listens(socket: &Path) -> bool {
    const LISTENING: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    sockets.lines().any(|line| line.ends_with(text(socket)) && line.split_whitespace().nth(3) == Some(LISTENING))
}

/// `memtap guest`, the VMM.
fn vmm(image: &Image, socket: &Path, more: &[&str]) -> Command {
    let mut command = memtap(&["guest", "--socket", text(socket), "--descriptor", text(&image.descriptor())]);
    command.args(["--verify", text(&image.index())]).args(more);
    command
}

#[test]
fn a_vmm_gets_its_memory_by_handshake() {
    let image = Arc::new(Image::new(4096));
    let server = ModelServer::tcp(&image, Behaviour::default());
    let workload = ["--workload", "random,touches=200%,writes=30%,discards=20%", "--guest-threads", "4"];
    for hydrate in ["off", "now"] {
        let (pager, socket) = pager(&image, &server.endpoint, &["--hydrate", hydrate]);
        let vmm = vmm(&image, &socket, &workload).spawn().unwrap();
        assert_verified(&image, &finish(vmm));
        let (code, _, log) = finish(pager);
        assert_eq!(code, 0, "{log}");
        assert!(!socket.exists());
    }
}

#[test]
fn huge_pages_by_handshake() {
    let image = Arc::new(Image::new(6 * 512));
    if let Err(reason) = reserve_huge_pages(6) {
        eprintln!("SKIPPED huge_pages_by_handshake: no 2 MiB pages can be reserved: {reason}");
        return;
    }
    let server = ModelServer::unix(&image.path("server"), &image, Behaviour { local: true, ..Behaviour::default() });
    let (pager, socket) = pager(&image, &server.endpoint, &[]);
    let workload = ["--backing", "huge", "--workload", "random,touches=50%,writes=30%,discards=0.3%"];
    assert_verified(&image, &finish(vmm(&image, &socket, &workload).spawn().unwrap()));
    assert_eq!(finish(pager).0, 0);
}

#[test]
fn a_pager_that_waits_for_its_vmm_stops_when_it_is_told() {
    let image = Arc::new(Image::new(64));
    let server = ModelServer::tcp(&image, Behaviour::default());
    let admin = image.path("admin");
    // Longer than any test waits.
    let (pager, socket) = pager(&image, &server.endpoint, &["--accept-timeout", "1h", "--admin", text(&admin)]);
    until("it is set up", || admin.exists());
    let pid = rustix::process::Pid::from_child(&pager);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let (code, _, log) = finish(pager);
    assert_eq!(code, i32::from(exit_code::STOPPED), "{log}");
    assert!(!socket.exists());
}

#[test]
fn a_vmm_that_is_killed_ends_its_pager() {
    let image = Arc::new(Image::new(1024));
    let server = ModelServer::tcp(&image, Behaviour { delay: Duration::from_millis(20), ..Behaviour::default() });
    let (pager, socket) = pager(&image, &server.endpoint, &[]);
    let mut vmm = vmm(&image, &socket, &[]).spawn().unwrap();
    until("some requests", || server.requests.load(Ordering::Relaxed) > 3);
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    let (code, _, log) = finish(pager);
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("the guest ended"), "{log}");
}

#[test]
fn a_vmm_without_any_server_is_failed_by_policy() {
    use std::os::unix::process::ExitStatusExt;
    let image = Image::new(1024);
    let socket = image.path("handshake");
    let pager =
        memtap(&["uffd", "--socket", text(&socket), "--descriptor", text(&image.descriptor())]).spawn().unwrap();
    until("the pager listens", || listens(&socket));
    let vmm = vmm(&image, &socket, &[]).spawn().unwrap();
    let (code, _, log) = finish(pager);
    assert_eq!(code, i32::from(exit_code::SETUP), "{log}");
    assert!(log.contains("no page server is known"), "{log}");
    assert_eq!(common::wait(vmm).status.signal(), Some(9));
}

#[test]
fn a_vmm_whose_source_stays_away_is_failed_by_policy() {
    let image = Arc::new(Image::new(1024));
    let path = image.path("server");
    for policy in ["kill", "pause", "hold"] {
        let behaviour = Behaviour { delay: Duration::from_millis(5), ..Behaviour::default() };
        let server = ModelServer::unix(&path, &image, behaviour);
        let admin = image.path("admin");
        let more = ["--lane", "socket", "--patience", "200ms", "--on-failure", policy, "--admin", text(&admin)];
        let (pager, socket) = pager(&image, &server.endpoint, &more);
        let mut vmm = vmm(&image, &socket, &[]).spawn().unwrap();
        until("some requests", || server.requests.load(Ordering::Relaxed) > 3);
        server.kill();
        if policy == "hold" {
            until("the guest is held", || status(&admin).is_some_and(|status| status["state"] == "holding"));
            assert!(vmm.try_wait().unwrap().is_none());
            let _server = ModelServer::unix(&path, &image, Behaviour::default());
            assert_verified(&image, &finish(vmm));
            assert_eq!(finish(pager).0, 0);
            continue;
        }
        let (code, _, log) = finish(pager);
        assert_eq!(code, i32::from(exit_code::SOURCE_GONE), "{log}");
        if policy == "kill" {
            use std::os::unix::process::ExitStatusExt;
            assert_eq!(common::wait(vmm).status.signal(), Some(9));
        } else {
            let stopped =
                || std::fs::read_to_string(format!("/proc/{}/stat", vmm.id())).is_ok_and(|stat| stat.contains(") T "));
            until("the VMM is stopped", stopped);
            vmm.kill().unwrap();
            vmm.wait().unwrap();
        }
    }
}

#[test]
fn nonsense_is_refused_with_its_reason() {
    let image = Arc::new(Image::new(1024));
    let server = Endpoint::Unix(image.path("nobody"));
    let region = |size: u64| format!(r#"[{{"base_host_virt_addr":65536,"size":{size},"offset":0,"page_size":4096}}]"#);
    let whole = region(4 << 20);
    let file = std::fs::File::open("/dev/null").unwrap();
    let one = [file.as_fd()];
    let two = [file.as_fd(), file.as_fd()];
    for (message, fds, reason) in [
        ("hello", &one[..], "no JSON array"),
        ("{}", &one, "no JSON array"),
        (&whole, &[], "no descriptor"),
        (&whole, &one, "/dev/null"),
        (&whole, &two, "2 descriptors"),
        ("[{", &one, "closed the socket"),
    ] {
        // The client is this very process, which is not to be killed.
        let (pager, socket) = pager(&image, &server, &["--on-failure", "hold"]);
        let client = UnixStream::connect(&socket).unwrap();
        send(&client, message, fds);
        drop(client);
        let (code, _, log) = finish(pager);
        assert_eq!(code, i32::from(exit_code::PORT), "{message}: {log}");
        assert!(log.contains(reason), "{message}: {log}");
    }
}

#[test]
fn whoever_says_nothing_is_given_up() {
    let image = Arc::new(Image::new(1024));
    let server = Endpoint::Unix(image.path("nobody"));
    let (nobody_came, _) = pager(&image, &server, &["--accept-timeout", "100ms"]);
    let (code, _, log) = finish(nobody_came);
    assert_eq!(code, i32::from(exit_code::SETUP), "{log}");
    assert!(log.contains("no VMM connected"), "{log}");
    let (silent, socket) = pager(&image, &server, &["--on-failure", "hold"]);
    let mut client = UnixStream::connect(&socket).unwrap();
    client.write_all(b"[").unwrap();
    let (code, _, log) = finish(silent);
    assert_eq!(code, i32::from(exit_code::PORT), "{log}");
    assert!(log.contains("did not come within"), "{log}");
}

fn send(client: &UnixStream, message: &str, fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let bytes = [IoSlice::new(message.as_bytes())];
    rustix::net::sendmsg(client, &bytes, &mut ancillary, SendFlags::empty()).unwrap();
}
