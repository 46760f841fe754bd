//! The processors' own lists of free pages, which the buddy allocator counts as taken.
//!
//! No symbol leads to them in every kernel, so they are found by their shape: rings of pages that nobody refers to, closed by
//! one node that is no page, the head of the list. Heads that lie close together belong to one processor's `per_cpu_pages`, and
//! are believed only when the `count` before its lists equals the pages found on them.

use std::collections::{BTreeMap, BTreeSet};

use super::Refusal;
use super::kernel::Kernel;
use super::page_array::{Fields, PageStruct, Section};

/// Flags that a page on such a list has none of: those below the zone, node and section numbers.
const STATE_FLAGS: u64 = (1 << 22) - 1;

/// `_mapcount` of a page without mappings or type.
const UNMAPPED: u32 = u32::MAX;

/// Bytes of a list's head.
const LIST_HEAD: u64 = 16;

/// Lists of one processor: three migration types for each order up to three, and one or two for huge pages.
const MAX_LISTS: u64 = 14;

/// The order of the lists from here on.
const HUGE_LIST: u64 = 12;
const HUGE_ORDER: u32 = 9;

/// How far before the first list `count` is looked for, in bytes.
const MAX_DISTANCE: u64 = 64;

/// A processor whose lists hold fewer pages proves nothing: any small number stands somewhere before them.
const MIN_PAGES: u64 = 4;

/// Collects pages that may be on such a list.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    /// Frames and the next node of each, in ascending order.
    next: Vec<(u64, u64)>,
}

/// A ring: the address of its head, and its pages.
type Ring = (u64, Vec<u64>);

impl Candidates {
    /// Looks at a page that is neither in a free block nor a tail. Frames come in ascending order.
    pub(super) fn look(&mut self, frame: u64, page: PageStruct<'_>) {
        let idle = page.refcount() == 0 && page.mapcount() == UNMAPPED && page.mapping() == 0;
        if idle && page.flags() & STATE_FLAGS == 0 && super::class::is_kernel_address(page.next()) {
            self.next.push((frame, page.next()));
        }
    }

    /// The free blocks on believed lists, as first frame and number of frames.
    pub(super) fn resolve(
        &self,
        kernel: &mut Kernel<'_>,
        fields: Fields,
        sections: &[Section],
    ) -> Result<Vec<(u64, u64)>, Refusal> {
        // Pages are told from heads by their address, which takes an array that is virtually in one piece.
        let Some(base) = sections.first().map(|section| section.base) else { return Ok(Vec::new()) };
        if sections.iter().any(|section| section.base != base) {
            return Ok(Vec::new());
        }
        let clusters = clusters(self.rings(kernel, base.wrapping_add(fields.lru()), fields.size));
        let readings: Vec<(Cluster, Vec<Reading>)> = clusters
            .into_iter()
            .map(|cluster| {
                let readings = cluster.readings(kernel);
                (cluster, readings)
            })
            .collect();
        // All processors keep their count at the same place; the one that explains most of them is right.
        let mut votes = BTreeMap::<u64, u32>::new();
        for (_, readings) in &readings {
            let distances: BTreeSet<u64> = readings.iter().map(|reading| reading.distance).collect();
            distances.into_iter().for_each(|distance| *votes.entry(distance).or_default() += 1);
        }
        let Some((distance, _)) =
            votes.into_iter().max_by_key(|(distance, votes)| (*votes, std::cmp::Reverse(*distance)))
        else {
            return Ok(Vec::new());
        };
        let mut blocks = Vec::new();
        for (cluster, readings) in &readings {
            let believed = readings.iter().find(|reading| reading.distance == distance && reading.pages >= MIN_PAGES);
            let Some(reading) = believed else { continue };
            for (head, pages) in &cluster.rings {
                let count = 1u64 << order(reading.lists, *head);
                blocks.extend(pages.iter().filter(|page| page.is_multiple_of(count)).map(|page| (*page, count)));
            }
        }
        Ok(blocks)
    }

    /// The rings among the candidates, each of which stands in one at most. `first` is the list node of frame 0.
    fn rings(&self, kernel: &mut Kernel<'_>, first: u64, size: u64) -> Vec<Ring> {
        let frame_of = |node: u64| {
            let distance = node.wrapping_sub(first);
            (distance < 1 << 46 && distance.is_multiple_of(size)).then_some(distance / size)
        };
        let mut seen = vec![false; self.next.len()];
        let mut rings = Vec::new();
        for (index, (start, next)) in self.next.iter().enumerate() {
            if std::mem::replace(&mut seen[index], true) {
                continue;
            }
            let (mut pages, mut head) = (vec![*start], None);
            let mut node = *next;
            let closed = loop {
                match frame_of(node) {
                    Some(frame) if frame == *start => break true,
                    Some(frame) => {
                        let Ok(index) = self.next.binary_search_by_key(&frame, |(frame, _)| *frame) else {
                            break false;
                        };
                        if std::mem::replace(&mut seen[index], true) {
                            break false;
                        }
                        pages.push(frame);
                        node = self.next[index].1;
                    }
                    None => {
                        if head.replace(node).is_some() {
                            break false;
                        }
                        let Ok(next) = kernel.u64(node) else { break false };
                        node = next;
                    }
                }
            };
            if let Some(head) = head.filter(|_| closed) {
                rings.push((head, pages));
            }
        }
        rings
    }
}

/// Rings whose heads lie close together.
#[derive(Debug)]
struct Cluster {
    rings: Vec<Ring>,
}

/// One way to see a cluster as the lists of a processor.
#[derive(Clone, Copy, Debug)]
struct Reading {
    /// The address of the first list.
    lists: u64,
    /// How far before it `count` stands.
    distance: u64,
    /// The pages on all lists.
    pages: u64,
}

fn clusters(mut rings: Vec<Ring>) -> Vec<Cluster> {
    rings.sort();
    let mut clusters: Vec<Cluster> = Vec::new();
    for ring in rings {
        match clusters.last_mut() {
            Some(cluster) if ring.0 - cluster.rings[0].0 < MAX_LISTS * LIST_HEAD => cluster.rings.push(ring),
            _ => clusters.push(Cluster { rings: vec![ring] }),
        }
    }
    clusters
}

impl Cluster {
    /// The ways in which an `int` before the lists equals the pages on them; the first list may be an empty one.
    fn readings(&self, kernel: &mut Kernel<'_>) -> Vec<Reading> {
        let (Some((first, _)), Some((last, _))) = (self.rings.first(), self.rings.last()) else { return Vec::new() };
        let mut readings = Vec::new();
        for back in 0..MAX_LISTS {
            let lists = first.wrapping_sub(LIST_HEAD * back);
            if last.wrapping_sub(lists) >= LIST_HEAD * MAX_LISTS {
                break;
            }
            let pages = self.rings.iter().map(|(head, pages)| (pages.len() as u64) << order(lists, *head)).sum::<u64>();
            for distance in (4..MAX_DISTANCE).step_by(4) {
                if kernel.u32(lists.wrapping_sub(distance)).is_ok_and(|count| u64::from(count) == pages) {
                    readings.push(Reading { lists, distance, pages });
                }
            }
        }
        readings
    }
}

/// The order of the pages on the list at `head`, where the first list is at `lists`.
fn order(lists: u64, head: u64) -> u32 {
    let index = head.wrapping_sub(lists) / LIST_HEAD;
    if index >= HUGE_LIST { HUGE_ORDER } else { (index / 3) as u32 }
}
