use std::time::Duration;

/// Whether the channel is heard at all.
#[derive(Debug)]
pub(super) struct Liveness {
    live: bool,
    heard: Duration,
}

impl Liveness {
    /// Three of the heartbeats that an idle sender sends, each 250 ms after the last. Shorter while it is busy would
    /// mistake a moment without CPU time for the end; what is urgent has deadlines of its own.
    pub(super) const SILENCE: Duration = Duration::from_millis(750);

    pub(super) fn new(now: Duration) -> Self {
        Self { live: false, heard: now }
    }

    /// Notes that the sender was heard; true when the channel comes alive by that.
    pub(super) fn heard(&mut self, now: Duration) -> bool {
        self.heard = now;
        !std::mem::replace(&mut self.live, true)
    }

    pub(super) fn is_live(&self) -> bool {
        self.live
    }

    /// True when the channel falls silent now.
    pub(super) fn fell_silent(&mut self, now: Duration) -> bool {
        let silent = self.live && now >= self.heard + Self::SILENCE;
        self.live &= !silent;
        silent
    }

    pub(super) fn next_timeout(&self) -> Option<Duration> {
        self.live.then(|| self.heard + Self::SILENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_told_once() {
        let ms = Duration::from_millis;
        let mut liveness = Liveness::new(ms(0));
        assert!(!liveness.fell_silent(ms(5000)) && liveness.next_timeout().is_none());
        assert!(liveness.heard(ms(5000)) && !liveness.heard(ms(5001)));
        assert_eq!(liveness.next_timeout(), Some(ms(5751)));
        assert!(!liveness.fell_silent(ms(5750)) && liveness.fell_silent(ms(5751)) && !liveness.fell_silent(ms(6000)));
        assert!(liveness.heard(ms(7000)) && liveness.is_live());
    }
}
