//! The structures that Xen and the kernel's Xen devices take, and their numbers, as Xen's public headers have them since 4.17.
//!
//! The numbers of the hypercalls are the `xen-sys` crate's, which has no more of what is needed here.

use xen_sys::{__HYPERVISOR_domctl, __HYPERVISOR_hvm_op, __HYPERVISOR_memory_op, __HYPERVISOR_multicall};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(super) const HYPERCALL_MEMORY_OP: u64 = __HYPERVISOR_memory_op as u64;
pub(super) const HYPERCALL_MULTICALL: u64 = __HYPERVISOR_multicall as u64;
pub(super) const HYPERCALL_HVM_OP: u64 = __HYPERVISOR_hvm_op as u64;
pub(super) const HYPERCALL_DOMCTL: u64 = __HYPERVISOR_domctl as u64;

pub(super) const XENMEM_DECREASE_RESERVATION: u64 = 1;
pub(super) const XENMEM_POPULATE_PHYSMAP: u64 = 6;
pub(super) const XENMEM_PAGING_OP: u64 = 20;
pub(super) const HVMOP_GET_PARAM: u64 = 1;

pub(in super::super) const PAGING_NOMINATE: u8 = 0;
pub(in super::super) const PAGING_EVICT: u8 = 1;
pub(in super::super) const PAGING_PREP: u8 = 2;

pub(in super::super) const DOMCTL_DESTROY: u32 = 2;
pub(in super::super) const DOMCTL_PAUSE: u32 = 3;
pub(in super::super) const DOMCTL_UNPAUSE: u32 = 4;
pub(in super::super) const DOMCTL_INFO: u32 = 5;
pub(in super::super) const DOMCTL_VM_EVENT: u32 = 56;

pub(in super::super) const VM_EVENT_ENABLE: u32 = 0;
pub(in super::super) const VM_EVENT_DISABLE: u32 = 1;
pub(in super::super) const VM_EVENT_MODE_PAGING: u32 = 1;

pub(in super::super) const PARAM_PAGING_RING: u32 = 27;

/// Not a domain: domain numbers end below.
pub(in super::super) const FIRST_RESERVED_DOMID: u16 = 0x7ff0;

pub(in super::super) const FLAG_DYING: u32 = 1 << 0;
pub(in super::super) const FLAG_HVM: u32 = 1 << 1;
pub(in super::super) const FLAG_PAUSED: u32 = 1 << 3;
pub(in super::super) const FLAG_HAP: u32 = 1 << 8;

/// `xen_domctl`: a header, and an argument by command.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(in super::super) struct Domctl {
    pub(in super::super) command: u32,
    pub(in super::super) interface_version: u32,
    pub(in super::super) domain: u16,
    padding: [u16; 3],
    pub(in super::super) argument: [u64; 16],
}

impl Domctl {
    pub(in super::super) fn new(interface_version: u32, command: u32, domain: u16) -> Self {
        Self { command, interface_version, domain, padding: [0; 3], argument: [0; 16] }
    }
}

/// `xen_domctl_getdomaininfo` up to where architectures begin to differ; the same from 4.17 to 4.21 at least.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(in super::super) struct DomainInfo {
    pub(in super::super) domain: u16,
    padding: u16,
    pub(in super::super) flags: u32,
    pub(in super::super) total_pages: u64,
    max_pages: u64,
    outstanding_pages: u64,
    shared_pages: u64,
    pub(in super::super) paged_pages: u64,
    shared_info_frame: u64,
    pub(in super::super) cpu_time_ns: u64,
    online_vcpus: u32,
    pub(in super::super) max_vcpu_id: u32,
    ssidref: u32,
    pub(in super::super) handle: [u8; 16],
    cpupool: u32,
}

/// `xen_domctl_vm_event_op`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(in super::super) struct VmEventOp {
    pub(in super::super) operation: u32,
    pub(in super::super) mode: u32,
    pub(in super::super) port: u32,
    pub(in super::super) padding: u32,
}

/// `xen_hvm_param`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct HvmParam {
    pub(super) domain: u16,
    pub(super) padding: u16,
    pub(super) index: u32,
    pub(super) value: u64,
}

/// `xen_memory_reservation`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Reservation {
    pub(super) extent_start: u64,
    pub(super) extents: u64,
    pub(super) extent_order: u32,
    pub(super) flags: u32,
    pub(super) domain: u16,
    pub(super) padding: [u16; 3],
}

