//! What the rings and the control plane have in common.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use descriptor::fetch::{Capabilities, ChannelGoneReason, ChannelOffer};
use descriptor::{Endpoint, ImageId};
use parking_lot::Mutex;

use crate::channel::{ChannelHandle, Order, SessionKey};
use crate::config::{Compress, ServeConfig};
use crate::image::{Catalog, ImageError, ServedImage};
use crate::ring::Features;
use crate::session::SessionConfig;
use crate::stats::{Number, RingStats};
use crate::sys::EventCounter;
use crate::working_set::KeeperHandle;

/// The state of a server, which all of its threads see.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) catalog: Catalog,
    unix_sessions: Arc<SessionConfig>,
    tcp_sessions: Arc<SessionConfig>,
    pub(crate) compress: Compress,
    pub(crate) rings: Vec<RingHandle>,
    /// Who keeps working sets.
    pub(crate) keeper: Option<KeeperHandle>,
    /// Where pages are multicast.
    pub(crate) channel: Option<ChannelHandle>,
    pub(crate) sessions: Mutex<BTreeMap<u64, Arc<SessionRecord>>>,
    /// Where it listens; known once everything is bound.
    pub(crate) endpoints: OnceLock<Vec<Endpoint>>,
    max_sessions: usize,
    open: AtomicUsize,
    draining: AtomicBool,
    epoch: Instant,
}

/// A ring as the other threads see it.
#[derive(Debug)]
pub(crate) struct RingHandle {
    pub(crate) stats: RingStats,
    pub(crate) features: OnceLock<Features>,
    pub(crate) wake: EventCounter,
    inbox: Mutex<Vec<Command>>,
}

/// What a ring can be told.
#[derive(Clone, Debug)]
pub(crate) enum Command {
    /// Accept no more, end the sessions, and stop; by force at the time given.
    Drain(Duration),
    /// An image is no longer served.
    ImageGone(Arc<ServedImage>),
    /// The channel has something to say to a session.
    Channel(SessionKey, News),
    /// The channel thread has ended.
    ChannelClosed,
}

/// What the channel has to say to a session.
#[derive(Clone, Debug)]
pub(crate) enum News {
    /// It is a member.
    Joined(ChannelOffer),
    /// It is none (any more), and why in words.
    Gone(ChannelGoneReason, String),
}

/// A session as the control plane shows it.
#[derive(Debug)]
pub(crate) struct SessionRecord {
    pub(crate) id: u64,
    pub(crate) image: ImageId,
    pub(crate) endpoint: Endpoint,
    pub(crate) peer: Option<SocketAddr>,
    pub(crate) local: bool,
    /// It is a member of a multicast channel.
    pub(crate) multicast: AtomicBool,
    pub(crate) since: Duration,
    /// Pages sent, by class.
    pub(crate) pages: [Number; 2],
    pub(crate) bytes: Number,
}

impl Shared {
    pub(crate) fn new(
        config: &ServeConfig,
        channel: Option<ChannelHandle>,
        keeper: Option<KeeperHandle>,
    ) -> std::io::Result<Self> {
        let rings = (0..config.threads.get())
            .map(|_| {
                Ok(RingHandle {
                    stats: RingStats::default(),
                    features: OnceLock::new(),
                    wake: EventCounter::new()?,
                    inbox: Mutex::new(Vec::new()),
                })
            })
            .collect::<std::io::Result<_>>()?;
        let lacking = if channel.is_some() { Capabilities::default() } else { Capabilities::MULTICAST };
        let unkept = if keeper.is_some() { Capabilities::default() } else { Capabilities::WORKING_SET };
        let sessions = config.session.clone().without(lacking.union(unkept));
        Ok(Self {
            catalog: Catalog::default(),
            unix_sessions: Arc::new(sessions.clone()),
            tcp_sessions: Arc::new(sessions.without(Capabilities::LOCAL)),
            channel,
            keeper,
            compress: config.compress,
            rings,
            sessions: Mutex::default(),
            endpoints: OnceLock::new(),
            max_sessions: config.max_sessions.get(),
            open: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            epoch: Instant::now(),
        })
    }

    /// The time, since the server was started.
    pub(crate) fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// Tells every ring.
    pub(crate) fn tell(&self, command: &Command) {
        self.rings.iter().for_each(|ring| ring.tell(command.clone()));
    }

    /// What sessions keep to that come in over TCP, or over a Unix socket.
    pub(crate) fn session_config(&self, tcp: bool) -> Arc<SessionConfig> {
        Arc::clone(if tcp { &self.tcp_sessions } else { &self.unix_sessions })
    }

    /// Takes an image out of service, its sessions included. What its clones needed is on the disk then.
    pub(crate) fn drop_image(&self, image: ImageId) -> Result<(), ImageError> {
        // Before the image can be added again, and read it.
        self.catalog.find(image).ok_or(ImageError::Unknown(image))?.needed().retire();
        let image = self.catalog.remove(image)?;
        if let Some(channel) = &self.channel {
            channel.tell(Order::ImageGone(Arc::clone(&image)));
        }
        self.tell(&Command::ImageGone(image));
        Ok(())
    }

    /// Takes an image out of service whose pages could not be read, if its files are no longer what they were.
    pub(crate) fn image_failed(&self, image: &ServedImage, error: &std::io::Error) {
        match image.check() {
            Err(reason) => {
                tracing::error!(image = %image.id(), reason = %descriptor::Report(&reason), "image taken out of service");
                image.needed().abandon();
                // Another session may have come first.
                let _ = self.drop_image(image.id());
            }
            Ok(()) => tracing::error!(image = %image.id(), %error, "pages of the image cannot be read"),
        }
    }

    /// Begins to stop; what is not done after `grace` is broken off. Said again it can only be sooner.
    pub(crate) fn drain(&self, grace: Duration) {
        if !self.draining.swap(true, Ordering::Relaxed) {
            tracing::info!(?grace, "draining");
        }
        self.tell(&Command::Drain(self.now().saturating_add(grace)));
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Takes a place for a session; false when there are as many as allowed.
    pub(crate) fn open_session(&self) -> bool {
        let more = |open| (open < self.max_sessions).then_some(open + 1);
        self.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Gives the place of a session back.
    pub(crate) fn close_session(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl RingHandle {
    /// Tells the ring.
    pub(crate) fn tell(&self, command: Command) {
        self.inbox.lock().push(command);
        self.wake.signal();
    }

    /// What the ring was told since the last time.
    pub(crate) fn take_commands(&self) -> Vec<Command> {
        std::mem::take(&mut *self.inbox.lock())
    }
}
