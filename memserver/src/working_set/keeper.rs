use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use descriptor::FrameRange;
use descriptor::working_set::{Order, Witness};

use super::ImageSet;
use super::inbox::{Inbox, Joined, Told};

/// How long what is new may be in memory only: clones report every second, and a file is written within milliseconds.
const SAVE_AFTER: Duration = Duration::from_secs(2);

/// After what time a file that could not be written is tried again: long enough for a bad disk to be left in peace.
const SAVE_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Sessions whose news are merged before new clones are told of it: each takes some milliseconds at worst.
const ROUND: usize = 64;

/// How long the end of the server may wait for what is not merged yet; the rest is dropped.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// The thread that works on working sets; dropping it waits until what is merged is saved.
#[derive(Debug)]
pub(crate) struct Keeper {
    handle: KeeperHandle,
    thread: Option<JoinHandle<()>>,
}

/// The other threads' end of it. Nothing here waits for the keeper, nor for the disk.
#[derive(Clone, Debug)]
pub(crate) struct KeeperHandle {
    inbox: Arc<Inbox>,
}

impl Keeper {
    /// Starts it.
    ///
    /// # Errors
    /// When there can be no further thread.
    pub(crate) fn start() -> io::Result<Self> {
        let inbox = Arc::new(Inbox::default());
        let handle = KeeperHandle { inbox: Arc::clone(&inbox) };
        let thread = std::thread::Builder::new().name("working-sets".to_owned()).spawn(move || keep(&inbox))?;
        Ok(Self { handle, thread: Some(thread) })
    }

    pub(crate) fn handle(&self) -> KeeperHandle {
        self.handle.clone()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.handle.inbox.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the working sets has failed; what was learnt last is lost");
        }
    }
}

impl KeeperHandle {
    /// A clone was told this order, without the probes that are drawn by `seed`.
    pub(crate) fn joined(&self, session: u64, set: Arc<ImageSet>, order: Arc<Order>, seed: u64) {
        self.inbox.joined(session, Joined { set, order, seed });
    }

    /// It needed this.
    pub(crate) fn touched(&self, session: u64, ranges: &[FrameRange], last: bool, declined: bool) {
        self.inbox.touched(session, ranges, last, declined);
    }

    /// Its session is over.
    pub(crate) fn left(&self, session: u64) {
        self.inbox.left(session);
    }

    /// A set was replaced.
    pub(crate) fn replaced(&self, set: Arc<ImageSet>) {
        self.inbox.replaced(set);
    }
}

/// A clone that may have more to say.
struct Speaker {
    set: Arc<ImageSet>,
    witness: Witness,
    /// Some of what it told was dropped, so that its silence says nothing.
    cut: bool,
}

fn keep(inbox: &Inbox) {
    let mut speakers: BTreeMap<u64, Speaker> = BTreeMap::new();
    // Sets with news that are not saved, and when they are to be.
    let mut unsaved: Vec<(Instant, Arc<ImageSet>)> = Vec::new();
    let mut stopping: Option<Instant> = None;
    loop {
        let due = unsaved.iter().map(|(due, _)| *due).min();
        let round = inbox.take(ROUND, due.map(|due| due.saturating_duration_since(Instant::now())));
        let mut changed = round.replaced;
        for (session, told) in round.sessions {
            if let Some(set) = hear(&mut speakers, session, told)
                && !changed.iter().any(|other| Arc::ptr_eq(other, &set))
            {
                changed.push(set);
            }
        }
        // An order is made once for all that has come.
        for set in changed {
            set.publish();
            if !unsaved.iter().any(|(_, other)| Arc::ptr_eq(other, &set)) {
                unsaved.push((Instant::now() + SAVE_AFTER, set));
            }
        }
        let mut stop = false;
        if round.stopped {
            let patience = *stopping.get_or_insert_with(|| Instant::now() + STOP_PATIENCE);
            stop = round.left == 0 || Instant::now() >= patience;
        }
        let now = Instant::now();
        let mut failed = Vec::new();
        for (_, set) in unsaved.extract_if(.., |(due, _)| stop || *due <= now) {
            if !set.save() {
                failed.push((now + SAVE_AGAIN_AFTER, set));
            }
        }
        unsaved.append(&mut failed);
        if stop {
            if round.left > 0 {
                tracing::warn!(sessions = round.left, "what these clones told last is not noted any more");
            }
            return;
        }
    }
}

