use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// A way to capture a running QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// A background snapshot into a file in which every page has its place (`mapped-ram`): the parent stands still for
    /// milliseconds, then goes on while its memory is written. QEMU 10 and newer.
    MappedRam,
    /// A background snapshot as a stream: likewise, for QEMU 6 and newer.
    BackgroundSnapshot,
    /// The device state alone (`x-ignore-shared`), and a copy of the file that backs the memory, made while the parent stands
    /// still. Needs `memory-backend-file,share=on`, but no privilege.
    IgnoreShared,
    /// A live migration into a file. Needs nothing, but the parent's writes prolong it, and it stands still at the end.
    Precopy,
}

/// A text that names no method.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no way to capture (mapped-ram, background-snapshot, ignore-shared, precopy)")]
pub struct ParseMethodError(String);

impl Method {
    /// All methods, the best first.
    pub const ALL: [Method; 4] = [Method::MappedRam, Method::BackgroundSnapshot, Method::IgnoreShared, Method::Precopy];

    /// The method's name as options spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Method::MappedRam => "mapped-ram",
            Method::BackgroundSnapshot => "background-snapshot",
            Method::IgnoreShared => "ignore-shared",
            Method::Precopy => "precopy",
        }
    }

    /// The migration capabilities that make up the method, in QMP's names.
    pub(super) fn capabilities(self) -> &'static [&'static str] {
        match self {
            Method::MappedRam => &["background-snapshot", "mapped-ram"],
            Method::BackgroundSnapshot => &["background-snapshot"],
            Method::IgnoreShared => &["x-ignore-shared"],
            Method::Precopy => &[],
        }
    }

    /// True when QEMU itself lets the parent go on.
    pub(super) fn in_background(self) -> bool {
        matches!(self, Method::MappedRam | Method::BackgroundSnapshot)
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = ParseMethodError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let method = Method::ALL.into_iter().find(|method| method.name() == text);
        method.ok_or_else(|| ParseMethodError(text.chars().take(64).collect()))
    }
}

/// What a parent is, as far as the choice of a method depends on it.
#[derive(Clone, Debug)]
pub(super) struct Parent {
    /// True when its vCPUs run.
    pub(super) running: bool,
    /// True when a background snapshot leaves it standing still if it did; before version 9.0 QEMU starts it.
    pub(super) stays_paused: bool,
    /// The names of the migration capabilities that its QEMU has.
    pub(super) capabilities: Vec<String>,
    /// Its memory backends.
    pub(super) backends: Vec<Backend>,
}

/// A memory backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Backend {
    pub(super) id: String,
    pub(super) size: u64,
    pub(super) shared: bool,
    /// The file behind it and the offset in it, where it is a file with a name.
    pub(super) file: Option<(PathBuf, u64)>,
}

/// Why a method does not fit a parent.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MethodError {
    /// QEMU lacks a capability.
    #[error("this QEMU has no capability {0}")]
    NoCapability(&'static str),
    /// A background snapshot of a parent that does not run.
    #[error("the parent does not run, and this QEMU would start it after a background snapshot")]
    NotRunning,
    /// No memory backend shares its memory.
    #[error("no memory is shared; it takes -object memory-backend-file,share=on as the machine's memory-backend")]
    NothingShared,
    /// A shared memory backend is not a file that could be read.
    #[error("memory backend {0:?} is shared but is no file with an absolute name (mem-path)")]
    NoFile(String),
}

/// Whether `method` fits `parent`.
pub(super) fn check(method: Method, parent: &Parent) -> Result<(), MethodError> {
    let lacks = |name: &&&str| !parent.capabilities.iter().any(|capability| capability == *name);
    if let Some(missing) = method.capabilities().iter().find(lacks) {
        return Err(MethodError::NoCapability(missing));
    }
    match method {
        _ if method.in_background() && !parent.running && !parent.stays_paused => Err(MethodError::NotRunning),
        Method::IgnoreShared => {
            let mut shared = parent.backends.iter().filter(|backend| backend.shared).peekable();
            if shared.peek().is_none() {
                return Err(MethodError::NothingShared);
            }
            match shared.find(|backend| backend.file.is_none()) {
                Some(nameless) => Err(MethodError::NoFile(nameless.id.clone())),
                None => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

/// The backend behind RAM block `block` of `size` bytes among `backends`: by its name, or else by its size when only one has it.
pub(super) fn backend_of<'b>(block: &str, size: u64, backends: &'b [Backend]) -> Option<&'b Backend> {
    let candidates = || backends.iter().filter(|backend| backend.file.is_some());
    let id = block.strip_prefix("/objects/").unwrap_or(block);
    candidates().find(|backend| backend.id == id).or_else(|| {
        let mut of_size = candidates().filter(|backend| backend.size == size);
        of_size.next().filter(|_| of_size.next().is_none())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parent(capabilities: &[&str]) -> Parent {
        let capabilities = capabilities.iter().map(|name| (*name).to_owned()).collect();
        Parent { running: true, stays_paused: false, capabilities, backends: vec![] }
    }

    fn backend(id: &str, size: u64, file: Option<&str>) -> Backend {
        Backend { id: id.into(), size, shared: true, file: file.map(|path| (path.into(), 0)) }
    }

    #[test]
    fn names() {
        for method in Method::ALL {
            assert_eq!(method.to_string().parse(), Ok(method));
        }
        assert!("auto".parse::<Method>().is_err());
    }

    #[test]
    fn methods_fit_or_say_why_not() {
        let old = parent(&["background-snapshot", "x-ignore-shared"]);
        assert_eq!(check(Method::MappedRam, &old), Err(MethodError::NoCapability("mapped-ram")));
        assert_eq!(check(Method::BackgroundSnapshot, &old), Ok(()));
        assert_eq!(check(Method::IgnoreShared, &old), Err(MethodError::NothingShared));
        assert_eq!(check(Method::Precopy, &parent(&[])), Ok(()));
        let paused = Parent { running: false, ..parent(&["mapped-ram", "background-snapshot"]) };
        assert_eq!(check(Method::BackgroundSnapshot, &paused), Err(MethodError::NotRunning));
        assert_eq!(check(Method::MappedRam, &Parent { stays_paused: true, ..paused }), Ok(()));
        let memfd = Parent { backends: vec![backend("pc.ram", 1, None)], ..old.clone() };
        assert_eq!(check(Method::IgnoreShared, &memfd), Err(MethodError::NoFile("pc.ram".into())));
        let file = Parent { backends: vec![backend("pc.ram", 1, Some("/ram"))], ..old };
        assert_eq!(check(Method::IgnoreShared, &file), Ok(()));
    }

    #[test]
    fn blocks_find_their_backends() {
        let backends = [backend("pc.ram", 10, Some("/a")), backend("dimm", 20, Some("/b")), backend("x", 20, None)];
        let id = |block, size| backend_of(block, size, &backends).map(|backend| backend.id.as_str());
        assert_eq!(id("pc.ram", 10), Some("pc.ram"));
        assert_eq!(id("/objects/dimm", 20), Some("dimm"));
        assert_eq!(id("mem", 20), Some("dimm"));
        assert_eq!(id("mem", 30), None);
    }
}
