//! What a clone is doing, judged from what QEMU, the pager and the kernel say.

use std::process::ExitStatus;

use crate::clones::CloneState;

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

impl Signs<'_> {
    /// The state that follows; QEMU's words are those of its `RunState` and `MigrationStatus`.
    pub(super) fn state(self) -> CloneState {
        if let Some(end) = self.guest_end {
            return if end.success() { CloneState::Ended } else { CloneState::Died };
        }
        let pager_is_well = self.pager_end.is_none_or(|end| end.success());
        match (self.migration, self.run) {
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
        let states = seen.map(|(run, migration)| Signs { run, migration, ..Signs::default() }.state());
        use CloneState::*;
        assert_eq!(states, [Starting, Loading, Loading, Running, Complete]);
    }

    #[test]
    fn a_clone_that_was_asked_to_wait_waits() {
        let signs = Signs { run: Some("prelaunch"), migration: Some("postcopy-active"), ..Signs::default() };
        assert_eq!(signs.state(), CloneState::Waiting);
    }

    #[test]
    fn deaths_are_told_apart() {
        let running = Signs { run: Some("running"), migration: Some("postcopy-active"), ..Signs::default() };
        let killed = Some(ExitStatus::from_raw(9));
        let well = Some(ExitStatus::from_raw(0));
        assert_eq!(Signs { guest_end: killed, ..running }.state(), CloneState::Died);
        assert_eq!(Signs { guest_end: well, ..running }.state(), CloneState::Ended);
        assert_eq!(Signs { pager_end: killed, ..running }.state(), CloneState::Stranded);
        let paused = Signs { run: Some("paused"), migration: Some("postcopy-paused"), ..Signs::default() };
        assert_eq!(paused.state(), CloneState::Stranded);
        let failed = Signs { run: Some("inmigrate"), migration: Some("failed"), ..Signs::default() };
        assert_eq!(failed.state(), CloneState::Failed);
    }
}
