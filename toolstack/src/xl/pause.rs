//! How long the parent stood still, by what `xl -vvv` logs while it captures.
//!
//! The pause begins when xl sees that the guest has suspended: no processor of its runs any more. It ends when xl has ended, which is
//! after it has resumed the guest. Before it, the guest gets ready: it acknowledges xl's request, freezes its processes and stops its
//! devices, which takes it some milliseconds, and more where processors are scarce; since what of it runs meanwhile cannot be seen from
//! outside, that time is told apart. How long it takes to thaw is not known either.

use std::time::{Duration, Instant};

/// The moments of a capture, as far as they were seen.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Moments {
    /// xl asked the guest to suspend.
    asked: Option<Instant>,
    /// The guest said that it will.
    acknowledged: Option<Instant>,
    /// No processor of the guest runs any more.
    suspended: Option<Instant>,
}

impl Moments {
    /// Takes note of a line that xl logged, at `now`.
    pub(super) fn note(&mut self, line: &str, now: Instant) {
        let marks = [
            // Or `Calling xc_domain_shutdown on HVM domain`, which is done before it is said.
            ("suspend request via", &mut self.asked),
            ("guest acknowledged suspend request", &mut self.acknowledged),
            ("guest has suspended", &mut self.suspended),
        ];
        if let Some((_, moment)) = marks.into_iter().find(|(words, _)| line.contains(words)) {
            moment.get_or_insert(now);
        }
    }

    /// When the guest stood still.
    pub(super) fn suspended(&self) -> Option<Instant> {
        self.suspended
    }

    /// How long no processor of the guest ran, when xl ended at `end`; none where xl did not tell.
    pub(super) fn pause(&self, end: Instant) -> Option<Duration> {
        Some(end.saturating_duration_since(self.suspended?))
    }

    /// How long it took the guest to get there, from its answer or else from xl's request on.
    pub(super) fn suspending(&self) -> Option<Duration> {
        Some(self.suspended?.saturating_duration_since(self.acknowledged.or(self.asked)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What xl 4.17 logs, and when in milliseconds.
    const LOG: [(&str, u64); 6] = [
        ("migration target: Ready to receive domain.", 0),
        (
            "libxl: debug: libxl_dom_suspend.c:203:domain_suspend_callback_common: Domain 1:issuing PVH/HVM suspend request via XenBus control node",
            1000,
        ),
        (
            "libxl: debug: libxl_dom_suspend.c:281:domain_suspend_common_pvcontrol_suspending: Domain 1:guest acknowledged suspend request",
            1010,
        ),
        (
            "libxl: debug: libxl_dom_suspend.c:300:domain_suspend_common_wait_guest: Domain 1:wait for the guest to suspend",
            1011,
        ),
        ("libxl: debug: libxl_dom_suspend.c:358:suspend_common_wait_guest_check: Domain 1:guest has suspended", 1030),
        ("Migration failed, resuming at sender.", 1090),
    ];

    fn noted(skip: &str) -> (Moments, Instant) {
        let start = Instant::now();
        let mut moments = Moments::default();
        for (line, at) in LOG.iter().filter(|(line, _)| skip.is_empty() || !line.contains(skip)) {
            moments.note(line, start + Duration::from_millis(*at));
        }
        (moments, start + Duration::from_millis(1100))
    }

    #[test]
    fn the_pause_goes_from_the_suspension_to_the_end() {
        let (moments, end) = noted("");
        assert_eq!(moments.pause(end), Some(Duration::from_millis(70)));
        assert_eq!(moments.suspending(), Some(Duration::from_millis(20)));
    }

    #[test]
    fn what_xl_does_not_tell_is_not_made_up() {
        let (moments, _) = noted("acknowledged");
        assert_eq!(moments.suspending(), Some(Duration::from_millis(30)));
        let (moments, end) = noted("has suspended");
        assert_eq!((moments.pause(end), moments.suspending()), (None, None));
    }
}