/// `xen_mem_paging_op`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct PagingOp {
    pub(super) operation: u8,
    pub(super) padding: u8,
    pub(super) domain: u16,
    pub(super) padding2: u32,
    pub(super) buffer: u64,
    pub(super) gfn: u64,
}

/// `multicall_entry`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct MulticallEntry {
    pub(super) operation: u64,
    pub(super) result: i64,
    pub(super) arguments: [u64; 6],
}

/// The kernel's `privcmd_hypercall`.
#[repr(C)]
pub(super) struct PrivcmdHypercall {
    pub(super) operation: u64,
    pub(super) arguments: [u64; 5],
}

/// The kernel's `privcmd_mmapbatch_v2`.
#[repr(C)]
pub(super) struct MmapBatch {
    pub(super) count: u32,
    pub(super) domain: u16,
    pub(super) address: u64,
    pub(super) frames: *const u64,
    pub(super) errors: *mut i32,
}

/// The kernel's `ioctl_evtchn_bind_interdomain`.
#[repr(C)]
pub(super) struct BindInterdomain {
    pub(super) remote_domain: u32,
    pub(super) remote_port: u32,
}

pub(super) const IOC_PRIVCMD_HYPERCALL: libc::Ioctl = plain(b'P', 0, size_of::<PrivcmdHypercall>());
pub(super) const IOC_PRIVCMD_MMAPBATCH_V2: libc::Ioctl = plain(b'P', 4, size_of::<MmapBatch>());
pub(super) const IOC_EVTCHN_BIND_INTERDOMAIN: libc::Ioctl = plain(b'E', 1, size_of::<BindInterdomain>());
pub(super) const IOC_EVTCHN_NOTIFY: libc::Ioctl = plain(b'E', 4, size_of::<u32>());

/// These devices number their requests without a direction.
const fn plain(kind: u8, number: libc::Ioctl, size: usize) -> libc::Ioctl {
    (size as libc::Ioctl) << 16 | (kind as libc::Ioctl) << 8 | number
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<Domctl>() == 144 && offset_of!(Domctl, domain) == 8 && offset_of!(Domctl, argument) == 16);
    assert!(size_of::<DomainInfo>() == 96 && size_of::<DomainInfo>() <= 128);
    assert!(offset_of!(DomainInfo, flags) == 4 && offset_of!(DomainInfo, total_pages) == 8);
    assert!(offset_of!(DomainInfo, paged_pages) == 40 && offset_of!(DomainInfo, cpu_time_ns) == 56);
    assert!(offset_of!(DomainInfo, max_vcpu_id) == 68 && offset_of!(DomainInfo, handle) == 76);
    assert!(size_of::<VmEventOp>() == 16 && offset_of!(VmEventOp, port) == 8);
    assert!(size_of::<HvmParam>() == 16 && offset_of!(HvmParam, value) == 8);
    assert!(size_of::<Reservation>() == 32 && offset_of!(Reservation, domain) == 24);
    assert!(offset_of!(Reservation, extent_order) == 16);
    assert!(size_of::<PagingOp>() == 24 && offset_of!(PagingOp, domain) == 2);
    assert!(offset_of!(PagingOp, buffer) == 8 && offset_of!(PagingOp, gfn) == 16);
    assert!(size_of::<MulticallEntry>() == size_of::<xen_sys::multicall_entry>());
    assert!(offset_of!(MulticallEntry, result) == offset_of!(xen_sys::multicall_entry, result));
    assert!(offset_of!(MulticallEntry, arguments) == offset_of!(xen_sys::multicall_entry, args));
    assert!(size_of::<PrivcmdHypercall>() == 48);
    assert!(size_of::<MmapBatch>() == 32 && offset_of!(MmapBatch, address) == 8 && offset_of!(MmapBatch, errors) == 24);
    assert!(size_of::<BindInterdomain>() == 8);
    assert!(IOC_PRIVCMD_HYPERCALL == 0x0030_5000);
    assert!(IOC_PRIVCMD_MMAPBATCH_V2 == 0x0020_5004);
    assert!(IOC_EVTCHN_BIND_INTERDOMAIN == 0x0008_4501);
    assert!(IOC_EVTCHN_NOTIFY == 0x0004_4504);
    assert!(HYPERCALL_MEMORY_OP == 12 && HYPERCALL_MULTICALL == 13);
    assert!(HYPERCALL_HVM_OP == 34 && HYPERCALL_DOMCTL == 36);
};
