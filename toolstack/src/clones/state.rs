use std::fmt;

use serde::{Serialize, Serializer};

/// What a clone is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloneState {
    /// Its hypervisor is starting.
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
    /// The guest is stopped for another reason that its hypervisor gives.
    Paused,
    /// The hypervisor could not load the clone.
    Failed,
    /// The guest powered off, or somebody ended it.
    Ended,
    /// The guest or its hypervisor died.
    Died,
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
