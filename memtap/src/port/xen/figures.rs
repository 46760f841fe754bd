use std::time::Duration;

use descriptor::PageCount;
use hdrhistogram::Histogram;
use serde::{Serialize, Serializer};

use super::prepare::Preparation;

/// What a Xen port tells of itself.
#[derive(Clone, Debug, Serialize)]
pub struct XenFigures {
    /// The domain.
    pub domain: u16,
    /// It was served by another memtap before.
    pub taken_over: bool,
    /// How long it took to turn its memory into paged-out frames.
    #[serde(rename = "prepare_us", serialize_with = "microseconds")]
    pub prepare: Duration,
    /// The same for each page.
    pub evict_us_per_page: f64,
    /// The most pages that it had meanwhile, as far as was looked.
    pub resident_peak_pages: PageCount,
    /// Requests on the ring.
    pub ring_requests: u64,
    /// Requests of other domains than the guest, such as backends and tools.
    pub foreign: u64,
    /// Frames that the guest gave up while they were paged out.
    pub dropped: u64,
    /// Requests for frames that were there, or on their way for another vCPU.
    pub duplicates: u64,
    /// Frames that were in use again before they were evicted.
    pub evict_failures: u64,
    /// How long faults kept the port busy, without the time to wait for the page: reading the request, filling the frame, waking
    /// the vCPU.
    pub fault_handler_us: HandlerTime,
}

/// A distribution of times in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct HandlerTime {
    /// Half took no longer.
    pub median: f64,
    /// 99 % took no longer.
    pub p99: f64,
}

/// The same in the making.
#[derive(Debug)]
pub(super) struct Counters {
    pub(super) requests: u64,
    pub(super) foreign: u64,
    pub(super) dropped: u64,
    pub(super) duplicates: u64,
    pub(super) evict_failures: u64,
    handler: Histogram<u64>,
}

/// The longest time that a histogram tells apart.
const LONGEST: Duration = Duration::from_secs(60);

impl Counters {
    pub(super) fn new() -> Self {
        let handler = Histogram::new_with_bounds(1, LONGEST.as_nanos() as u64, 2).expect("constant bounds are valid");
        Self { requests: 0, foreign: 0, dropped: 0, duplicates: 0, evict_failures: 0, handler }
    }

    pub(super) fn handled(&mut self, took: Duration) {
        self.handler.saturating_record(took.min(LONGEST).as_nanos().max(1) as u64);
    }

    pub(super) fn figures(&self, domain: u16, preparation: &Preparation) -> XenFigures {
        let quantile = |quantile| self.handler.value_at_quantile(quantile) as f64 / 1000.0;
        let Preparation { took, frames, peak, taken_over } = *preparation;
        XenFigures {
            domain,
            taken_over,
            prepare: took,
            evict_us_per_page: took.as_secs_f64() * 1e6 / frames.get().max(1) as f64,
            resident_peak_pages: peak,
            ring_requests: self.requests,
            foreign: self.foreign,
            dropped: self.dropped,
            duplicates: self.duplicates,
            evict_failures: self.evict_failures,
            fault_handler_us: HandlerTime { median: quantile(0.5), p99: quantile(0.99) },
        }
    }
}

fn microseconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(time.as_micros() as u64)
}
