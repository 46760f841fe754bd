//! What the server tells of itself, as JSON for programs and as text for people.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use descriptor::working_set::Summary;
use descriptor::{Endpoint, ImageId, PAGE_SIZE};
use serde::{Deserialize, Serialize};

use crate::channel::report::Report;
use crate::image::ServedImage;
use crate::ring::Features;
use crate::shared::{SessionRecord, Shared};
use crate::stats::{CLASSES, ENCODINGS, HistogramSnapshot, Quantiles, REFUSALS, class_index};

/// The state of a server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The server's version.
    pub version: String,
    /// Where it listens.
    pub endpoints: Vec<Endpoint>,
    /// Seconds since it was started.
    pub uptime_s: u64,
    /// It is about to stop.
    pub draining: bool,
    /// Connections at this moment, handshakes included.
    pub connections: u64,
    /// Sessions welcomed since the start.
    pub sessions_total: u64,
    /// Sessions refused since the start, by reason.
    pub refused: Vec<(String, u64)>,
    /// The images in service.
    pub images: Vec<ImageStatus>,
    /// The sessions at this moment.
    pub sessions: Vec<SessionStatus>,
    /// Requests that a stopped vCPU waits for.
    pub demand: ClassStatus,
    /// Requests ahead of need.
    pub bulk: ClassStatus,
    /// The multicast channels, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multicast: Option<Report>,
    /// The rings.
    pub rings: Vec<RingStatus>,
}

/// Requests of one class.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClassStatus {
    /// Received since the start.
    pub requests: u64,
    /// Waiting at this moment.
    pub queued: u64,
    /// Pages sent as they are.
    pub pages_raw: u64,
    /// Pages sent as zeros, without bytes.
    pub pages_zero: u64,
    /// Pages sent as lz4.
    pub pages_lz4: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// From the receipt of a request until the kernel has its answer.
    pub latency_us: Option<Quantiles>,
}

/// An image in service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageStatus {
    /// Its name.
    pub image: ImageId,
    /// Pages of the guest.
    pub pages: u64,
    /// Those of them that are sent as zeros.
    pub zeros: u64,
    /// The files, in which the pages lie.
    pub files: Vec<String>,
    /// Sessions at this moment.
    pub sessions: usize,
    /// What its clones needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set: Option<WorkingSetStatus>,
}

/// What the clones of an image needed, as far as they told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkingSetStatus {
    /// In numbers.
    #[serde(flatten)]
    pub summary: Summary,
    /// Where it is kept; nowhere but in memory where there is none.
    pub file: Option<PathBuf>,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Its number.
    pub id: u64,
    /// Its image.
    pub image: ImageId,
    /// Where it came in.
    pub endpoint: Endpoint,
    /// Its other side, where it has an address.
    pub peer: Option<String>,
    /// It was handed the image itself.
    pub local: bool,
    /// It is a member of a multicast channel.
    #[serde(default)]
    pub multicast: bool,
    /// Seconds since its handshake.
    pub age_s: u64,
    /// Pages sent on demand.
    pub pages_demand: u64,
    /// Pages sent ahead of need.
    pub pages_bulk: u64,
    /// Bytes sent.
    pub bytes: u64,
}

/// A ring.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RingStatus {
    /// What of io_uring is in use.
    pub features: Option<Features>,
    /// What this kernel lacks, in words.
    pub lacking: Vec<String>,
    /// Sends that were to go without a copy.
    pub zero_copy_sends: u64,
    /// Those that were sent from a registered buffer.
    pub registered_sends: u64,
    /// Bytes of images that are registered: of those in memory (tmpfs), within RLIMIT_MEMLOCK.
    pub registered_bytes: u64,
    /// Those that the kernel copied all the same.
    pub zero_copy_copied: u64,
}

impl Status {
    /// The state of the server at this moment.
    pub(crate) fn of(shared: &Shared) -> Self {
        let sessions: Vec<_> = shared.sessions.lock().values().cloned().collect();
        let sum =
            |read: &dyn Fn(&crate::stats::RingStats) -> u64| shared.rings.iter().map(|ring| read(&ring.stats)).sum();
        let refused = REFUSALS.iter().enumerate().map(|(index, reason)| {
            let count = sum(&|stats| stats.refused.get(index).map_or(0, crate::stats::Number::read));
            (format!("{reason:?}"), count)
        });
        let [demand, bulk] = CLASSES.map(|class| class_status(shared, class_index(class)));
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            endpoints: shared.endpoints.get().cloned().unwrap_or_default(),
            uptime_s: shared.now().as_secs(),
            draining: shared.is_draining(),
            connections: sum(&|stats| stats.connections.read()),
            sessions_total: sum(&|stats| stats.welcomed.read()),
            refused: refused.filter(|(_, count)| *count > 0).collect(),
            images: images(shared),
            sessions: sessions.iter().map(|session| SessionStatus::of(session, shared)).collect(),
            demand,
            bulk,
            multicast: shared.channel.as_ref().map(|channel| Report::clone(&channel.report())),
            rings: shared.rings.iter().map(ring_status).collect(),
        }
    }
}

/// The images in service.
pub(super) fn images(shared: &Shared) -> Vec<ImageStatus> {
    let sessions = shared.sessions.lock();
    let users = |image: &ServedImage| sessions.values().filter(|session| session.image == image.id()).count();
    let report = |image: &ServedImage| ImageStatus {
        image: image.id(),
        pages: image.present().get(),
        zeros: image.zeros().get(),
        files: image.paths().map(|path| path.display().to_string()).collect(),
        sessions: users(image),
        working_set: shared.keeper.is_some().then(|| WorkingSetStatus::of(image)),
    };
    shared.catalog.list().iter().map(|image| report(image)).collect()
}

