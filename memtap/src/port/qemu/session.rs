//! One migration as a state machine without I/O: what was said, which pages were sent, which the destination waits for.
//! It neither sees page bytes nor writes to a socket; what it wants to say is put into buffers, and the shell sends it.

use descriptor::import::qemu::record::{self, CloneState, RecordError};
use descriptor::memory::{MemoryMap, Region};
use descriptor::{Descriptor, FrameRange, FrameSet, Gfn, PAGE_SIZE, PageCount};
use thiserror::Error;

use super::return_path::{Message, RESUME_YES};
use super::wire;
use crate::port::{Event, Waiter};

/// The value of the only PING, in the device state.
const PING: u32 = 1;

/// The most device state in bytes, some thousand times what real machines have; it keeps the package's length in 32 bits.
const DEVICE_STATE_MAX: usize = 1 << 30;

/// The most pages in one piece: a huge page must be one piece, and with a record header for each it is still one write.
const PIECE_MAX: PageCount = PageCount::new(512);

/// Something that QEMU said and the protocol does not allow.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub(super) enum SessionError {
    #[error("page requested at {offset:#x} of block {block:?}, which has no such page of {length} bytes")]
    NoSuchPage { block: String, offset: u64, length: u32 },
    #[error("page requested of unknown block {0:?}")]
    NoSuchBlock(String),
    #[error("page requested without a block, and no request was before it")]
    NoBlock,
    #[error("PONG {0} without a PING")]
    Pong(u32),
    #[error("bitmap of block {0:?}, which was not asked for")]
    UnaskedBitmap(String),
    #[error("bitmap of block {block:?} has {length} bytes for {frames} pages")]
    BitmapLength { block: String, length: usize, frames: PageCount },
    #[error("bitmap of block {block:?} has part of the huge page at frame {frame}")]
    BitmapPart { block: String, frame: Gfn },
    #[error("RESUME was answered with {0}")]
    Resume(u32),
    #[error("it ended the migration with error {error:#x}, {missing} pages before the end")]
    Shut { error: u32, missing: PageCount },
}

/// What a page run is to the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It can be sent as one piece.
    Send(Piece),
    /// The first page was sent before.
    AlreadySent,
    /// The run begins outside of every block, or does not hold the whole huge page that it begins in.
    Unfit,
}

/// Pages of one block that follow each other and may be sent as one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) frames: FrameRange,
    /// True when the destination has asked for them.
    pub(super) demand: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A fresh memtap learns which pages of the block of this number, and those after it, have arrived.
    Relearning { block: usize },
    /// Everything is relearned; RESUME was sent.
    Resuming,
    /// Pages flow.
    Running,
    /// Everything was sent, the end as well.
    Ended,
    /// The destination has everything.
    Completed,
}

/// The source's side of one migration.
#[derive(Debug)]
pub(super) struct Session {
    memory: MemoryMap,
    section_id: u32,
    phase: Phase,
    sent: FrameSet,
    requested: FrameSet,
    /// The block of the last request, by its number.
    last_block: Option<usize>,
}

impl Session {
    /// A session that starts a clone; `out` gets what is to be sent first.
    pub(super) fn start(descriptor: &Descriptor, out: &mut Vec<u8>) -> Result<Self, RecordError> {
        let state = CloneState::of(descriptor)?;
        let bytes = state.device_state.len();
        if bytes == 0 || bytes > DEVICE_STATE_MAX {
            return Err(RecordError::Malformed { name: record::name::DEVICE_STATE, bytes });
        }
        let blocks: Vec<wire::Block<'_>> = descriptor.memory.regions().iter().map(block).collect();
        wire::opening(out, &state, &blocks, PING);
        Ok(Self::new(descriptor, &state, Phase::Running))
    }

    /// A session that takes over a clone whose source died; `out` gets what is to be sent first.
    pub(super) fn recover(descriptor: &Descriptor, out: &mut Vec<u8>) -> Result<Self, RecordError> {
        let state = CloneState::of(descriptor)?;
        if let Some(region) = descriptor.memory.regions().first() {
            wire::ask_received_bitmap(out, &region.name);
        }
        Ok(Self::new(descriptor, &state, Phase::Relearning { block: 0 }))
    }

