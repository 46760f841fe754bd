use std::io;

use descriptor::{Gfn, PageCount};
use thiserror::Error;

use super::ring::RingError;

/// Why a domain cannot be served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum XenError {
    /// The kernel has no way to Xen.
    #[error("{device} is not there: memtap has to run in Xen's control domain (dom0), with the module {module} loaded")]
    NoDevice {
        /// The device.
        device: &'static str,
        /// The module that has it.
        module: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel lets this user not use the device.
    #[error("no permission for {device}: memtap has to run as root in Xen's control domain (dom0)")]
    Permission {
        /// The device.
        device: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Xen refuses what a guest asks for.
    #[error("Xen lets this domain not control others: memtap has to run in the control domain (dom0)")]
    NotPrivileged(#[source] io::Error),
    /// The control interface has none of the versions that are known or likely.
    #[error(
        "Xen's control interface has no version from {first:#x} (4.17) to {last:#x}: this Xen is older, or much newer than memtap, or its XSM policy lets this domain not control others"
    )]
    InterfaceVersion {
        /// The first that was tried.
        first: u32,
        /// The last that was tried.
        last: u32,
    },
    /// No such domain.
    #[error("there is no domain {0}; see `xl list`")]
    NoDomain(String),
    /// The list of domains cannot be read.
    #[error("cannot look up the domain's name: no answer from xenstored at {socket}; give --domid instead")]
    Xenstore {
        /// Where it was looked for.
        socket: &'static str,
        /// The kernel's answer, or what was wrong.
        #[source]
        source: io::Error,
    },
    /// A paravirtualised guest.
    #[error("domain {domain} is a PV guest, whose memory Xen cannot page out: it has to be of type pvh or hvm")]
    Paravirtual {
        /// The domain.
        domain: u16,
    },
    /// Shadow page tables.
    #[error(
        "domain {domain} runs without hardware-assisted paging, which Xen needs to page memory out: it has to be made with hap=1, on a processor with EPT or NPT"
    )]
    NoHap {
        /// The domain.
        domain: u16,
    },
    /// The hypervisor was built without paging.
    #[error(
        "this Xen has no memory paging: it has to be built with CONFIG_MEM_PAGING=y (CONFIG_EXPERT and CONFIG_UNSUPPORTED make the option visible)"
    )]
    NoPaging,
    /// A control domain that is itself an HVM or PVH guest.
    #[error(
        "Xen pages no memory out where the control domain is a PVH one: boot it as PV (no dom0=pvh on Xen's command line)"
    )]
    ControlDomainPvh,
    /// A domain with devices passed through.
    #[error(
        "domain {domain} uses the IOMMU, and Xen pages such memory not out: it must have no device passed through, nor passthrough enabled"
    )]
    Iommu {
        /// The domain.
        domain: u16,
    },
    /// A domain with populate-on-demand memory.
    #[error(
        "domain {domain} has memory populated on demand, and Xen pages such memory not out: its memory and maxmem must be the same"
    )]
    PopulateOnDemand {
        /// The domain.
        domain: u16,
    },
    /// The ring is enabled already.
    #[error("a pager is attached to domain {domain} already; if it was a memtap that died, go on with --take-over")]
    Attached {
        /// The domain.
        domain: u16,
    },
    /// Another memtap lives.
    #[error("another memtap serves domain {domain}: one of them is enough")]
    Served {
        /// The domain.
        domain: u16,
    },
    /// The toolstack reserved no frame for the ring.
    #[error(
        "domain {domain} has no frame for a paging ring (HVM parameter 27 is 0): it was not made by xl or another libxl toolstack"
    )]
    NoRing {
        /// The domain.
        domain: u16,
    },
    /// The descriptor is of another hypervisor.
    #[error(
        "the descriptor is of a guest of {hypervisor}, not of Xen; make one by `snowflock capture xl` or `descriptor make xl-stream`"
    )]
    OtherHypervisor {
        /// Whose.
        hypervisor: descriptor::vm::Hypervisor,
    },
    /// The domain runs.
    #[error(
        "domain {domain} is running; a clone has to be paused until its memory is paged out: make it by `xl restore -p`"
    )]
    Running {
        /// The domain.
        domain: u16,
    },
    /// The domain has its memory.
    #[error(
        "domain {domain} has {pages} pages of memory already, where its descriptor brings {special}: make it from the stream of `descriptor export xl`, not from the whole one"
    )]
    HasMemory {
        /// The domain.
        domain: u16,
        /// Its pages.
        pages: PageCount,
        /// What the hole stream brings.
        special: PageCount,
    },
    /// A frame that does not go.
    #[error(
        "frame {gfn} of domain {domain} cannot be paged out: something maps it, such as a backend or a tool that dumps memory"
    )]
    InUse {
        /// The domain.
        domain: u16,
        /// The frame.
        gfn: Gfn,
        /// Xen's answer.
        #[source]
        source: io::Error,
    },
    /// Xen lacks memory for the guest, or for its page tables.
    #[error(
        "Xen has no memory left for frame {gfn} of domain {domain}; free some, or give the domain a larger shadow_memory for page tables"
    )]
    NoMemory {
        /// The domain.
        domain: u16,
        /// The frame.
        gfn: Gfn,
    },
    /// vCPUs wait within Xen for a slot of the old ring.
    #[error(
        "domain {domain} cannot be taken over: more of its vCPUs faulted than the ring of the dead pager has slots, and Xen replaces no ring that vCPUs queue for; destroy the domain"
    )]
    Queued {
        /// The domain.
        domain: u16,
    },
    /// Nothing to take over.
    #[error(
        "domain {domain} has no pager to be replaced: its memory is complete, or was never paged out (then leave out \
         --take-over). If it is complete and paused, its memtap died while it let go of it: `xl unpause` it"
    )]
    NoPager {
        /// The domain.
        domain: u16,
    },
    /// The lock file cannot be had.
    #[error("cannot lock {path}, which keeps two memtaps from serving one domain")]
    Lock {
        /// The file.
        path: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The domain ended.
    #[error("domain {domain} is gone")]
    Gone {
        /// The domain.
        domain: u16,
    },
    /// The ring is broken.
    #[error("the paging ring of domain {domain} is broken")]
    Ring {
        /// The domain.
        domain: u16,
        /// How.
        #[source]
        source: RingError,
    },
    /// A call failed.
    #[error("{operation} for domain {domain} failed")]
    Call {
        /// What was tried.
        operation: &'static str,
        /// The domain.
        domain: u16,
        /// The answer.
        #[source]
        source: io::Error,
    },
}
