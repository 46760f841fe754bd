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

/// The name of clone `id` by a template in which `{id}` stands for the number.
///
/// # Errors
/// The name itself, where it is none: one that a file, a command line or a hypervisor might take for something else.
pub(crate) fn clone_name(template: &str, id: u32) -> Result<String, String> {
    let name = template.replace("{id}", &id.to_string());
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty() || name.starts_with('-') || !name.bytes().all(allowed) { Err(name) } else { Ok(name) }
}