    fn new(descriptor: &Descriptor, state: &CloneState<'_>, phase: Phase) -> Self {
        let memory = descriptor.memory.clone();
        let empty = FrameSet::empty(memory.universe());
        let section_id = state.ram_section_id;
        Self { memory, section_id, phase, sent: empty.clone(), requested: empty, last_block: None }
    }

    /// The smallest number of frames that may be sent at once: those of the largest page behind a block.
    pub(super) fn granule(&self) -> PageCount {
        self.memory.regions().iter().map(|region| region.page_size.frames()).max().unwrap_or(PageCount::ONE)
    }

    /// The size in bytes of the largest block's bitmap.
    pub(super) fn bitmap_max(&self) -> u64 {
        self.memory.regions().iter().map(|region| bitmap_length(region.frames.count())).max().unwrap_or(0)
    }

    /// The frames that were sent, or had arrived before the recovery.
    pub(super) fn sent(&self) -> &FrameSet {
        &self.sent
    }

    /// The frames of the machine that have not been sent.
    pub(super) fn missing(&self) -> PageCount {
        self.memory.frame_count() - self.sent.count()
    }

    /// True when pages may be sent.
    pub(super) fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// True when everything was sent, the end as well.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended | Phase::Completed)
    }

    /// True when the destination said that it has everything.
    pub(super) fn is_completed(&self) -> bool {
        self.phase == Phase::Completed
    }

    /// Takes in what the destination says: faults go to `events`, answers to `out`.
    pub(super) fn handle(
        &mut self,
        message: Message,
        events: &mut Vec<Event>,
        out: &mut Vec<u8>,
    ) -> Result<(), SessionError> {
        match message {
            Message::RequestPages { block, offset, length } => self.requested(block, offset, length, events),
            Message::Pong { value: PING } => {
                tracing::info!(sent = %self.sent.count(), "QEMU has taken the device state");
                Ok(())
            }
            Message::Pong { value } => Err(SessionError::Pong(value)),
            Message::ReceivedBitmap { block, bits } => self.relearn(&block, &bits, out),
            Message::ResumeAck { value: RESUME_YES } if self.phase == Phase::Resuming => {
                tracing::info!(present = %self.sent.count(), missing = %self.missing(), "the migration goes on");
                self.phase = Phase::Running;
                Ok(())
            }
            Message::ResumeAck { value } => Err(SessionError::Resume(value)),
            Message::Shut { error: 0 } if self.has_ended() => {
                self.phase = Phase::Completed;
                Ok(())
            }
            Message::Shut { error } => Err(SessionError::Shut { error, missing: self.missing() }),
        }
    }

    /// What may be sent at once of `range`, from its first page on.
    pub(super) fn next(&self, range: FrameRange) -> Next {
        let Some(region) = self.memory.region_of(range.start()) else {
            return Next::Unfit;
        };
        if self.sent.contains(range.start()) {
            return Next::AlreadySent;
        }
        let (range, _) = range.intersection(region.frames).split_at(PIECE_MAX);
        let unsent = self.sent.gaps_in(range).next().unwrap_or(range);
        let demand = self.requested.contains(range.start());
        let alike = match demand {
            true => self.requested.runs_in(unsent).next(),
            false => self.requested.gaps_in(unsent).next(),
        };
        let frames = alike.unwrap_or(unsent);
        let granule = region.page_size.frames().get();
        let (whole, _) = frames.split_at(PageCount::new(frames.count().get() / granule * granule));
        if whole.is_empty() || !whole.start().index().is_multiple_of(granule) {
            return Next::Unfit;
        }
        Next::Send(Piece { frames: whole, demand })
    }

    /// Notes that `piece` goes out now, and puts the headers of its records into `headers`, one after the other, with the
    /// end of each in `ends`. The first names its block, so that no piece depends on the one sent before it.
    pub(super) fn send(&mut self, piece: Piece, kind: wire::RecordKind, headers: &mut Vec<u8>, ends: &mut Vec<usize>) {
        let Some(region) = self.memory.region_of(piece.frames.start()) else {
            return;
        };
        let mut name = Some(region.name.as_str());
        for gfn in piece.frames.frames() {
            let offset = (gfn - region.frames.start()).bytes();
            wire::record(headers, kind, offset, name.take());
            if kind == wire::RecordKind::Zero {
                headers.push(wire::ZERO_FILL);
            }
            ends.push(headers.len());
        }
        self.sent.insert_range(piece.frames);
        self.requested.remove_range(piece.frames);
    }

    /// The id of the RAM section.
    pub(super) fn section_id(&self) -> u32 {
        self.section_id
    }

    /// Ends the migration, unless pages are missing: QEMU would take them for zeros.
    pub(super) fn end(&mut self) -> Result<(), PageCount> {
        if !self.missing().is_zero() || self.phase != Phase::Running {
            return Err(self.missing());
        }
        self.phase = Phase::Ended;
        Ok(())
    }

    fn requested(
        &mut self,
        block: Option<String>,
        offset: u64,
        length: u32,
        events: &mut Vec<Event>,
    ) -> Result<(), SessionError> {
        let regions = self.memory.regions();
        let index = match block {
            None => self.last_block.ok_or(SessionError::NoBlock)?,
            Some(name) => match regions.iter().position(|region| region.name == name) {
                Some(index) => index,
                None => return Err(SessionError::NoSuchBlock(name)),
            },
        };
        let region = &regions[index];
        self.last_block = Some(index);
        let page = region.page_size.frames();
        let range = Gfn::checked(offset / PAGE_SIZE)
            .and_then(|first| region.frames.start().checked_add(first - Gfn::new(0)))
            .and_then(|start| FrameRange::checked(start, page))
            .filter(|range| {
                offset.is_multiple_of(page.bytes()) && u64::from(length) == page.bytes() && region.frames.covers(*range)
            });
        let Some(range) = range else {
            return Err(SessionError::NoSuchPage { block: region.name.clone(), offset, length });
        };
        // A page that was sent but has not arrived yet is asked for all the same.
        if !self.sent.contains(range.start()) {
            self.requested.insert_range(range);
            events.push(Event::Fault { gfn: range.start(), waiter: Waiter(0), write: false });
        }
        Ok(())
    }

    fn relearn(&mut self, name: &str, bits: &[u8], out: &mut Vec<u8>) -> Result<(), SessionError> {
        let unasked = || SessionError::UnaskedBitmap(name.to_owned());
        let Phase::Relearning { block } = self.phase else {
            return Err(unasked());
        };
        let region = self.memory.regions().get(block).filter(|region| region.name == name).ok_or_else(unasked)?;
        let frames = region.frames.count();
        if bits.len() as u64 != bitmap_length(frames) {
            return Err(SessionError::BitmapLength { block: name.to_owned(), length: bits.len(), frames });
        }
        for range in runs_of_bits(bits, region.frames) {
            self.sent.insert_range(range);
        }
        let granule = region.page_size.frames().get();
        let part = self.sent.runs_in(region.frames).flat_map(|run| [run.start(), run.end()]);
        if let Some(frame) = part.into_iter().find(|edge| !edge.index().is_multiple_of(granule)) {
            return Err(SessionError::BitmapPart { block: name.to_owned(), frame });
        }
        tracing::debug!(block = name, present = %self.sent.count_in(region.frames), of = %frames, "QEMU has these pages");
        match self.memory.regions().get(block + 1) {
            Some(next) => {
                wire::ask_received_bitmap(out, &next.name);
                self.phase = Phase::Relearning { block: block + 1 };
            }
            None => {
                wire::resume(out);
                self.phase = Phase::Resuming;
            }
        }
        Ok(())
    }
}

fn block(region: &Region) -> wire::Block<'_> {
    let page_size = region.page_size.frames().bytes();
    wire::Block { name: &region.name, length: region.frames.count().bytes(), page_size }
}

/// The bytes of a bitmap of so many pages, padded to words of eight.
fn bitmap_length(frames: PageCount) -> u64 {
    frames.get().div_ceil(64) * 8
}

/// The frames of `frames` whose bits are set, lowest bit first, as runs.
fn runs_of_bits(bits: &[u8], frames: FrameRange) -> impl Iterator<Item = FrameRange> {
    let is_set = move |frame: u64| bits.get((frame / 8) as usize).is_some_and(|byte| byte >> (frame % 8) & 1 == 1);
    let count = frames.count().get();
    let mut next = 0;
    std::iter::from_fn(move || {
        let first = (next..count).find(|frame| is_set(*frame))?;
        next = (first..count).find(|frame| !is_set(*frame)).unwrap_or(count);
        Some(FrameRange::new(frames.start() + PageCount::new(first), PageCount::new(next - first)))
    })
}
