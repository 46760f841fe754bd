//! How long a vCPU waits for a page that must come from a server over loopback TCP, as the guest sees it.
//!
//! The floor in the same run: a userfaultfd fault that is answered with a page at hand, plus a TCP ping-pong of the same
//! sizes between two threads. Who sits where decides over much, so the threads of the floor sit where those of the clone do:
//! the guest on the first processor and its handler or pager on the second (the two sides of the ping-pong likewise), as where
//! vCPUs have processors of their own; or everything on one, where a wake-up costs least. The server sits with the guest.
//!
//! Measured with processors kept awake (`/dev/cpu_dma_latency` held at 0) and without, and with a pager that sleeps at once
//! instead of looking for the answer for a moment.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use bench_kit::clone::{self, ClonePlan};
use bench_kit::image::RandomImage;
use bench_kit::roles::{self, PageServer};
use bench_kit::{Args, AwakeProcessors, median, micros, pin, quantile, rounded};
use descriptor::PAGE_SIZE;
use descriptor::fetch::PageRun;
use memtap::guest::Guest;
use memtap::guest::embedded::{Backing, EmbeddedGuest};
use memtap::pager::Hydrate;
use memtap::port::{Event, FaultPort, Stop};
use memtap::source::Lane;
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

/// A request for one page on the wire: header and one range.
const REQUEST: usize = 32;

/// Its answer: header, run, page.
const ANSWER: usize = PageRun::HEAD + PAGE_SIZE as usize;

/// The processor of the guest and the server.
const GUEST: usize = 0;

/// Who sits where, and whether the pager looks before it sleeps.
#[derive(Clone, Copy)]
struct Setting {
    /// The processor of the pager.
    pager: usize,
    spin: Duration,
}

/// How long the pager looks for events before it sleeps, as by default on its command line.
const SPIN: Duration = Duration::from_micros(50);

/// QEMU's postcopy-preempt request on a machine like CI's, in microseconds.
const QEMU_PREEMPT_US: f64 = 380.0;

fn main() -> ExitCode {
    roles::play().unwrap_or_else(|| bench_kit::run("fault_latency", bench))
}

fn bench(args: &Args) -> anyhow::Result<Value> {
    pin(GUEST)?;
    let image = RandomImage::make(args.pick(64, 256))?;
    let server = PageServer::start(&image.index_path, "tcp://127.0.0.1:0", &["--compress", "off"])?;
    let rounds = args.pick(3, 7);
    let apart = Setting { pager: GUEST + 1, spin: SPIN };
    let together = Setting { pager: GUEST, spin: Duration::ZERO };

    let awake = AwakeProcessors::hold().inspect_err(|error| println!("processors may sleep: {error}"));
    let held = awake.is_ok();
    let with = measure(&image, &server, apart, rounds)?;
    let sleeping = measure(&image, &server, Setting { spin: Duration::ZERO, ..apart }, rounds)?;
    let one = measure(&image, &server, together, rounds)?;
    drop(awake);
    let without = measure(&image, &server, apart, rounds)?;

    println!("{:<28}{:>12}{:>12}{:>12}{:>12}{:>8}", "us", "demand p50", "demand p99", "uffd p50", "tcp p50", "ratio");
    let row = |name: &str, m: &Measured| {
        let ratio = m.ratio;
        println!("{name:<28}{:>12.1}{:>12.1}{:>12.1}{:>12.1}{ratio:>8.2}", m.p50, m.p99, m.uffd, m.ping_pong);
    };
    row("two processors", &with);
    row("  pager sleeps at once", &sleeping);
    row("  processors may sleep", &without);
    row("one processor", &one);
    let report = |m: &Measured| {
        json!({
            "demand_us": { "p50": rounded(m.p50), "p99": rounded(m.p99) },
            "floor_us": rounded(m.uffd + m.ping_pong),
            "ratio_floor": rounded(m.ratio),
        })
    };
    Ok(json!({
        "demand_us": { "p50": rounded(with.p50), "p99": rounded(with.p99) },
        "floor_us": rounded(with.uffd + with.ping_pong),
        "ratio_floor": rounded(with.ratio),
        "ratio_qemu_preempt": rounded(QEMU_PREEMPT_US / with.p50),
        "cpu_dma_latency_held": held,
        "without_spin": report(&sleeping),
        "unheld": report(&without),
        "one_processor": report(&one),
    }))
}

