//! Goal: a server can be watched, changed and stopped while it serves. Method: as in `serving.rs`, and the command itself as
//! a process where signals are concerned.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Client, FRAMES, Got, PAGE, PATIENCE, TestImage, page_of, range, serve, wait_for};
use descriptor::fetch::{Capabilities, Class, ErrorCode, GoodbyeReason, Hello, LocalImage, Message, Preamble, decode};
use descriptor::{Endpoint, Gfn, ImageId};
use memserver::client::{self, AdminError};
use memserver::image::Preload;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

#[test]
fn a_client_that_stops_reading_delays_nobody() {
    let image = TestImage::new(1);
    let server = serve(&image, |_| {});
    for endpoint in server.endpoints() {
        let mut stopped = Client::open(endpoint, image.id);
        stopped.request_plenty();
        let mut other = Client::open(endpoint, image.id);
        (0..50).for_each(|round| other.check_fetch(Class::Demand, &[range(round * 3, 2)]));
        other.check_fetch(Class::Bulk, &[range(0, FRAMES)]);
        let status = server.status();
        assert!(status.bulk.queued >= 4, "the stopped client's requests wait: {status:?}");
    }
}

#[test]
fn demand_overtakes_bulk() {
    let image = TestImage::new(2);
    let server = serve(&image, |_| {});
    for endpoint in server.endpoints() {
        let mut client = Client::open(endpoint, image.id);
        let bulk = client.request_plenty();
        wait_for("bulk", || server.status().bulk.bytes > 0);
        let demand = client.request(Class::Demand, &[range(17, 1)]);
        let mut before = 0;
        loop {
            match client.receive() {
                Got::Pages { tag, .. } if tag == demand => break,
                Got::Pages { tag, frames, .. } => {
                    assert!(bulk.contains(&tag));
                    before += frames.count().get();
                }
                other => panic!("{other:?}"),
            }
        }
        // Socket buffers and the quantum under way go first, all of the bulk does not.
        assert!(before < 8_000, "{before} pages of bulk came before a page of demand");
    }
}

