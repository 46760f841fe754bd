use std::fmt;
use std::path::Path;

use clap::{Args, ValueEnum};

use super::{Class, Fill, Introspection, Physical, Refusal, banks, introspect, vcpus};
use crate::image::{ImageError, ImageIndex, ImageReader, Survey, survey};
use crate::vm::Hypervisor;
use crate::{Descriptor, FrameRange, FrameSet, Gfn, PageCount, Report};

/// Looks at every page of an image once: for zero pages while it is imported, for the notes of its guest's kernel meanwhile,
/// and at the pages that no importer asked for when the guest is introspected.
#[derive(Debug, Default)]
pub struct Surveyor {
    seen: Option<FrameSet>,
    notes: Vec<Gfn>,
    page_tables: Option<Vec<u64>>,
}

impl Surveyor {
    /// The zero frames among `frames`; what importers call their scan. `progress` is told of pages that were looked at.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn zero_frames(
        &mut self,
        image: &ImageReader,
        frames: &FrameSet,
        progress: &(dyn Fn(PageCount) + Sync),
    ) -> Result<FrameSet, ImageError> {
        let Survey { zero, notes } = survey(image, frames, progress)?;
        self.notes.extend(notes);
        match &mut self.seen {
            Some(seen) => seen.union_with(frames),
            None => self.seen = Some(frames.clone()),
        }
        Ok(zero)
    }

    /// What the guest uses its memory for.
    ///
    /// # Errors
    /// Why its memory is not believed.
    pub fn introspect(&mut self, image: &ImageReader, hypervisor: Hypervisor) -> Result<Introspection, Refusal> {
        let mut unseen = image.index().memory.present();
        unseen.subtract(&image.index().zero);
        if let Some(seen) = &self.seen {
            unseen.subtract(seen);
        }
        if !unseen.is_empty() {
            self.zero_frames(image, &unseen, &|_| ())?;
        }
        self.notes.sort_unstable();
        self.notes.dedup();
        let mut first = None;
        for banks in banks::candidates(hypervisor, &image.index().memory) {
            let physical = Physical::new(image, banks).with_page_tables(self.page_tables.clone());
            match introspect(&physical, &self.notes) {
                Ok(introspection) => return Ok(introspection),
                Err(refusal) => _ = first.get_or_insert(refusal),
            }
        }
        Err(first.unwrap_or(Refusal::NoNote))
    }
}

/// What became of the search for free pages.
#[derive(Debug)]
pub enum Avoidance {
    /// Nobody wanted it.
    Off,
    /// They were found.
    Found(Box<Introspection>),
    /// They were found, but the guest expects to find its poison in them, which clones would have to make up.
    Poisoned(Box<Introspection>),
    /// The guest's memory is not believed; only zero pages are avoided.
    Refused(Refusal),
}

/// Whether a guest's free pages are looked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Avoid {
    /// Where they can be told.
    #[default]
    Auto,
    /// Only zero pages are avoided.
    Off,
}

/// What a descriptor is to say of what a guest uses its memory for.
#[derive(Clone, Debug, Default, Args)]
pub struct Insight {
    /// Which pages clones need not fetch besides zero ones: auto (those that the guest's kernel holds free, where it is a Linux
    /// whose tables agree), off (none)
    #[arg(long, value_enum, default_value = "auto")]
    pub avoid: Avoid,
    /// What clones are to fetch ahead of need, one class after the other, where the guest's tables can be read: such as
    /// kernel-image,page-table. Clones that are told what siblings needed fetch that first
    #[arg(long, value_name = "CLASS,...", value_enum, value_delimiter = ',', hide_possible_values = true)]
    pub ahead: Vec<Class>,
}

impl Surveyor {
    /// Enters what is wanted of the guest's free frames, and of what is best fetched ahead, into a descriptor that was just made,
    /// where its memory is believed. `folder` is where the relative paths of `index` count from.
    ///
    /// # Errors
    /// When the image's files cannot be opened.
    pub fn avoid(
        mut self,
        insight: &Insight,
        (mut descriptor, index): (Descriptor, ImageIndex),
        folder: &Path,
    ) -> Result<(Descriptor, ImageIndex, Avoidance), ImageError> {
        let Insight { avoid, ahead } = insight;
        if *avoid == Avoid::Off && ahead.is_empty() {
            return Ok((descriptor, index, Avoidance::Off));
        }
        let image = ImageReader::new(index, folder)?;
        let found = vcpus::page_tables(&descriptor).and_then(|tables| {
            self.page_tables = tables;
            self.introspect(&image, descriptor.identity.hypervisor)
        });
        if let Ok(introspection) = &found {
            // A ROM, which hypervisors bring along, is none of the guest's memory.
            let known = |run: &FrameRange| descriptor.memory.covers(*run);
            descriptor.prefetch = introspection.order_of(ahead).into_iter().filter(known).collect();
        }
        let avoidance = match found {
            Ok(_) if *avoid == Avoid::Off => Avoidance::Off,
            Ok(introspection) => match introspection.fill {
                Fill::Zero => {
                    descriptor.free = introspection.free.clone();
                    Avoidance::Found(Box::new(introspection))
                }
                Fill::Poison(_) => Avoidance::Poisoned(Box::new(introspection)),
            },
            Err(refusal) => Avoidance::Refused(refusal),
        };
        Ok((descriptor, image.into_index(), avoidance))
    }
}

impl fmt::Display for Avoidance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Avoidance::Off => f.write_str("not looked for"),
            Avoidance::Found(found) => {
                write!(f, "{} MiB, as Linux {} tells", found.free.count().bytes() >> 20, found.release)
            }
            Avoidance::Poisoned(found) => write!(
                f,
                "fetched all the same: Linux {} runs with page_poison, and looks for its poison in them",
                found.release
            ),
            Avoidance::Refused(refusal) => write!(f, "unknown, fetched like others: {}", Report(refusal)),
        }
    }
}
