//! The channel thread as the other threads see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use descriptor::FrameRange;
use descriptor::fetch::Class;
use parking_lot::Mutex;

use super::report::Report;
use crate::image::ServedImage;
use crate::stats::Number;
use crate::sys::EventCounter;

/// Ranges that may wait for the channel thread, 1 MiB of them. It takes them out within a send, so more are a flood, and are
/// dropped: whoever asked asks again over its connection.
const MAX_WAITING_RANGES: usize = 1 << 16;

/// Names a session to the channel thread, and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SessionKey {
    /// The ring that has it.
    pub(crate) ring: usize,
    pub(crate) slot: u32,
    /// Tells it from another holder of the slot.
    pub(crate) generation: u32,
}

impl SessionKey {
    /// The session's number in reports and logs.
    pub(crate) fn number(self) -> u64 {
        (self.ring as u64) << 32 | u64::from(self.generation)
    }
}

/// What the channel thread is told.
#[derive(Debug)]
pub(crate) enum Order {
    /// A session wants to be a member of its image's channel. The answer comes as
    /// [`News`](crate::shared::News).
    Join { session: SessionKey, image: Arc<ServedImage> },
    /// It is over.
    Leave { session: SessionKey },
    /// It asks for pages.
    Request { session: SessionKey, class: Class, ranges: Vec<FrameRange> },
    /// The image is no longer served.
    ImageGone(Arc<ServedImage>),
    /// The server has stopped.
    Stop,
}

/// Where orders are left, and where the thread leaves what it has to show.
#[derive(Debug)]
pub(crate) struct ChannelHandle {
    pub(crate) wake: EventCounter,
    inbox: Mutex<Inbox>,
    closed: AtomicBool,
    /// Requests that came in such numbers that they were dropped.
    pub(crate) dropped: Number,
    report: Mutex<Arc<Report>>,
}

#[derive(Debug, Default)]
struct Inbox {
    orders: Vec<Order>,
    ranges: usize,
}

impl ChannelHandle {
    pub(crate) fn new(report: Report) -> std::io::Result<Self> {
        Ok(Self {
            wake: EventCounter::new()?,
            inbox: Mutex::default(),
            closed: AtomicBool::new(false),
            dropped: Number::default(),
            report: Mutex::new(Arc::new(report)),
        })
    }

    /// Leaves an order.
    pub(crate) fn tell(&self, order: Order) {
        let mut inbox = self.inbox.lock();
        if let Order::Request { ranges, .. } = &order {
            if inbox.ranges + ranges.len() > MAX_WAITING_RANGES {
                return self.dropped.add(1);
            }
            inbox.ranges += ranges.len();
        }
        inbox.orders.push(order);
        // The thread sets the counter back before it takes the orders, so one signal is enough for all that wait.
        let first = inbox.orders.len() == 1;
        drop(inbox);
        if first {
            self.wake.signal();
        }
    }

    /// Takes the orders out.
    pub(crate) fn take(&self) -> Vec<Order> {
        self.wake.reset();
        std::mem::take(&mut *self.inbox.lock()).orders
    }

    /// The thread has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Takes note that the thread has ended.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.publish(Report { channels: Vec::new(), ..Report::clone(&self.report()) });
    }

    /// What the thread last published.
    pub(crate) fn report(&self) -> Arc<Report> {
        Arc::clone(&self.report.lock())
    }

    /// Shows `report` to the control plane.
    pub(crate) fn publish(&self, report: Report) {
        *self.report.lock() = Arc::new(report);
    }
}

#[cfg(test)]
mod tests {
    use descriptor::{Gfn, PageCount};

    use super::*;

    #[test]
    fn a_flood_of_requests_is_dropped_and_everything_else_kept() {
        let handle = ChannelHandle::new(Report::default()).unwrap();
        let session = SessionKey { ring: 0, slot: 0, generation: 1 };
        let ranges = vec![FrameRange::new(Gfn::new(1), PageCount::ONE); 256];
        for _ in 0..300 {
            handle.tell(Order::Request { session, class: Class::Demand, ranges: ranges.clone() });
        }
        handle.tell(Order::Leave { session });
        assert_eq!(handle.take().len(), 257);
        assert_eq!(handle.dropped.read(), 44);
        handle.tell(Order::Request { session, class: Class::Bulk, ranges });
        assert_eq!(handle.take().len(), 1, "there is room again");
    }
}
