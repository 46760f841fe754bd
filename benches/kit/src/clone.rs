//! An embedded clone within the bench's own process.

use std::time::{Duration, Instant};

use anyhow::Context;
use descriptor::{Descriptor, FrameSet};
use memtap::engine::{Engine, EngineConfig, OnFailure, control};
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
    /// What it fetches without being asked to.
    pub hydrate: Hydrate,
    /// How long its pager looks for events before it sleeps.
    pub spin: Duration,
}

/// A clone of `image`, served by `endpoint`: its guest, and the engine that must run for it.
pub fn embedded(image: &RandomImage, endpoint: &str, plan: ClonePlan) -> anyhow::Result<(EmbeddedGuest, Engine)> {
    let descriptor = Descriptor::read(&image.descriptor_path)?;
    let (guest, port, handle) = EmbeddedGuest::new(&descriptor.memory, Backing::Anon)?;
    let traits = port.traits();
    let mut config = PagerConfig::for_clone(&descriptor, traits);
    config.hydrate = plan.hydrate;
    config.prefetch = Prefetch::Off;
    let patience = config.patience;
    let epoch = Instant::now();
    let source = Source::new(SourceConfig {
        endpoints: vec![endpoint.parse().context("the server's endpoint")?],
        image: image.id,
        universe: descriptor.memory.universe(),
        ticket: Vec::new(),
        lane: plan.lane,
        multicast: false,
        granule: traits.granule,
        seed: 1,
    })?;
    // The handle may go: nobody commands this engine.
    let (control, _) = control()?;
    let engine = EngineConfig {
        image: image.id,
        hydrate: plan.hydrate,
        spin: plan.spin,
        on_failure: OnFailure::Kill,
        patience,
        progress: false,
        channel_interface: None,
    };
    let pager = Pager::new(Duration::ZERO, config, 1)?;
    Ok((guest, Engine::new(engine, pager, Box::new(port), source, Box::new(handle), control, epoch)))
}

/// One thread that does `workload` on all of its memory, without a comparison at the end.
pub fn guest_plan(workload: &str, image: &RandomImage) -> anyhow::Result<GuestPlan> {
    let workload: Workload = workload.parse()?;
    let free = FrameSet::empty(Descriptor::read(&image.descriptor_path)?.memory.universe());
    Ok(GuestPlan { workload, threads: 1, image: None, free, epoch: Instant::now() })
}
