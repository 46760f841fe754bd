use std::time::Duration;

use descriptor::fetch::Class;
use descriptor::image::Layout;

use super::shards::Work;
use super::{Sender, Shards, Transmit, wire_number};
use crate::wire::{self, Confirm, HEAD, Pulse, PulseKind, ShardKind};
use crate::{BlockId, BlockMap, Geometry, class_index};

/// What the windows allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Room {
    Closed,
    /// Demand and repairs.
    Urgent,
    All,
}

/// The places of a class in [`Sender::under_way`].
pub(super) const REPAIR: usize = 0;
pub(super) const DATA: usize = 1;

/// Reports of losses from fewer members are no reason to send parity that nobody has asked for.
const LOSSY_MEMBERS: u32 = 5;

impl Sender {
    /// A confirmation or pulse that is due.
    pub(super) fn control(&mut self, now: Duration) -> Option<Transmit> {
        let mut datagram = Vec::new();
        let most = wire::max_entries(self.config.channel.payload);
        let entries = self.repairs.confirmations(&mut self.histories, most);
        if !entries.is_empty() {
            self.stats.confirmed += entries.len() as u64;
            self.stats.refused += entries.iter().filter(|entry| entry.answer == wire::Answer::Gone).count() as u64;
            Confirm::encode(self.config.channel.session, wire_number(self.seq), &entries, &mut datagram);
            return Some(self.control_sent(datagram));
        }
        let spacing = self.members.round_trip().max(Duration::from_millis(2));
        let kind = if self.bulk.take_end(now, spacing) {
            PulseKind::End
        } else if now >= self.heartbeat.due() {
            PulseKind::Heartbeat
        } else {
            return None;
        };
        if self.bulk.is_bursting() {
            self.members.wake(now);
        }
        self.pulse(now, kind).encode(&mut datagram);
        self.heartbeat.sent(now, self.seq, self.bulk.is_bursting());
        Some(self.control_sent(datagram))
    }

    /// The next burst of the most urgent shards.
    pub(super) fn shards(&mut self, now: Duration, layout: &dyn Layout) -> Option<Transmit> {
        let room = self.room();
        self.note_held(now, room);
        if room == Room::Closed || !self.pace.ready(now) {
            return None;
        }
        [Class::Demand, Class::Bulk].into_iter().find_map(|class| {
            self.refill(now, class, layout, room);
            let [repair, data] = &self.under_way[class_index(class)];
            let slot = match (repair, data) {
                (Some(_), _) => REPAIR,
                (None, Some(_)) if class == Class::Demand || room == Room::All => DATA,
                _ => return None,
            };
            self.burst(now, class, slot)
        })
    }

    /// What the windows allow: bulk up to the smallest and while anybody listens, what is urgent some beyond.
    pub(super) fn room(&self) -> Room {
        match self.members.limit() {
            Some((limit, extra)) if self.seq >= limit + extra => Room::Closed,
            Some((limit, _)) if self.seq >= limit => Room::Urgent,
            _ if self.members.useful() == 0 => Room::Urgent,
            _ => Room::All,
        }
    }

    /// True when there are shards to send that `room` allows, not counting repairs that are gathered.
    pub(super) fn has_work(&self, room: Room) -> bool {
        let [demand, bulk] = &self.under_way;
        let urgent = demand.iter().any(Option::is_some) || bulk[REPAIR].is_some() || !self.demand.is_empty();
        let patient = bulk[DATA].is_some() || self.bulk.has_work();
        room >= Room::Urgent && urgent || room == Room::All && patient
    }

    /// Tells the members when the windows begin to hold something back: whoever lost the last of a window does not know yet.
    fn note_held(&mut self, now: Duration, room: Room) {
        let held = room < Room::All && self.members.limit().is_some() && self.has_work(Room::All);
        if held {
            self.members.hold();
        }
        if held && !self.held {
            self.heartbeat.soon(now);
        }
        self.held = held;
    }

    /// Takes up what is to be sent next of `class`, where nothing is under way.
    fn refill(&mut self, now: Duration, class: Class, layout: &dyn Layout, room: Room) {
        let at = class_index(class);
        if self.under_way[at][REPAIR].is_none() {
            let loss = self.members.mean_loss(1);
            self.under_way[at][REPAIR] = self.repairs.next(now, class, &mut self.histories[at], loss);
        }
        if self.under_way[at][DATA].is_none() && (class == Class::Demand || room == Room::All) {
            let map = match class {
                Class::Demand => self.demand.next_block(layout, self.geometry),
                Class::Bulk => self.bulk.next_block(layout),
            };
            self.under_way[at][DATA] = map.map(|map| self.begin(now, class, map));
        }
    }

