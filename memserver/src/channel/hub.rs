//! The thread of the channels.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use descriptor::ImageId;
use descriptor::fetch::{ChannelGoneReason, ChannelOffer, Class};
use mcast::sender::{ExpelReason, SenderConfig, SenderEvent};
use mcast::wire::{Datagram, HEAD};
use mcast::{ChannelParameters, Member};
use mcast_socket::{Event, SendError, Station, StationConfig};

use super::gather::Kept;
use super::handle::{ChannelHandle, Order, SessionKey};
use super::outbox::Outbox;
use super::report::Report;
use super::stream::Stream;
use crate::ServeError;
use crate::config::MulticastConfig;
use crate::image::ServedImage;
use crate::shared::{Command, News, Shared};
use crate::sys;

/// Images that are multicast at one time: each may keep some megabytes, and they share one link.
const MAX_STREAMS: usize = 64;

/// How long a channel outlives its last member, so that clones that come one after another find it.
const LINGER: Duration = Duration::from_secs(10);

/// Bursts between two looks at what the rings and the members say: demand and NACKs wait for no more than 240 KiB.
const BURSTS_PER_TURN: usize = 4;

/// The time between two reports to the control plane.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// The time between two words to the log about a network that does not take datagrams.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// The state of the channel thread.
#[derive(Debug)]
pub(crate) struct Hub {
    shared: Arc<Shared>,
    config: MulticastConfig,
    outbox: Outbox,
    /// By the session of the sender.
    streams: BTreeMap<u64, Stream>,
    by_image: BTreeMap<ImageId, u64>,
    /// The membership of each session: the stream's session and the member.
    sessions: BTreeMap<SessionKey, (u64, Member)>,
    /// The stream whose turn it is first.
    turn: u64,
    /// What is told of all streams, without those that there are.
    past: Report,
    published: Duration,
    changed: bool,
    complained: Option<Duration>,
    stopped: bool,
}

/// Opens the socket of the channels, and the handle by which the hub will be reached.
///
/// # Errors
/// When the group cannot be sent to.
pub(crate) fn open(config: &MulticastConfig) -> Result<(ChannelHandle, Station<Kept>), ServeError> {
    let failed = |source| ServeError::Thread { thread: "channel".to_owned(), source };
    let handle = ChannelHandle::new(Report::default()).map_err(failed)?;
    let station = StationConfig { ttl: config.ttl, ..StationConfig::new(config.group.clone()) };
    let station = Station::open(&station, Some(handle.wake.as_fd()))?;
    let (datagram, least) = (datagram_size(config, &station), HEAD as u16 + ChannelParameters::MIN_PAYLOAD);
    if datagram < least {
        return Err(ServeError::SmallDatagrams { datagram, least });
    }
    handle.publish(first_report(config, &station));
    Ok((handle, station))
}

fn datagram_size(config: &MulticastConfig, station: &Station<Kept>) -> u16 {
    config.max_datagram.unwrap_or(u16::MAX).min(station.max_datagram())
}

fn first_report(config: &MulticastConfig, station: &Station<Kept>) -> Report {
    Report {
        group: config.group.to_string(),
        interface: station.interface().map(str::to_owned),
        address: station.local().to_string(),
        datagram: datagram_size(config, station),
        max_rate: config.max_rate.map(Into::into),
        lacking: lacking(station),
        ..Report::default()
    }
}

/// What slows sending down.
fn lacking(station: &Station<Kept>) -> Vec<String> {
    let features = station.features();
    let all = [(features.ring, "multishot receives in io_uring"), (features.offload, "UDP segmentation")];
    all.into_iter().filter(|(used, _)| !used).map(|(_, name)| name.to_owned()).collect()
}

impl Hub {
    pub(crate) fn new(shared: Arc<Shared>, config: MulticastConfig, station: Station<Kept>) -> Self {
        let past = first_report(&config, &station);
        Self {
            shared,
            config,
            outbox: Outbox::new(station),
            streams: BTreeMap::new(),
            by_image: BTreeMap::new(),
            sessions: BTreeMap::new(),
            turn: 0,
            past,
            published: Duration::ZERO,
            changed: true,
            complained: None,
            stopped: false,
        }
    }

