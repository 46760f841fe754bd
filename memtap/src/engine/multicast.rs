//! The multicast lane as the engine runs it: the decisions of [`Lanes`], the [`Channel`] they are about, and what people are
//! told of it.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use descriptor::FrameRange;
use descriptor::fetch::{ChannelGoneReason, Class, Delivery, Tag};
use mcast::receiver::ChannelEvent;
use mcast::{ChunkSet, Lacks};

use super::PAGES_PER_TURN;
use super::desk::Desk;
use super::outcome::EngineError;
use crate::channel::{Arrival, Channel};
use crate::lanes::{Lanes, Link, Notice, PROBE, STALL, Step};
use crate::pager::{Hydrate, Input};
use crate::source::{ChannelPeer, Source};
use crate::stats::ChannelStatus;

/// How often the channel is told what is missing: some of its reports later at most, and a look at the whole image takes up
/// to a tenth of a millisecond.
const LACKS_EVERY: Duration = Duration::from_millis(100);

/// Portions of datagrams between two looks at the port: half a megabyte at an MTU of 1500, which takes some 100 µs to put
/// together.
const PORTIONS_PER_TURN: usize = 3;

/// The multicast lane of one clone.
pub(super) struct Multicast {
    interface: Option<String>,
    lanes: Lanes,
    channel: Option<Channel>,
    /// All that came was looked at.
    drained: bool,
    /// When the channel is told next what is missing.
    lacks_due: Duration,
    /// What an earlier channel did, its group included.
    status: Option<ChannelStatus>,
}

impl Multicast {
    pub(super) fn new(interface: Option<String>, hydrate: Hydrate) -> Self {
        let lanes = Lanes::new(hydrate == Hydrate::Now);
        Self { interface, lanes, channel: None, drained: true, lacks_due: Duration::ZERO, status: None }
    }

    /// A session begins, with a channel in prospect or without.
    pub(super) fn session(&mut self, now: Duration, promised: bool) {
        self.close();
        if promised { self.lanes.offered(now) } else { self.lanes.down() }
    }

    /// The session has ended.
    pub(super) fn down(&mut self) {
        self.close();
        self.lanes.down();
    }

    /// Leaves the channel, as the clone needs nothing any more. It is told of on as it was.
    pub(super) fn close(&mut self) {
        self.status = self.status();
        self.channel = None;
    }

    /// Joins the channel that the server offers.
    pub(super) fn open(&mut self, now: Duration, peer: &ChannelPeer) {
        self.close();
        match Channel::open(now, peer, self.interface.as_deref()) {
            Ok(channel) => {
                let (group, interface) = channel.group();
                tracing::info!(%group, interface, "joined the multicast group");
                if let Some(advice) = channel.advice() {
                    tracing::warn!("{advice}");
                }
                self.channel = Some(channel);
                self.lacks_due = now;
                self.lanes.offered(now);
            }
            Err(error) => {
                let error = descriptor::Report(&error);
                tracing::warn!(%error, "no multicast; the clone runs on unicast");
                self.lanes.gone(now);
            }
        }
    }

    /// The server has ended the channel for this clone.
    pub(super) fn gone(&mut self, now: Duration, reason: ChannelGoneReason, text: &str) {
        tracing::warn!(?reason, text, "the server ended the multicast channel; the clone runs on unicast");
        self.close();
        self.lanes.gone(now);
    }

    /// True as long as it is not known whether the channel serves.
    pub(super) fn is_probing(&self) -> bool {
        self.lanes.link() == Link::Probing
    }

    /// Which way to ask for pages.
    pub(super) fn route(&mut self, now: Duration, tag: Tag, class: Class, ranges: &[FrameRange]) -> Delivery {
        self.lanes.route(now, tag, class, ranges)
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.channel.as_ref().map(Channel::fd)
    }

    pub(super) fn set_readable(&mut self) {
        if let Some(channel) = &mut self.channel {
            channel.set_readable();
        }
    }

    pub(super) fn has_work(&self) -> bool {
        self.channel.as_ref().is_some_and(Channel::has_work)
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        let channel = self.channel.as_ref();
        let lacks = channel.filter(|_| self.lanes.hydrates()).map(|_| self.lacks_due);
        [self.lanes.next_timeout(), channel.and_then(Channel::next_timeout), lacks].into_iter().flatten().min()
    }

