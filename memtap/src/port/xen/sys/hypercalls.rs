use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::Errno;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::abi::*;
use super::mapping::Mapping;

/// Frames in one [`Hypercalls::reservation`], and twice as many calls in one [`Hypercalls::paging`]: those of 2 MiB, each
/// nominated and evicted.
const FRAMES: usize = 512;

/// Calls in one [`Hypercalls::paging`].
const CALLS: usize = 2 * FRAMES;

/// Pages that one [`Hypercalls::paging`] can bring: enough for the cost of the call to count no more, and few enough that
/// those who wait do not wait long.
pub(in super::super) const PREP_PAGES: usize = 64;

const PAGE: usize = 4096;

/// Where things lie in the buffer.
const ARGUMENT: usize = 0;
const EXTENTS: usize = ARGUMENT + PAGE;
const ENTRIES: usize = EXTENTS + FRAMES * size_of::<u64>();
const OPERATIONS: usize = ENTRIES + CALLS * size_of::<MulticallEntry>();
const PAGES: usize = OPERATIONS + CALLS * size_of::<PagingOp>();
const LENGTH: usize = PAGES + PREP_PAGES * PAGE;

/// As much of it as single calls take.
const SMALL: usize = ENTRIES;

const _: () = assert!(PAGES.is_multiple_of(PAGE) && size_of::<Domctl>() <= PAGE);

/// One operation on a paged-out or present frame.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct PagingCall {
    /// What to do, a `PAGING_…`.
    pub(in super::super) operation: u8,
    /// The frame.
    pub(in super::super) gfn: u64,
    /// Which of [`Hypercalls::pages`] it gets; none where the operation takes none.
    pub(in super::super) page: Option<usize>,
}

/// The way to the hypervisor, and the memory in which it finds arguments: it reads the caller's page tables and takes no
/// fault, so a page that the kernel may move or write out makes calls fail.
#[derive(Debug)]
pub(in super::super) struct Hypercalls {
    privcmd: File,
    buffer: Mapping,
}

impl Hypercalls {
    /// With `batches`, also for [`Hypercalls::paging`], which takes some hundred KiB that stay in memory.
    pub(in super::super) fn open(batches: bool) -> io::Result<Self> {
        let length = if batches { LENGTH } else { SMALL };
        let privcmd = File::options().read(true).write(true).open("/dev/xen/privcmd")?;
        // Linux 4.18 gives memory that is meant for this; before, locked memory is the best there is.
        let buffer = match File::options().read(true).write(true).open("/dev/xen/hypercall") {
            Ok(device) => Mapping::of_device(device.as_fd(), length)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Mapping::locked(length)?,
            Err(error) => return Err(error),
        };
        Ok(Self { privcmd, buffer })
    }

