use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use descriptor::FrameRange;
use descriptor::working_set::{Order, Witness};

use crate::image::ServedImage;

/// How long what is new may be in memory only: clones report every second, and a file is written within milliseconds.
const SAVE_AFTER: Duration = Duration::from_secs(2);

/// The thread that works on working sets; dropping it waits until everything is saved.
#[derive(Debug)]
pub(crate) struct Keeper {
    handle: KeeperHandle,
    thread: Option<JoinHandle<()>>,
}

/// The other threads' end of it. What is in its queue is bounded by what sessions may tell.
#[derive(Clone, Debug)]
pub(crate) struct KeeperHandle {
    news: Sender<News>,
}

#[derive(Debug)]
enum News {
    /// A clone was told this order.
    Joined { session: u64, image: Arc<ServedImage>, order: Arc<Order>, seed: u64 },
    /// It needed this.
    Touched { session: u64, ranges: Vec<FrameRange>, last: bool, declined: bool },
    /// Its session is over.
    Left { session: u64 },
    /// The set of an image was replaced.
    Replaced { image: Arc<ServedImage> },
    /// The server ends.
    Stop,
}

impl Keeper {
    /// Starts it.
    ///
    /// # Errors
    /// When there can be no further thread.
    pub(crate) fn start() -> io::Result<Self> {
        let (news, told) = channel();
        let thread = std::thread::Builder::new().name("working-sets".to_owned()).spawn(move || keep(&told))?;
        Ok(Self { handle: KeeperHandle { news }, thread: Some(thread) })
    }

    pub(crate) fn handle(&self) -> KeeperHandle {
        self.handle.clone()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.handle.tell(News::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the working sets has failed; what was learnt last is lost");
        }
    }
}

impl KeeperHandle {
    pub(crate) fn joined(&self, session: u64, image: Arc<ServedImage>, order: Arc<Order>, seed: u64) {
        self.tell(News::Joined { session, image, order, seed });
    }

    pub(crate) fn touched(&self, session: u64, ranges: Vec<FrameRange>, last: bool, declined: bool) {
        self.tell(News::Touched { session, ranges, last, declined });
    }

    pub(crate) fn left(&self, session: u64) {
        self.tell(News::Left { session });
    }

    pub(crate) fn replaced(&self, image: Arc<ServedImage>) {
        self.tell(News::Replaced { image });
    }

    fn tell(&self, news: News) {
        // Without a keeper nothing is learnt any more, and it has said why.
        let _ = self.news.send(news);
    }
}

/// A clone that may have more to say.
struct Speaker {
    image: Arc<ServedImage>,
    witness: Witness,
}

fn keep(told: &Receiver<News>) {
    let mut speakers: BTreeMap<u64, Speaker> = BTreeMap::new();
    // Images with news that are not saved, and since when.
    let mut unsaved: Vec<(Instant, Arc<ServedImage>)> = Vec::new();
    loop {
        let wait = unsaved.first().map(|(since, _)| (*since + SAVE_AFTER).saturating_duration_since(Instant::now()));
        let first = match wait {
            Some(wait) => told.recv_timeout(wait),
            None => told.recv().map_err(RecvTimeoutError::from),
        };
        let mut stop = matches!(first, Err(RecvTimeoutError::Disconnected));
        let mut changed: Vec<Arc<ServedImage>> = Vec::new();
        // An order is made once for all that has come.
        for news in first.into_iter().chain(told.try_iter()) {
            match news {
                News::Stop => stop = true,
                news => changed.extend(hear(&mut speakers, news)),
            }
        }
        for image in changed {
            if !unsaved.iter().any(|(_, other)| Arc::ptr_eq(other, &image)) {
                unsaved.push((Instant::now(), image));
            }
        }
        for (_, image) in &unsaved {
            image.needed().publish();
        }
        let due = |since: Instant| stop || since.elapsed() >= SAVE_AFTER;
        for (_, image) in unsaved.extract_if(.., |(since, _)| due(*since)) {
            image.needed().save();
        }
        if stop {
            return;
        }
    }
}

/// Takes note of news; tells of which image more is known now.
fn hear(speakers: &mut BTreeMap<u64, Speaker>, news: News) -> Option<Arc<ServedImage>> {
    match news {
        News::Joined { session, image, order, seed } => {
            let witness = Witness::new(image.facts().frames, order, seed);
            speakers.insert(session, Speaker { image, witness });
            None
        }
        News::Touched { session, ranges, last, declined } => {
            let Speaker { image, witness } = speakers.get_mut(&session)?;
            if declined {
                witness.declines();
            }
            let mut merged = image.needed().merged.lock();
            merged.touched(witness, &ranges);
            merged.ended(witness, last);
            drop(merged);
            Some(Arc::clone(image))
        }
        News::Left { session } => {
            speakers.remove(&session);
            None
        }
        News::Replaced { image } => Some(image),
        News::Stop => None,
    }
}