    /// Installs pages from the channel, up to a bound.
    pub(super) fn receive(&mut self, desk: &mut Desk) -> Result<(), EngineError> {
        let Self { lanes, channel: Some(channel), drained, lacks_due, .. } = self else {
            self.drained = true;
            return Ok(());
        };
        let now = desk.now();
        if lanes.set_hydrates(now, desk.hydrate == Hydrate::Now) || now >= *lacks_due {
            *lacks_due = now + LACKS_EVERY;
            channel.set_lacks(now, lacks(desk, channel));
        }
        let mut pages = 0;
        let mut error = None;
        // Also where nothing comes of many datagrams, as they are for others.
        for _ in 0..PORTIONS_PER_TURN {
            let now = desk.now();
            let more = if channel.has_work() { channel.take(now) } else { Ok(false) };
            *drained = !*more.as_ref().unwrap_or(&false);
            error = more.err().or(error);
            let mut ended = false;
            channel.deliver(now, |arrival| match arrival {
                Arrival::Pages { frames, bytes } => {
                    pages += frames.count().get();
                    desk.arrived(0, frames, bytes, false)?;
                    lanes.arrived(desk.now(), frames);
                    Ok::<(), EngineError>(())
                }
                Arrival::Event(event) => {
                    note(lanes, now, event);
                    ended |= matches!(event, ChannelEvent::BurstEnded { .. });
                    Ok(())
                }
            })?;
            lanes.set_members(channel.members());
            if ended {
                channel.set_lacks(now, lacks(desk, channel));
            }
            if *drained || pages >= PAGES_PER_TURN || desk.is_over() {
                break;
            }
        }
        if let Some(error) = error {
            tracing::warn!(%error, "the multicast socket failed; the clone runs on unicast");
            self.close();
            self.lanes.gone(now);
        }
        Ok(())
    }

    /// Does what the lanes decide.
    pub(super) fn advance(&mut self, desk: &mut Desk, source: &mut Source) {
        let now = desk.now();
        while let Some(step) = self.lanes.poll(now, self.drained, |tag| desk.pager.owed(tag)) {
            match step {
                Step::Came(tag) => desk.pager.came(now, tag),
                Step::Ask { tag, class, ranges } => {
                    source.request(tag, class, Delivery::Unicast, &ranges);
                    desk.pager.redirected(now, tag);
                }
                Step::Pushed(pushed) => desk.pager.handle(now, Input::Pushed(pushed)),
                Step::Say(notice) => self.say(notice),
            }
        }
    }

    /// How things are; `None` where there never was a channel.
    pub(super) fn status(&self) -> Option<ChannelStatus> {
        let Some(channel) = &self.channel else {
            return self.status.clone().map(|status| ChannelStatus { link: self.lanes.link(), ..status });
        };
        let (group, interface) = channel.group();
        Some(ChannelStatus {
            group: group.socket_address().to_string(),
            interface: interface.map(str::to_owned),
            link: self.lanes.link(),
            members: self.lanes.members(),
            lanes: *self.lanes.stats(),
            reception: channel.stats().into(),
        })
    }

    fn say(&self, notice: Notice) {
        let (group, interface) = match &self.channel {
            Some(channel) => (channel.group().0.socket_address().to_string(), channel.group().1),
            None => return,
        };
        let interface = interface.unwrap_or("the interface of its route");
        match notice {
            Notice::Live => tracing::info!(group, interface, "pages come by multicast"),
            Notice::Back => tracing::info!(group, interface, "pages come by multicast again"),
            Notice::Blocked => tracing::warn!(
                "no multicast arrives from {group} on {interface} within {PROBE:?}: the clone runs on unicast. To be checked: \
                 switches that snoop IGMP or MLD need a querier; firewalls must let UDP to {group} pass; the server must be \
                 reached by this interface (else --mcast-interface), or rp_filter drops what comes"
            ),
            Notice::Silent => {
                tracing::warn!(group, interface, "no multicast arrives any more: the clone runs on unicast")
            }
            Notice::Stalled => tracing::info!(
                group,
                "nothing was pushed for {STALL:?}: the rest is fetched by unicast, until something comes"
            ),
            Notice::Resting(rest) => tracing::info!(
                group,
                "multicast answers come too late: pages that the guest waits for are asked for by unicast for {rest:?}"
            ),
        }
    }
}

fn note(lanes: &mut Lanes, now: Duration, event: ChannelEvent) {
    match event {
        ChannelEvent::Live => lanes.live(now),
        ChannelEvent::Silent => lanes.silent(now),
        ChannelEvent::BurstEnded { endgame } => lanes.set_endgame(now, endgame),
        _ => {}
    }
}

/// What is missing, as the channel reports it; `None` when nothing is wanted by push.
fn lacks(desk: &Desk, channel: &Channel) -> Option<Lacks> {
    let parameters = channel.parameters();
    let mut chunks = ChunkSet::new(parameters.chunks());
    let numbers = desk.pager.lacks(parameters.chunk_frames);
    numbers.filter_map(|number| u32::try_from(number).ok()).for_each(|number| chunks.insert(number));
    let pages = desk.pager.lacking();
    (!pages.is_zero()).then_some(Lacks { chunks, pages })
}
