//! How long faults took, from the port's report to the page's installation.

use std::time::Duration;

use hdrhistogram::Histogram;

/// How a page that someone waits for is got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Demand,
    Covered,
    Local,
}

/// Histograms of fault latencies in nanoseconds.
#[derive(Clone, Debug)]
pub struct Latency {
    /// Faults whose page had to be asked for.
    pub demand: Histogram<u64>,
    /// Faults whose page was on its way already.
    pub covered: Histogram<u64>,
    /// Faults answered with zeros, without a fetch.
    pub local: Histogram<u64>,
}

/// Longer waits count as this long: 1000 s.
const MAX_NANOSECONDS: u64 = 1_000_000_000_000;

impl Latency {
    pub(super) fn new() -> Self {
        // Two significant digits keep a histogram at some 60 KB and its error below 1 %.
        let histogram = Histogram::new_with_bounds(1, MAX_NANOSECONDS, 2).expect("constant bounds are valid");
        Self { demand: histogram.clone(), covered: histogram.clone(), local: histogram }
    }

    pub(super) fn record(&mut self, kind: Kind, latency: Duration) {
        let histogram = match kind {
            Kind::Demand => &mut self.demand,
            Kind::Covered => &mut self.covered,
            Kind::Local => &mut self.local,
        };
        histogram.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(MAX_NANOSECONDS).max(1));
    }
}
