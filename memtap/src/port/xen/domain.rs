use std::io;

use descriptor::{Gfn, PageCount};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::error::XenError;
use super::sys::abi::*;
use super::sys::{ForeignPage, Hypercalls, PagingCall};

/// Versions of the control interface that are tried: Xen 4.17 has 0x15, 4.18 0x16, 4.19 to 4.21 0x17, and the one after 0x18. What
/// is used here was the same in all of them.
const INTERFACE_VERSIONS: std::ops::RangeInclusive<u32> = 0x15..=0x1f;

/// The newest version of which that is known. Later ones are likely to be the same in what is used here: it was for many years.
const KNOWN_VERSION: u32 = 0x18;

/// One domain, and the way to its hypervisor.
#[derive(Debug)]
pub struct Domain {
    calls: Hypercalls,
    version: u32,
    id: u16,
    handle: [u8; 16],
}

/// How things are with a domain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Info {
    pub(super) flags: u32,
    /// Pages that it has.
    pub(super) pages: PageCount,
    /// Pages that are paged out.
    pub(super) paged: PageCount,
    pub(super) vcpus: u32,
    /// It has executed something.
    pub(super) has_run: bool,
}

impl Info {
    pub(super) fn is(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

/// What a frame is to its pager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FrameState {
    PagedOut,
    /// There, or not even a hole that is to be filled.
    Other,
}

impl Domain {
    /// Opens the way to Xen and finds the domain.
    ///
    /// # Errors
    /// When this is no control domain, or there is no such domain.
    pub fn open(id: u16) -> Result<Self, XenError> {
        Self::open_for(id, true)
    }

    /// With `batches`, to page memory in and out by.
    fn open_for(id: u16, batches: bool) -> Result<Self, XenError> {
        let mut calls =
            Hypercalls::open(batches).map_err(|source| device_error("/dev/xen/privcmd", "xen-privcmd", source))?;
        for version in INTERFACE_VERSIONS {
            match info(&mut calls, version, id) {
                Ok(info) if info.domain != id => return Err(XenError::NoDomain(id.to_string())),
                Ok(info) => {
                    if version > KNOWN_VERSION && batches {
                        tracing::warn!(version, "this Xen's control interface is newer than memtap knows it");
                    }
                    return Ok(Self { calls, version, id, handle: info.handle });
                }
                Err(error) => match error.raw_os_error() {
                    // Xen's answer to another version.
                    Some(libc::EACCES) => {}
                    Some(libc::EPERM | libc::ENOSYS) => return Err(XenError::NotPrivileged(error)),
                    Some(libc::ESRCH | libc::EINVAL) => return Err(XenError::NoDomain(id.to_string())),
                    _ => {
                        return Err(XenError::Call {
                            operation: "XEN_DOMCTL_getdomaininfo",
                            domain: id,
                            source: error,
                        });
                    }
                },
            }
        }
        let (first, last) = INTERFACE_VERSIONS.into_inner();
        Err(XenError::InterfaceVersion { first, last })
    }

    /// The same domain by another way, for another thread; for its life, not for its memory.
    ///
    /// # Errors
    /// As [`Domain::open`]; also when it has ended, and its number is another's.
    pub fn reopen(&self) -> Result<Self, XenError> {
        let other = Self::open_for(self.id, false)?;
        if other.handle == self.handle { Ok(other) } else { Err(XenError::Gone { domain: self.id }) }
    }

    /// Its number.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Its UUID.
    pub fn handle(&self) -> [u8; 16] {
        self.handle
    }

    /// How things are, or `None` when the domain is gone or about to go. A domain that is about to go is kept by the pages of
    /// it that are mapped, so it counts as gone.
    pub(super) fn info(&mut self) -> Result<Option<Info>, XenError> {
        match info(&mut self.calls, self.version, self.id) {
            Ok(raw) if raw.domain != self.id || raw.handle != self.handle || raw.flags & FLAG_DYING != 0 => Ok(None),
            Ok(raw) => Ok(Some(Info {
                flags: raw.flags,
                pages: PageCount::new(raw.total_pages),
                paged: PageCount::new(raw.paged_pages),
                // All ones means none.
                vcpus: raw.max_vcpu_id.wrapping_add(1),
                has_run: raw.cpu_time_ns > 0,
            })),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => Ok(None),
            Err(source) => Err(self.failed("XEN_DOMCTL_getdomaininfo", source)),
        }
    }

    /// True when the domain is gone or about to go; false also when that cannot be told.
    pub fn is_gone(&mut self) -> bool {
        matches!(self.info(), Ok(None))
    }

    /// True when someone paused it.
    pub fn is_paused(&mut self) -> bool {
        matches!(self.info(), Ok(Some(info)) if info.is(FLAG_PAUSED))
    }

