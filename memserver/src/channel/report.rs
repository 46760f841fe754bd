//! What the channels tell of themselves, as JSON for programs and as text for people.

use std::fmt;

use descriptor::ImageId;
use serde::{Deserialize, Serialize};

use crate::control::size;

/// The multicast channels of a server.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The group, its port, and the interface if one was asked for.
    pub group: String,
    /// The interface that datagrams leave by, where it could be found out.
    pub interface: Option<String>,
    /// Where feedback comes in.
    pub address: String,
    /// Bytes in a datagram at most.
    pub datagram: u16,
    /// Bytes per second that a channel may send at most.
    pub max_rate: Option<u64>,
    /// What the kernel does not do for sending, in words.
    pub lacking: Vec<String>,
    /// What was sent since the start, channels included that are no more.
    pub total: Traffic,
    /// Members that joined since the start.
    pub joined: u64,
    /// Members that were moved to unicast since the start, by reason.
    pub moved: Vec<(String, u64)>,
    /// Requests that were dropped because too many waited.
    pub dropped: u64,
    /// Sends that the network refused.
    pub refused: u64,
    /// The images that are multicast at this moment.
    pub channels: Vec<ChannelStatus>,
}

/// The channel of an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChannelStatus {
    /// The image.
    pub image: ImageId,
    /// Bytes per second that it may send at this moment.
    pub rate: u64,
    /// What it sent.
    pub sent: Traffic,
    /// The clones in it.
    pub members: Vec<MemberStatus>,
}

/// A clone in a channel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Its session.
    pub session: u64,
    /// The share of datagrams that it lost lately, from 0 to 1; unknown before its first reports.
    pub loss: Option<f64>,
    /// Bytes per second that it received lately.
    pub rate: u64,
    /// Microseconds from a datagram to its report; unknown before the first.
    pub round_trip_us: Option<u64>,
    /// Datagrams sent and not yet reported.
    pub lag: u64,
    /// Pages that it still lacks.
    pub lacks: u64,
}

/// Counters of what was sent and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Datagrams with pages, sent for the first time.
    pub data: Sent,
    /// Datagrams sent again.
    pub repair: Sent,
    /// Datagrams of parity.
    pub parity: Sent,
    /// Confirmations, heartbeats, ends of bursts.
    pub control: Sent,
    /// Pages asked for that were not sent, because they were on their way.
    pub suppressed: u64,
    /// Requests for repair received, one for each block.
    pub nacks: u64,
    /// Reports received.
    pub reports: u64,
    /// Feedback that made no sense.
    pub strange: u64,
}

/// Datagrams and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// Datagrams.
    pub datagrams: u64,
    /// Their bytes, without the headers of IP and UDP.
    pub bytes: u64,
}

impl Sent {
    pub(super) fn add(&mut self, datagrams: usize, bytes: usize) {
        self.datagrams += datagrams as u64;
        self.bytes += bytes as u64;
    }

    fn plus(self, other: Sent) -> Sent {
        Sent { datagrams: self.datagrams + other.datagrams, bytes: self.bytes + other.bytes }
    }
}

impl Traffic {
    /// All bytes.
    pub fn bytes(&self) -> u64 {
        [self.data, self.repair, self.parity, self.control].iter().map(|sent| sent.bytes).sum()
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: &Traffic) -> Traffic {
        Traffic {
            data: self.data.plus(other.data),
            repair: self.repair.plus(other.repair),
            parity: self.parity.plus(other.parity),
            control: self.control.plus(other.control),
            suppressed: self.suppressed + other.suppressed,
            nacks: self.nacks + other.nacks,
            reports: self.reports + other.reports,
            strange: self.strange + other.strange,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "multicast: {}", self.group)?;
        if let Some(interface) = self.interface.as_ref().filter(|name| !self.group.ends_with(&format!("%{name}"))) {
            write!(f, " on {interface}")?;
        }
        write!(f, ", feedback to {}, datagrams of {} bytes", self.address, self.datagram)?;
        if let Some(rate) = self.max_rate {
            write!(f, ", at most {}/s", size(rate))?;
        }
        if !self.lacking.is_empty() {
            write!(f, "; the kernel or the device lacks {}", self.lacking.join(", "))?;
        }
        writeln!(f)?;
        for channel in &self.channels {
            write!(f, "{channel}")?;
        }
        write!(f, "  since the start: {}; {} joined", self.total, self.joined)?;
        for (reason, count) in self.moved.iter().filter(|(_, count)| *count > 0) {
            write!(f, ", {count} moved to unicast ({reason})")?;
        }
        writeln!(f)
    }
}

impl fmt::Display for ChannelStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members = self.members.len();
        writeln!(f, "  image {}: {members} members, {}/s allowed, {}", self.image, size(self.rate), self.sent)?;
        for member in &self.members {
            writeln!(f, "    {member}")?;
        }
        Ok(())
    }
}

impl fmt::Display for MemberStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "session {}: {}/s", self.session, size(self.rate))?;
        if let Some(loss) = self.loss {
            write!(f, ", {:.1} % lost", 100.0 * loss)?;
        }
        if let Some(round_trip) = self.round_trip_us {
            write!(f, ", round trip {round_trip} µs")?;
        }
        write!(f, ", {} datagrams behind, lacks {} pages", self.lag, self.lacks)
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Traffic { data, repair, parity, suppressed, nacks, .. } = self;
        write!(f, "{} sent, {} datagrams, {} repaired", size(self.bytes()), data.datagrams, repair.datagrams)?;
        write!(f, ", {} of parity, {suppressed} pages suppressed, {nacks} NACKs", parity.datagrams)
    }
}