impl SessionStatus {
    fn of(session: &SessionRecord, shared: &Shared) -> Self {
        let [demand, bulk] = &session.pages;
        Self {
            id: session.id,
            image: session.image,
            endpoint: session.endpoint.clone(),
            peer: session.peer.map(|peer| peer.to_string()),
            local: session.local,
            multicast: session.multicast.load(Ordering::Relaxed),
            age_s: shared.now().saturating_sub(session.since).as_secs(),
            pages_demand: demand.read(),
            pages_bulk: bulk.read(),
            bytes: session.bytes.read(),
        }
    }
}

fn class_status(shared: &Shared, class: usize) -> ClassStatus {
    let mut report = ClassStatus::default();
    let mut latency = HistogramSnapshot::default();
    for stats in shared.rings.iter().filter_map(|ring| ring.stats.classes.get(class)) {
        report.requests += stats.requests.read();
        report.queued += stats.queued.read();
        report.bytes += stats.bytes.read();
        let [raw, zero, lz4] = ENCODINGS.map(|encoding| stats.pages[encoding as usize].read());
        report.pages_raw += raw;
        report.pages_zero += zero;
        report.pages_lz4 += lz4;
        latency.merge(&stats.latency.snapshot());
    }
    report.latency_us = (latency.count() > 0).then(|| latency.quantiles());
    report
}

fn ring_status(ring: &crate::shared::RingHandle) -> RingStatus {
    let features = ring.features.get().copied();
    RingStatus {
        features,
        lacking: features.map(|features| features.lacking()).into_iter().flatten().map(str::to_owned).collect(),
        zero_copy_sends: ring.stats.zero_copy.read(),
        registered_sends: ring.stats.fixed.read(),
        registered_bytes: ring.stats.registered_bytes.read(),
        zero_copy_copied: ring.stats.copied.read(),
    }
}

impl WorkingSetStatus {
    pub(super) fn of(image: &ServedImage) -> Self {
        let needed = image.needed();
        Self { summary: needed.summary(), file: needed.file().map(Path::to_owned) }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.draining { "draining" } else { "serving" };
        writeln!(f, "memserver {}, {state} for {} s", self.version, self.uptime_s)?;
        for endpoint in &self.endpoints {
            writeln!(f, "  at {endpoint}")?;
        }
        writeln!(f, "\nimages: {}", self.images.len())?;
        for image in &self.images {
            writeln!(f, "  {image}")?;
        }
        let open = self.sessions.len();
        write!(f, "\nsessions: {open} now, {} since the start", self.sessions_total)?;
        for (reason, count) in &self.refused {
            write!(f, ", {count} refused ({reason})")?;
        }
        writeln!(f)?;
        for session in &self.sessions {
            writeln!(f, "  {session}")?;
        }
        writeln!(f, "\n         requests   waiting       pages      zeros        lz4       sent    p50 µs    p99 µs")?;
        for (name, class) in [("demand", &self.demand), ("bulk", &self.bulk)] {
            writeln!(f, "{name:<7}{class}")?;
        }
        if let Some(multicast) = &self.multicast {
            write!(f, "\n{multicast}")?;
        }
        for (index, ring) in self.rings.iter().enumerate() {
            write!(f, "\nring {index}: {} zero-copy sends", ring.zero_copy_sends)?;
            write!(f, ", {} of them copied by the kernel", ring.zero_copy_copied)?;
            write!(f, "; {} of images registered", size(ring.registered_bytes))?;
            if !ring.lacking.is_empty() {
                write!(f, "; the kernel lacks {}", ring.lacking.join(", "))?;
            }
        }
        writeln!(f)
    }
}

impl fmt::Display for ClassStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages = self.pages_raw + self.pages_zero + self.pages_lz4;
        write!(f, "{:>10}{:>10}{pages:>12}", self.requests, self.queued)?;
        write!(f, "{:>11}{:>11}{:>11}", self.pages_zero, self.pages_lz4, size(self.bytes))?;
        match self.latency_us {
            Some(latency) => write!(f, "{:>10.0}{:>10.0}", latency.p50, latency.p99),
            None => write!(f, "{:>10}{:>10}", "-", "-"),
        }
    }
}

impl fmt::Display for ImageStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = 100 * self.zeros / self.pages.max(1);
        let total = size(self.pages.saturating_mul(PAGE_SIZE));
        write!(f, "{}  {total}, {share} % zeros, {} sessions, {}", self.image, self.sessions, self.files.join(" "))?;
        if let Some(WorkingSetStatus { summary, .. }) = &self.working_set {
            let common = size(summary.common.saturating_mul(PAGE_SIZE));
            write!(f, ", working set {common} of {} clones", summary.heard)?;
        }
        Ok(())
    }
}

impl fmt::Display for SessionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peer = self.peer.clone().unwrap_or_else(|| self.endpoint.to_string());
        let lane = match (self.local, self.multicast) {
            (true, _) => ", local lane",
            (false, true) => ", multicast",
            (false, false) => "",
        };
        let pages = format!("{} pages on demand, {} in bulk", self.pages_demand, self.pages_bulk);
        write!(f, "{}  {peer}  image {}, {} s, {pages}, {}{lane}", self.id, self.image, self.age_s, size(self.bytes))
    }
}

/// Bytes as people read them.
pub(crate) fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 100.0);
    format!("{value:.digits$} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(4096), "4.0 KiB");
        assert_eq!(size(150 << 20), "150 MiB");
        assert_eq!(size(u64::MAX), "16384 PiB");
    }
}
