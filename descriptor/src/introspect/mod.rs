//! What an unmodified Linux guest uses its memory for, read from its image alone.
//!
//! ```text
//!   VMCOREINFO note ─▶ page tables ─▶ page array ─▶ free blocks ── equal? ── counters of the zones
//!                                         │    └──▶ per-CPU lists ── equal? ── their counts
//!                                         └───────▶ a class for every frame
//! ```
//!
//! SnowFlock (2008) patched its guests so that free pages were never fetched. A kernel with crash support leaves a note for
//! analysers of crash dumps instead, which names what is needed to find the allocator's lists. Nothing is known by version:
//! a kernel that lacks a key, or whose structures disagree anywhere, is **refused as a whole**, since a page wrongly taken for
//! free would be lost; then only zero pages are avoided.
//!
//! Only memory of a *stopped* guest may be analysed: nothing here notices that it changed meanwhile. Nor does the memory of a guest
//! that was just reset differ from before: its firmware and its loader use frames that were free for the kernel that is no more. So one of
//! the vCPUs must use that kernel's page tables, where the hypervisor tells which they use; raw memory comes without them. What the image says is
//! foreign: every walk is bounded by the memory's size, and ends in a [`Refusal`] at worst.

mod banks;
mod buddy;
mod class;
mod error;
mod kernel;
mod note;
mod page_array;
mod per_cpu;
mod physical;
mod surveyor;
mod vcpus;

use crate::{FrameRange, FrameSet, Gfn, PAGE_SIZE, PageCount};

pub use class::Class;
pub use error::Refusal;
pub use note::is_note;
pub use physical::{Bank, Physical};
pub use surveyor::{Avoid, Avoidance, Insight, Surveyor};

use buddy::{Found, FreeBlocks};
use class::Classifier;
use kernel::Kernel;
use note::{MAX_NOTES, Note};
use page_array::{Fields, Section};
use per_cpu::Candidates;

/// The byte that `page_poison` fills free pages with.
const POISON: u8 = 0xaa;

/// What a guest's memory is used for.
#[derive(Clone, Debug)]
pub struct Introspection {
    /// The kernel's release, such as `6.1.0-31-amd64`.
    pub release: String,
    /// Frames whose contents do not matter: free ones, and those that a balloon took.
    pub free: FrameSet,
    /// What the guest expects to find in a page that it takes from its allocator.
    pub fill: Fill,
    classes: Vec<(FrameRange, Vec<Class>)>,
}

/// What free pages hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Anything; zeros serve, also for a guest that zeroes pages when it frees them.
    Zero,
    /// The guest checks for its poison when it takes a page, so a free one must hold this byte everywhere.
    Poison(u8),
}

impl Introspection {
    /// The class of each frame, by bank.
    pub fn classes(&self) -> impl Iterator<Item = (FrameRange, &[Class])> {
        self.classes.iter().map(|(frames, classes)| (*frames, classes.as_slice()))
    }

    /// The frames of these classes as runs, one class after the other: an order in which they may be fetched ahead.
    pub fn order_of(&self, classes: &[Class]) -> Vec<FrameRange> {
        let mut runs: Vec<FrameRange> = Vec::new();
        for wanted in classes {
            let first = runs.len();
            for (frames, classes) in self.classes() {
                let of_class = frames.frames().zip(classes).filter(|(_, class)| *class == wanted);
                for (gfn, _) in of_class {
                    match runs.get_mut(first..).and_then(<[FrameRange]>::last_mut) {
                        Some(last) if last.end() == gfn => {
                            *last = FrameRange::between(last.start(), gfn + PageCount::ONE)
                        }
                        _ => runs.push(FrameRange::single(gfn)),
                    }
                }
            }
        }
        runs
    }

    /// How many frames there are of each class, in the order of [`Class::ALL`].
    pub fn counts(&self) -> [PageCount; Class::ALL.len()] {
        let mut counts = [PageCount::ZERO; Class::ALL.len()];
        for class in self.classes.iter().flat_map(|(_, classes)| classes) {
            counts[*class as usize] += PageCount::ONE;
        }
        counts
    }
}