    /// Begins a block.
    fn begin(&mut self, now: Duration, class: Class, map: BlockMap) -> Work {
        let count = map.shards(self.geometry) as u8;
        let block = self.histories[class_index(class)].push(map, count);
        self.demand.sent(now, class, block, &map);
        if class == Class::Demand {
            self.bulk.sent(&map);
        }
        self.stats.blocks[class_index(class)] += 1;
        Work { block, kind: ShardKind::Data, shards: Shards::Range(0..count) }
    }

    /// The next burst of what is under way.
    fn burst(&mut self, now: Duration, class: Class, slot: usize) -> Option<Transmit> {
        let at = class_index(class);
        let mut work = self.under_way[at][slot].take()?;
        let datagram = HEAD + self.geometry.payload();
        // A burst begins while the window is open and may go beyond it. A quarter of the window is what that may be, and not
        // so little that the reports of several members would cut bursts to pieces.
        let within = self.members.limit().map_or(u64::MAX, |(_, quarter)| quarter);
        let most = (self.config.burst as u64 / datagram as u64).min(within);
        let shards = work.shards.take(most.clamp(1, 255) as u8);
        let (block, kind, first_seq) = (work.block, work.kind, wire_number(self.seq));
        // Blocks under way are the newest; a repair of one that has left the history since is dropped.
        let entry = self.histories[at].get(block)?;
        let (map, count) = (entry.map, entry.count);
        let mut bytes = usize::from(shards.len()) * datagram;
        if kind != ShardKind::Parity && shards.last() == Some(count - 1) {
            bytes -= usize::from(count) * self.geometry.payload() - self.geometry.stream_length(map.pages());
        }
        self.seq += u64::from(shards.len());
        self.members.wake(now);
        self.repairs.sent(shards.len());
        self.pace.spend(bytes);
        self.stats.bytes += bytes as u64;
        let counter = match kind {
            ShardKind::Data => &mut self.stats.data,
            ShardKind::Repair => &mut self.stats.repaired,
            ShardKind::Parity => &mut self.stats.parity,
        };
        counter[at] += u64::from(shards.len());
        if work.shards.is_empty() {
            self.demand.sent(now, class, block, &map);
            self.finish(now, class, slot, &work);
        } else {
            self.under_way[at][slot] = Some(work);
        }
        let block = BlockId { class, number: wire_number(block) };
        Some(Transmit::Shards { block, count, kind, shards, first_seq })
    }

    /// Sees to what follows a block or repair whose last shard goes now.
    fn finish(&mut self, now: Duration, class: Class, slot: usize, work: &Work) {
        let at = class_index(class);
        let loss = self.members.mean_loss(LOSSY_MEMBERS);
        let Some(entry) = self.histories[at].get_mut(work.block) else { return };
        if slot == REPAIR {
            self.repairs.finished(now, entry);
        }
        if class == Class::Bulk && work.kind == ShardKind::Data {
            // Parity that follows the losses saves the round trip of asking for it.
            let rows = ((f64::from(entry.count) * loss) as u8).min(Geometry::MAX_PARITY - entry.rows);
            if rows > 0 {
                let shards = Shards::Range(entry.rows..entry.rows + rows);
                entry.rows += rows;
                self.under_way[at][DATA] = Some(Work { block: work.block, kind: ShardKind::Parity, shards });
                return;
            }
        }
        if class == Class::Demand || slot == REPAIR || !self.bulk.has_work() {
            self.heartbeat.soon(now);
        }
    }

    fn pulse(&self, now: Duration, kind: PulseKind) -> Pulse {
        // A block that is partly sent is not yet before the next.
        let next = |class: Class| match &self.under_way[class_index(class)][DATA] {
            Some(work) => work.block,
            None => self.histories[class_index(class)].next(),
        };
        Pulse {
            kind,
            session: self.config.channel.session,
            next_seq: wire_number(self.seq),
            bursting: self.bulk.is_bursting(),
            // It is not meant for newcomers, who may be pushed everything in a moment.
            endgame: self.bulk.endgame() && !self.members.awaits_newcomers(now),
            next_block: [Class::Demand, Class::Bulk].map(|class| wire_number(next(class))),
            oldest_block: self.histories.each_ref().map(|history| wire_number(history.oldest())),
            members: self.members.len() as u32,
            round_trip: self.members.round_trip(),
            report_interval: self.members.report_interval(now),
            report_bytes: self.members.report_bytes(),
            burst: self.bulk.burst(),
            sent: now,
        }
    }

    fn control_sent(&mut self, datagram: Vec<u8>) -> Transmit {
        self.stats.control += 1;
        self.stats.bytes += datagram.len() as u64;
        self.pace.spend(datagram.len());
        Transmit::Control { datagram }
    }
}
