//! Whole overwrites, from a VMM's word on the admin socket to the kernel's pages.
//!
//! Goal: what was announced is not fetched, and no answer that was on its way lands on what was written since. Method: guests with
//! a real userfaultfd that announce and overwrite pages while others touch them and the server takes its time; at the end
//! each page is compared with what was written to it.

#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod common;
#[path = "../examples/overwrite.rs"]
mod overwrite;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{Behaviour, Image, ModelServer, assert_verified, embedded, finish, memtap, status, text, until};
use memtap::admin::{self, AdminError};
use overwrite::{Noted, announce};
use serde_json::json;

/// Every other touch of a few pages by four threads overwrites 16 of them.
const WORKLOAD: &str = "hot:10%,touches=20%,writes=10%,discards=5%,overwrites=40%";

fn slow() -> Behaviour {
    Behaviour { delay: Duration::from_millis(2), ..Behaviour::default() }
}

#[test]
fn a_late_answer_never_lands_on_what_was_overwritten() {
    let image = Arc::new(Image::new(2048));
    let mut late = 0;
    for (backing, hydrate) in [("anon", "off"), ("memfd", "off"), ("anon", "4000"), ("memfd", "4000")] {
        let server = ModelServer::tcp(&image, slow());
        let more = ["--workload", WORKLOAD, "--guest-threads", "4", "--backing", backing, "--hydrate", hydrate];
        let result = finish(embedded(&image, &server.endpoint, &more).spawn().unwrap());
        assert_verified(&image, &result);
        let (_, report, log) = result;
        assert!(report["guest"]["announced"].as_u64() > Some(100), "{report}\n{log}");
        let pager = &report["status"]["pager"];
        assert!(pager["overwritten"].as_u64() > Some(10), "{report}");
        late += pager["stale"].as_u64().unwrap() + pager["duplicates"].as_u64().unwrap();
    }
    assert!(late > 0, "no answer came late");
}

#[test]
fn a_vmm_announces_on_the_admin_socket() {
    let image = Arc::new(Image::new(2048));
    let server = ModelServer::tcp(&image, slow());
    let (socket, admin) = (image.path("handshake"), image.path("admin"));
    let mut pager = memtap(&["uffd", "--socket", text(&socket), "--descriptor", text(&image.descriptor())]);
    pager.args(["--server", &server.endpoint.to_string(), "--admin", text(&admin), "--hydrate", "now"]);
    let pager = pager.spawn().unwrap();
    until("the pager listens", || socket.exists() && admin.exists());
    let mut vmm = memtap(&["guest", "--socket", text(&socket), "--descriptor", text(&image.descriptor())]);
    vmm.args(["--verify", text(&image.index()), "--admin", text(&admin), "--guest-threads", "4"]);
    let result = finish(vmm.args(["--workload", WORKLOAD]).spawn().unwrap());
    assert_verified(&image, &result);
    assert!(result.1["guest"]["announced"].as_u64() > Some(100), "{}", result.1);
    assert_eq!(finish(pager).0, 0);
}

#[test]
fn the_example_announces_and_nothing_of_it_is_fetched() {
    let image = Arc::new(Image::new(2048));
    let server = ModelServer::tcp(&image, Behaviour::default());
    let (admin, stats) = (image.path("admin"), image.path("stats"));
    let more = [
        "--hold",
        "--admin",
        text(&admin),
        "--stats",
        text(&stats),
        "--workload",
        "random,touches=1%,writes=0%,discards=0%",
    ];
    let mut command = memtap(&["embedded", "--descriptor", text(&image.descriptor())]);
    let clone = command.args(["--server", &server.endpoint.to_string()]).args(more).spawn().unwrap();
    // The eager frames, some of them zeros, are there before the guest runs.
    let running = || status(&admin).is_some_and(|status| status["pager"]["faults"].as_u64() > Some(0));
    until("the guest runs", running);
    assert_eq!(announce(&admin, &[(3, 40), (10, 5)]).unwrap(), Noted { frames: 0, present: 40 });
    for (ranges, outside) in [(&[(100, 10), (2040, 20)][..], "1024..2060"), (&[(5000, 1)], "5000")] {
        match announce(&admin, ranges) {
            Err(AdminError::Refused(reason)) => {
                assert!(reason.contains("not in the guest's memory"), "{outside}: {reason}")
            }
            other => panic!("{ranges:?}: {other:?}"),
        }
    }
    for nonsense in [json!([[u64::MAX, 2]]), json!([[1]]), json!("all"), json!([[-1, 1]])] {
        assert!(admin::ask(&admin, &json!({"cmd": "overwrite", "ranges": nonsense})).is_err(), "{nonsense}");
    }
    let lacks = |status: &serde_json::Value| status["progress"]["missing"].as_u64().unwrap();
    let before = status(&admin).unwrap();
    let regions: Vec<(u64, u64)> =
        image.memory.regions().iter().map(|r| (r.frames.start().index(), r.frames.count().get())).collect();
    let noted = announce(&admin, &regions).unwrap();
    assert!(noted.frames > 1000 && noted.frames <= lacks(&before), "{noted:?}, {before}");
    assert!(noted.present >= 40, "{noted:?}");
    // Nothing is missing any more, so that the pager is done.
    let (code, report, log) = finish(clone);
    assert_eq!(code, 0, "{report}\n{log}");
    let stats: serde_json::Value = serde_json::from_slice(&std::fs::read(&stats).unwrap()).unwrap();
    let (fetched, pager) = (&stats["status"]["progress"], &stats["status"]["pager"]);
    assert_eq!((&fetched["missing"], &pager["overwritten"]), (&json!(0), &json!(noted.frames)), "{stats}");
}

#[test]
fn the_examples_words() {
    assert_eq!(overwrite::range("0x10+3"), Some((16, 3)));
    assert_eq!(overwrite::range("10+0x10"), Some((10, 16)));
    for nonsense in ["", "10", "+3", "10+", "ten+3", "10-3"] {
        assert_eq!(overwrite::range(nonsense), None, "{nonsense}");
    }
    assert!(announce(Path::new("/nonexistent/admin"), &[]).is_err());
}
