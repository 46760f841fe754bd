use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::Errno;

use super::abi::{BindInterdomain, IOC_EVTCHN_BIND_INTERDOMAIN, IOC_EVTCHN_NOTIFY};

/// One event channel to another domain. The kernel closes it with the descriptor, also when the process is killed.
#[derive(Debug)]
pub(in super::super) struct EventChannel {
    device: File,
    port: u32,
}

impl EventChannel {
    /// Binds to the unbound `port` of `domain`.
    pub(in super::super) fn bind(domain: u16, port: u32) -> io::Result<Self> {
        let device = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/xen/evtchn")?;
        let argument = BindInterdomain { remote_domain: domain.into(), remote_port: port };
        // SAFETY: the request takes a pointer to this structure and returns the number of the local port.
        let port = unsafe { libc::ioctl(device.as_raw_fd(), IOC_EVTCHN_BIND_INTERDOMAIN, &raw const argument) };
        let port = u32::try_from(port).map_err(|_| io::Error::last_os_error())?;
        Ok(Self { device, port })
    }

    /// Readable when the other side has notified us.
    pub(in super::super) fn fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Takes note of a notification, if there is one, so that the next can come. What it is about has to be looked at *after*
    /// this: what comes later notifies again.
    pub(in super::super) fn acknowledge(&self) -> io::Result<()> {
        let mut ports = [0u8; 16];
        match rustix::io::read(&self.device, &mut ports) {
            Ok(length) => {
                let (fired, _) = ports[..length.min(ports.len())].as_chunks::<4>();
                if fired.contains(&self.port.to_ne_bytes()) {
                    rustix::io::write(&self.device, &self.port.to_ne_bytes())?;
                }
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Notifies the other side.
    pub(in super::super) fn notify(&self) -> io::Result<()> {
        let argument = self.port;
        // SAFETY: the request takes a pointer to the number of the port.
        let result = unsafe { libc::ioctl(self.device.as_raw_fd(), IOC_EVTCHN_NOTIFY, &raw const argument) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