    /// Serves until it is told to stop.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let Some(handle) = &shared.channel else { return Ok(()) };
        while !self.stopped {
            let pace = self.transmit();
            let now = shared.now();
            self.expire(now);
            self.publish(now, handle);
            let timeout = self.timeout(now, pace);
            self.outbox.wait(timeout)?;
            self.handle_events(handle);
        }
        Ok(())
    }

    /// Sends what is due, a few bursts of it; the streams take turns.
    fn transmit(&mut self) -> Pace {
        for _ in 0..BURSTS_PER_TURN {
            let mut idle = true;
            let (before, after) = (self.streams.range(..self.turn), self.streams.range(self.turn..));
            let order: Vec<u64> = after.chain(before).map(|(session, _)| *session).collect();
            for session in order {
                if !self.outbox.has_room() {
                    // Those that had no turn are first in the next.
                    self.turn = session;
                    return Pace::Blocked;
                }
                let Some(stream) = self.streams.get_mut(&session) else { continue };
                match stream.transmit(self.shared.now(), &mut self.outbox) {
                    Ok(false) => {}
                    Ok(true) => {
                        idle = false;
                        self.changed = true;
                    }
                    Err(error) => self.unreadable(session, &error),
                }
                self.take_sender_events(session);
            }
            if idle {
                return Pace::Idle;
            }
        }
        Pace::Busy
    }

    /// How long to wait for an event.
    fn timeout(&self, now: Duration, pace: Pace) -> Option<Duration> {
        let senders = match pace {
            Pace::Busy => return Some(Duration::ZERO),
            // The end of a burst is an event.
            Pace::Blocked => None,
            Pace::Idle => self.streams.values().filter_map(|stream| stream.sender.next_timeout()).min(),
        };
        let expiry = self.streams.values().filter_map(|stream| stream.expiry(LINGER)).min();
        let report = self.changed.then_some(self.published + REPORT_INTERVAL);
        [senders, expiry, report].into_iter().flatten().min().map(|time| time.saturating_sub(now))
    }

    fn handle_events(&mut self, handle: &ChannelHandle) {
        let mut woken = false;
        let mut failures = Vec::new();
        while let Some(event) = self.outbox.next_event() {
            match event {
                Event::Woken => woken = true,
                Event::Feedback { bytes, .. } => {
                    let stream = Datagram::session_of(bytes).and_then(|session| self.streams.get_mut(&session));
                    match stream {
                        Some(stream) => stream.sender.feedback(self.shared.now(), bytes),
                        None => self.past.total.strange += 1,
                    }
                    self.changed = true;
                }
                Event::Sent { mut burst, result } => {
                    if let Err(error) = result {
                        failures.push((burst.take_kept().map(|kept| kept.session()), error));
                    }
                    self.outbox.reuse(burst);
                }
                Event::ControlFailed(error) => failures.push((None, error)),
            }
        }
        for (session, error) in failures {
            self.send_failed(session, error);
        }
        if woken {
            handle.take().into_iter().for_each(|order| self.obey(order));
        }
    }

    fn obey(&mut self, order: Order) {
        let now = self.shared.now();
        self.changed = true;
        match order {
            Order::Join { session, image } => self.join(now, session, &image),
            Order::Leave { session } => {
                if let Some((stream, member)) = self.sessions.remove(&session)
                    && let Some(stream) = self.streams.get_mut(&stream)
                {
                    stream.leave(now, member);
                }
            }
            Order::Request { session, class, ranges } => {
                if let Some((stream, member)) = self.sessions.get(&session)
                    && let Some(stream) = self.streams.get_mut(stream)
                {
                    match class {
                        Class::Demand => stream.sender.demand(now, *member, ranges),
                        Class::Bulk => stream.sender.prefetch(now, *member, ranges),
                    }
                }
            }
            Order::ImageGone(image) => {
                let stream = self.by_image.get(&image.id()).copied();
                let same = |session: &u64| self.streams.get(session).is_some_and(|s| Arc::ptr_eq(&s.image, &image));
                if let Some(session) = stream.filter(same) {
                    self.close(session, "the image is no longer served");
                }
            }
            Order::Stop => self.stopped = true,
        }
    }

    fn join(&mut self, now: Duration, session: SessionKey, image: &Arc<ServedImage>) {
        let joined = self.try_join(now, session, image).inspect_err(|text| {
            tracing::warn!(session = session.number(), image = %image.id(), reason = %text, "not multicast to");
        });
        let news = match joined {
            Ok(offer) => {
                // Without the member: its number is a secret.
                tracing::debug!(session = session.number(), image = %image.id(), "joined");
                self.past.joined += 1;
                News::Joined(offer)
            }
            Err(text) => {
                self.count_move(ChannelGoneReason::Full);
                News::Gone(ChannelGoneReason::Full, text)
            }
        };
        self.tell(session, news);
    }

    fn try_join(
        &mut self,
        now: Duration,
        session: SessionKey,
        image: &Arc<ServedImage>,
    ) -> Result<ChannelOffer, String> {
        let stream = self.stream_of(now, image)?;
        let number = sys::random().map_err(|error| format!("no random number for a member: {error}"))?;
        let member = Member(number);
        stream.join(now, member, session).map_err(|full| full.to_string())?;
        let (start, parameters) = (stream.sender.start(), stream.parameters);
        self.sessions.insert(session, (parameters.session, member));
        let local = self.outbox.station().local();
        Ok(ChannelOffer {
            group: self.config.group.socket_address(),
            feedback: Some(local.ip()),
            feedback_port: local.port(),
            payload: parameters.payload,
            chunk_frames: parameters.chunk_frames,
            session: parameters.session,
            member: member.0,
            start_seq: start.seq.get(),
            start_block: start.next_block.map(|number| number.get()),
        })
    }

    /// The stream of an image, a new one if need be.
    fn stream_of(&mut self, now: Duration, image: &Arc<ServedImage>) -> Result<&mut Stream, String> {
        let there = self.by_image.get(&image.id()).copied();
        // An image that was dropped and is served again is another.
        let same = there.filter(|s| self.streams.get(s).is_some_and(|stream| Arc::ptr_eq(&stream.image, image)));
        let session = match same {
            Some(session) => session,
            None => {
                if let Some(old) = there {
                    self.close(old, "the image is served anew");
                }
                if self.streams.len() >= MAX_STREAMS {
                    return Err(format!("{MAX_STREAMS} images are multicast already"));
                }
                self.open_stream(now, image)?
            }
        };
        self.streams.get_mut(&session).ok_or_else(|| "the channel has just closed".to_owned())
    }

    fn open_stream(&mut self, now: Duration, image: &Arc<ServedImage>) -> Result<u64, String> {
        let numbers = || Ok::<_, io::Error>((sys::random()?, sys::random()?));
        let (session, seed) = numbers().map_err(|error| format!("no random number for a channel: {error}"))?;
        let payload = datagram_size(&self.config, self.outbox.station()) - HEAD as u16;
        let frames = image.facts().frames;
        let channel = ChannelParameters::new(session, payload, frames).map_err(|error| error.to_string())?;
        let config = SenderConfig { max_rate: self.config.max_rate, ..SenderConfig::new(channel) };
        self.streams.insert(session, Stream::new(now, Arc::clone(image), config, seed));
        self.by_image.insert(image.id(), session);
        tracing::info!(image = %image.id(), group = %self.config.group, payload, "multicast channel");
        Ok(session)
    }

    /// Takes note of what a sender says about its members.
    fn take_sender_events(&mut self, session: u64) {
        let now = self.shared.now();
        let Some(stream) = self.streams.get_mut(&session) else { return };
        let mut moved = Vec::new();
        while let Some(event) = stream.sender.poll_event() {
            match event {
                SenderEvent::Expelled { member, reason } => {
                    moved.extend(stream.leave(now, member).map(|key| (key, reason)));
                }
            }
        }
        let image = stream.image.id();
        for (key, reason) in moved {
            let (reason, text) = match reason {
                ExpelReason::TooSlow => (ChannelGoneReason::TooSlow, "it takes in too little and holds the others up"),
                ExpelReason::Silent => (ChannelGoneReason::Silent, "it reports nothing"),
                ExpelReason::Nonsense => (ChannelGoneReason::Closed, "what it reports cannot be true"),
            };
            tracing::warn!(session = key.number(), %image, reason = text, "moved to unicast");
            self.sessions.remove(&key);
            self.count_move(reason);
            self.tell(key, News::Gone(reason, text.to_owned()));
        }
    }

    /// Gives a stream up; its members go on by unicast.
    fn close(&mut self, session: u64, why: &str) {
        let Some(stream) = self.streams.remove(&session) else { return };
        let image = stream.image.id();
        if self.by_image.get(&image) == Some(&session) {
            self.by_image.remove(&image);
        }
        self.past.total = self.past.total.plus(&stream.traffic());
        self.changed = true;
        let members: Vec<_> = stream.members().map(|(_, key)| key).collect();
        tracing::info!(%image, members = members.len(), reason = why, "multicast channel closed");
        for key in members {
            self.sessions.remove(&key);
            self.count_move(ChannelGoneReason::Closed);
            self.tell(key, News::Gone(ChannelGoneReason::Closed, why.to_owned()));
        }
    }

    /// Closes the streams that had no members for long.
    fn expire(&mut self, now: Duration) {
        let over = |stream: &Stream| stream.expiry(LINGER).is_some_and(|time| now >= time);
        let expired: Vec<_> =
            self.streams.iter().filter(|(_, stream)| over(stream)).map(|(session, _)| *session).collect();
        for session in expired {
            self.close(session, "nobody is left in it");
        }
    }

    fn send_failed(&mut self, session: Option<u64>, error: SendError) {
        match (session, error) {
            (Some(session), SendError::Unreadable(error)) => self.unreadable(session, &error),
            (Some(session), error @ SendError::TooLarge { .. }) => {
                tracing::error!(error = %descriptor::Report(&error), "datagrams do not fit any more");
                self.close(session, "the network takes no datagrams of this size any more");
            }
            (_, error) => {
                // They are as good as lost on the way, and repaired or fetched by unicast like others.
                self.past.refused += 1;
                let now = self.shared.now();
                if self.complained.is_none_or(|last| now >= last + COMPLAINT_INTERVAL) {
                    self.complained = Some(now);
                    tracing::warn!(error = %descriptor::Report(&error), group = %self.config.group, "multicast");
                }
            }
        }
    }

    /// Closes a stream whose pages cannot be read, and takes its image out of service if its files are no longer what they were.
    fn unreadable(&mut self, session: u64, error: &io::Error) {
        let Some(image) = self.streams.get(&session).map(|stream| Arc::clone(&stream.image)) else { return };
        self.close(session, "pages of the image cannot be read");
        self.shared.image_failed(&image, error);
    }

    fn tell(&self, session: SessionKey, news: News) {
        if let Some(ring) = self.shared.rings.get(session.ring) {
            ring.tell(Command::Channel(session, news));
        }
    }

    fn count_move(&mut self, reason: ChannelGoneReason) {
        let name = format!("{reason:?}");
        match self.past.moved.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => self.past.moved.push((name, 1)),
        }
    }

    fn publish(&mut self, now: Duration, handle: &ChannelHandle) {
        if !self.changed || now < self.published + REPORT_INTERVAL {
            return;
        }
        (self.changed, self.published) = (false, now);
        let total = self.streams.values().fold(self.past.total, |total, stream| total.plus(&stream.traffic()));
        let channels = self.streams.values().map(Stream::status).collect();
        // Offload goes when the device turns out not to do it.
        let lacking = lacking(self.outbox.station());
        handle.publish(Report { total, channels, dropped: handle.dropped.read(), lacking, ..self.past.clone() });
    }
}

/// How a turn of sending has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    /// Nothing is due.
    Idle,
    /// There is more to send.
    Busy,
    /// There is, but no room for it.
    Blocked,
}