/// Analyses the memory of a stopped guest. `notes` are the frames of which [`is_note`] holds.
///
/// # Errors
/// Why the memory is not believed.
pub fn introspect(physical: &Physical<'_>, notes: &[Gfn]) -> Result<Introspection, Refusal> {
    if notes.len() > MAX_NOTES {
        return Err(Refusal::TooManyNotes(MAX_NOTES));
    }
    let mut believed: Option<(String, Introspection)> = None;
    let mut refusal = Refusal::NoNote;
    let mut conflicts = 1;
    for gfn in notes {
        let Some(text) = note::text(physical.image(), *gfn)? else { continue };
        if believed.as_ref().is_some_and(|(known, _)| *known == text) {
            continue;
        }
        match analyse(physical, Note::parse(&text)) {
            Ok(_) if believed.is_some() => conflicts += 1,
            Ok(introspection) => believed = Some((text, introspection)),
            Err(why) => refusal = why,
        }
    }
    match believed {
        Some(_) if conflicts > 1 => Err(Refusal::Conflict(conflicts)),
        Some((_, introspection)) => Ok(introspection),
        None => Err(refusal),
    }
}

fn analyse(physical: &Physical<'_>, note: Note) -> Result<Introspection, Refusal> {
    let mut kernel = Kernel::new(physical, note)?;
    let kernel = &mut kernel;
    let fields = Fields::of(&kernel.note)?;
    let sections = page_array::sections(kernel)?;
    let mut blocks = FreeBlocks::new(&kernel.note)?;
    let mut candidates = Candidates::default();
    let mut map = ClassMap::new(physical);
    let classifier = Classifier::of(&kernel.note)?;
    let mut array = Vec::new();
    for section in &sections {
        let mut tails = Tails { section: *section, fields };
        let mut note_array = |frame, count| array.push((frame, count));
        page_array::for_each(kernel, fields, *section, &mut note_array, &mut |frame, page| {
            match blocks.look(frame, page, section.end)? {
                Found::Block(count) => map.set(frame, count, Class::Free),
                Found::Within => {}
                Found::Other => match tails.head(frame, page.compound()) {
                    Some(head) => map.copy(head, frame),
                    None => {
                        let class = classifier.class(page);
                        map.set(frame, 1, class);
                        if class == Class::Kernel {
                            candidates.look(frame, page);
                        }
                    }
                },
            }
            Ok(())
        })?;
    }
    blocks.check(kernel)?;
    for (frame, count) in candidates.resolve(kernel, fields, &sections)? {
        map.set_where(frame, count, Class::Kernel, Class::PerCpuFree);
    }
    for (frame, count) in array {
        map.set_where(frame, count, Class::Kernel, Class::PageArray);
    }
    kernel_image(kernel, &mut map)?;
    let free = map.droppable(physical.image().memory().universe());
    let fill = fill(physical, &free)?;
    let release = kernel.note.text("OSRELEASE")?.to_owned();
    Ok(Introspection { release, free, fill, classes: map.into_classes() })
}

/// Marks the kernel's image, from its text on.
fn kernel_image(kernel: &mut Kernel<'_>, map: &mut ClassMap) -> Result<(), Refusal> {
    const STEP: u64 = 2 << 20;
    const DEFAULT_SIZE: i64 = 1 << 30;
    let size = kernel.note.number_if("KERNEL_IMAGE_SIZE")?.unwrap_or(DEFAULT_SIZE).clamp(0, 2 * DEFAULT_SIZE);
    let mut address = kernel.note.symbol("_stext")? & !(STEP - 1);
    let end = address.saturating_add(size.cast_unsigned());
    while address < end {
        match kernel.translate(address) {
            Ok((place, length)) => {
                map.set_where(place / PAGE_SIZE, length / PAGE_SIZE, Class::Kernel, Class::KernelImage);
                address = address.saturating_add(length.max(PAGE_SIZE));
            }
            Err(Refusal::Unmapped(_)) => address = (address & !(STEP - 1)).saturating_add(STEP),
            Err(refusal) => return Err(refusal),
        }
    }
    Ok(())
}

