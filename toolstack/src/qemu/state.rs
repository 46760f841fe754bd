//! What a clone is doing, judged from what QEMU, the pager and the kernel say.

use std::fmt;
use std::process::ExitStatus;

use serde::{Serialize, Serializer};

/// What a clone is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloneState {
    /// QEMU is starting.
    Starting,
    /// Device state is being loaded.
    Loading,
    /// The guest is ready and was asked to wait (`-S`); memory arrives when it is touched.
    Waiting,
    /// The guest runs; memory arrives when it is touched.
    Running,
    /// The guest runs and has all its memory; it needs nobody any more.
    Complete,
    /// The guest is stopped because its pager is gone.
    Stranded,
    /// The guest is stopped for another reason that QEMU gives.
    Paused,
    /// QEMU could not load the clone.
    Failed,
    /// QEMU ended by itself: the guest powered off.
    Ended,
    /// QEMU died.
    Died,
}

/// What is known of a clone at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Signs<'a> {
    /// How QEMU ended, if it did.
    pub(super) guest_end: Option<ExitStatus>,
    /// How the pager ended, if it did.
    pub(super) pager_end: Option<ExitStatus>,
    /// What `query-status` says, such as `running`; none before QEMU answers.
    pub(super) run: Option<&'a str>,
    /// What `query-migrate` says, such as `postcopy-active`; none before a migration.
    pub(super) migration: Option<&'a str>,
}

impl CloneState {
    /// Nothing can happen to the clone any more.
    pub fn is_final(self) -> bool {
        matches!(self, CloneState::Failed | CloneState::Ended | CloneState::Died)
    }

    /// Something went wrong.
    pub fn is_bad(self) -> bool {
        matches!(self, CloneState::Failed | CloneState::Died | CloneState::Stranded)
    }

    /// The guest got as far as its first instruction, or was asked not to.
    pub fn is_up(self) -> bool {
        matches!(self, CloneState::Waiting | CloneState::Running | CloneState::Complete | CloneState::Paused)
    }

    /// The clone no longer changes from millisecond to millisecond.
    pub fn is_settled(self) -> bool {
        !matches!(self, CloneState::Starting | CloneState::Loading)
    }

    /// The state that follows from the signs; QEMU's words are those of its `RunState` and `MigrationStatus`.
    pub(super) fn judge(signs: Signs<'_>) -> Self {
        if let Some(end) = signs.guest_end {
            return if end.success() { CloneState::Ended } else { CloneState::Died };
        }
        let pager_is_well = signs.pager_end.is_none_or(|end| end.success());
        match (signs.migration, signs.run) {
            (Some("failed"), _) => CloneState::Failed,
            (Some("postcopy-paused" | "postcopy-recover" | "postcopy-recover-setup"), _) => CloneState::Stranded,
            (Some("completed"), Some("running")) => CloneState::Complete,
            (_, Some("running")) if pager_is_well => CloneState::Running,
            (_, Some("running")) => CloneState::Stranded,
            (Some("postcopy-active" | "completed"), Some("prelaunch" | "paused")) => CloneState::Waiting,
            (_, Some("inmigrate")) => CloneState::Loading,
            (_, None) => CloneState::Starting,
            (None | Some("none" | "setup" | "active"), _) => CloneState::Loading,
            _ => CloneState::Paused,
        }
    }

    fn word(self) -> &'static str {
        match self {
            CloneState::Starting => "starting",
            CloneState::Loading => "loading",
            CloneState::Waiting => "waiting",
            CloneState::Running => "running",
            CloneState::Complete => "complete",
            CloneState::Stranded => "stranded",
            CloneState::Paused => "paused",
            CloneState::Failed => "failed",
            CloneState::Ended => "ended",
            CloneState::Died => "died",
        }
    }
}

impl fmt::Display for CloneState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

impl Serialize for CloneState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_clone_goes_from_starting_to_complete() {
        let seen = [
            (None, None),
            (Some("inmigrate"), None),
            (Some("inmigrate"), Some("active")),
            (Some("running"), Some("postcopy-active")),
            (Some("running"), Some("completed")),
        ];
        let states = seen.map(|(run, migration)| CloneState::judge(Signs { run, migration, ..Signs::default() }));
        use CloneState::*;
        assert_eq!(states, [Starting, Loading, Loading, Running, Complete]);
    }

    #[test]
    fn a_clone_that_was_asked_to_wait_waits() {
        let signs = Signs { run: Some("prelaunch"), migration: Some("postcopy-active"), ..Signs::default() };
        assert_eq!(CloneState::judge(signs), CloneState::Waiting);
    }

    #[test]
    fn deaths_are_told_apart() {
        let running = Signs { run: Some("running"), migration: Some("postcopy-active"), ..Signs::default() };
        let killed = Some(ExitStatus::from_raw(9));
        let well = Some(ExitStatus::from_raw(0));
        assert_eq!(CloneState::judge(Signs { guest_end: killed, ..running }), CloneState::Died);
        assert_eq!(CloneState::judge(Signs { guest_end: well, ..running }), CloneState::Ended);
        assert_eq!(CloneState::judge(Signs { pager_end: killed, ..running }), CloneState::Stranded);
        let paused = Signs { run: Some("paused"), migration: Some("postcopy-paused"), ..Signs::default() };
        assert_eq!(CloneState::judge(paused), CloneState::Stranded);
        let failed = Signs { run: Some("inmigrate"), migration: Some("failed"), ..Signs::default() };
        assert_eq!(CloneState::judge(failed), CloneState::Failed);
    }
}
