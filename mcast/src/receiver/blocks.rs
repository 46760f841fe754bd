use std::collections::VecDeque;
use std::time::Duration;

use descriptor::fetch::Class;
use fastrand::Rng;

use super::block::{Block, Part};
use super::nack::{Alarm, Ask, Promise, Timing};
use super::stats::ReceiverStats;
use super::window::{Slot, Window};
use super::{Output, Placement, ReceiverConfig};
use crate::wire::{self, Answer, Confirmation, Lack, Pulse, ShardDatagram};
use crate::{BlockId, BlockMap, ChannelParameters, Geometry, Lacks, class_index};

/// The blocks of both classes that are not finished, from the first shard to the last page, and what of them is asked for.
#[derive(Debug)]
pub(super) struct Blocks {
    channel: ChannelParameters,
    geometry: Geometry,
    max_blocks: usize,
    windows: [Window; 2],
    alarms: [Alarm; 2],
    /// Blocks that may have something to put out.
    queue: VecDeque<BlockId>,
    /// Blocks that were given up, of which the bytes are to be forgotten.
    released: VecDeque<BlockId>,
    /// Incomplete blocks.
    open: usize,
    /// Complete ones that were not taken yet.
    complete: usize,
}

/// Why a shard was left aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Contradicting,
    Ahead,
    Full,
}

const CLASSES: [Class; 2] = [Class::Demand, Class::Bulk];

impl Blocks {
    /// Blocks that are complete or given up and wait to be taken, at most. Whoever runs the receiver looks after each batch
    /// of datagrams, and no batch makes as many.
    pub(super) const MAX_UNTAKEN: usize = 256;

    /// A bulk block's pages go out together, unless it takes longer than this to arrive: a guest may wait for one of them.
    const HOLD: Duration = Duration::from_millis(2);

    /// Wholly lost blocks that are asked for, at most: a hiccup of some ms. Whoever lost more gets it by the next pass.
    const MAX_WHOLE: u64 = 16;

    pub(super) fn new(config: &ReceiverConfig) -> Self {
        Self {
            channel: config.channel,
            geometry: config.channel.geometry(),
            max_blocks: config.max_blocks.max(1),
            windows: config.start.next_block.map(Window::new),
            alarms: [Alarm::default(); 2],
            queue: VecDeque::new(),
            released: VecDeque::new(),
            open: 0,
            complete: 0,
        }
    }

    /// Takes in a shard: where it belongs, or nothing when it is of no use.
    pub(super) fn shard(
        &mut self,
        now: Duration,
        shard: &ShardDatagram<'_>,
        (timing, rng): (&Timing, &mut Rng),
        stats: &mut ReceiverStats,
    ) -> Result<Option<Placement>, Refusal> {
        let id = shard.block;
        let at = class_index(id.class);
        if !self.geometry.fits(shard.count, shard.shard(), shard.payload.len()) {
            return Err(Refusal::Contradicting);
        }
        let number = self.windows[at].extend(id.number);
        if number >= self.windows[at].next() + Window::MAX_LEAD {
            return Err(Refusal::Ahead);
        }
        if number >= self.windows[at].next() {
            self.reach(now, id.class, number, (timing, rng), stats);
            self.windows[at].grow(number + 1);
        }
        match self.windows[at].slot(number) {
            Slot::Finished => return Ok(None),
            Slot::Unseen => self.open(now, id.class, number, shard.count, stats)?,
            Slot::Open(_) => {}
        }
        let Some(block) = self.windows[at].block(number) else { return Ok(None) };
        if !block.is_unseen() && block.count() != shard.count {
            return Err(Refusal::Contradicting);
        }
        if block.is_complete() || !block.place(self.geometry, shard, self.channel.frames.get()) {
            return Ok(None);
        }
        if block.is_complete() {
            self.open -= 1;
            self.complete += 1;
            self.enqueue(id);
        } else {
            block.eager |= block.is_older(now, Self::HOLD);
            let due = block.eager || block.is_recoverable();
            if block.ask == Ask::Nothing && block.is_lossy() {
                let from = now + timing.tolerance();
                block.ask = Ask::From(from);
                self.alarms[at].arm(from, timing, rng);
            }
            if due {
                self.enqueue(id);
            }
        }
        Ok(Some(Placement { block: id, shard: shard.shard(), count: shard.count }))
    }