#[test]
fn images_come_and_go_while_sessions_go_on() {
    let (first, second) = (TestImage::new(3), TestImage::new(4));
    let admin = first.folder.path().join("admin");
    let server = serve(&first, |config| config.admin = Some(admin.clone()));
    let endpoint = &server.endpoints()[0];
    let mut stays = Client::open(endpoint, first.id);
    let added = client::ask(&admin, &client::Command::Add { path: second.index.clone() }).unwrap();
    assert_eq!(added.image, Some(second.id));
    let again = client::ask(&admin, &client::Command::Add { path: second.index.clone() });
    assert!(matches!(again, Err(AdminError::Refused(text)) if text.ends_with("is served already")));
    let mut goes = Client::open(endpoint, second.id);
    goes.check_fetch(Class::Demand, &[range(0, 100)]);
    goes.request_plenty();
    wait_for("bulk to wait", || server.status().bulk.queued >= 2);
    client::ask(&admin, &client::Command::Drop { image: second.id }).unwrap();
    let mut errors = 0;
    loop {
        match goes.receive() {
            Got::Pages { .. } => {}
            Got::Error(_, ErrorCode::ImageGone) => errors += 1,
            Got::Goodbye(GoodbyeReason::ImageGone) => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(errors >= 2, "{errors}");
    assert_eq!(goes.receive(), Got::End);
    stays.check_fetch(Class::Demand, &[range(500, 40)]);
    let images = client::ask(&admin, &client::Command::Images).unwrap().images.unwrap();
    assert_eq!(images.iter().map(|image| image.image).collect::<Vec<_>>(), [first.id]);
    assert!(server.drop_image(second.id).is_err());
    assert!(server.add_image(Path::new("/nowhere"), Preload::Off).is_err());
}

#[test]
fn the_admin_socket_takes_lines_and_nothing_else() {
    let image = TestImage::new(5);
    let admin = image.folder.path().join("admin");
    let server = serve(&image, |config| config.admin = Some(admin.clone()));
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&admin).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let _session = Client::open(&server.endpoints()[1], image.id);
    wait_for("the session", || server.status().sessions.len() == 1);
    let stream = UnixStream::connect(&admin).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut lines = BufReader::new(&stream).lines();
    let mut ask = |line: &str| {
        (&stream).write_all(line.as_bytes()).unwrap();
        lines.next().unwrap().unwrap()
    };
    assert!(ask("nonsense\n").starts_with(r#"{"ok":false,"error":"no command: "#));
    assert!(ask("{\"cmd\":\"sessions\"}\n").contains(&image.id.to_string()));
    let status = ask("{\"cmd\":\"status\"}\n{\"cmd\":\"images\"}\n");
    assert!(status.contains("\"status\":{"), "{status}");
    assert!(ask("").contains("\"images\":["));
    assert!(
        ask(&format!("{{\"cmd\":\"drop\",\"image\":\"{}\"}}\n", ImageId::from_bytes([0; 16]))).contains("not served")
    );
    let text = server.status().to_string();
    assert!(text.contains(&image.id.to_string()) && text.contains("sessions: 1 now"), "{text}");
    // A line without end is cut off.
    (&stream).write_all(&vec![b' '; 20 << 10]).unwrap();
    assert!(lines.next().is_none_or(|line| line.is_err()));
}

#[test]
fn metrics_can_be_scraped() {
    let image = TestImage::new(6);
    let server = serve(&image, |config| config.metrics = Some("127.0.0.1:0".parse().unwrap()));
    let mut client = Client::open(&server.endpoints()[0], image.id);
    client.check_fetch(Class::Demand, &[range(0, 10)]);
    client.check_fetch(Class::Bulk, &[range(100, 40)]);
    let scrape = |request: &str| {
        let mut stream = TcpStream::connect(server.metrics().unwrap()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    // A send is counted a moment after the client has it.
    let get = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    let latency = "memserver_request_latency_seconds_count{class=\"bulk\"} 2\n";
    wait_for("the count", || scrape(get).contains(latency));
    let answer = scrape(get);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    for line in [
        "memserver_pages_total{class=\"demand\",encoding=\"raw\"} 10",
        "memserver_pages_total{class=\"bulk\",encoding=\"zero\"} 30",
        "memserver_requests_total{class=\"bulk\"} 1",
        "memserver_open_sessions 1",
        "memserver_request_latency_seconds_bucket{le=\"+Inf\",class=\"demand\"} 1",
        "# EOF",
    ] {
        assert!(answer.contains(&format!("{line}\n")), "{line} is missing in {answer}");
    }
    assert!(scrape("GET / HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(scrape("POST /metrics HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 405"));
    assert!(scrape("\0\r\n\r\n").starts_with("HTTP/1.1 400"));
    assert!(scrape(&format!("GET /{} HTTP/1.0\r\n", "x".repeat(9000))).starts_with("HTTP/1.1 431"));
}

#[test]
fn silence_ends_a_session() {
    let image = TestImage::new(7);
    let server = serve(&image, |config| {
        config.session.limits.idle_timeout_ms = 400;
        config.session.handshake_timeout = Duration::from_millis(300);
    });
    let mut silent = Client::open(&server.endpoints()[0], image.id);
    let mut mute = Client::connect(&server.endpoints()[1]);
    assert_eq!(silent.receive(), Got::Ping);
    assert_eq!(silent.receive(), Got::Goodbye(GoodbyeReason::Idle));
    assert_eq!(silent.receive(), Got::End);
    assert_eq!(mute.receive(), Got::End);
}

#[test]
fn draining_answers_what_was_asked_and_says_goodbye() {
    let image = TestImage::new(8);
    let server = serve(&image, |_| {});
    let endpoints = server.endpoints().to_vec();
    let mut idle = Client::open(&endpoints[0], image.id);
    let mut busy = Client::open(&endpoints[1], image.id);
    let tags: Vec<_> =
        (0..3).map(|_| (busy.request(Class::Bulk, &[range(0, FRAMES)]), vec![range(0, FRAMES)])).collect();
    wait_for("the requests", || server.status().bulk.requests == 3);
    server.drain(PATIENCE);
    assert_eq!(idle.receive(), Got::Goodbye(GoodbyeReason::Draining));
    busy.check_answers(&tags);
    assert_eq!(busy.receive(), Got::Goodbye(GoodbyeReason::Draining));
    drop((idle, busy));
    server.wait().unwrap();
    let Endpoint::Unix(path) = &endpoints[1] else { panic!("{endpoints:?}") };
    assert!(!path.exists());
}

#[test]
fn draining_does_not_wait_for_the_stopped() {
    let image = TestImage::new(9);
    let server = serve(&image, |_| {});
    let mut stopped = Client::open(&server.endpoints()[0], image.id);
    stopped.request_plenty();
    wait_for("bulk to wait", || server.status().bulk.queued >= 2);
    server.drain(10 * PATIENCE);
    // New clients are turned away meanwhile, and whoever asks again need not wait as long.
    let endpoints = server.endpoints().to_vec();
    wait_for("the end of listening", || endpoints.iter().all(|endpoint| Client::try_connect(endpoint).is_err()));
    server.drain(Duration::from_millis(100));
    server.wait().unwrap();
}

#[test]
fn a_file_cut_short_costs_its_image_and_not_the_server() {
    let (broken, whole) = (TestImage::new(10), TestImage::new(11));
    let server = serve(&broken, |config| {
        config.images.push(whole.index.clone());
        config.preload = Preload::Off;
    });
    let mut victim = Client::open(&server.endpoints()[0], broken.id);
    let mut other = Client::open(&server.endpoints()[0], whole.id);
    File::options().write(true).open(broken.folder.path().join("raw")).unwrap().set_len(8192).unwrap();
    victim.check_fetch(Class::Demand, &[range(0, 2)]);
    victim.request(Class::Demand, &[range(3000, 10)]);
    wait_for("the image to be taken out", || server.status().images.len() == 1);
    wait_for("its session to end", || server.status().sessions.len() == 1);
    other.check_fetch(Class::Demand, &[range(3000, 10)]);
    assert!(
        server
            .add_image(&broken.index, Preload::Off)
            .unwrap_err()
            .to_string()
            .contains("not the file that was indexed")
    );
}

#[test]
fn the_local_lane_hands_the_image_over() {
    let image = TestImage::new(12);
    let server = serve(&image, |_| {});
    let Endpoint::Unix(path) = &server.endpoints()[1] else { panic!("no Unix endpoint") };
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = Vec::new();
    Preamble.encode(&mut bytes);
    Message::Hello(Hello { image: image.id, capabilities: Capabilities::LOCAL, ticket: b"" }).encode(&mut bytes);
    stream.write_all(&bytes).unwrap();
    let (local, files) = receive_local(&stream);
    assert_eq!(usize::from(local.files), files.len());
    for frame in [0, 999, 1000, 1250, 1499, 2000, 2101, FRAMES - 1] {
        let gfn = Gfn::new(frame);
        let extent = local.extents.iter().find(|extent| extent.frames.contains(gfn)).unwrap();
        let mut page = vec![0; PAGE];
        files[usize::from(extent.file)].read_exact_at(&mut page, extent.offset_of(gfn)).unwrap();
        assert!(page == page_of(frame), "frame {frame}");
    }
    assert!(files[0].write_at(b"x", 0).is_err(), "the files are for reading");
    wait_for("the record", || server.status().sessions.first().is_some_and(|session| session.local));
    // Over TCP there is no such lane, whatever a client offers.
    let tcp = Client::open_with(&server.endpoints()[0], image.id, Capabilities::LOCAL);
    assert_eq!(tcp.capabilities, Capabilities::default());
}

/// Reads up to the IMAGE message, and the files that come with it.
fn receive_local(stream: &UnixStream) -> (LocalImage, Vec<File>) {
    let (mut bytes, mut files) = (Vec::new(), Vec::new());
    loop {
        let mut chunk = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(stream, &mut [IoSliceMut::new(&mut chunk)], &mut ancillary, RecvFlags::empty()).unwrap();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights.map(|fd: OwnedFd| File::from(fd)));
            }
        }
        assert!(received.bytes > 0, "the stream ends");
        bytes.extend_from_slice(&chunk[..received.bytes]);
        let mut rest = bytes.get(8..).unwrap_or_default();
        while let Some((message, length)) = decode(rest).unwrap() {
            if let Message::Image(local) = message {
                return (local, files);
            }
            rest = &rest[length..];
        }
    }
}

/// The command as a process, killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_command_serves_and_ends_at_a_signal() {
    let image = TestImage::new(13);
    let path = |name: &str| image.folder.path().join(name).display().to_string();
    std::fs::write(path("ticket"), "a ticket of some length\n").unwrap();
    let memserver = || Command::new(env!("CARGO_BIN_EXE_memserver"));
    let mut child = memserver()
        .args(["serve", "--image", &image.index.display().to_string(), "--listen", "tcp://127.0.0.1:0"])
        .args(["--listen", &image.socket().to_string(), "--admin", &path("admin"), "--ticket-file", &path("ticket")])
        .args(["--threads", "2", "--grace", "1", "--socket-mode", "0660"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let mut process = Process(child);
    let endpoints: Vec<Endpoint> = line.split_whitespace().skip(1).map(|text| text.parse().unwrap()).collect();
    assert!(line.starts_with("ready tcp://127.0.0.1:"), "{line}");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path("socket")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o660);
    let (mut client, got) = Client::hello(&endpoints[1], image.id, Capabilities::default(), b"a ticket of some length");
    assert!(matches!(got, Got::Welcome(_)), "{got:?}");
    client.check_fetch(Class::Demand, &[range(0, 5)]);
    let run = |arguments: &[&str]| {
        let output = memserver().args(arguments).args(["--admin", &path("admin")]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(run(&["status"]).contains("sessions: 1 now"));
    assert!(run(&["status", "--json"]).contains("\"sessions_total\": 1"));
    assert!(run(&["images"]).contains(&image.id.to_string()));
    let other = TestImage::new(14);
    assert_eq!(run(&["add", &other.index.display().to_string()]).trim(), other.id.to_string());
    run(&["drop", &other.id.to_string()]);
    let failed = memserver().args(["drop", &other.id.to_string(), "--admin", &path("admin")]).output().unwrap();
    assert!(!failed.status.success() && String::from_utf8_lossy(&failed.stderr).contains("is not served"));
    let taken = memserver().args(["serve", "--listen", &image.socket().to_string()]).output().unwrap();
    assert!(String::from_utf8_lossy(&taken.stderr).contains("another program listens there"), "{taken:?}");
    let pid = rustix::process::Pid::from_child(&process.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(client.receive(), Got::Goodbye(GoodbyeReason::Draining));
    drop(client);
    assert!(process.0.wait().unwrap().success());
    assert!(!Path::new(&path("socket")).exists() && !Path::new(&path("admin")).exists());
}

#[test]
fn only_the_owner_can_connect_unless_told_otherwise_and_open_doors_are_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let mut child = Command::new(env!("CARGO_BIN_EXE_memserver"))
        .args(["serve", "--listen", &format!("unix:{}", socket.display())])
        .args(["--listen", "tcp://0.0.0.0:0", "--listen", "tcp://127.0.0.1:0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let mut process = Process(child);
    let mut ready = String::new();
    BufReader::new(out).read_line(&mut ready).unwrap();
    assert!(ready.starts_with("ready "), "{ready}");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&socket).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    process.0.kill().unwrap();
    let log = std::io::read_to_string(err).unwrap();
    let warnings: Vec<_> = log.lines().filter(|line| line.contains("CAN READ GUEST MEMORY")).collect();
    assert!(matches!(warnings[..], [line] if line.contains("tcp://0.0.0.0:")), "{log}");
    for arguments in [["--socket-mode", "0999"], ["--socket-mode", "1777"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memserver"));
        let refused = command.args(["serve", "--listen", "tcp://127.0.0.1:0"]).args(arguments).output().unwrap();
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    }
}

#[test]
fn an_idle_timeout_that_would_end_every_session_at_once_is_refused() {
    for idle in ["0", "0.01"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memserver"));
        let refused =
            command.args(["serve", "--listen", "tcp://127.0.0.1:0", "--idle-timeout", idle]).output().unwrap();
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("would end sessions at once"), "{refused:?}");
    }
}

#[test]
fn a_killed_server_can_be_started_again_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let endpoint = format!("unix:{}", folder.path().join("socket").display());
    for round in 0..5 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_memserver"))
            .args(["serve", "--listen", &endpoint, "--threads", "2"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let out = child.stdout.take().unwrap();
        let _killed = Process(child);
        let mut ready = String::new();
        BufReader::new(out).read_line(&mut ready).unwrap();
        assert_eq!(ready.trim_end(), format!("ready {endpoint}"), "round {round}");
    }
}