    /// The device that guest pages are mapped by.
    pub(in super::super) fn device(&self) -> BorrowedFd<'_> {
        self.privcmd.as_fd()
    }

    /// `command`, which must be one whose argument has no pointer; its answer is in it.
    pub(in super::super) fn domctl(&mut self, command: &mut Domctl) -> io::Result<()> {
        let plain = [DOMCTL_DESTROY, DOMCTL_PAUSE, DOMCTL_UNPAUSE, DOMCTL_INFO, DOMCTL_VM_EVENT];
        assert!(plain.contains(&command.command), "domctl {} is not known to have no pointer", command.command);
        self.put(ARGUMENT, command);
        // SAFETY: Xen reads and writes the structure in the buffer, and these commands point to nothing else.
        let result = unsafe { self.call(HYPERCALL_DOMCTL, [self.address(ARGUMENT), 0]) };
        *command = self.take(ARGUMENT);
        result.map(drop)
    }

    /// The HVM parameter `index` of `domain`.
    pub(in super::super) fn hvm_param(&mut self, domain: u16, index: u32) -> io::Result<u64> {
        self.put(ARGUMENT, &HvmParam { domain, padding: 0, index, value: 0 });
        // SAFETY: Xen reads and writes the structure in the buffer, which has no pointer.
        unsafe { self.call(HYPERCALL_HVM_OP, [HVMOP_GET_PARAM, self.address(ARGUMENT)]) }?;
        Ok(self.take::<HvmParam>(ARGUMENT).value)
    }

    /// Gives `domain` memory of its own at `frames`, each the first of 2^`order` frames; returns at how many of them.
    pub(in super::super) fn populate(&mut self, domain: u16, order: u32, frames: &[u64]) -> io::Result<usize> {
        self.reservation(XENMEM_POPULATE_PHYSMAP, domain, order, frames)
    }

    /// Takes the memory at `frames` away from `domain`; returns at how many of them.
    pub(in super::super) fn remove(&mut self, domain: u16, frames: &[u64]) -> io::Result<usize> {
        self.reservation(XENMEM_DECREASE_RESERVATION, domain, 0, frames)
    }

    /// At most [`FRAMES`] frames.
    fn reservation(&mut self, command: u64, domain: u16, order: u32, frames: &[u64]) -> io::Result<usize> {
        let extents = frames.len();
        assert!(extents <= FRAMES, "{extents} extents at once");
        self.area(EXTENTS..EXTENTS + 8 * extents).copy_from_slice(frames.as_bytes());
        let extent_start = self.address(EXTENTS);
        let argument = Reservation {
            extent_start,
            extents: extents as u64,
            extent_order: order,
            flags: 0,
            domain,
            padding: [0; 3],
        };
        self.put(ARGUMENT, &argument);
        // SAFETY: Xen reads the structure in the buffer, and reads and writes as many frame numbers as it says at the extents,
        // which lie in the buffer too.
        let done = unsafe { self.call(HYPERCALL_MEMORY_OP, [command, self.address(ARGUMENT)]) }?;
        Ok(done)
    }

    /// What [`PagingCall::page`] means: to be filled before [`Hypercalls::paging`]; none without batches.
    pub(in super::super) fn pages(&mut self) -> &mut [u8] {
        let length = self.buffer.length();
        self.area(PAGES.min(length)..length)
    }

    /// Does all of `calls`, at most twice as many as 2 MiB have frames, in one hypercall, also behind one that fails; puts what
    /// became of each into `results`.
    pub(in super::super) fn paging(
        &mut self,
        domain: u16,
        calls: &[PagingCall],
        results: &mut Vec<Result<(), Errno>>,
    ) -> io::Result<()> {
        if self.buffer.length() < LENGTH {
            return Err(io::ErrorKind::Unsupported.into());
        }
        assert!(calls.len() <= CALLS, "{} calls at once", calls.len());
        results.clear();
        for (index, call) in calls.iter().enumerate() {
            let PagingCall { operation, gfn, page } = *call;
            assert!(page.is_none_or(|page| page < PREP_PAGES), "page {page:?} of {PREP_PAGES}");
            let buffer = page.map_or(0, |page| self.address(PAGES + page * PAGE));
            let argument = PagingOp { operation, padding: 0, domain, padding2: 0, buffer, gfn };
            self.put(OPERATIONS + index * size_of::<PagingOp>(), &argument);
        }
        if let [_] = calls {
            // SAFETY: Xen reads and writes the structure in the buffer, and reads a page at the address in it, which lies in the
            // buffer too, or is none.
            let result = unsafe { self.call(HYPERCALL_MEMORY_OP, [XENMEM_PAGING_OP, self.address(OPERATIONS)]) };
            results.push(match result {
                Ok(_) => Ok(()),
                Err(error) => Err(Errno::from_io_error(&error).ok_or(error)?),
            });
            return Ok(());
        }
        for index in 0..calls.len() {
            let operation = self.address(OPERATIONS + index * size_of::<PagingOp>());
            let arguments = [XENMEM_PAGING_OP, operation, 0, 0, 0, 0];
            let entry = MulticallEntry { operation: HYPERCALL_MEMORY_OP, result: 0, arguments };
            self.put(ENTRIES + index * size_of::<MulticallEntry>(), &entry);
        }
        // SAFETY: Xen reads and writes as many entries as there are calls, all in the buffer. Each points to a structure in the
        // buffer of which the same holds as above.
        unsafe { self.call(HYPERCALL_MULTICALL, [self.address(ENTRIES), calls.len() as u64]) }?;
        results.extend((0..calls.len()).map(|index| {
            let entry: MulticallEntry = self.take(ENTRIES + index * size_of::<MulticallEntry>());
            match i32::try_from(entry.result) {
                Ok(0..) => Ok(()),
                Ok(error) => Err(Errno::from_raw_os_error(error.saturating_neg())),
                Err(_) => Err(Errno::IO),
            }
        }));
        Ok(())
    }

    /// Issues a hypercall; what it returns is a small number or an error.
    ///
    /// # Safety
    /// Whatever memory the hypervisor reads or writes for these arguments must lie in the buffer.
    unsafe fn call(&self, operation: u64, [first, second]: [u64; 2]) -> io::Result<usize> {
        let argument = PrivcmdHypercall { operation, arguments: [first, second, 0, 0, 0] };
        // SAFETY: the request takes a pointer to this structure; what the hypercall does to memory is the caller's promise.
        let result = unsafe { libc::ioctl(self.privcmd.as_raw_fd(), IOC_PRIVCMD_HYPERCALL, &raw const argument) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    fn address(&self, offset: usize) -> u64 {
        (self.buffer.start().as_ptr().addr() + offset) as u64
    }

    fn put<T: IntoBytes + zerocopy::Immutable>(&mut self, offset: usize, value: &T) {
        self.area(offset..offset + size_of::<T>()).copy_from_slice(value.as_bytes());
    }

    fn take<T: FromBytes + FromZeros>(&self, offset: usize) -> T {
        let mut value = T::new_zeroed();
        let length = size_of::<T>();
        assert!(offset + length <= self.buffer.length());
        // SAFETY: the bytes lie in the buffer, as was just checked, and any bytes make a `T`. Nobody writes to the buffer between
        // two calls. The kernel's buffer device may lack what a shared reference needs, so the bytes are copied.
        unsafe {
            std::ptr::copy_nonoverlapping(self.buffer.start().as_ptr().add(offset), (&raw mut value).cast(), length);
        }
        value
    }

    fn area(&mut self, range: Range<usize>) -> &mut [u8] {
        assert!(range.start <= range.end && range.end <= self.buffer.length());
        // SAFETY: the range lies in the buffer, as was just checked, which is mapped for as long as `self` lives. Xen touches it in
        // calls alone, and these need `self`, of which the slice borrows all.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.start().as_ptr().add(range.start), range.len()) }
    }
}
