use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

/// What to watch.
pub(super) struct Watched<'a> {
    pub(super) port: Option<BorrowedFd<'a>>,
    pub(super) control: BorrowedFd<'a>,
    /// The source's socket, and whether for room to send.
    pub(super) source: Option<(BorrowedFd<'a>, bool)>,
    /// The multicast channel.
    pub(super) channel: Option<BorrowedFd<'a>>,
    pub(super) guest: Option<BorrowedFd<'a>>,
}

/// What was found ready.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ready {
    pub(super) port: bool,
    pub(super) control: bool,
    pub(super) source_in: bool,
    pub(super) source_out: bool,
    pub(super) channel: bool,
    pub(super) guest: bool,
}

/// Waits for events: looks again and again for a short time before it sleeps, where that has paid lately.
///
/// Waking a sleeping thread takes longer than an answer from a server in the same rack, and a guest that got its page often
/// faults again at once. Looking costs a core, so it ends after `limit`, and is left out when recent waits took longer.
pub(super) struct Waiter {
    limit: Duration,
    /// How long recent waits took, smoothed; waits beyond four limits count as that.
    recent: Duration,
}

impl Waiter {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, recent: Duration::ZERO }
    }

    /// Waits until something is ready, `timeout` has passed, or a signal came.
    pub(super) fn wait(&mut self, watched: &Watched<'_>, timeout: Option<Duration>) -> Result<Ready, Errno> {
        if timeout == Some(Duration::ZERO) || self.limit.is_zero() {
            return look(watched, timeout);
        }
        let began = Instant::now();
        if self.recent <= self.limit {
            loop {
                let ready = look(watched, Some(Duration::ZERO))?;
                let waited = began.elapsed();
                if ready.any() {
                    self.note(waited);
                    return Ok(ready);
                }
                if timeout.is_some_and(|timeout| waited >= timeout) {
                    return Ok(ready);
                }
                if waited > self.limit {
                    break;
                }
                std::hint::spin_loop();
            }
        }
        let rest = timeout.map(|timeout| timeout.saturating_sub(began.elapsed()));
        let ready = look(watched, rest)?;
        self.note(began.elapsed());
        Ok(ready)
    }

    fn note(&mut self, waited: Duration) {
        self.recent = (self.recent * 7 + waited.min(4 * self.limit)) / 8;
    }
}

impl Ready {
    fn any(self) -> bool {
        self.port || self.control || self.source_in || self.source_out || self.channel || self.guest
    }
}

fn look(watched: &Watched<'_>, timeout: Option<Duration>) -> Result<Ready, Errno> {
    let timeout = timeout.map(|timeout| Timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let idle = PollFlags::empty();
    let source_flags = match watched.source {
        Some((_, true)) => PollFlags::IN | PollFlags::OUT,
        Some((_, false)) => PollFlags::IN,
        None => idle,
    };
    // The control descriptor stands in for what is not watched, with no flag asked for.
    let optional = |fd: Option<_>| {
        PollFd::from_borrowed_fd(fd.unwrap_or(watched.control), if fd.is_some() { PollFlags::IN } else { idle })
    };
    let mut fds = [
        optional(watched.port),
        PollFd::from_borrowed_fd(watched.control, PollFlags::IN),
        PollFd::from_borrowed_fd(watched.source.map_or(watched.control, |(fd, _)| fd), source_flags),
        optional(watched.channel),
        optional(watched.guest),
    ];
    match rustix::event::poll(&mut fds, timeout.as_ref()) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok(Ready::default()),
        Err(error) => return Err(error),
    }
    let [port, control, source, channel, guest] = fds.map(|fd| fd.revents());
    let broken = PollFlags::ERR | PollFlags::HUP;
    Ok(Ready {
        port: watched.port.is_some() && !port.is_empty(),
        control: control.contains(PollFlags::IN),
        source_in: watched.source.is_some() && source.intersects(PollFlags::IN | broken),
        source_out: watched.source.is_some_and(|(_, out)| out) && source.intersects(PollFlags::OUT | broken),
        channel: watched.channel.is_some() && !channel.is_empty(),
        guest: watched.guest.is_some() && !guest.is_empty(),
    })
}

/// True when `fd` becomes readable within `timeout`.
pub(super) fn readable_within(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        let rest = Timespec { tv_sec: 0, tv_nsec: rest.subsec_nanos().into() };
        match rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&rest)) {
            Err(Errno::INTR) => {}
            result => return result.is_ok_and(|count| count > 0),
        }
    }
}
