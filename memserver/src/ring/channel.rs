//! Between the sessions of a ring and the channel thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use descriptor::FrameRange;
use descriptor::fetch::{ChannelGoneReason, Class};

use super::Ring;
use super::sys::Key;
use crate::channel::{Order, SessionKey};
use crate::shared::News;

/// What a client is told when the server has no channel any more.
const CLOSED: &str = "the server has no multicast channel any more";

impl Ring {
    /// How the channel thread knows a session.
    pub(super) fn session_key(&self, key: Key) -> SessionKey {
        SessionKey { ring: self.index, slot: key.slot, generation: key.generation }
    }

    pub(super) fn tell_channel(&self, order: Order) {
        if let Some(channel) = &self.shared.channel {
            channel.tell(order);
        }
    }

    /// Takes note of what somebody waits for, so that clones that come later are sent it first.
    pub(super) fn note_demand(&mut self, key: Key, class: Class, ranges: impl Iterator<Item = FrameRange>) {
        if class == Class::Demand
            && self.shared.channel.is_some()
            && let Some(image) = self.connection(key).and_then(|connection| connection.image.as_ref())
        {
            image.needed().note(ranges);
        }
    }

    /// Asks for a session's membership; the answer comes later.
    pub(super) fn join_channel(&mut self, key: Key) {
        let session = self.session_key(key);
        let shared = Arc::clone(&self.shared);
        let Some(connection) = self.connection(key) else { return };
        match (&shared.channel, connection.image.clone()) {
            (Some(channel), Some(image)) if !channel.is_closed() => {
                connection.in_channel = true;
                channel.tell(Order::Join { session, image });
            }
            _ => connection.session.channel_gone(ChannelGoneReason::Closed, CLOSED),
        }
    }

    /// Ends the membership of a session that is over.
    pub(super) fn leave_channel(&mut self, key: Key) {
        let session = self.session_key(key);
        let Some(connection) = self.connection(key) else { return };
        if std::mem::take(&mut connection.in_channel) {
            self.tell_channel(Order::Leave { session });
        }
    }

    /// Hands on to a session what the channel thread has to say to it.
    pub(super) fn channel_news(&mut self, now: Duration, session: SessionKey, news: News) {
        let key = Key { slot: session.slot, generation: session.generation };
        let Some(connection) = self.connection(key) else { return };
        let member = matches!(news, News::Joined(_));
        match news {
            News::Joined(offer) => drop(connection.session.offer_channel(offer)),
            News::Gone(reason, text) => {
                connection.in_channel = false;
                connection.session.channel_gone(reason, &text);
            }
        }
        if let Some(record) = &connection.record {
            record.multicast.store(member, Ordering::Relaxed);
        }
        self.attend(now, key);
    }

    /// Tells every session that there are no channels any more.
    pub(super) fn channel_closed(&mut self, now: Duration) {
        for key in self.keys() {
            let news = News::Gone(ChannelGoneReason::Closed, CLOSED.to_owned());
            self.channel_news(now, self.session_key(key), news);
        }
    }
}
