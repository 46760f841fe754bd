//! What a run of the channel consists of and what may go wrong in it, drawn from its seed.

use std::num::NonZeroU64;
use std::time::Duration;

use descriptor::{FrameRange, Gfn, PageCount};
use fastrand::Rng;

use super::network::{Loss, Quality};
use crate::image::Image;

/// What a run consists of.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Where everything else came from, and the source of what is random in the run.
    pub seed: u64,
    /// The parent's image.
    pub image: Image,
    /// Bytes of a shard.
    pub payload: u16,
    /// What the sender may send, in bytes a second.
    pub max_rate: Option<NonZeroU64>,
    /// Blocks that the sender can repair.
    pub history: usize,
    /// Frames that are pushed first.
    pub order: Vec<FrameRange>,
    /// The way that all copies have in common.
    pub shared: Quality,
    /// One way of a connection of the unicast lane.
    pub unicast: Duration,
    /// The clones.
    pub clones: Vec<Member>,
    /// When the server starts anew.
    pub restart: Option<Duration>,
    /// Foreign datagrams in a thousand that come to a clone between those of the channel.
    pub noise: u32,
    /// The clones ask for pages and are not pushed any.
    pub lazy: bool,
}

/// What one clone is like.
#[derive(Clone, Debug)]
pub struct Member {
    /// When it connects.
    pub joins: Duration,
    /// When it goes, finished or not.
    pub leaves: Option<Duration>,
    /// Its own way from the server.
    pub down: Quality,
    /// Its way to the server.
    pub up: Quality,
    /// Bytes in its socket's buffer.
    pub buffer: u64,
    /// Bytes a second that it takes.
    pub speed: u64,
    /// It stands still, from and until.
    pub stall: Option<(Duration, Duration)>,
    /// The network parts it from the server, from and until.
    pub partition: Option<(Duration, Duration)>,
    /// It receives no multicast at all.
    pub deaf: bool,
    /// What it says is made up.
    pub lies: bool,
    /// The pages that its guest touches, in this order, one after the other.
    pub accesses: Vec<Gfn>,
    /// What the guest does between two of them takes so long, at most.
    pub thinks: Duration,
}

impl Scenario {
    /// The scenario that `seed` stands for.
    pub fn draw(seed: u64) -> Self {
        let rng = &mut Rng::with_seed(seed);
        // Many receivers are rare, and their images small, since each costs as much as another run.
        let receivers = match rng.u8(0..64) {
            0 => rng.usize(65..=256),
            1..=4 => rng.usize(17..=64),
            5..=20 => rng.usize(5..=16),
            _ => rng.usize(1..=4),
        };
        let most = match receivers {
            65.. => 128,
            17.. => 512,
            _ => 2048,
        };
        let scale = 16 << rng.u32(0..8);
        let frames = rng.u64(1..=scale).min(most);
        let image = Image::draw(rng, frames, 1);
        let universe = image.memory.universe().get();
        let troubled = rng.u8(0..4) > 0;
        let payload = match rng.u8(0..8) {
            0 => rng.u16(512..=9000),
            1 => 61_440,
            2 => 8948,
            3 => 1428,
            _ => 1448,
        };
        let worst = if troubled { rng.f64() * rng.f64() * 0.3 } else { 0.0 };
        let lockstep: Vec<_> = (0..rng.u64(0..40)).map(|_| Gfn::new(rng.u64(0..universe))).collect();
        let shared = Quality { loss: loss(if rng.bool() { worst / 2.0 } else { 0.0 }, rng), ..quality(troubled, rng) };
        let span = Duration::from_millis(if rng.bool() { 20 } else { 500 });
        let within = |rng: &mut Rng| span.mul_f64(rng.f64());
        let clones = (0..receivers).map(|at| {
            let sickly = troubled && rng.u8(0..4) == 0;
            let mut period = |share: u8, most: u64| {
                (sickly && rng.u8(0..share) == 0).then(|| {
                    let from = within(rng);
                    (from, from + Duration::from_micros(rng.u64(0..most)))
                })
            };
            let (stall, partition) = (period(3, 2_000_000), period(3, 3_000_000));
            let down = if troubled { rng.f64() * worst } else { 0.0 };
            let up = if troubled && rng.u8(0..4) == 0 { 0.3 } else { down };
            let own: Vec<_> = (0..rng.u64(0..20)).map(|_| Gfn::new(rng.u64(0..universe))).collect();
            let accesses = lockstep.iter().filter(|_| rng.u8(0..10) > 0).copied().chain(own).collect();
            Member {
                joins: if at > 0 && rng.u8(0..4) == 0 { within(rng) } else { Duration::from_micros(rng.u64(0..3000)) },
                leaves: (sickly && rng.u8(0..4) == 0).then(|| within(rng)),
                down: Quality { loss: loss(down, rng), ..quality(troubled, rng) },
                up: Quality { loss: loss(up, rng), ..quality(troubled, rng) },
                buffer: 1 << rng.u32(17..24),
                speed: if sickly && rng.bool() { rng.u64(500_000..20_000_000) } else { 1_000_000_000 },
                stall,
                partition,
                deaf: sickly && rng.u8(0..6) == 0,
                lies: sickly && rng.u8(0..4) == 0,
                accesses,
                thinks: Duration::from_micros(1 << rng.u32(0..12)),
            }
        });
        let clones: Vec<_> = clones.collect();
        let order = (0..rng.u32(0..4)).map(|_| {
            let start = rng.u64(0..universe);
            FrameRange::new(Gfn::new(start), PageCount::new(rng.u64(1..60)))
        });
        let order = order.collect();
        Self {
            payload,
            max_rate: (rng.u8(0..4) == 0).then(|| NonZeroU64::new(rng.u64(3_000_000..200_000_000))).flatten(),
            history: if rng.u8(0..8) == 0 { rng.usize(2..20) } else { 4096 },
            order,
            shared,
            unicast: Duration::from_micros(rng.u64(10..2000)),
            clones,
            restart: (troubled && rng.u8(0..6) == 0).then(|| within(rng)),
            noise: if troubled && rng.bool() { rng.u32(0..50) } else { 0 },
            lazy: rng.u8(0..6) == 0,
            seed,
            image,
        }
    }

