//! What a child does between fork and exec, which the standard library offers only as an unsafe hook.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// Lets the process that `command` starts get `farewell` when `parent`, the calling process, dies, and hands it `fds` under the same
/// numbers.
///
/// The kernel watches the *thread* that starts the child: when that thread ends, the child gets the signal.
pub(super) fn prepare(command: &mut Command, parent: Pid, farewell: Signal, fds: Vec<OwnedFd>) {
    let hook = move || {
        set_parent_process_death_signal(Some(farewell))?;
        // A parent that died before the line above sends no signal any more.
        if getppid() != Some(parent) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        for fd in &fds {
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe work is allowed. The hook makes three system calls through rustix,
    // which calls the kernel (or libc's thin wrappers) directly; it takes no lock, and allocates nothing: an `io::Error` of a
    // kind or of an error number holds no box.
    unsafe {
        command.pre_exec(hook);
    }
}