    /// Stops it.
    ///
    /// # Errors
    /// When it is gone.
    pub fn pause(&mut self) -> Result<(), XenError> {
        self.domctl("XEN_DOMCTL_pausedomain", DOMCTL_PAUSE)
    }

    /// Takes back one pause.
    ///
    /// # Errors
    /// When it is gone, or was not paused.
    pub fn unpause(&mut self) -> Result<(), XenError> {
        self.domctl("XEN_DOMCTL_unpausedomain", DOMCTL_UNPAUSE)
    }

    /// Ends it. The toolstack, which watches for that, cleans up behind it.
    ///
    /// # Errors
    /// When it is gone.
    pub fn destroy(&mut self) -> Result<(), XenError> {
        self.domctl("XEN_DOMCTL_destroydomain", DOMCTL_DESTROY)
    }

    /// Enables the paging ring in the page at the ring's frame; returns the event channel's port.
    pub(super) fn enable_paging(&mut self) -> Result<u32, XenError> {
        let domain = self.id;
        self.vm_event(VM_EVENT_ENABLE).map_err(|source| match source.raw_os_error() {
            Some(libc::ENOSYS) => XenError::NoPaging,
            Some(libc::EOPNOTSUPP) => XenError::ControlDomainPvh,
            Some(libc::ENODEV) => XenError::NoHap { domain },
            Some(libc::EMLINK) => XenError::Iommu { domain },
            Some(libc::EXDEV) => XenError::PopulateOnDemand { domain },
            Some(libc::EBUSY) => XenError::Attached { domain },
            _ => self.failed("XEN_VM_EVENT_ENABLE", source),
        })
    }

    /// Disables the paging ring.
    pub(super) fn disable_paging(&mut self) -> Result<(), XenError> {
        let domain = self.id;
        self.vm_event(VM_EVENT_DISABLE).map(drop).map_err(|source| match source.raw_os_error() {
            Some(libc::ENOSYS) => XenError::NoPaging,
            Some(libc::EBUSY) => XenError::Queued { domain },
            Some(libc::EINVAL) => XenError::NoPager { domain },
            _ => self.failed("XEN_VM_EVENT_DISABLE", source),
        })
    }

    /// The frame that the toolstack reserved for the paging ring.
    pub(super) fn ring_frame(&mut self) -> Result<u64, XenError> {
        match self.calls.hvm_param(self.id, PARAM_PAGING_RING) {
            Ok(0) => Err(XenError::NoRing { domain: self.id }),
            Ok(frame) => Ok(frame),
            Err(source) => Err(self.failed("HVMOP_get_param", source)),
        }
    }

    /// Maps a page of the guest, if it has one there.
    pub(super) fn map(&mut self, frame: u64) -> Result<Option<ForeignPage>, XenError> {
        ForeignPage::map(self.calls.device(), self.id, frame).map_err(|source| self.failed("mapping a page", source))
    }

    /// Gives it memory at `frames`, each the first of 2^`order`; tells at how many of them.
    pub(super) fn populate(&mut self, order: u32, frames: &[u64]) -> Result<usize, XenError> {
        let done = self.calls.populate(self.id, order, frames);
        done.map_err(|source| self.failed("XENMEM_populate_physmap", source))
    }

    /// Takes its memory at `frame` away.
    pub(super) fn remove(&mut self, frame: u64) -> Result<(), XenError> {
        match self.calls.remove(self.id, &[frame]) {
            Ok(1) => Ok(()),
            Ok(_) => Err(self.failed("XENMEM_decrease_reservation", io::Error::other("the frame was not there"))),
            Err(source) => Err(self.failed("XENMEM_decrease_reservation", source)),
        }
    }

    /// Nominates and evicts `frames`, at most 2 MiB of them, and puts into `results` how that went for each.
    pub(super) fn evict(&mut self, frames: &[u64], results: &mut Vec<Result<(), Errno>>) -> Result<(), XenError> {
        let call = |operation| move |gfn: &u64| PagingCall { operation, gfn: *gfn, page: None };
        let calls: Vec<PagingCall> =
            frames.iter().flat_map(|gfn| [call(PAGING_NOMINATE)(gfn), call(PAGING_EVICT)(gfn)]).collect();
        self.paging(&calls, results)?;
        let (pairs, _) = results.as_chunks::<2>();
        // A frame that was nominated before cannot be once more, but it can be evicted.
        *results = pairs.iter().map(|[nominated, evicted]| evicted.or(nominated.and(*evicted))).collect();
        Ok(())
    }

