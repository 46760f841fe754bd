use std::fmt;
use std::time::Duration;

use descriptor::fetch::{Capabilities, Limits};
use subtle::ConstantTimeEq;

/// What all sessions of a listener have in common.
#[derive(Clone)]
pub struct SessionConfig {
    /// What a client must show to be served; `None` serves everyone.
    pub ticket: Option<Vec<u8>>,
    /// What a client must keep to; the idle time-out is among it.
    pub limits: Limits,
    /// What the server takes up when a client offers it.
    pub capabilities: Capabilities,
    /// The time from connecting to a complete HELLO.
    pub handshake_timeout: Duration,
    /// How long a send may make no progress.
    pub stall_timeout: Duration,
    /// How long to wait for the client's end of a connection after the last word, so that it can read it.
    pub linger: Duration,
}

impl SessionConfig {
    /// Silence after which a session ends.
    pub fn idle_timeout(&self) -> Duration {
        Duration::from_millis(self.limits.idle_timeout_ms.into())
    }

    /// The same without `capabilities`.
    pub fn without(self, capabilities: Capabilities) -> Self {
        Self { capabilities: self.capabilities.without(capabilities), ..self }
    }

    /// True when `ticket` is the right one, or none is needed; takes as long for every wrong one of the same length.
    pub(super) fn admits(&self, ticket: &[u8]) -> bool {
        self.ticket.as_ref().is_none_or(|expected| bool::from(expected.as_slice().ct_eq(ticket)))
    }
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            ticket: None,
            // The server keeps a few dozen bytes for each of them, so the limits can be generous: 256 MiB under way
            // keep any network busy.
            limits: Limits { max_requests: 1024, max_pages: 65_536, idle_timeout_ms: 60_000 },
            capabilities: Capabilities::default(),
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
            linger: Duration::from_secs(1),
        }
    }
}

impl fmt::Debug for SessionConfig {
    /// Leaves the ticket out: it is a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionConfig")
            .field("ticket", &self.ticket.as_ref().map(|_| "secret"))
            .field("limits", &self.limits)
            .field("capabilities", &self.capabilities)
            .finish_non_exhaustive()
    }
}
