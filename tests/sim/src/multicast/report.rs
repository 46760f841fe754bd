//! What came of a run, in figures.

use std::time::Duration;

use mcast::receiver::ReceiverStats;
use mcast::sender::SenderStats;

use super::clones::{CloneStats, Wait};

/// Bytes that each datagram has on the wire beside those that the channel makes: Ethernet, IPv4 and UDP headers.
pub const OVERHEAD: usize = 14 + 20 + 8;

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The events of the run.
    pub events: u64,
    /// When the last clone was done.
    pub time: Duration,
    /// Bytes of the pages of the image.
    pub size: u64,
    /// Bytes that the server multicast, with all headers.
    pub sent: u64,
    /// Datagrams with shards.
    pub datagrams: u64,
    /// Of those, the ones that a clone lost, whatever for.
    pub lost: u64,
    /// What the senders did, those before a restart included.
    pub sender: SenderTotal,
    /// What the clones did, all together.
    pub clones: CloneStats,
    /// How long guests waited, in ascending order.
    pub waits: Vec<Wait>,
    /// Blocks that clones gave up.
    pub given_up: u64,
    /// Shards computed from parity.
    pub recovered: u64,
    /// Entries of NACKs that the sender's confirmations made superfluous.
    pub spared: u64,
    /// Datagrams that receivers did not take: foreign, replayed, malformed.
    pub dropped: u64,
}

/// The counters of senders that matter here.
#[derive(Clone, Copy, Debug, Default)]
pub struct SenderTotal {
    /// NACK datagrams.
    pub nacks: u64,
    /// Blocks named in them.
    pub nacked: u64,
    /// Shards sent again, parity included.
    pub repaired: u64,
    /// Frames that were asked for and not sent again.
    pub suppressed: u64,
    /// Nonsense, and datagrams of strangers and other sessions, or malformed ones.
    pub refused: u64,
    /// Members moved to unicast.
    pub expelled: u64,
    /// Passes of bulk.
    pub passes: u64,
    /// REPORT datagrams.
    pub reports: u64,
    /// HEARTBEAT, END and CONFIRM datagrams.
    pub control: u64,
}

impl Report {
    /// Bytes that the server multicast for each byte of the image.
    pub fn bytes_ratio(&self) -> f64 {
        self.sent as f64 / self.size.max(1) as f64
    }

    /// Blocks named in NACKs for each datagram that someone lost.
    pub fn nacks_per_lost(&self) -> f64 {
        self.sender.nacked as f64 / self.lost.max(1) as f64
    }

    /// What all but a hundredth of the waits were no longer than.
    pub fn wait_p99(&self) -> Duration {
        self.waits.get(self.waits.len() * 99 / 100).map_or(Duration::ZERO, |wait| wait.time)
    }

    /// Adds another run.
    pub fn add(&mut self, other: Report) {
        self.events += other.events;
        self.time += other.time;
        self.size += other.size;
        self.sent += other.sent;
        self.datagrams += other.datagrams;
        self.lost += other.lost;
        self.given_up += other.given_up;
        self.recovered += other.recovered;
        self.spared += other.spared;
        self.dropped += other.dropped;
        self.waits.extend(other.waits);
        self.sender.add(&other.sender);
        self.clones.add(&other.clones);
    }

    /// All counters, for people.
    pub fn summary(&self) -> String {
        let rest = Report { waits: Vec::new(), ..self.clone() };
        format!("{} waits; {rest:?}", self.waits.len())
    }

    /// Adds what a receiver did.
    pub fn add_receiver(&mut self, stats: &ReceiverStats) {
        self.given_up += stats.given_up;
        self.recovered += stats.recovered;
        self.spared += stats.suppressed;
        self.dropped += stats.dropped.total();
    }

    /// Adds what a sender did.
    pub fn add_sender(&mut self, stats: &SenderStats) {
        self.sender.add(&SenderTotal {
            nacks: stats.nacks,
            nacked: stats.nacked,
            repaired: stats.repaired.iter().chain(&stats.parity).sum(),
            suppressed: stats.suppressed,
            refused: stats.nonsense + stats.strangers + stats.other_session + stats.malformed + stats.nacked_beyond,
            expelled: stats.expelled,
            passes: stats.passes,
            reports: stats.reports,
            control: stats.control,
        });
    }
}

impl SenderTotal {
    fn add(&mut self, other: &SenderTotal) {
        self.nacks += other.nacks;
        self.nacked += other.nacked;
        self.repaired += other.repaired;
        self.suppressed += other.suppressed;
        self.refused += other.refused;
        self.expelled += other.expelled;
        self.passes += other.passes;
        self.reports += other.reports;
        self.control += other.control;
    }
}
