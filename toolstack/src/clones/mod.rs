//! What clones have in common, whatever runs them: options, a state, and being watched from their start to their end.

mod options;
mod state;
mod watch;

use std::path::Path;

use descriptor::Endpoint;

pub(crate) use self::options::{CommonOptions, ServeOptions, Served};
pub use self::state::CloneState;
pub(crate) use self::watch::{Forked, watch};

/// Where the memory of clones comes from.
pub(crate) struct Origin<'a> {
    pub(crate) descriptor: &'a Path,
    pub(crate) server: Option<&'a Endpoint>,
    /// How pages travel where the user did not say.
    pub(crate) lane: Option<&'a str>,
}