/// What all free pages hold. Only pages that are poisoned from the first to the last are believed to be poisoned.
fn fill(physical: &Physical<'_>, free: &FrameSet) -> Result<Fill, Refusal> {
    const BATCH: PageCount = PageCount::new(256);
    let mut buffer = vec![0; BATCH.bytes() as usize];
    for run in free.runs().flat_map(|run| run.chunks(BATCH)) {
        let pages = &mut buffer[..run.count().bytes() as usize];
        physical.image().read_pages(run, pages)?;
        if pages.iter().any(|byte| *byte != POISON) {
            return Ok(Fill::Zero);
        }
    }
    Ok(if free.is_empty() { Fill::Zero } else { Fill::Poison(POISON) })
}

/// Finds the heads of compound pages.
struct Tails {
    section: Section,
    fields: Fields,
}

impl Tails {
    /// The head of the compound page of which `frame` is a tail, when it is one. It lies before, in the same section.
    fn head(&mut self, frame: u64, compound: u64) -> Option<u64> {
        if compound & 1 == 0 {
            return None;
        }
        let own = self.section.base.wrapping_add(frame.wrapping_mul(self.fields.size));
        let value = compound - 1;
        // From 7.1 on it may be a mask for the tail's own address.
        let address = if value >> 32 == 0xffff_ffff { own & value } else { value };
        let distance = address.wrapping_sub(self.section.base);
        let head = distance / self.fields.size;
        (distance.is_multiple_of(self.fields.size) && (self.section.start..frame).contains(&head)).then_some(head)
    }
}

/// A class for each frame of each bank.
struct ClassMap {
    banks: Vec<(Bank, Vec<Class>)>,
}

impl ClassMap {
    fn new(physical: &Physical<'_>) -> Self {
        let classes = |bank: &Bank| vec![Class::Unknown; bank.frames.count().get() as usize];
        Self { banks: physical.banks().iter().map(|bank| (*bank, classes(bank))).collect() }
    }

    fn set(&mut self, frame: u64, count: u64, class: Class) {
        self.each(frame, count, |known| *known = class);
    }

    /// Gives frames of class `old` a finer one.
    fn set_where(&mut self, frame: u64, count: u64, old: Class, class: Class) {
        self.each(frame, count, |known| {
            if *known == old {
                *known = class;
            }
        });
    }

    fn copy(&mut self, from: u64, to: u64) {
        let mut class = Class::Unknown;
        self.each(from, 1, |known| class = *known);
        self.set(to, 1, class);
    }

    fn each(&mut self, frame: u64, count: u64, mut each: impl FnMut(&mut Class)) {
        let Some(index) = self.banks.partition_point(|(bank, _)| bank.physical <= frame).checked_sub(1) else { return };
        let (bank, classes) = &mut self.banks[index];
        let start = usize::try_from(frame - bank.physical).unwrap_or(usize::MAX).min(classes.len());
        let end = start.saturating_add(usize::try_from(count).unwrap_or(usize::MAX)).min(classes.len());
        classes[start..end].iter_mut().for_each(&mut each);
    }

    fn droppable(&self, universe: PageCount) -> FrameSet {
        let mut set = FrameSet::empty(universe);
        for (bank, classes) in &self.banks {
            let mut index = 0;
            for same in classes.chunk_by(|a, b| a.is_droppable() == b.is_droppable()) {
                if same[0].is_droppable() {
                    let start = bank.frames.start() + PageCount::new(index);
                    set.insert_range(FrameRange::new(start, PageCount::new(same.len() as u64)));
                }
                index += same.len() as u64;
            }
        }
        set
    }

    fn into_classes(self) -> Vec<(FrameRange, Vec<Class>)> {
        self.banks.into_iter().map(|(bank, classes)| (bank.frames, classes)).collect()
    }
}