/// Medians over the rounds, in microseconds.
struct Measured {
    p50: f64,
    p99: f64,
    uffd: f64,
    ping_pong: f64,
    ratio: f64,
}

fn measure(image: &RandomImage, server: &PageServer, setting: Setting, rounds: usize) -> anyhow::Result<Measured> {
    let (mut p50, mut p99, mut uffd, mut ping, mut ratio) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..rounds {
        let (half, most) = demand(image, &server.endpoints[0], setting)?;
        let (fault, echo) = (bare_fault(image, setting.pager)?, ping_pong(3000, setting.pager)?);
        ratio.push(half / (fault + echo));
        p50.push(half);
        p99.push(most);
        uffd.push(fault);
        ping.push(echo);
    }
    let mut samples = [p50, p99, uffd, ping, ratio];
    let [p50, p99, uffd, ping_pong, ratio] = samples.each_mut().map(|samples| median(samples));
    Ok(Measured { p50, p99, uffd, ping_pong, ratio })
}

/// A guest touches pages here and there, and each comes from the server: what half and 99 % of its faults take.
fn demand(image: &RandomImage, endpoint: &str, setting: Setting) -> anyhow::Result<(f64, f64)> {
    let plan = ClonePlan { lane: Lane::Socket, multicast: false, hydrate: Hydrate::Off, spin: setting.spin };
    let (guest, engine) = clone::embedded(image, endpoint, plan)?;
    let work = clone::guest_plan("random,touches=20%,writes=0%,discards=0%", image)?;
    std::thread::scope(|scope| {
        let engine = scope.spawn(|| pin(setting.pager).map(|()| engine.run()));
        let report = guest.work(&work);
        guest.end();
        let ended = engine.join().map_err(|_| anyhow!("the engine panicked"))??;
        let report = report?;
        let fetched = ended.status.pager.demand_pages;
        ensure!(
            fetched > 1000 && fetched >= report.fault_us.count,
            "only {fetched} pages were fetched: {}",
            ended.outcome
        );
        Ok((report.fault_us.p50_us, report.fault_us.p99_us))
    })
}

/// The same guest with a handler that has every page at hand: what half of its faults take.
fn bare_fault(image: &RandomImage, processor: usize) -> anyhow::Result<f64> {
    let descriptor = descriptor::Descriptor::read(&image.descriptor_path)?;
    let (guest, mut port, handle) = EmbeddedGuest::new(&descriptor.memory, Backing::Anon)?;
    let work = clone::guest_plan("random,touches=20%,writes=0%,discards=0%", image)?;
    handle.open();
    std::thread::scope(|scope| {
        let handler = scope.spawn(|| -> anyhow::Result<()> {
            pin(processor)?;
            let mut events = Vec::new();
            loop {
                let ended = handle.watch().context("an embedded guest can be watched")?;
                let mut fds = [
                    PollFd::from_borrowed_fd(port.fd(), PollFlags::IN),
                    PollFd::from_borrowed_fd(ended, PollFlags::IN),
                ];
                poll(&mut fds, None)?;
                if !fds[1].revents().is_empty() {
                    return Ok(());
                }
                port.read_events(&mut events)?;
                for event in events.drain(..) {
                    let Event::Fault { gfn, .. } = event else { continue };
                    let offset = gfn.address() as usize;
                    let page =
                        image.bytes.get(offset..offset + PAGE_SIZE as usize).context("a fault beyond the image")?;
                    let done = port.install(gfn, page)?;
                    ensure!(done.stopped != Some(Stop::Busy), "busy without a discard");
                }
            }
        });
        let report = guest.work(&work);
        guest.end();
        handler.join().map_err(|_| anyhow!("the handler panicked"))??;
        Ok(report?.fault_us.p50_us)
    })
}

/// A request and an answer of the right sizes between two threads: the median round trip in microseconds.
fn ping_pong(count: usize, processor: usize) -> anyhow::Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if pin(processor).is_err() {
                return;
            }
            let (mut request, answer) = ([0; REQUEST], [0x5a; ANSWER]);
            while far.read_exact(&mut request).is_ok() && far.write_all(&answer).is_ok() {}
        });
        let mut samples = Vec::with_capacity(count);
        let (request, mut answer) = ([0; REQUEST], [0; ANSWER]);
        for _ in 0..count {
            let start = Instant::now();
            near.write_all(&request)?;
            near.read_exact(&mut answer)?;
            samples.push(start.elapsed());
        }
        drop(near);
        Ok(micros(quantile(&mut samples, 0.5)))
    })
}