    /// Gives paged-out frames from `start` on their contents, whole `pages`, at most [`PREP_PAGES`](super::sys::PREP_PAGES),
    /// and puts into `results` how that went for each: ENOENT where a frame is not paged out.
    pub(super) fn fill(
        &mut self,
        start: Gfn,
        pages: &[u8],
        results: &mut Vec<Result<(), Errno>>,
    ) -> Result<(), XenError> {
        self.calls.pages()[..pages.len()].copy_from_slice(pages);
        self.fill_staged(start, pages.len() / descriptor::PAGE_SIZE as usize, results)
    }

    /// The same with zeros.
    pub(super) fn fill_zeros(
        &mut self,
        start: Gfn,
        count: usize,
        results: &mut Vec<Result<(), Errno>>,
    ) -> Result<(), XenError> {
        self.calls.pages()[..count * descriptor::PAGE_SIZE as usize].fill(0);
        self.fill_staged(start, count, results)
    }

    fn fill_staged(&mut self, start: Gfn, count: usize, results: &mut Vec<Result<(), Errno>>) -> Result<(), XenError> {
        let call = |page| PagingCall { operation: PAGING_PREP, gfn: start.index() + page as u64, page: Some(page) };
        let calls: Vec<PagingCall> = (0..count).map(call).collect();
        self.paging(&calls, results)
    }

    /// What `frames` are, at most 4 MiB of them: filling a frame from nowhere changes nothing, and is refused for another
    /// reason where the frame is paged out.
    pub(super) fn states(&mut self, frames: &[u64]) -> Result<Vec<FrameState>, XenError> {
        let calls: Vec<PagingCall> =
            frames.iter().map(|gfn| PagingCall { operation: PAGING_PREP, gfn: *gfn, page: None }).collect();
        let mut results = Vec::new();
        self.paging(&calls, &mut results)?;
        results
            .into_iter()
            .map(|result| match result {
                Err(Errno::INVAL) => Ok(FrameState::PagedOut),
                // Success: the frame was on its way out and not gone yet, and is back now.
                Ok(()) | Err(Errno::NOENT) => Ok(FrameState::Other),
                Err(error) => Err(self.failed("XENMEM_paging_op_prep", error.into())),
            })
            .collect()
    }

    /// True when a ring is enabled, its pager alive or not. Xen looks for that before it looks at the frame.
    pub(super) fn has_pager(&mut self) -> bool {
        let mut results = Vec::new();
        let call = PagingCall { operation: PAGING_PREP, gfn: 0, page: None };
        let asked = self.calls.paging(self.id, &[call], &mut results);
        asked.is_ok() && matches!(results.as_slice(), [Ok(()) | Err(Errno::NOENT | Errno::INVAL)])
    }

    fn paging(&mut self, calls: &[PagingCall], results: &mut Vec<Result<(), Errno>>) -> Result<(), XenError> {
        self.calls.paging(self.id, calls, results).map_err(|source| self.failed("XENMEM_paging_op", source))
    }

    fn vm_event(&mut self, operation: u32) -> io::Result<u32> {
        let mut command = Domctl::new(self.version, DOMCTL_VM_EVENT, self.id);
        let argument = VmEventOp { operation, mode: VM_EVENT_MODE_PAGING, port: 0, padding: 0 };
        command.argument.as_mut_bytes()[..size_of::<VmEventOp>()].copy_from_slice(argument.as_bytes());
        self.calls.domctl(&mut command)?;
        let (answer, _) =
            VmEventOp::read_from_prefix(command.argument.as_bytes()).map_err(|_| io::ErrorKind::InvalidData)?;
        Ok(answer.port)
    }

    fn domctl(&mut self, operation: &'static str, command: u32) -> Result<(), XenError> {
        let done = self.calls.domctl(&mut Domctl::new(self.version, command, self.id));
        done.map_err(|source| self.failed(operation, source))
    }

    /// The error of a call, or that the domain is gone.
    pub(super) fn failed(&mut self, operation: &'static str, source: io::Error) -> XenError {
        let domain = self.id;
        let gone = match info(&mut self.calls, self.version, self.id) {
            Ok(raw) => raw.domain != domain || raw.handle != self.handle || raw.flags & FLAG_DYING != 0,
            Err(error) => matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)),
        };
        if gone { XenError::Gone { domain } } else { XenError::Call { operation, domain, source } }
    }
}

fn info(calls: &mut Hypercalls, version: u32, domain: u16) -> io::Result<DomainInfo> {
    if domain >= FIRST_RESERVED_DOMID {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let mut command = Domctl::new(version, DOMCTL_INFO, domain);
    calls.domctl(&mut command)?;
    let (info, _) =
        DomainInfo::read_from_prefix(command.argument.as_bytes()).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(info)
}

/// Why a device of the kernel cannot be opened.
pub(super) fn device_error(device: &'static str, module: &'static str, source: io::Error) -> XenError {
    match source.kind() {
        io::ErrorKind::PermissionDenied => XenError::Permission { device, source },
        _ => XenError::NoDevice { device, module, source },
    }
}
