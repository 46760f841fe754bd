//! How a port comes to its domain: the checks, the ring, the memory.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use descriptor::memory::RegionKind;
use descriptor::vm::Hypervisor;
use descriptor::{Descriptor, FrameRange, FrameSet, Gfn, PageCount};

use super::domain::{Domain, FrameState, Info, device_error};
use super::error::XenError;
use super::prepare::{self, Preparation};
use super::ring::{BackRing, SLOTS};
use super::sys::abi::{FLAG_HAP, FLAG_HVM, FLAG_PAUSED};
use super::sys::{self, EventChannel, ForeignPage};

/// Pages that a domain from a hole stream may have beside those of the stream: what a toolstack adds, such as a page for a ring.
const EXTRA_PAGES: PageCount = PageCount::new(64);

/// Each memtap locks the byte of its domain's number in this file. Nobody but root can.
const LOCK: &str = "/run/snowflock-xen.lock";

/// Frames that are asked for at once what they are.
const STATES_AT_ONCE: PageCount = PageCount::new(1024);

/// An enabled ring.
pub(super) struct Ring {
    pub(super) page: ForeignPage,
    pub(super) back: BackRing,
    pub(super) channel: EventChannel,
}

/// A domain that is paused, has a ring, and all of whose memory is there or paged out.
pub(super) struct Attached {
    pub(super) domain: Domain,
    pub(super) ring: Ring,
    /// Frames of the descriptor that it has.
    pub(super) present: FrameSet,
    pub(super) vcpus: u32,
    pub(super) preparation: Preparation,
    /// Held as long as this process serves the domain.
    pub(super) lock: File,
}

/// A domain that is not served.
#[derive(Debug)]
pub struct AttachError {
    /// Why.
    pub error: XenError,
    /// What became of it.
    pub left: Left,
}

/// What became of a domain that is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It is as it was found.
    Untouched,
    /// Its memory is partly made: it can never run.
    Unfinished,
    /// It was to be taken over, and stands still; another attempt may succeed.
    Paused,
}

/// Attaches to a domain that was restored from the hole stream of `descriptor` and is paused.
pub(super) fn attach(domain: Domain, descriptor: &Descriptor) -> Result<Attached, AttachError> {
    let mut left = Left::Untouched;
    attach_noting(domain, descriptor, &mut left).map_err(|error| AttachError { error, left })
}

fn attach_noting(mut domain: Domain, descriptor: &Descriptor, left: &mut Left) -> Result<Attached, XenError> {
    let (ram, special) = frames_of(descriptor)?;
    let lock = lock(&domain)?;
    let info = suitable(&mut domain)?;
    if domain.has_pager() {
        return Err(XenError::Attached { domain: domain.id() });
    }
    if !info.is(FLAG_PAUSED) {
        return Err(XenError::Running { domain: domain.id() });
    }
    if info.pages + info.paged > special.count() + EXTRA_PAGES {
        let (domain, pages, special) = (domain.id(), info.pages + info.paged, special.count());
        return Err(XenError::HasMemory { domain, pages, special });
    }
    let ring = enable(&mut domain)?;
    *left = Left::Unfinished;
    close_page(&mut domain)?;
    let preparation = prepare::page_out(&mut domain, &ram)?;
    Ok(Attached { domain, ring, present: special, vcpus: info.vcpus, preparation, lock })
}

/// Takes a domain over whose pager died. It is paused when this returns, also if it ran.
///
/// What the dead pager knew is asked of Xen: which frames are paged out by looking at each, which vCPUs wait by letting all of them
/// go on, whereupon they fault again. Meanwhile the domain must not run: a fault without a ring ends it.
///
/// One thing Xen does not tell: a frame that was asked for (of type paging-in) is not asked for again, and a vCPU that touches it
/// spins until it is there. So all frames have to be filled soon after a domain was taken over.
pub(super) fn take_over(domain: Domain, descriptor: &Descriptor) -> Result<Attached, AttachError> {
    let mut left = Left::Untouched;
    take_over_noting(domain, descriptor, &mut left).map_err(|error| AttachError { error, left })
}

fn take_over_noting(mut domain: Domain, descriptor: &Descriptor, left: &mut Left) -> Result<Attached, XenError> {
    let (ram, mut present) = frames_of(descriptor)?;
    let lock = lock(&domain)?;
    let info = suitable(&mut domain)?;
    if !domain.has_pager() {
        return Err(XenError::NoPager { domain: domain.id() });
    }
    // A domain that never ran is paused by who made it, and waits for being ready; a pause of anyone else is theirs to end.
    if info.has_run || !info.is(FLAG_PAUSED) {
        domain.pause()?;
    }
    if let Err(error) = domain.disable_paging() {
        if info.has_run || !info.is(FLAG_PAUSED) {
            domain.unpause()?;
        }
        return Err(error);
    }
    *left = Left::Paused;
    let mut ring = enable(&mut domain)?;
    release_vcpus(&mut domain, &mut ring, info.vcpus)?;
    drop(ring);
    // The answers went to no question of this ring, so that Xen's count of its slots is wrong: begin anew.
    domain.disable_paging()?;
    let ring = enable(&mut domain)?;
    close_page(&mut domain)?;
    let mut preparation = Preparation { taken_over: true, peak: info.pages, ..Preparation::default() };
    let there = not_paged_out(&mut domain, &ram, present.universe())?;
    if info.has_run {
        present.union_with(&there);
    } else {
        // It died while it prepared the domain: frames that are not paged out are holes, or have no contents yet.
        for frame in there.runs().flat_map(FrameRange::frames) {
            // A hole has nothing to be removed.
            let _hole = domain.remove(frame.index());
        }
        let rest: Vec<FrameRange> = there.runs().collect();
        preparation = Preparation { taken_over: true, ..prepare::page_out(&mut domain, &rest)? };
    }
    Ok(Attached { domain, ring, present, vcpus: info.vcpus, preparation, lock })
}

