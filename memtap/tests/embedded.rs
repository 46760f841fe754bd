//! Clones whose guests are threads in `memtap` itself, over real userfaultfds.
//!
//! Goal: every page of every clone is right at the end, whatever the guest does to its memory, whatever the server does, and
//! whichever way the pages come; and a pager that cannot go on says so. Method: the command runs as a process of its own
//! against a model server; its guest compares all of its memory with the image, its own writes and discards included.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{
    Behaviour, Image, ModelServer, assert_verified, embedded, finish, mode, reserve_huge_pages, run, status, text,
    until,
};
use descriptor::fetch::Refusal;
use serde_json::json;

#[test]
fn every_page_is_right_over_tcp() {
    let image = Arc::new(Image::new(4096));
    for lz4 in [false, true] {
        let server = ModelServer::tcp(&image, Behaviour { lz4, ..Behaviour::default() });
        let workload = "random,touches=100%,writes=40%,discards=5%";
        let result = run(embedded(&image, &server.endpoint, &["--workload", workload, "--guest-threads", "4"]));
        assert_verified(&image, &result);
        assert!(result.1["pages_fetched"].as_u64().unwrap() > 0, "{}", result.1);
        assert!(result.1["first_touch_ms"].as_f64().unwrap() > 0.0, "{}", result.1);
        assert!(result.1["bytes_received"].as_u64().unwrap() > 0, "{}", result.1);
    }
}

#[test]
fn every_page_is_right_from_the_images_own_files() {
    let image = Arc::new(Image::new(4096));
    let server = ModelServer::unix(&image.path("server"), &image, Behaviour { local: true, ..Behaviour::default() });
    for hydrate in ["off", "now"] {
        let result = run(embedded(&image, &server.endpoint, &["--lane", "local", "--hydrate", hydrate]));
        assert_verified(&image, &result);
        assert_eq!(result.1["local"], true);
    }
    assert_eq!(server.requests.load(Ordering::Relaxed), 0);
    let result = run(embedded(&image, &server.endpoint, &["--lane", "socket"]));
    assert_verified(&image, &result);
    assert!(server.requests.load(Ordering::Relaxed) > 0);
}

#[test]
fn files_that_cannot_be_used_leave_the_socket() {
    let image = Arc::new(Image::new(1024));
    let behaviour = Behaviour { local: true, file_lost: true, ..Behaviour::default() };
    let server = ModelServer::unix(&image.path("server"), &image, behaviour);
    let result = run(embedded(&image, &server.endpoint, &["--patience", "30s"]));
    assert_verified(&image, &result);
    assert_eq!(result.1["local"], false);
    // One with the files, one without.
    assert_eq!(server.sessions.load(Ordering::Relaxed), 2);
    assert_eq!(result.2.matches("pages come through the socket instead").count(), 1, "{}", result.2);
}

#[test]
fn every_pattern_and_prefetch_gives_the_same_memory() {
    let image = Arc::new(Image::new(2048));
    let server = ModelServer::tcp(&image, Behaviour::default());
    for (workload, prefetch, hydrate) in [
        ("sequential,touches=100%", "auto", "off"),
        ("strided:7,touches=50%", "auto", "now"),
        ("hot:5%,touches=300%,writes=60%", "16", "2000/s"),
        ("random,touches=5%", "off", "now"),
    ] {
        let more = ["--workload", workload, "--prefetch", prefetch, "--hydrate", hydrate];
        assert_verified(&image, &run(embedded(&image, &server.endpoint, &more)));
    }
}

#[test]
fn a_storm_of_discards_loses_nothing() {
    let image = Arc::new(Image::new(4096));
    let server = ModelServer::tcp(&image, Behaviour::default());
    let workload = "random,touches=800%,writes=30%,discards=30%";
    for backing in ["anon", "memfd"] {
        let more = ["--workload", workload, "--guest-threads", "8", "--hydrate", "now", "--backing", backing];
        assert_verified(&image, &run(embedded(&image, &server.endpoint, &more)));
    }
}

