//! From the runs of the schedule to sends, and back to the sessions when they are done.

use std::io;
use std::time::Duration;

use descriptor::PageCount;
use descriptor::fetch::{Encoding, PageRun};
use descriptor::image::{Content, Layout};

use super::connection::{Connection, Stage};
use super::gather::Gather;
use super::sys::Key;
use super::{Ring, connection_of};
use crate::schedule::Run;
use crate::stats::{CLASSES, RingStats, class_index};

impl Ring {
    /// Submits everything urgent, and one quantum of bulk: by the next look at the completion queue there may be more
    /// demand, which would otherwise wait until all bulk is copied.
    pub(super) fn send_all(&mut self, now: Duration) {
        let mut runs = std::mem::take(&mut self.runs);
        loop {
            let connections = &self.connections;
            let Some(slot) = self.schedule.next_urgent(|slot| layout_of(connections, slot), &mut runs) else { break };
            self.start_send(now, slot, &mut runs);
        }
        let connections = &self.connections;
        if let Some(slot) = self.schedule.next_bulk(|slot| layout_of(connections, slot), &mut runs) {
            self.start_send(now, slot, &mut runs);
        }
        self.runs = runs;
        let queued = self.schedule.depth();
        for class in CLASSES {
            self.handle().stats.classes[class_index(class)].queued.set(queued[class_index(class)] as u64);
        }
    }

    fn start_send(&mut self, now: Duration, slot: usize, runs: &mut Vec<Run>) {
        let mut gather = self.pool.pop().unwrap_or_default();
        let stats = &self.shared.rings[self.index].stats;
        let Some(connection) = self.connections.get_mut(slot).and_then(Option::as_mut) else {
            return self.schedule.sent(slot);
        };
        if connection.stage == Stage::Dying {
            return self.schedule.sent(slot);
        }
        let key = Key { slot: slot as u32, generation: connection.generation };
        let composed = compose(connection, &mut gather, runs, stats);
        std::mem::swap(&mut connection.running, runs);
        let Some(socket) = connection.socket.as_ref().filter(|_| gather.len() > 0) else {
            self.schedule.sent(slot);
            self.reuse(Some(gather));
            return self.composed(key, composed);
        };
        if let Some(record) = &connection.record {
            record.bytes.add(gather.len() as u64);
        }
        // Descriptors can only go along with an ordinary send.
        let zero_copy = gather.descriptors().is_empty() && connection.zero_copy.choose(gather.len());
        stats.zero_copy.add(zero_copy.into());
        let fixed = gather.only_stored().filter(|_| zero_copy).zip(connection.image.as_ref());
        let fixed = fixed.and_then(|((address, length), image)| self.fixed.find(image, address, length));
        stats.fixed.add(fixed.is_some().into());
        self.uring.send(key, socket, gather, zero_copy, fixed);
        connection.sending = true;
        connection.operations += 1;
        connection.session.sending(now, true);
        self.note_timer(key);
        self.composed(key, composed);
    }

    /// Ends a connection whose answers could not be composed: what is missing of them would be waited for in vain.
    fn composed(&mut self, key: Key, result: io::Result<()>) {
        if let Err(error) = result {
            self.image_failed(key, &error);
            self.kill(key);
        }
    }

    pub(super) fn sent(&mut self, now: Duration, key: Key, result: io::Result<()>, gather: Option<Gather>) {
        // The turn's own time is from before the kernel copied what was sent in it.
        let done = self.shared.now();
        let stats = &self.shared.rings[self.index].stats;
        let Some(connection) = connection_of(&mut self.connections, key) else { return self.reuse(gather) };
        connection.sending = false;
        connection.session.sending(now, false);
        let mut failure = None;
        match result {
            Ok(()) => {
                for run in &connection.running {
                    let pages = run.frames.count().get();
                    stats.classes[class_index(run.class)].latency.record(done.saturating_sub(run.received));
                    connection.session.answered(now, pages, run.last);
                    if let Some(record) = &connection.record {
                        record.pages[class_index(run.class)].add(pages);
                    }
                }
            }
            Err(error) => failure = Some(error),
        }
        connection.running.clear();
        let local_due = connection.local_due;
        self.schedule.sent(key.slot as usize);
        if local_due {
            self.schedule.push_control(key.slot as usize);
        }
        self.reuse(gather);
        if let Some(error) = failure {
            tracing::debug!(%error, "send");
            if error.raw_os_error() == Some(libc::EFAULT) {
                self.image_failed(key, &error);
            }
            self.kill(key);
        }
        self.attend(now, key);
        self.operation_ended(key);
    }

    /// Takes an image out of service whose files are no longer what they were.
    fn image_failed(&mut self, key: Key, error: &io::Error) {
        let Some(image) = self.connection(key).and_then(|connection| connection.image.clone()) else { return };
        self.shared.image_failed(&image, error);
    }
}

fn layout_of(connections: &[Option<Connection>], slot: usize) -> Option<&dyn Layout> {
    let connection = connections.get(slot)?.as_ref()?;
    // Descriptors come with the first byte of a message of its own, before any page.
    if connection.local_due || connection.stage != Stage::Open {
        return None;
    }
    connection.image.as_deref().map(|image| image as &dyn Layout)
}

/// Fills `gather` with control bytes and runs. After an error its messages are whole, but some are missing.
fn compose(connection: &mut Connection, gather: &mut Gather, runs: &[Run], stats: &RingStats) -> io::Result<()> {
    gather.reset(connection.image.clone());
    let control = connection.session.control();
    if !control.is_empty() {
        gather.push(control);
        control.clear();
    } else if std::mem::take(&mut connection.local_due) {
        gather.push_local();
        return Ok(());
    }
    for run in runs {
        let start = gather.len();
        let class = &stats.classes[class_index(run.class)];
        let count = |encoding: Encoding, pages: PageCount| class.pages[encoding as usize].add(pages.get());
        match (run.content, &mut connection.compressor, &connection.image) {
            (Content::Zero, _, _) => {
                gather.push(&PageRun::head(run.tag, run.frames, Encoding::Zero, run.last, 0));
                count(Encoding::Zero, run.frames.count());
            }
            (Content::Stored, Some(compressor), Some(image)) if compressor.takes(run.class) => {
                compressor.push(gather, image, run, count)?;
            }
            (Content::Stored, ..) => {
                let payload = run.frames.count().bytes() as usize;
                gather.push(&PageRun::head(run.tag, run.frames, Encoding::Raw, run.last, payload));
                gather.push_stored(run.frames);
                count(Encoding::Raw, run.frames.count());
            }
        }
        class.bytes.add((gather.len() - start) as u64);
    }
    Ok(())
}