/// The runs of memory that are to be paged out, and the frames that the hole stream brings.
fn frames_of(descriptor: &Descriptor) -> Result<(Vec<FrameRange>, FrameSet), XenError> {
    let hypervisor = descriptor.identity.hypervisor;
    if hypervisor != Hypervisor::Xen {
        return Err(XenError::OtherHypervisor { hypervisor });
    }
    let of = |kind| move |region: &&descriptor::memory::Region| region.kind == kind;
    let regions = descriptor.memory.regions();
    let ram = regions.iter().filter(of(RegionKind::Ram)).map(|region| region.frames).collect();
    let special = regions.iter().filter(of(RegionKind::Rom)).map(|region| region.frames);
    Ok((ram, FrameSet::from_ranges(descriptor.memory.universe(), special)))
}

/// One memtap for a domain: let go when the process ends, however it does.
fn lock(domain: &Domain) -> Result<File, XenError> {
    let failed = |source| XenError::Lock { path: LOCK, source };
    let mut options = File::options();
    options.read(true).write(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(LOCK).map_err(failed)?;
    match sys::lock_byte(&file, domain.id().into()) {
        Ok(true) => Ok(file),
        Ok(false) => Err(XenError::Served { domain: domain.id() }),
        Err(error) => Err(failed(error)),
    }
}

/// Checks what Xen would answer less clearly.
fn suitable(domain: &mut Domain) -> Result<Info, XenError> {
    let id = domain.id();
    let info = domain.info()?.ok_or(XenError::Gone { domain: id })?;
    if !info.is(FLAG_HVM) {
        return Err(XenError::Paravirtual { domain: id });
    }
    if !info.is(FLAG_HAP) {
        return Err(XenError::NoHap { domain: id });
    }
    Ok(info)
}

/// Enables the ring in its page, which the toolstack made, or not.
fn enable(domain: &mut Domain) -> Result<Ring, XenError> {
    let frame = domain.ring_frame()?;
    let mut page = match domain.map(frame)? {
        Some(page) => page,
        None => {
            let gfn = Gfn::checked(frame).ok_or(XenError::NoRing { domain: domain.id() })?;
            let no_memory = XenError::NoMemory { domain: domain.id(), gfn };
            if domain.populate(0, &[frame])? != 1 {
                return Err(no_memory);
            }
            domain.map(frame)?.ok_or(no_memory)?
        }
    };
    // A ring of zeros is one at its beginning, and Xen leaves the page as it finds it. From here on Xen writes to it.
    page.clear();
    let port = domain.enable_paging()?;
    let channel = EventChannel::bind(domain.id(), port);
    let channel = channel.map_err(|source| device_error("/dev/xen/evtchn", "xen-evtchn", source))?;
    Ok(Ring { page, back: BackRing::new(), channel })
}

/// Takes the page of the ring away from the guest, which could write to it. It stays with Xen and us until both let go.
fn close_page(domain: &mut Domain) -> Result<(), XenError> {
    let frame = domain.ring_frame()?;
    domain.remove(frame)
}

/// Lets every vCPU go on that waits for the pager, however often it was stopped: at most once for each slot of the old ring. Xen
/// passes over what is too much. The domain is paused, so that none of them gets anywhere.
fn release_vcpus(domain: &mut Domain, ring: &mut Ring, vcpus: u32) -> Result<(), XenError> {
    for vcpu in 0..vcpus {
        for _ in 0..SLOTS {
            ring.back.release(&mut ring.page, vcpu);
        }
        // Xen takes the answers before this returns.
        ring.channel.notify().map_err(|source| domain.failed("notifying Xen", source))?;
    }
    Ok(())
}

/// The frames of `ram` that are not paged out.
fn not_paged_out(domain: &mut Domain, ram: &[FrameRange], universe: PageCount) -> Result<FrameSet, XenError> {
    let mut there = FrameSet::empty(universe);
    for chunk in ram.iter().flat_map(|range| range.chunks(STATES_AT_ONCE)) {
        let frames: Vec<u64> = chunk.frames().map(Gfn::index).collect();
        for (gfn, state) in chunk.frames().zip(domain.states(&frames)?) {
            if state == FrameState::Other {
                there.insert(gfn);
            }
        }
    }
    Ok(there)
}
