//! A memory that looks like a small Linux guest's, built by hand: for tests and fuzzing of the introspection.
//!
//! The kernel maps all of it with large pages from its image's address on, without KASLR. Where things lie:
//!
//! | frames | |
//! |---|---|
//! | 16 | the VMCOREINFO note |
//! | 20–22 | page tables of three levels |
//! | 30, 31 | the section table and its one section |
//! | 32–33 | the node table and the node with its zone |
//! | 36 | a processor's lists of free pages |
//! | 40 | the name of the kernel |
//! | 256–319 | the page array |

use std::sync::Mutex;

use descriptor::image::{ImageError, ReadPages};
use descriptor::introspect::{Bank, Introspection, Physical, Refusal, introspect, is_note};
use descriptor::memory::{MemoryMap, PageSize, Region, RegionKind};
use descriptor::{FrameRange, Gfn, PAGE_SIZE, PageCount};

/// Frames of the memory: 16 MiB.
pub const FRAMES: u64 = 4096;

/// Where the kernel maps frame 0.
pub const MAP: u64 = 0xffff_ffff_8000_0000;

/// The frame of the note.
pub const NOTE: u64 = 16;

/// The address in the memory of the zone's count of free blocks of order 0.
pub const COUNTS: u64 = 33 * PAGE_SIZE + 256 + 64 + 32;

/// The address of the page array, and the bytes of one page's struct.
pub const PAGES: u64 = 256 * PAGE_SIZE;
/// The bytes of one page's struct.
pub const PAGE_STRUCT: u64 = 64;

const ORDERS: u64 = 11;
const AREA: u64 = 40;
const BUDDY: u32 = 0xffff_ff7f;
const RELEASE: &str = "6.1.0-synthetic";

/// The memory, whose bytes anyone may change.
pub struct LinuxMemory {
    /// All of it.
    pub bytes: Vec<u8>,
    map: MemoryMap,
    reads: Mutex<u64>,
}

impl LinuxMemory {
    /// A memory in which all is used, save the `free` blocks, each a frame and an order, and the pages on a processor's list.
    pub fn new(free: &[(u64, u32)], per_cpu: &[u64]) -> Self {
        let region = Region {
            name: "ram".to_owned(),
            frames: FrameRange::new(Gfn::new(0), PageCount::new(FRAMES)),
            kind: RegionKind::Ram,
            page_size: PageSize::Base,
        };
        let map = MemoryMap::new(vec![region]).expect("one region is a map");
        let mut memory = Self { bytes: vec![0; (FRAMES * PAGE_SIZE) as usize], map, reads: Mutex::new(0) };
        memory.put_note(NOTE, &note());
        memory.put_page_tables();
        memory.put_u64(30 * PAGE_SIZE, MAP + 31 * PAGE_SIZE);
        memory.put_u64(31 * PAGE_SIZE, (MAP + PAGES) | 7);
        memory.put_u64(32 * PAGE_SIZE, MAP + 33 * PAGE_SIZE);
        memory.put_u32(33 * PAGE_SIZE, 1);
        memory.put_u64(33 * PAGE_SIZE + 256, FRAMES);
        memory.put(40 * PAGE_SIZE + 130, RELEASE.as_bytes());
        for frame in 0..FRAMES {
            memory.put_u32(page(frame) + 48, u32::MAX);
            memory.put_u32(page(frame) + 52, 1);
        }
        for (frame, order) in free {
            memory.put_u32(page(*frame) + 48, BUDDY);
            memory.put_u64(page(*frame) + 40, u64::from(*order));
            (*frame..frame + (1 << order)).for_each(|frame| memory.put_u32(page(frame) + 52, 0));
            let count = COUNTS + u64::from(*order) * AREA;
            let counted = u64::from_le_bytes(memory.bytes[count as usize..][..8].try_into().expect("eight bytes"));
            memory.put_u64(count, counted + 1);
        }
        memory.put_list(per_cpu);
        memory
    }

