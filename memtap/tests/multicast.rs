//! Clones that share a multicast channel, over the loopback interface.
//!
//! Goal: every page is right whichever way it comes, and a channel that never comes, falls silent, loses datagrams or is taken
//! away costs time and nothing else. Method: as in `embedded.rs`; the server's channel is a model that sends everything once,
//! so that whatever is lost must come by unicast.

mod common;

use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{
    Behaviour, ChannelBehaviour, Image, ModelServer, assert_verified, embedded, finish, run, status, text, until,
};
use serde_json::Value;

type Result = (i32, Value, String);

fn server(image: &Arc<Image>, channel: ChannelBehaviour) -> ModelServer {
    ModelServer::tcp(image, Behaviour { channel: Some(channel), ..Behaviour::default() })
}

/// Runs a clone, and asserts that it is right.
fn verified(image: &Image, server: &ModelServer, more: &[&str]) -> Result {
    let result = run(embedded(image, &server.endpoint, more));
    assert_verified(image, &result);
    result
}

fn number(result: &Result, path: &str) -> u64 {
    let value = result.1.pointer(&format!("/status/{path}"));
    value.and_then(Value::as_u64).unwrap_or_else(|| panic!("no {path} in {}\n{}", result.1, result.2))
}

const TOUCH_ALL: [&str; 4] = ["--workload", "random,touches=100%,writes=30%,discards=2%", "--prefetch", "off"];

/// A clone that does next to nothing until it is told to quit, and its admin socket.
fn idle(image: &Image, server: &ModelServer) -> (Child, PathBuf) {
    let admin = image.path("admin");
    let calm = "random,touches=5%,writes=0%,discards=0%";
    let mut command = common::memtap(&["embedded", "--descriptor", text(&image.descriptor()), "--hold"]);
    command.args(["--server", &server.endpoint.to_string(), "--admin", text(&admin), "--workload", calm]);
    (command.spawn().expect("memtap can be run"), admin)
}

#[test]
fn what_is_waited_for_comes_by_multicast() {
    let image = Arc::new(Image::new(4096));
    let server = server(&image, ChannelBehaviour::default());
    let result = verified(&image, &server, &TOUCH_ALL);
    assert!(number(&result, "channel/answered") > 100, "{}", result.1);
    assert!(number(&result, "pager/unasked_pages") + number(&result, "pager/demand_pages") > 1000, "{}", result.1);
    assert!(result.2.contains("pages come by multicast"), "{}", result.2);
}

#[test]
fn the_background_is_pushed() {
    let image = Arc::new(Image::new(16384));
    let server = server(&image, ChannelBehaviour::default());
    let calm =
        ["--workload", "random,touches=1%,writes=0%,discards=0%", "--prefetch", "off", "--hydrate", "now", "--hold"];
    let result = verified(&image, &server, &calm);
    let stats = &result.1;
    assert!(number(&result, "pager/unasked_pages") > 5000, "{stats}\n{}", result.2);
    assert!(number(&result, "pager/hydrate_pages") < 2000, "{stats}\n{}", result.2);
}

#[test]
fn a_single_clone_asks_by_unicast() {
    let image = Arc::new(Image::new(2048));
    let server = server(&image, ChannelBehaviour { members: 1, ..ChannelBehaviour::default() });
    let result = verified(&image, &server, &TOUCH_ALL);
    assert!(number(&result, "channel/requests") < 20, "{}", result.1);
}

#[test]
fn a_channel_that_is_not_wanted_is_not_joined() {
    let image = Arc::new(Image::new(1024));
    let server = server(&image, ChannelBehaviour::default());
    let result = verified(&image, &server, &["--mcast", "off"]);
    assert_eq!(result.1["status"]["channel"], Value::Null);
    assert_eq!(server.channel.as_ref().unwrap().reports.load(Ordering::Relaxed), 0);
    let result = verified(&image, &server, &["--mcast-interface", "no-such-interface"]);
    assert_eq!(result.2.matches("the clone runs on unicast").count(), 1, "{}", result.2);
}

#[test]
fn blocked_multicast_is_told_of_once_and_done_without() {
    let image = Arc::new(Image::new(2048));
    let blocked = ChannelBehaviour { mute: true, ..ChannelBehaviour::default() };
    let slow = Behaviour { channel: Some(blocked), delay: Duration::from_millis(2), ..Behaviour::default() };
    let server = ModelServer::tcp(&image, slow);
    let result = verified(&image, &server, &TOUCH_ALL);
    assert_eq!(number(&result, "channel/requests"), 0);
    assert_eq!(result.2.matches("no multicast arrives from 239.255.").count(), 1, "{}", result.2);
    assert!(result.2.contains("on lo within 1s") && result.2.contains("querier"), "{}", result.2);
}

