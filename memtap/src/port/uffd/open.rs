use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use descriptor::memory::PageSize;
use rustix::io::Errno;
use thiserror::Error;

use super::{HostRegion, HostRegions, PortError, UffdPort, sys};

/// A userfaultfd of this process, for memory that it maps itself.
///
/// It takes faults of user mode alone, which needs no privilege: a system call that is given an address of missing memory
/// fails with EFAULT instead of waiting.
pub struct Userfaultfd {
    fd: OwnedFd,
}

/// A userfaultfd that cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// This process may not have one.
    #[error(
        "no permission to open a userfaultfd (system call: {syscall}; /dev/userfaultfd: {device}): allow the userfaultfd \
         system call (a seccomp filter, such as a container runtime's default one, forbids it), or give this user access \
         to /dev/userfaultfd by its group and mode, or set vm.unprivileged_userfaultfd=1, or grant CAP_SYS_PTRACE"
    )]
    Permission {
        /// What the system call answered.
        syscall: io::Error,
        /// What the device answered.
        device: io::Error,
    },
    /// The kernel was built without.
    #[error("this kernel has no userfaultfd (CONFIG_USERFAULTFD), or one older than Linux 5.11")]
    Unsupported,
    /// The kernel cannot report discards, or serve the kind of memory asked for.
    #[error("this kernel's userfaultfd lacks {missing} (it has features {has:#x})")]
    Feature {
        /// What is missing.
        missing: &'static str,
        /// The feature bits that it has.
        has: u64,
    },
    /// Anything else.
    #[error("opening a userfaultfd failed")]
    Os(#[source] io::Error),
}

impl Userfaultfd {
    /// Opens one and agrees with the kernel on its interface: missing pages and discards.
    ///
    /// # Errors
    /// When this process may not have one, or the kernel is too old.
    pub fn open() -> Result<Self, OpenError> {
        let fd = sys::open().or_else(|syscall| match Errno::from_io_error(&syscall) {
            Some(Errno::PERM | Errno::ACCESS) => {
                sys::open_device().map_err(|device| OpenError::Permission { syscall, device })
            }
            Some(Errno::NOSYS | Errno::INVAL) => Err(OpenError::Unsupported),
            _ => Err(OpenError::Os(syscall)),
        })?;
        // Asking for no feature tells which there are, but a descriptor takes one handshake only; these three are older than
        // user-mode faults, so that they are there wherever the call above succeeds.
        let features = sys::FEATURE_EVENT_REMOVE | sys::FEATURE_EVENT_UNMAP | sys::FEATURE_MISSING_SHMEM;
        let features = features | sys::FEATURE_MISSING_HUGETLBFS;
        match sys::handshake(fd.as_fd(), features) {
            Ok(has) if has & features == features => Ok(Self { fd }),
            Ok(has) => Err(OpenError::Feature { missing: "discard events or shared memory", has }),
            Err(Errno::INVAL) => Err(OpenError::Feature { missing: "discard events or shared memory", has: 0 }),
            Err(error) => Err(OpenError::Os(error.into())),
        }
    }

    /// Registers `regions`, which this process maps, and makes the port that serves them.
    ///
    /// # Errors
    /// When the kernel refuses a region.
    pub fn into_port(self, regions: HostRegions) -> Result<UffdPort, PortError> {
        for region in regions.regions() {
            self.register(region)?;
        }
        Ok(UffdPort::new(self.fd, regions))
    }

    fn register(&self, region: &HostRegion) -> Result<(), PortError> {
        sys::register(self.fd(), region.address, region.length()).map_err(|error| {
            let kind = match region.page_size {
                PageSize::Base => "memory",
                PageSize::Huge => "huge pages",
            };
            PortError::Os {
                operation: "UFFDIO_REGISTER",
                object: format!("{kind} for frames {region}"),
                source: error.into(),
            }
        })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
