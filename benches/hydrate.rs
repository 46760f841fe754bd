//! How fast a clone is filled completely, over loopback TCP and through the local lane, against a bare loop of UFFDIO_COPY.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use bench_kit::clone::{self, ClonePlan};
use bench_kit::image::RandomImage;
use bench_kit::roles::{self, PageServer};
use bench_kit::{Args, median, rounded};
use descriptor::{Descriptor, Gfn};
use memtap::guest::embedded::{Backing, EmbeddedGuest};
use memtap::pager::Hydrate;
use memtap::port::FaultPort;
use memtap::source::Lane;
use serde_json::{Value, json};

/// Bytes that the bare loop hands to one UFFDIO_COPY: beyond 64 KiB larger pieces gain nothing.
const PIECE: usize = 1 << 20;

fn main() -> ExitCode {
    roles::play().unwrap_or_else(|| bench_kit::run("hydrate", bench))
}

fn bench(args: &Args) -> anyhow::Result<Value> {
    let mib: u64 = args.pick(256, 1024);
    let image = RandomImage::make(mib)?;
    let folder = tempfile::tempdir()?;
    let socket = format!("unix:{}", folder.path().join("pages").display());
    let tcp = PageServer::start(&image.index_path, "tcp://127.0.0.1:0", &["--compress", "off"])?;
    let unix = PageServer::start(&image.index_path, &socket, &["--compress", "off"])?;

    let (mut copies, mut locals, mut tcps) = (vec![], vec![], vec![]);
    // The first round touches memory that the host may not have backed yet.
    for round in 0..=args.pick(3, 5) {
        let copy = bare_copy(&image)?;
        let local = filled(&image, &unix.endpoints[0], Lane::Local)?;
        let socket = filled(&image, &tcp.endpoints[0], Lane::Socket)?;
        if round > 0 {
            copies.push(copy);
            locals.push(local);
            tcps.push(socket);
        }
    }
    let ratio = |lane: &[f64]| median(&mut copies.iter().zip(lane).map(|(copy, lane)| copy / lane).collect::<Vec<_>>());
    let (local_ratio, tcp_ratio) = (ratio(&locals), ratio(&tcps));
    let speed = |seconds: &mut Vec<f64>| (mib << 20) as f64 / median(seconds);
    let (copy, local, socket) = (speed(&mut copies), speed(&mut locals), speed(&mut tcps));
    println!("{mib} MiB: bare UFFDIO_COPY {:.2} GB/s", copy / 1e9);
    println!(
        "local lane {:.2} GB/s, ratio {local_ratio:.2}; TCP {:.2} GB/s, ratio {tcp_ratio:.2}",
        local / 1e9,
        socket / 1e9
    );
    Ok(json!({
        "image_mib": mib,
        "bytes_per_s": { "copy": rounded(copy), "local": rounded(local), "tcp": rounded(socket) },
        "ratio_copy": { "local": rounded(local_ratio), "tcp": rounded(tcp_ratio) },
    }))
}

/// Seconds until every page of a clone is there, the connection included.
fn filled(image: &RandomImage, endpoint: &str, lane: Lane) -> anyhow::Result<f64> {
    let plan = ClonePlan { lane, multicast: false, hydrate: Hydrate::Now, spin: Duration::ZERO };
    let (guest, engine) = clone::embedded(image, endpoint, plan)?;
    let pages = image.bytes.len() as u64 / descriptor::PAGE_SIZE;
    let look = clone::guest_plan("random,touches=1%,writes=0%,discards=0%", image)?;
    std::thread::scope(|scope| {
        let start = Instant::now();
        let engine = scope.spawn(move || {
            let ended = engine.run();
            (ended, start.elapsed())
        });
        let (ended, elapsed) = engine.join().map_err(|_| anyhow!("the engine panicked"))?;
        let there = ended.status.pager.hydrate_pages;
        ensure!(there == pages, "{there} of {pages} pages came: {}", ended.outcome);
        guest.work(&look)?;
        Ok(elapsed.as_secs_f64())
    })
}

/// Seconds for installing the image from memory, in large pieces, with nothing else to do.
fn bare_copy(image: &RandomImage) -> anyhow::Result<f64> {
    let descriptor = Descriptor::read(&image.descriptor_path)?;
    let (_guest, mut port, _handle) = EmbeddedGuest::new(&descriptor.memory, Backing::Anon)?;
    let start = Instant::now();
    for (index, piece) in image.bytes.chunks(PIECE).enumerate() {
        let done = port.install(Gfn::containing((index * PIECE) as u64), piece)?;
        ensure!(done.stopped.is_none(), "UFFDIO_COPY stopped: {done:?}");
    }
    Ok(start.elapsed().as_secs_f64())
}