    /// Takes in what a pulse says of the blocks.
    pub(super) fn pulse(
        &mut self,
        now: Duration,
        pulse: &Pulse,
        (timing, rng): (&Timing, &mut Rng),
        stats: &mut ReceiverStats,
    ) {
        for class in CLASSES {
            let at = class_index(class);
            let next = self.windows[at].extend(pulse.next_block[at]);
            self.reach(now, class, next, (timing, rng), stats);
            let oldest = self.windows[at].extend(pulse.oldest_block[at]).min(next);
            let lost: Vec<u64> = self.windows[at]
                .incomplete()
                .take_while(|(number, _)| *number < oldest)
                .map(|(number, _)| number)
                .collect();
            lost.into_iter().for_each(|number| self.doom(class, number));
            let held: Vec<u64> = self.windows[at]
                .incomplete()
                .filter(|(_, block)| !block.eager && block.is_older(now, Self::HOLD))
                .map(|(number, _)| number)
                .collect();
            held.into_iter().for_each(|number| self.hasten(class, number));
        }
    }

    /// Takes in what the sender confirms.
    pub(super) fn confirmed(&mut self, now: Duration, entry: &Confirmation, timing: &Timing) {
        let id = entry.block;
        let window = &mut self.windows[class_index(id.class)];
        let number = window.extend(id.number);
        let Some(block) = window.block(number).filter(|block| !block.is_complete()) else { return };
        if entry.answer == Answer::Gone {
            // Only what was sent as a whole can have gone.
            if block.is_lossy() {
                self.doom(id.class, number);
            }
        } else {
            block.promise = Some(Promise { answer: entry.answer, until: now + timing.hold_off(id.class, 1) });
        }
    }

    /// Takes in the map of a block, which became readable.
    pub(super) fn map(&mut self, id: BlockId, map: BlockMap, stats: &mut ReceiverStats) {
        let geometry = self.geometry;
        let window = &mut self.windows[class_index(id.class)];
        let number = window.extend(id.number);
        let Some(block) = window.block(number).filter(|block| !block.has_map() && !block.is_unseen()) else { return };
        if !block.set_map(geometry, map) {
            stats.dropped.contradicting += 1;
            self.give_up(id.class, number, stats);
        } else if block.eager || block.is_complete() {
            self.enqueue(id);
        }
    }

    /// Gives a block up whose bytes are of no use.
    pub(super) fn spoiled(&mut self, id: BlockId, stats: &mut ReceiverStats) {
        stats.dropped.contradicting += 1;
        let number = self.windows[class_index(id.class)].extend(id.number);
        self.give_up(id.class, number, stats);
    }

    /// True when [`Blocks::next_output`] may have something.
    pub(super) fn has_output(&self) -> bool {
        !self.queue.is_empty() || !self.released.is_empty()
    }

    /// What comes out of the blocks next.
    pub(super) fn next_output(&mut self, stats: &mut ReceiverStats) -> Option<Output> {
        loop {
            if let Some(block) = self.released.pop_front() {
                return Some(Output::Release { block });
            }
            let id = *self.queue.front()?;
            let window = &mut self.windows[class_index(id.class)];
            let number = window.extend(id.number);
            let Some(block) = window.block(number) else {
                self.queue.pop_front();
                continue;
            };
            if block.is_recoverable() {
                stats.recovered += u64::from(block.recovered());
                self.open -= 1;
                self.complete += 1;
                return Some(Output::Recover { block: id });
            }
            match block.next_part(self.geometry) {
                Some(Part::Pages { first_page, frames }) => {
                    return Some(Output::Pages { block: id, first_page, frames });
                }
                Some(Part::Zeros { frames }) => return Some(Output::Zeros { frames }),
                None => {}
            }
            block.queued = false;
            let finished = block.is_complete() && block.has_map();
            self.queue.pop_front();
            if block.doomed && !block.is_complete() {
                self.give_up(id.class, number, stats);
                continue;
            }
            if finished {
                self.complete -= 1;
                stats.blocks += 1;
                self.windows[class_index(id.class)].finish(number);
                return Some(Output::Release { block: id });
            }
        }
    }