#[test]
fn huge_pages_are_installed_whole() {
    let image = Arc::new(Image::new(8 * 512));
    if let Err(reason) = reserve_huge_pages(8) {
        eprintln!("SKIPPED huge_pages_are_installed_whole: no 2 MiB pages can be reserved: {reason}");
        return;
    }
    let workload = "random,touches=50%,writes=30%,discards=0.2%";
    let tcp = ModelServer::tcp(&image, Behaviour { lz4: true, ..Behaviour::default() });
    let unix = ModelServer::unix(&image.path("server"), &image, Behaviour { local: true, ..Behaviour::default() });
    for server in [&tcp, &unix] {
        let more = ["--backing", "huge", "--workload", workload, "--guest-threads", "4", "--hydrate", "now"];
        assert_verified(&image, &run(embedded(&image, &server.endpoint, &more)));
    }
}

#[test]
fn broken_sessions_and_failed_requests_are_survived() {
    let image = Arc::new(Image::new(2048));
    for behaviour in [
        Behaviour { break_after: Some(40), ..Behaviour::default() },
        Behaviour { drain_after: Some(40), ..Behaviour::default() },
        Behaviour { fail_every: Some(10), ..Behaviour::default() },
    ] {
        let server = ModelServer::tcp(&image, behaviour);
        assert_verified(&image, &run(embedded(&image, &server.endpoint, &["--prefetch", "off"])));
    }
}

#[test]
fn a_server_that_is_killed_and_comes_back_goes_unnoticed_by_the_guest() {
    let image = Arc::new(Image::new(4096));
    let path = image.path("server");
    let slow = Behaviour { delay: Duration::from_micros(500), ..Behaviour::default() };
    let server = ModelServer::unix(&path, &image, slow);
    let more = ["--prefetch", "off", "--lane", "socket", "--patience", "60s"];
    let clone = embedded(&image, &server.endpoint, &more).spawn().unwrap();
    until("some requests", || server.requests.load(Ordering::Relaxed) > 100);
    server.kill();
    std::thread::sleep(Duration::from_millis(300));
    let server = ModelServer::unix(&path, &image, Behaviour::default());
    assert_verified(&image, &finish(clone));
    assert!(server.requests.load(Ordering::Relaxed) > 0);
}

#[test]
fn servers_are_tried_in_turn() {
    let image = Arc::new(Image::new(1024));
    let refusing = ModelServer::tcp(&image, Behaviour { refuse: Some(Refusal::UnknownImage), ..Behaviour::default() });
    let serving = ModelServer::tcp(&image, Behaviour::default());
    let nobody = image.path("nobody");
    let more = ["--server", &format!("unix:{}", text(&nobody)), "--server", &serving.endpoint.to_string()];
    assert_verified(&image, &run(embedded(&image, &refusing.endpoint, &more)));
}

#[test]
fn a_refusal_for_good_ends_the_clone_at_once() {
    let image = Arc::new(Image::new(1024));
    let server = ModelServer::tcp(&image, Behaviour { ticket: b"sesame".into(), ..Behaviour::default() });
    let (code, report, log) = run(embedded(&image, &server.endpoint, &["--patience", "1h"]));
    assert_eq!(code, i32::from(memtap::engine::exit_code::REFUSED), "{log}");
    assert_eq!(report["done"], false);
    assert!(log.contains("Ticket"), "{log}");
    let ticket = image.path("ticket");
    std::fs::write(&ticket, "sesame\n").unwrap();
    assert_verified(&image, &run(embedded(&image, &server.endpoint, &["--ticket-file", text(&ticket)])));
}