/// Takes note of what is new of a session; tells of which set more is known now.
fn hear(speakers: &mut BTreeMap<u64, Speaker>, session: u64, told: Told) -> Option<Arc<ImageSet>> {
    if let Some(Joined { set, order, seed }) = told.joined {
        let witness = Witness::new(set.frames(), order, seed);
        speakers.insert(session, Speaker { set, witness, cut: false });
    }
    let Speaker { set, witness, cut } = speakers.get_mut(&session)?;
    let set = Arc::clone(set);
    *cut |= told.cut;
    if told.declined {
        witness.declines();
    }
    let says = told.last || !told.ranges.is_empty();
    if says {
        let mut merged = set.merged.lock();
        merged.touched(witness, &told.ranges);
        merged.ended(witness, told.last && !*cut);
    }
    if told.left {
        speakers.remove(&session);
    }
    says.then_some(set)
}

#[cfg(test)]
mod tests {
    use descriptor::{Gfn, ImageId, PageCount};

    use super::*;

    const IMAGE: ImageId = ImageId::from_bytes([7; 16]);
    const FRAMES: PageCount = PageCount::new(1 << 20);

    fn range(start: u64) -> FrameRange {
        FrameRange::new(Gfn::new(start), PageCount::ONE)
    }

    /// Has a clone say all that it needed, in a message for each range.
    fn clone(keeper: &KeeperHandle, session: u64, set: &Arc<ImageSet>, needs: impl Iterator<Item = u64>) {
        keeper.joined(session, Arc::clone(set), set.order(), session);
        needs.for_each(|start| keeper.touched(session, &[range(start)], false, false));
        keeper.touched(session, &[], true, false);
        keeper.left(session);
    }

    #[test]
    fn what_was_told_before_the_end_is_saved() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("x.snowidx");
        let set = Arc::new(ImageSet::load(IMAGE, FRAMES, &index));
        let keeper = Keeper::start().unwrap();
        clone(&keeper.handle(), 1, &set, [100, 200].into_iter());
        drop(keeper);
        let again = ImageSet::load(IMAGE, FRAMES, &index);
        assert_eq!((again.summary().clones, again.summary().common), (1, 2));
    }

    #[test]
    fn many_small_messages_delay_neither_others_nor_the_end() {
        let set = Arc::new(ImageSet::new(IMAGE, FRAMES));
        let keeper = Keeper::start().unwrap();
        // 16 Ki messages of each clone, none next to another.
        for session in 0..4 {
            clone(&keeper.handle(), session, &set, (0..16 << 10).map(|n| n * 64));
        }
        let since = Instant::now();
        drop(keeper);
        assert!(since.elapsed() < 10 * STOP_PATIENCE, "{:?} until the end", since.elapsed());
        assert!(set.summary().common > 0);
    }

    #[test]
    fn who_was_cut_is_not_whole() {
        let set = Arc::new(ImageSet::new(IMAGE, FRAMES));
        let mut speakers = BTreeMap::new();
        let joined = Some(Joined { set: Arc::clone(&set), order: set.order(), seed: 1 });
        hear(&mut speakers, 1, Told { joined, ranges: vec![range(5)], cut: true, ..Told::default() });
        hear(&mut speakers, 1, Told { ranges: vec![range(50)], last: true, left: true, ..Told::default() });
        let summary = set.summary();
        assert_eq!((summary.heard, summary.clones, summary.frames), (1, 0, 2));
        assert!(speakers.is_empty());
    }

    #[test]
    fn a_session_that_is_not_known_changes_nothing() {
        let told = Told { ranges: vec![range(1)], last: true, ..Told::default() };
        assert!(hear(&mut BTreeMap::new(), 1, told).is_none());
    }
}