    /// When [`Blocks::asks`] has something to do.
    pub(super) fn next_timeout(&self) -> Option<Duration> {
        self.alarms.iter().filter_map(|alarm| alarm.wake).min()
    }

    /// What is to be asked for now. `lacks` is what is wanted in bulk.
    pub(super) fn asks(
        &mut self,
        now: Duration,
        lacks: Option<&Lacks>,
        (timing, rng): (&Timing, &mut Rng),
        stats: &mut ReceiverStats,
    ) -> Vec<Lack> {
        let mut asks = Vec::new();
        for class in CLASSES {
            if self.alarms[class_index(class)].is_due(now) {
                self.asks_of(now, class, lacks, (timing, rng), &mut asks, stats);
            }
        }
        asks
    }

    fn asks_of(
        &mut self,
        now: Duration,
        class: Class,
        lacks: Option<&Lacks>,
        (timing, rng): (&Timing, &mut Rng),
        asks: &mut Vec<Lack>,
        stats: &mut ReceiverStats,
    ) {
        let at = class_index(class);
        let most = wire::max_entries(self.channel.payload);
        let fires = self.alarms[at].fire.is_some_and(|fire| fire <= now);
        let (mut over, mut hasty) = (Vec::new(), Vec::new());
        let mut alarm = Alarm { fire: self.alarms[at].fire.filter(|_| !fires), wake: None };
        let mut waiting: Option<Duration> = None;
        for (number, block) in self.windows[at].incomplete() {
            if let Ask::Held(until) = block.ask
                && until <= now
            {
                block.ask = Ask::From(now);
            }
            let id = BlockId { class, number: (number as u32).into() };
            if let Ask::From(from) = block.ask
                && fires
                && from <= now
            {
                if asks.len() >= most {
                    // The rest goes with another NACK, at once.
                    alarm.fire = Some(now);
                    continue;
                }
                let wanted = match lacks {
                    Some(lacks) => block.concerns(&self.channel, &lacks.chunks),
                    None => class == Class::Demand,
                };
                block.ask = match block.lack(id) {
                    None => Ask::Nothing,
                    Some(_) if !wanted => {
                        over.push(number);
                        Ask::Nothing
                    }
                    Some(lack) => {
                        hasty.push(number);
                        let promise =
                            block.promise.filter(|promise| now < promise.until && promise.covers(block, lack.need));
                        match promise {
                            Some(promise) => {
                                stats.suppressed += 1;
                                Ask::Held(promise.until)
                            }
                            None if !block.progress && block.tries >= Timing::TRIES => {
                                over.push(number);
                                Ask::Nothing
                            }
                            None => {
                                block.tries = if std::mem::take(&mut block.progress) { 1 } else { block.tries + 1 };
                                asks.push(lack);
                                Ask::Held(now + timing.hold_off(class, block.tries))
                            }
                        }
                    }
                };
            }
            match block.ask {
                Ask::Nothing => {}
                Ask::From(from) => waiting = Some(waiting.map_or(from, |waiting| waiting.min(from))),
                Ask::Held(until) => alarm.wake_by(until),
            }
        }
        self.alarms[at] = alarm;
        match (waiting, self.alarms[at].fire) {
            (Some(from), None) => self.alarms[at].arm(from.max(now), timing, rng),
            (Some(_), Some(fire)) => self.alarms[at].wake_by(fire),
            (None, Some(fire)) if fire <= now => self.alarms[at].wake_by(fire),
            (None, _) => self.alarms[at].fire = None,
        }
        hasty.into_iter().for_each(|number| self.hasten(class, number));
        over.into_iter().for_each(|number| self.doom(class, number));
    }