#[test]
fn a_source_that_stays_away_fails_the_guest_by_policy() {
    let image = Arc::new(Image::new(1024));
    let path = image.path("server");
    for policy in ["pause", "kill"] {
        let server =
            ModelServer::unix(&path, &image, Behaviour { delay: Duration::from_millis(5), ..Behaviour::default() });
        let stats = image.path("stats");
        let more = ["--lane", "socket", "--patience", "300ms", "--on-failure", policy, "--stats", text(&stats)];
        let clone = embedded(&image, &server.endpoint, &more).spawn().unwrap();
        until("some requests", || server.requests.load(Ordering::Relaxed) > 3);
        server.kill();
        let (code, report, log) = finish(clone);
        assert_eq!(code, i32::from(memtap::engine::exit_code::SOURCE_GONE), "{report}\n{log}");
        assert!(log.contains("longer than the patience allows"), "{log}");
        let stats: serde_json::Value = serde_json::from_slice(&std::fs::read(&stats).unwrap()).unwrap();
        assert_eq!((&stats["exit_code"], &stats["status"]["state"]), (&json!(3), &json!("failed")));
    }
}

#[test]
fn a_guest_that_is_held_goes_on_when_the_server_is_back() {
    let image = Arc::new(Image::new(1024));
    let (path, admin) = (image.path("server"), image.path("admin"));
    let server =
        ModelServer::unix(&path, &image, Behaviour { delay: Duration::from_millis(2), ..Behaviour::default() });
    let more = ["--lane", "socket", "--patience", "100ms", "--on-failure", "hold", "--admin", text(&admin)];
    let clone = embedded(&image, &server.endpoint, &more).spawn().unwrap();
    until("some requests", || server.requests.load(Ordering::Relaxed) > 3);
    assert_eq!(mode(&admin), 0o600);
    server.kill();
    until("the guest is held", || status(&admin).is_some_and(|status| status["state"] == "holding"));
    let _server = ModelServer::unix(&path, &image, Behaviour::default());
    assert_verified(&image, &finish(clone));
    assert!(!admin.exists());
}

#[test]
fn the_admin_socket_and_signals_are_obeyed() {
    let image = Arc::new(Image::new(2048));
    let server = ModelServer::tcp(&image, Behaviour::default());
    let admin = image.path("admin");
    let more = ["--hold", "--admin", text(&admin), "--workload", "random,touches=1%,writes=0%,discards=0%"];
    let without_verify = |more: &[&str]| {
        let mut command = common::memtap(&["embedded", "--descriptor", text(&image.descriptor())]);
        command.args(["--server", &server.endpoint.to_string()]).args(more);
        command.spawn().unwrap()
    };
    // Hydration on demand completes the clone, which ends the pager.
    let clone = without_verify(&more);
    until("faults", || status(&admin).is_some_and(|status| status["pager"]["faults"].as_u64() > Some(5)));
    let before = status(&admin).unwrap();
    assert!(before["progress"]["missing"].as_u64() > Some(0), "{before}");
    assert!(memtap::admin::ask(&admin, &json!({"cmd": "dance"})).is_err());
    assert!(memtap::admin::ask(&admin, &json!({"cmd": "hydrate", "policy": "slowly"})).is_err());
    memtap::admin::ask(&admin, &json!({"cmd": "hydrate", "policy": "now"})).unwrap();
    assert_eq!(finish(clone).0, 0);
    // Quit and SIGTERM stop it before.
    let clone = without_verify(&more);
    until("an answer", || status(&admin).is_some_and(|status| status["state"] == "running"));
    memtap::admin::ask(&admin, &json!({"cmd": "quit"})).unwrap();
    assert_eq!(finish(clone).0, i32::from(memtap::engine::exit_code::STOPPED));
    let clone = without_verify(&more);
    until("an answer", || status(&admin).is_some_and(|status| status["state"] == "running"));
    let pid = rustix::process::Pid::from_child(&clone);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(finish(clone).0, i32::from(memtap::engine::exit_code::STOPPED));
}
