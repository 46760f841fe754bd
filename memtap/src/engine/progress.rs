use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::pager::{Hydrate, Pager, Progress};

/// How often a line is logged where no terminal shows a bar.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// How often the bar moves.
const DRAW_EVERY: Duration = Duration::from_millis(200);

/// Tells how far the hydration of a clone is: a bar on a terminal, else a line in the log every few seconds.
pub(super) struct Reporter {
    bar: Option<ProgressBar>,
    enabled: bool,
    active: bool,
    next: Duration,
    last_missing: u64,
}

impl Reporter {
    pub(super) fn new(enabled: bool, progress: Progress) -> Self {
        let bar = (enabled && std::io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{bar:40} {percent:>3}% {binary_bytes_per_sec} {msg}");
            let bar = ProgressBar::new(progress.missing.bytes());
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, enabled, active: false, next: Duration::ZERO, last_missing: progress.missing.get() }
    }

    /// When [`Reporter::report`] wants to be called.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.active.then_some(self.next)
    }

    pub(super) fn report(&mut self, now: Duration, hydrate: Hydrate, pager: &Pager) {
        self.active = self.enabled && hydrate != Hydrate::Off;
        if !self.active || now < self.next {
            return;
        }
        let progress = pager.progress();
        let missing = progress.missing.get();
        match &self.bar {
            Some(bar) => {
                bar.set_position(bar.length().unwrap_or(0).saturating_sub(progress.missing.bytes()));
                bar.set_message(format!("{} MiB missing", progress.missing.bytes() >> 20));
                self.next = now + DRAW_EVERY;
            }
            None => {
                if self.next > Duration::ZERO {
                    let rate = self.last_missing.saturating_sub(missing) as f64 / LOG_EVERY.as_secs_f64();
                    tracing::info!(missing, total = progress.total.get(), "hydrating at {rate:.0} pages/s");
                }
                self.next = now + LOG_EVERY;
            }
        }
        self.last_missing = missing;
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