    /// Notes that all blocks before `to` are known to have been sent.
    fn reach(
        &mut self,
        now: Duration,
        class: Class,
        to: u64,
        (timing, rng): (&Timing, &mut Rng),
        stats: &mut ReceiverStats,
    ) {
        let at = class_index(class);
        let from = self.windows[at].ended();
        if to <= from {
            return;
        }
        if to > self.windows[at].next() + Window::SPAN {
            // So much was missed that what is there is stale.
            let all: Vec<u64> = self.windows[at].open().collect();
            all.into_iter().for_each(|number| self.give_up(class, number, stats));
        }
        stats.missed += self.windows[at].end(to);
        let due = now + timing.tolerance();
        for number in from.max(self.windows[at].base())..to {
            match self.windows[at].slot(number) {
                Slot::Finished => continue,
                Slot::Unseen if class == Class::Demand || number + Self::MAX_WHOLE < to => continue,
                Slot::Unseen if self.open >= self.max_blocks => continue,
                Slot::Unseen => {
                    self.open += 1;
                    self.windows[at].put(number, Block::new(now, class, 0));
                }
                Slot::Open(_) => {}
            }
            let Some(block) = self.windows[at].block(number).filter(|block| !block.is_complete()) else { continue };
            block.ended();
            if block.ask == Ask::Nothing && block.is_lossy() {
                block.ask = Ask::From(due);
                self.alarms[at].arm(due, timing, rng);
            }
        }
        self.trim(class, stats);
    }

    /// Keeps a window from becoming too long.
    fn trim(&mut self, class: Class, stats: &mut ReceiverStats) {
        let at = class_index(class);
        stats.missed += self.windows[at].settle();
        while self.windows[at].is_long() {
            let oldest = self.windows[at].open().next();
            let Some(oldest) = oldest else { break };
            self.give_up(class, oldest, stats);
            stats.missed += self.windows[at].settle();
        }
    }

    fn open(
        &mut self,
        now: Duration,
        class: Class,
        number: u64,
        count: u8,
        stats: &mut ReceiverStats,
    ) -> Result<(), Refusal> {
        while self.open >= self.max_blocks {
            let oldest = [Class::Bulk, Class::Demand].into_iter().find_map(|class| {
                self.windows[class_index(class)].incomplete().next().map(|(number, _)| (class, number))
            });
            let Some((class, oldest)) = oldest else { break };
            self.give_up(class, oldest, stats);
        }
        if self.complete + self.released.len() >= Self::MAX_UNTAKEN {
            return Err(Refusal::Full);
        }
        let at = class_index(class);
        let mut block = Block::new(now, class, count);
        if number < self.windows[at].ended() {
            block.ended();
        }
        self.open += 1;
        self.windows[at].put(number, block);
        Ok(())
    }

    fn give_up(&mut self, class: Class, number: u64, stats: &mut ReceiverStats) {
        let window = &mut self.windows[class_index(class)];
        let Some(block) = window.block(number) else { return };
        *(if block.is_complete() { &mut self.complete } else { &mut self.open }) -= 1;
        stats.given_up += 1;
        if !block.is_unseen() {
            self.released.push_back(BlockId { class, number: (number as u32).into() });
        }
        window.finish(number);
    }

    /// Gives a block up, but what is there of it goes out.
    fn doom(&mut self, class: Class, number: u64) {
        if let Some(block) = self.windows[class_index(class)].block(number) {
            block.doomed = true;
        }
        self.hasten(class, number);
    }

    /// Lets the pages of a block out as soon as they are complete.
    fn hasten(&mut self, class: Class, number: u64) {
        if let Some(block) = self.windows[class_index(class)].block(number) {
            block.eager = true;
            self.enqueue(BlockId { class, number: (number as u32).into() });
        }
    }

    fn enqueue(&mut self, id: BlockId) {
        let window = &mut self.windows[class_index(id.class)];
        let number = window.extend(id.number);
        if let Some(block) = window.block(number)
            && !std::mem::replace(&mut block.queued, true)
        {
            self.queue.push_back(id);
        }
    }
}
