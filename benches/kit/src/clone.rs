//! An embedded clone within the bench's own process.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use descriptor::{Descriptor, FrameSet};
use memtap::engine::{ControlHandle, Engine, EngineConfig, OnFailure, WorkingSetPolicy, control};
use memtap::guest::embedded::{Backing, EmbeddedGuest, GuestPlan, Workload};
use memtap::pager::{Hydrate, Pager, PagerConfig, Prefetch};
use memtap::port::FaultPort;
use memtap::source::{Lane, Source, SourceConfig};

use crate::image::RandomImage;

/// What a clone is to do.
#[derive(Clone, Copy)]
pub struct ClonePlan {
    /// How its pages come.
    pub lane: Lane,
    /// Whether it takes part in the server's multicast.
    pub multicast: bool,
    /// What it fetches without being asked to.
    pub hydrate: Hydrate,
    /// How long its pager looks for events before it sleeps.
    pub spin: Duration,
}

/// A clone of `image`, served by `endpoint`: its guest, and the engine that must run for it.
pub fn embedded(image: &RandomImage, endpoint: &str, plan: ClonePlan) -> anyhow::Result<(EmbeddedGuest, Engine)> {
    // The handle may go: nobody commands this engine.
    let (guest, engine, _) = commanded(&image.descriptor_path, endpoint, plan)?;
    Ok((guest, engine))
}

/// As [`embedded`], by the path of the descriptor, and with the handle that commands the engine.
pub fn commanded(
    descriptor: &Path,
    endpoint: &str,
    plan: ClonePlan,
) -> anyhow::Result<(EmbeddedGuest, Engine, ControlHandle)> {
    let descriptor = Descriptor::read(descriptor)?;
    let image = descriptor.identity.image;
    let (guest, port, handle) = EmbeddedGuest::new(&descriptor.memory, Backing::Anon)?;
    let traits = port.traits();
    let mut config = PagerConfig::for_clone(&descriptor, traits);
    config.hydrate = plan.hydrate;
    config.prefetch = Prefetch::Off;
    let patience = config.patience;
    let epoch = Instant::now();
    let source = Source::new(SourceConfig {
        endpoints: vec![endpoint.parse().context("the server's endpoint")?],
        image,
        universe: descriptor.memory.universe(),
        ticket: Vec::new(),
        lane: plan.lane,
        multicast: plan.multicast,
        working_set: false,
        granule: traits.granule,
        seed: 1,
    })?;
    let (control, commands) = control()?;
    let engine = EngineConfig {
        image,
        hydrate: plan.hydrate,
        spin: plan.spin,
        on_failure: OnFailure::Kill,
        patience,
        progress: false,
        channel_interface: None,
        working_set: WorkingSetPolicy::Off,
    };
    let pager = Pager::new(Duration::ZERO, config, 1)?;
    let engine = Engine::new(engine, pager, Box::new(port), source, Box::new(handle), control, epoch);
    Ok((guest, engine, commands))
}

/// One thread that does `workload` on all of its memory, without a comparison at the end.
pub fn guest_plan(workload: &str, image: &RandomImage) -> anyhow::Result<GuestPlan> {
    let workload: Workload = workload.parse()?;
    let free = FrameSet::empty(Descriptor::read(&image.descriptor_path)?.memory.universe());
    Ok(GuestPlan { workload, threads: 1, image: None, free, announce: None, epoch: Instant::now() })
}