    /// Where the struct of `frame` lies.
    pub fn page(frame: u64) -> u64 {
        page(frame)
    }

    /// Puts `bytes` at an address.
    pub fn put(&mut self, address: u64, bytes: &[u8]) {
        self.bytes[address as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Puts a number of four bytes at an address.
    pub fn put_u32(&mut self, address: u64, value: u32) {
        self.put(address, &value.to_le_bytes());
    }

    /// Puts a number of eight bytes at an address.
    pub fn put_u64(&mut self, address: u64, value: u64) {
        self.put(address, &value.to_le_bytes());
    }

    /// Puts a note of `text` into `frame`.
    pub fn put_note(&mut self, frame: u64, text: &str) {
        let mut header = [11, text.len() as u32, 0].map(u32::to_le_bytes).concat();
        header.extend_from_slice(b"VMCOREINFO\0\0");
        self.put(frame * PAGE_SIZE, &header);
        self.put(frame * PAGE_SIZE + 24, text.as_bytes());
    }

    /// Analyses it, as if it were all of a guest's memory.
    ///
    /// # Errors
    /// Why it is not believed.
    ///
    /// # Panics
    /// When the analysis reads far more than there is.
    pub fn introspect(&self) -> Result<Introspection, Refusal> {
        self.introspect_by(None)
    }

    /// The same where vCPUs use these page tables.
    ///
    /// # Errors
    /// As [`LinuxMemory::introspect`].
    pub fn introspect_by(&self, page_tables: Option<&[u64]>) -> Result<Introspection, Refusal> {
        let frames = self.map.regions()[0].frames;
        let notes = self.bytes.chunks_exact(PAGE_SIZE as usize).zip(0..).filter(|(page, _)| is_note(page));
        let notes: Vec<Gfn> = notes.map(|(_, frame)| Gfn::new(frame)).collect();
        let physical = Physical::new(self, vec![Bank { physical: 0, frames }]);
        let result = introspect(&physical.with_page_tables(page_tables.map(<[u64]>::to_vec)), &notes);
        let reads = *self.reads.lock().expect("nobody panics with the lock");
        assert!(reads <= (notes.len() as u64 + 1) * 16 * FRAMES, "{reads} pages read of {FRAMES}");
        result
    }

    fn put_page_tables(&mut self) {
        const TABLE: u64 = 3;
        const LARGE: u64 = 0x83;
        self.put_u64(20 * PAGE_SIZE + 511 * 8, (21 * PAGE_SIZE) | TABLE);
        self.put_u64(21 * PAGE_SIZE + 510 * 8, (22 * PAGE_SIZE) | TABLE);
        for index in 0..FRAMES / 512 {
            self.put_u64(22 * PAGE_SIZE + index * 8, (index * 512 * PAGE_SIZE) | LARGE);
        }
    }

    /// Threads pages on the first list of a processor, whose count stands 20 bytes before.
    fn put_list(&mut self, pages: &[u64]) {
        let head = 36 * PAGE_SIZE + 64;
        self.put_u32(head - 20, pages.len() as u32);
        let mut previous = head;
        for frame in pages {
            self.put_u32(page(*frame) + 52, 0);
            self.put_u64(previous, MAP + page(*frame) + 8);
            previous = page(*frame) + 8;
        }
        self.put_u64(previous, MAP + head);
    }
}

impl ReadPages for LinuxMemory {
    fn memory(&self) -> &MemoryMap {
        &self.map
    }

    fn read_pages(&self, frames: FrameRange, buffer: &mut [u8]) -> Result<(), ImageError> {
        if !self.map.covers(frames) {
            return Err(ImageError::Absent(frames));
        }
        *self.reads.lock().expect("nobody panics with the lock") += frames.count().get();
        buffer.copy_from_slice(&self.bytes[frames.start().address() as usize..frames.end().address() as usize]);
        Ok(())
    }
}

/// Changes a memory by the recipe in `bytes`, an address and a value again and again, and analyses it: no panic, no endless walk,
/// and no frame that the guest uses is called free while the count of a zone says otherwise.
pub fn edited(bytes: &[u8]) {
    let mut memory = LinuxMemory::new(&[(1024, 10), (512, 3), (600, 0)], &[700, 701, 705, 710, 711]);
    for edit in bytes.chunks_exact(6) {
        let address = u32::from_le_bytes([edit[0], edit[1], edit[2], 0]);
        memory.bytes[address as usize % (FRAMES * PAGE_SIZE) as usize] = edit[3];
        // Near it, where tables are dense.
        memory.bytes[(address as usize + usize::from(edit[4])) % (FRAMES * PAGE_SIZE) as usize] ^= edit[5];
    }
    if let Ok(introspection) = memory.introspect() {
        assert!(introspection.free.count() <= PageCount::new(FRAMES));
    }
}

fn page(frame: u64) -> u64 {
    PAGES + frame * PAGE_STRUCT
}

fn note() -> String {
    let symbol = |frame: u64| format!("{:x}", MAP + frame * PAGE_SIZE);
    [
        format!("OSRELEASE={RELEASE}"),
        "PAGESIZE=4096".to_owned(),
        format!("SYMBOL(init_uts_ns)={}", symbol(40)),
        "OFFSET(uts_namespace.name)=0".to_owned(),
        format!("SYMBOL(_stext)={}", symbol(2048)),
        format!("SYMBOL(init_top_pgt)={}", symbol(20)),
        format!("SYMBOL(mem_section)={}", symbol(30)),
        format!("SYMBOL(node_data)={}", symbol(32)),
        "NUMBER(phys_base)=0".to_owned(),
        "NUMBER(pgtable_l5_enabled)=0".to_owned(),
        "NUMBER(SECTION_SIZE_BITS)=27".to_owned(),
        "NUMBER(KERNEL_IMAGE_SIZE)=2097152".to_owned(),
        "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)=-129".to_owned(),
        "NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)=-257".to_owned(),
        "NUMBER(PG_lru)=4".to_owned(),
        "NUMBER(PG_slab)=9".to_owned(),
        "NUMBER(PG_swapbacked)=19".to_owned(),
        "SIZE(mem_section)=16".to_owned(),
        "OFFSET(mem_section.section_mem_map)=0".to_owned(),
        format!("SIZE(page)={PAGE_STRUCT}"),
        "OFFSET(page.flags)=0".to_owned(),
        "OFFSET(page.lru)=8".to_owned(),
        "OFFSET(page.compound_head)=8".to_owned(),
        "OFFSET(page.mapping)=24".to_owned(),
        "OFFSET(page.private)=40".to_owned(),
        "OFFSET(page._mapcount)=48".to_owned(),
        "OFFSET(page._refcount)=52".to_owned(),
        "LENGTH(node_data)=4".to_owned(),
        "OFFSET(pglist_data.nr_zones)=0".to_owned(),
        "OFFSET(pglist_data.node_zones)=256".to_owned(),
        "SIZE(zone)=2048".to_owned(),
        "OFFSET(zone.spanned_pages)=0".to_owned(),
        "OFFSET(zone.free_area)=64".to_owned(),
        format!("LENGTH(zone.free_area)={ORDERS}"),
        format!("SIZE(free_area)={AREA}"),
        "OFFSET(free_area.free_list)=0".to_owned(),
        "LENGTH(free_area.free_list)=2".to_owned(),
        "SIZE(list_head)=16".to_owned(),
        String::new(),
    ]
    .join("\n")
}

#[cfg(test)]
mod tests {
    use descriptor::introspect::{Class, Fill};
    use proptest::prelude::*;

    use super::*;

    const FREE: [(u64, u32); 4] = [(1024, 10), (512, 3), (600, 0), (602, 1)];

    fn memory() -> LinuxMemory {
        LinuxMemory::new(&FREE, &[700, 701, 705, 710, 711])
    }

    fn refused(change: impl FnOnce(&mut LinuxMemory)) -> Refusal {
        let mut memory = memory();
        change(&mut memory);
        memory.introspect().expect_err("it must not be believed")
    }

    #[test]
    fn free_frames_are_found() {
        let found = memory().introspect().unwrap();
        let runs: Vec<(u64, u64)> = found.free.runs().map(|run| (run.start().index(), run.count().get())).collect();
        assert_eq!(runs, [(512, 8), (600, 1), (602, 2), (700, 2), (705, 1), (710, 2), (1024, 1024)]);
        assert_eq!((found.release.as_str(), found.fill), (RELEASE, Fill::Zero));
        let counts = found.counts();
        assert_eq!(counts[Class::PerCpuFree as usize], PageCount::new(5));
        assert_eq!(counts[Class::PageArray as usize], PageCount::new(64));
        assert_eq!(counts[Class::KernelImage as usize], PageCount::new(512));
        assert_eq!(counts.into_iter().sum::<PageCount>(), PageCount::new(FRAMES));
    }

    #[test]
    fn classes_make_an_order() {
        let found = memory().introspect().unwrap();
        let order = found.order_of(&[Class::PageArray, Class::KernelImage]);
        let runs: Vec<(u64, u64)> = order.iter().map(|run| (run.start().index(), run.count().get())).collect();
        let of_class = |class: Class| found.counts()[class as usize].get();
        let first: u64 = runs
            .iter()
            .scan(0, |sum, (_, count)| {
                *sum += count;
                Some(*sum)
            })
            .find(|sum| *sum >= of_class(Class::PageArray))
            .unwrap();
        assert_eq!(first, of_class(Class::PageArray), "one class is through before the next begins: {runs:?}");
        assert_eq!(runs.iter().map(|(_, count)| count).sum::<u64>(), first + of_class(Class::KernelImage));
        assert_eq!(found.order_of(&Class::ALL).iter().map(|run| run.count().get()).sum::<u64>(), FRAMES);
        assert!(found.order_of(&[]).is_empty());
    }

    #[test]
    fn pages_have_classes() {
        let mut memory = memory();
        let kernel_pointer = 0xffff_8880_0000_1000;
        memory.put_u64(page(800) + 24, kernel_pointer | 1);
        memory.put_u64(page(801) + 24, kernel_pointer);
        memory.put_u64(page(801), 1 << 4);
        memory.put_u64(page(802) + 24, kernel_pointer);
        memory.put_u64(page(802), 1 << 4 | 1 << 19);
        memory.put_u64(page(803), 1 << 9);
        memory.put_u32(page(804) + 48, !0x200);
        memory.put_u32(page(805) + 48, -257_i32 as u32);
        // The tail of 800.
        memory.put_u64(page(806) + 8, (MAP + page(800)) | 1);
        let found = memory.introspect().unwrap();
        let classes = found.classes().next().unwrap().1;
        let expected = [
            Class::Anonymous,
            Class::File,
            Class::Shmem,
            Class::Slab,
            Class::PageTable,
            Class::Offline,
            Class::Anonymous,
        ];
        assert_eq!(classes[800..807], expected);
        assert!(found.free.contains(Gfn::new(805)), "what a balloon took need not be fetched");
    }

    #[test]
    fn a_list_whose_count_differs_is_not_believed() {
        let mut memory = memory();
        memory.put_u32(36 * PAGE_SIZE + 64 - 20, 4);
        let found = memory.introspect().unwrap();
        assert!(!found.free.contains(Gfn::new(700)) && found.free.contains(Gfn::new(600)));
    }

    #[test]
    fn poison_is_told_where_all_free_pages_hold_it() {
        let mut memory = LinuxMemory::new(&[(512, 3)], &[]);
        memory.put(512 * PAGE_SIZE, &vec![0xaa; 8 * PAGE_SIZE as usize]);
        assert_eq!(memory.introspect().unwrap().fill, Fill::Poison(0xaa));
        memory.put(515 * PAGE_SIZE, &[0]);
        assert_eq!(memory.introspect().unwrap().fill, Fill::Zero);
    }

    #[test]
    fn whatever_disagrees_refuses_the_whole() {
        assert!(matches!(refused(|memory| memory.put(NOTE * PAGE_SIZE, &[0; 64])), Refusal::NoNote));
        assert!(matches!(refused(|memory| memory.put(40 * PAGE_SIZE + 130, b"5.10")), Refusal::Release { .. }));
        assert!(matches!(refused(|memory| memory.put_u64(20 * PAGE_SIZE + 511 * 8, 0)), Refusal::Unmapped(_)));
        assert!(matches!(
            refused(|memory| memory.put_u64(COUNTS, 9)),
            Refusal::Counters { order: 0, counted: 9, found: 1 }
        ));
        assert!(matches!(
            refused(|memory| memory.put_u64(page(600) + 40, 11)),
            Refusal::Order { frame: 600, order: 11 }
        ));
        assert!(matches!(
            refused(|memory| memory.put_u64(page(600) + 40, 4)),
            Refusal::Misaligned { frame: 600, order: 4 }
        ));
        assert!(matches!(refused(|memory| memory.put_u32(page(514) + 48, BUDDY)), Refusal::Overlap(514)));
        assert!(matches!(refused(|memory| memory.put_u32(page(1500) + 52, 1)), Refusal::InUse(1500)));
        let lacking = note().replace("SIZE(zone)", "SIZE(zoo)");
        assert!(
            matches!(refused(|memory| memory.put_note(NOTE, &lacking)), Refusal::MissingKey(key) if key == "SIZE(zone)")
        );
        let large = note().replace("PAGESIZE=4096", "PAGESIZE=65536");
        assert!(matches!(refused(|memory| memory.put_note(NOTE, &large)), Refusal::PageSize(_)));
    }

    #[test]
    fn a_copy_of_the_note_does_no_harm_and_another_kernel_does() {
        let mut memory = memory();
        memory.put_note(50, &note());
        memory.put_note(51, &note().replace(RELEASE, "5.4.0-stale"));
        assert!(memory.introspect().is_ok(), "a stale note is not true of the memory");
        memory.put_note(52, &format!("{}FORGED=1\n", note()));
        assert!(matches!(memory.introspect(), Err(Refusal::Conflict(2))));
    }

    #[test]
    fn a_kernel_that_no_vcpu_runs_is_not_believed() {
        let memory = memory();
        let runs = |tables: &[u64]| match memory.introspect_by(Some(tables)) {
            Ok(_) => true,
            Err(Refusal::NotRunning(release)) if release == RELEASE => false,
            Err(other) => panic!("{other}"),
        };
        assert!(runs(&[20 * PAGE_SIZE]));
        assert!(runs(&[0x9000, (20 * PAGE_SIZE) | 0xfff]), "one vCPU suffices; the low bits say other things");
        assert!(runs(&[21 * PAGE_SIZE]), "on the second page, of a process that is isolated from the kernel");
        for tables in [&[][..], &[0], &[30 * PAGE_SIZE], &[22 * PAGE_SIZE], &[u64::MAX], &[1 << 40]] {
            assert!(!runs(tables), "{tables:x?}");
        }
    }

    #[test]
    fn rings_without_end_do_no_harm() {
        let mut memory = memory();
        // 705 leads back into the middle; 800 to itself.
        memory.put_u64(page(705) + 8, MAP + page(701) + 8);
        memory.put_u32(page(800) + 52, 0);
        memory.put_u64(page(800) + 8, MAP + page(800) + 8);
        let found = memory.introspect().unwrap();
        assert!(!found.free.contains(Gfn::new(701)) && !found.free.contains(Gfn::new(800)));
    }

    proptest! {
        #[test]
        fn any_edit_is_borne(edits in proptest::collection::vec(any::<u8>(), 0..120)) {
            edited(&edits);
        }
    }
}
