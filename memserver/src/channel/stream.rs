//! The channel of one image: its sender, and what its decisions mean in bytes.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use descriptor::Gfn;
use mcast::sender::{Full, Sender, SenderConfig, Shards, Transmit};
use mcast::wire::{HEAD, ShardDatagram, ShardKind};
use mcast::{BlockMap, ChannelParameters, Member};

use super::gather::{self, Kept};
use super::handle::SessionKey;
use super::outbox::Outbox;
use super::parity::ParityMaker;
use super::report::{ChannelStatus, MemberStatus, Traffic};
use crate::image::ServedImage;

/// An image that is multicast.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) image: Arc<ServedImage>,
    pub(super) parameters: ChannelParameters,
    pub(super) sender: Sender,
    members: BTreeMap<Member, SessionKey>,
    parity: ParityMaker,
    sent: Traffic,
    /// Since when it has no members.
    deserted: Option<Duration>,
}

impl Stream {
    pub(super) fn new(now: Duration, image: Arc<ServedImage>, config: SenderConfig, seed: u64) -> Self {
        Self {
            image,
            parameters: config.channel,
            sender: Sender::new(now, config, seed),
            members: BTreeMap::new(),
            parity: ParityMaker::default(),
            sent: Traffic::default(),
            deserted: Some(now),
        }
    }

    /// Makes a session a member.
    pub(super) fn join(&mut self, now: Duration, member: Member, session: SessionKey) -> Result<(), Full> {
        self.sender.join(now, member)?;
        self.sender.set_order(self.image.needed().channel_order());
        self.members.insert(member, session);
        self.deserted = None;
        Ok(())
    }

    /// Forgets a member; tells which session it was.
    pub(super) fn leave(&mut self, now: Duration, member: Member) -> Option<SessionKey> {
        self.sender.leave(now, member);
        let session = self.members.remove(&member);
        if self.members.is_empty() {
            self.deserted.get_or_insert(now);
        }
        session
    }

    /// The members with their sessions.
    pub(super) fn members(&self) -> impl Iterator<Item = (Member, SessionKey)> {
        self.members.iter().map(|(member, session)| (*member, *session))
    }

    /// When it is to be given up, having been without members for `linger`.
    pub(super) fn expiry(&self, linger: Duration) -> Option<Duration> {
        self.deserted.map(|since| since.saturating_add(linger))
    }

    /// Sends the next thing that is due; false when nothing is.
    ///
    /// # Errors
    /// When pages cannot be read to make parity of them.
    pub(super) fn transmit(&mut self, now: Duration, outbox: &mut Outbox) -> io::Result<bool> {
        let image = Arc::clone(&self.image);
        match self.sender.poll(now, &*image) {
            None => return Ok(false),
            Some(Transmit::Control { datagram }) => {
                // What is dropped might have been lost in the network just as well.
                if outbox.control(&datagram) {
                    self.sent.control.add(1, datagram.len());
                }
            }
            Some(Transmit::Shards { block, count, kind, shards, first_seq }) => {
                let head = ShardDatagram {
                    session: self.parameters.session,
                    seq: first_seq,
                    kind,
                    block,
                    index: 0,
                    count,
                    gfn: Gfn::new(0),
                    payload: &[],
                };
                self.transmit_shards(outbox, head, &shards)?;
            }
        }
        Ok(true)
    }

    /// Sends shards of one block, whose heads are `first` but for the number, the index and the frame.
    fn transmit_shards(&mut self, outbox: &mut Outbox, first: ShardDatagram<'_>, shards: &Shards) -> io::Result<()> {
        let Some(map) = self.sender.block(first.block).copied() else { return Ok(()) };
        let mut parity = std::mem::take(&mut self.parity);
        let result = self.gather_shards(outbox, first, shards, &map, &mut parity);
        self.parity = parity;
        result
    }

    fn gather_shards(
        &mut self,
        outbox: &mut Outbox,
        first: ShardDatagram<'_>,
        shards: &Shards,
        map: &BlockMap,
        parity: &mut ParityMaker,
    ) -> io::Result<()> {
        let geometry = self.parameters.geometry();
        let first_row = shards.iter().next().unwrap_or(0);
        let rows = match first.kind {
            ShardKind::Parity => {
                let end = shards.iter().last().map_or(0, |last| last + 1);
                parity.rows(&self.image, map, geometry, first_row..end)?
            }
            ShardKind::Data | ShardKind::Repair => &[],
        };
        let segment = (HEAD + geometry.payload()) as u16;
        let per_burst = gather::shards_per_burst(geometry);
        let mut burst = outbox.burst(segment);
        for (at, index) in shards.iter().enumerate() {
            if at > 0 && at % per_burst == 0 {
                let next = outbox.burst(segment);
                self.send(outbox, std::mem::replace(&mut burst, next), first.kind);
            }
            let head = ShardDatagram { seq: first.seq.plus(at as u32), index, ..first };
            if first.kind == ShardKind::Parity {
                let row = usize::from(index - first_row) * geometry.payload();
                gather::push_parity(&mut burst, &head, rows.get(row..row + geometry.payload()).unwrap_or_default());
            } else {
                let head = ShardDatagram { gfn: map.named_by(geometry, index), ..head };
                gather::push_source(&mut burst, &self.image, map, geometry, &head);
            }
        }
        self.send(outbox, burst, first.kind);
        Ok(())
    }

    fn send(&mut self, outbox: &mut Outbox, mut burst: mcast_socket::Burst<Kept>, kind: ShardKind) {
        let counter = match kind {
            ShardKind::Data => &mut self.sent.data,
            ShardKind::Repair => &mut self.sent.repair,
            ShardKind::Parity => &mut self.sent.parity,
        };
        counter.add(burst.datagrams(), burst.len());
        burst.keep(Kept::new(Arc::clone(&self.image), self.parameters.session));
        outbox.push(burst);
    }

    /// What it sent, and why.
    pub(super) fn traffic(&self) -> Traffic {
        let stats = self.sender.stats();
        Traffic {
            suppressed: stats.suppressed,
            nacks: stats.nacked,
            reports: stats.reports,
            strange: stats.malformed + stats.other_session + stats.strangers + stats.stale + stats.nonsense,
            ..self.sent
        }
    }

    pub(super) fn status(&self) -> ChannelStatus {
        let member = |member: mcast::sender::MemberStatus| {
            let session = self.members.get(&member.member)?.number();
            Some(MemberStatus {
                session,
                loss: member.loss,
                rate: member.rate,
                round_trip_us: member.round_trip.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
                lag: member.lag,
                lacks: member.missing.into(),
            })
        };
        ChannelStatus {
            image: self.image.id(),
            rate: self.sender.rate(),
            sent: self.traffic(),
            members: self.sender.members().filter_map(member).collect(),
        }
    }
}