#[test]
fn a_channel_that_falls_silent_is_left_for_unicast() {
    let image = Arc::new(Image::new(4096));
    for hydrate in ["off", "now"] {
        let server = server(&image, ChannelBehaviour { mute_after: Some(300), ..ChannelBehaviour::default() });
        let result = verified(&image, &server, &[&TOUCH_ALL[..], &["--hydrate", hydrate]].concat());
        assert!(number(&result, "channel/received") > 0, "{}", result.1);
    }
}

#[test]
fn silence_and_its_end_are_told_of() {
    let image = Arc::new(Image::new(1024));
    let server = server(&image, ChannelBehaviour::default());
    let (clone, admin) = idle(&image, &server);
    let link = |word: &str| status(&admin).is_some_and(|status| status["channel"]["link"] == word);
    let channel = server.channel.as_ref().unwrap();
    for muted in [false, true, false, true] {
        channel.muted.store(muted, Ordering::Relaxed);
        until("the change", || link(if muted { "silent" } else { "live" }));
    }
    memtap::admin::ask(&admin, &serde_json::json!({"cmd": "quit"})).unwrap();
    let (_, _, log) = finish(clone);
    // A machine that stands still for a second makes more of it.
    for words in ["no multicast arrives any more", "pages come by multicast again"] {
        assert!(log.contains(words), "{log}");
    }
    assert_eq!(log.matches("joined the multicast group").count(), 1, "{log}");
}

#[test]
fn what_is_lost_comes_by_unicast() {
    let image = Arc::new(Image::new(4096));
    let server = server(&image, ChannelBehaviour { loses: Some(9), ..ChannelBehaviour::default() });
    for hydrate in ["off", "now"] {
        let result = verified(&image, &server, &[&TOUCH_ALL[..], &["--hydrate", hydrate]].concat());
        if hydrate == "off" {
            assert!(number(&result, "channel/fallbacks") > 0, "{}", result.1);
        }
    }
}

#[test]
fn a_channel_that_is_taken_away_is_done_without() {
    let image = Arc::new(Image::new(4096));
    let channel = Some(ChannelBehaviour::default());
    let server = ModelServer::tcp(&image, Behaviour { channel, gone_after: Some(200), ..Behaviour::default() });
    let result = verified(&image, &server, &TOUCH_ALL);
    assert_eq!(result.1["status"]["channel"]["link"], "none");
    assert_eq!(result.2.matches("the server ended the multicast channel").count(), 1, "{}", result.2);
}

#[test]
fn a_server_that_comes_back_offers_another_channel() {
    let image = Arc::new(Image::new(4096));
    let path = image.path("server");
    let behaviour = Behaviour {
        channel: Some(ChannelBehaviour::default()),
        delay: Duration::from_micros(300),
        ..Behaviour::default()
    };
    let server = ModelServer::unix(&path, &image, behaviour.clone());
    let more = [&TOUCH_ALL[..], &["--lane", "socket", "--patience", "60s"]].concat();
    let clone = embedded(&image, &server.endpoint, &more).spawn().unwrap();
    until("some requests", || server.channel.as_ref().unwrap().demanded.load(Ordering::Relaxed) > 100);
    server.kill();
    std::thread::sleep(Duration::from_millis(300));
    let server = ModelServer::unix(&path, &image, behaviour);
    let result = finish(clone);
    assert_verified(&image, &result);
    assert!(server.channel.as_ref().unwrap().demanded.load(Ordering::Relaxed) > 0);
    assert_eq!(result.2.matches("joined the multicast group").count(), 2, "{}", result.2);
}

#[test]
fn huge_pages_are_pushed_in_parts() {
    let image = Arc::new(Image::new(8 * 512));
    if let Err(reason) = common::reserve_huge_pages(8) {
        eprintln!("SKIPPED huge_pages_are_pushed_in_parts: no 2 MiB pages can be reserved: {reason}");
        return;
    }
    let server = server(&image, ChannelBehaviour::default());
    let workload = "random,touches=20%,writes=30%,discards=0.2%";
    verified(&image, &server, &["--backing", "huge", "--workload", workload, "--hydrate", "now"]);
}

#[test]
fn the_status_tells_of_the_channel() {
    let image = Arc::new(Image::new(1024));
    let server = server(&image, ChannelBehaviour::default());
    let (clone, admin) = idle(&image, &server);
    let live = |status: Value| status["channel"]["link"] == "live" && status["channel"]["members"] == 4;
    until("a live channel", || status(&admin).is_some_and(live));
    let output = common::wait(common::memtap(&["status", "--admin", text(&admin)]).spawn().unwrap());
    let words = String::from_utf8(output.stdout).unwrap();
    assert!(words.contains("multicast  239.255.") && words.contains(" on lo (live), 4 clones"), "{words}");
    memtap::admin::ask(&admin, &serde_json::json!({"cmd": "quit"})).unwrap();
    finish(clone);
}
