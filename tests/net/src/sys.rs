//! The system calls that the standard library and rustix offer only as unsafe functions, or not at all.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling thread a network of its own, without interfaces but `lo`.
pub(crate) fn unshare_network() -> io::Result<()> {
    // SAFETY: only unsharing the table of file descriptors is unsafe, which is not asked for.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// Lets the process that `command` starts be killed when the thread that starts it ends, at the latest with this process.
pub(crate) fn die_with_thread(command: &mut Command, parent: Pid) {
    let hook = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // A parent that died before the line above sends no signal any more.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::NotConnected.into()) }
    };
    // SAFETY: between fork and exec only async-signal-safe work is allowed. The hook makes two system calls through rustix,
    // takes no lock, and allocates nothing: an `io::Error` of a kind or of an error number holds no box.
    unsafe {
        command.pre_exec(hook);
    }
}

/// The number of an interface of the calling thread's network.
pub(crate) fn interface_index(name: &str) -> io::Result<u32> {
    let name = CString::new(name)?;
    // SAFETY: the argument is a string that ends with a zero byte and lives during the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// `struct bpf_insn` of linux/bpf.h.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Instruction {
    pub(crate) code: u8,
    /// Destination register in the low four bits, source in the high ones.
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

const _: () = assert!(size_of::<Instruction>() == 8);

/// The beginning of `union bpf_attr` for BPF_PROG_LOAD; what is left out is zero.
#[repr(C)]
struct ProgramLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

const _: () = assert!(size_of::<ProgramLoad>() == 48);

/// The beginning of `union bpf_attr` for BPF_LINK_CREATE.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

const _: () = assert!(size_of::<LinkCreate>() == 16);

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
/// In the driver, before frames are coalesced, not in the generic path behind it.
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// Loads an XDP program.
pub(crate) fn load_xdp(program: &[Instruction]) -> io::Result<OwnedFd> {
    let license = c"Dual MIT/GPL";
    let attributes = ProgramLoad {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: the attributes are those of this command, and the program and the licence that they point to live during the call,
    // which only reads them.
    unsafe { bpf(BPF_PROG_LOAD, &attributes) }
}

/// Runs `program` on everything that arrives at an interface of the calling thread's network, as long as the result lives.
pub(crate) fn attach_xdp(program: BorrowedFd<'_>, interface: u32) -> io::Result<OwnedFd> {
    let attributes = LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        target_ifindex: interface,
        attach_type: BPF_XDP,
        flags: XDP_FLAGS_DRV_MODE,
    };
    // SAFETY: the attributes are those of this command, and hold no pointers.
    unsafe { bpf(BPF_LINK_CREATE, &attributes) }
}

/// bpf(2), for commands that make a file descriptor.
///
/// # Safety
/// `attributes` must be the beginning of a `union bpf_attr` for this command; what it points to must live during the call.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of attributes and takes the rest for zero; what they mean is the caller's duty.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}