    /// `receivers` that join at the same time and lose `loss` each, independently, on good links at an MTU of 1500, while a
    /// solid image of `frames` is pushed and the guests touch some pages of it in near lockstep.
    pub fn plain(seed: u64, receivers: usize, loss: f64, frames: u64) -> Self {
        let rng = &mut Rng::with_seed(seed);
        let accesses: Vec<_> = (0..60).map(|_| Gfn::new(rng.u64(0..frames))).collect();
        let member = Member {
            joins: Duration::ZERO,
            leaves: None,
            down: Quality { loss: Loss::Independent(loss), ..Quality::GOOD },
            up: Quality { loss: Loss::Independent(loss), ..Quality::GOOD },
            buffer: 8 << 20,
            speed: 1_000_000_000,
            stall: None,
            partition: None,
            deaf: false,
            lies: false,
            accesses,
            thinks: Duration::from_micros(200),
        };
        let join = |_| Member { joins: Duration::from_micros(rng.u64(0..2000)), ..member.clone() };
        Self {
            seed,
            image: Image::solid(frames, seed),
            payload: 1448,
            max_rate: None,
            history: 4096,
            order: Vec::new(),
            shared: Quality::GOOD,
            unicast: Duration::from_micros(60),
            clones: (0..receivers).map(join).collect(),
            restart: None,
            noise: 0,
            lazy: false,
        }
    }
}

impl Member {
    /// True when nothing but losses of datagrams happens to it.
    pub fn is_sound(&self) -> bool {
        self.stall.is_none() && self.partition.is_none() && !self.deaf && !self.lies && self.speed >= 100_000_000
    }
}

fn loss(mean: f64, rng: &mut Rng) -> Loss {
    if mean > 0.0 && rng.u8(0..3) == 0 { Loss::bursty(mean, 2.0 + rng.f64() * 30.0) } else { Loss::Independent(mean) }
}

fn quality(troubled: bool, rng: &mut Rng) -> Quality {
    let disorder = troubled && rng.u8(0..3) == 0;
    Quality {
        delay: Duration::from_micros(rng.u64(5..500)),
        lag: Duration::from_micros(if disorder { rng.u64(0..3000) } else { 0 }),
        overtaken: if disorder { rng.f64() * 0.2 } else { 0.0 },
        duplicated: if disorder { rng.f64() * 0.1 } else { 0.0 },
        loss: Loss::Independent(0.0),
        rate: if troubled && rng.u8(0..4) == 0 { rng.u64(10_000_000..200_000_000) } else { 1_250_000_000 },
        queue: 1 << rng.u32(17..22),
    }
}
