//! What a pager tells of itself: on its admin socket, and in the file of `--stats` at its end.

use std::time::Duration;

use descriptor::ImageId;
use hdrhistogram::Histogram;
use mcast::receiver::ReceiverStats;
use serde::Serialize;

use crate::lanes::{LaneStats, Link};
use crate::pager::{Hydrate, Latency, Pager, PagerStats, Progress};
use crate::port::PortFigures;

/// How things are with one clone.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The image that it is a clone of.
    pub image: ImageId,
    /// In words: `connecting`, `running`, `holding`, or how it ended.
    pub state: String,
    /// Why, where something is wrong; the last trouble with the source otherwise.
    pub reason: Option<String>,
    /// Seconds since the pager began.
    pub uptime_s: f64,
    /// Microseconds from then until the guest had what it needs before its first instruction, and was let go; none before.
    pub ready_us: Option<u64>,
    /// The page source.
    pub source: SourceStatus,
    /// The multicast channel, the last one where there were several; none where none was offered.
    pub channel: Option<ChannelStatus>,
    /// The hydration policy in words: `off`, `now`, or pages per second.
    pub hydrate: String,
    /// How much of the image is there.
    pub progress: Progress,
    /// Counters of the pager.
    pub pager: PagerStats,
    /// How long faults took, from the port's report to the installed page.
    pub latency: LatencyStatus,
    /// What the port tells of itself, by the port's name.
    #[serde(flatten)]
    pub port: Option<PortFigures>,
}

/// The page source.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SourceStatus {
    /// The server that is asked.
    pub endpoint: String,
    /// A session is open.
    pub connected: bool,
    /// Pages come from the image's own files.
    pub local: bool,
    /// Bytes of pages received through sockets, as they were on the wire.
    pub bytes_received: u64,
}

/// The multicast channel that the clone shares with others.
#[derive(Clone, Debug, Serialize)]
pub struct ChannelStatus {
    /// The group and its port.
    pub group: String,
    /// The interface on which it was joined; none where the routing table chose it.
    pub interface: Option<String>,
    /// `probing` (nothing has come yet), `blocked` (nothing ever came), `live`, `silent` (nothing comes any more), or `none` (the
    /// channel has ended).
    pub link: Link,
    /// Clones in the channel; 0 where that is not known.
    pub members: u32,
    /// Requests that went to the channel.
    #[serde(flatten)]
    pub lanes: LaneStats,
    /// What was received.
    #[serde(flatten)]
    pub reception: Reception,
}

/// What was received from a multicast channel.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Reception {
    /// Datagrams with pages that came.
    pub received: u64,
    /// Datagrams with pages that did not come, repaired or not.
    pub lost: u64,
    /// The part of all that did not come, from 0 to 1.
    pub loss: f64,
    /// Pieces of blocks computed from parity.
    pub recovered: u64,
    /// Pieces of blocks that came as repairs.
    pub repaired: u64,
    /// Datagrams sent to ask for repairs.
    pub nacks: u64,
    /// Datagrams that are none of this channel's: of another session, version or form, or replayed.
    pub dropped: u64,
}

/// Fault latencies by how the page was got.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct LatencyStatus {
    /// The page had to be asked for.
    pub demand: Percentiles,
    /// The page was on its way already.
    pub covered: Percentiles,
    /// Zeros sufficed, without a fetch.
    pub local: Percentiles,
}

/// A distribution of times in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Percentiles {
    /// How many were measured.
    pub count: u64,
    /// Half took no longer.
    pub p50_us: f64,
    /// 90 % took no longer.
    pub p90_us: f64,
    /// 99 % took no longer.
    pub p99_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl Status {
    /// The status of a pager that has not begun.
    pub fn new(image: ImageId, pager: &Pager) -> Self {
        Self {
            image,
            state: "connecting".into(),
            reason: None,
            uptime_s: 0.0,
            ready_us: None,
            source: SourceStatus::default(),
            channel: None,
            hydrate: String::new(),
            progress: pager.progress(),
            pager: *pager.stats(),
            latency: LatencyStatus::default(),
            port: None,
        }
    }

    /// The same with what the pager says now.
    pub(crate) fn with_pager(self, pager: &Pager, hydrate: Hydrate, now: Duration) -> Self {
        Self {
            uptime_s: now.as_secs_f64(),
            hydrate: hydrate_text(hydrate),
            progress: pager.progress(),
            pager: *pager.stats(),
            latency: LatencyStatus::from(pager.latency()),
            ..self
        }
    }
}

impl Percentiles {
    /// Of a histogram in nanoseconds.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        if histogram.is_empty() {
            return Self::default();
        }
        let us = |nanoseconds: u64| nanoseconds as f64 / 1000.0;
        let quantile = |quantile| us(histogram.value_at_quantile(quantile));
        Self {
            count: histogram.len(),
            p50_us: quantile(0.5),
            p90_us: quantile(0.9),
            p99_us: quantile(0.99),
            max_us: us(histogram.max()),
        }
    }
}

impl From<&ReceiverStats> for Reception {
    fn from(stats: &ReceiverStats) -> Self {
        let (received, lost) = (stats.received, stats.lost);
        Self {
            received,
            lost,
            loss: lost as f64 / (received + lost).max(1) as f64,
            recovered: stats.recovered,
            repaired: stats.repaired,
            nacks: stats.nacks,
            dropped: stats.dropped.total(),
        }
    }
}

impl From<&Latency> for LatencyStatus {
    fn from(latency: &Latency) -> Self {
        Self {
            demand: Percentiles::of(&latency.demand),
            covered: Percentiles::of(&latency.covered),
            local: Percentiles::of(&latency.local),
        }
    }
}

fn hydrate_text(hydrate: Hydrate) -> String {
    match hydrate {
        Hydrate::Off => "off".into(),
        Hydrate::Now => "now".into(),
        Hydrate::Rate(rate) => format!("{rate} pages/s"),
    }
}
