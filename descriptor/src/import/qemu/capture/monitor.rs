use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::super::qmp::{Qmp, QmpError};
use super::method::{Backend, Parent};

/// The state of a migration, as `query-migrate` tells it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Migration {
    /// `none`, `setup`, `active`, `completed`, `failed`, `cancelled` and others.
    pub(super) status: String,
    pub(super) error: Option<String>,
    /// How much of the memory was written, in bytes.
    pub(super) transferred: u64,
    pub(super) total: u64,
    /// How many pages were written, zero pages too.
    pub(super) pages: u64,
}

impl Migration {
    /// True when there is none, or it has ended.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.status.as_str(), "none" | "completed" | "failed" | "cancelled")
    }
}

/// What a capture asks QEMU, in words of its own.
impl Qmp {
    pub(super) fn parent(&mut self) -> Result<Parent, QmpError> {
        let running = self.is_running()?;
        let capabilities = self.capabilities()?.into_iter().map(|(name, _)| name).collect();
        let memdevs = self.execute("query-memdev", json!({}))?;
        let mut backends = Vec::new();
        for memdev in memdevs.as_array().into_iter().flatten() {
            // A backend without a name cannot be asked any further.
            let Some(id) = memdev["id"].as_str() else { continue };
            let shared = memdev["share"].as_bool().unwrap_or(false);
            let file = if shared { self.backing_file(id)? } else { None };
            backends.push(Backend { id: id.to_owned(), size: memdev["size"].as_u64().unwrap_or(0), shared, file });
        }
        let stays_paused = self.version().major >= 9;
        Ok(Parent { running, stays_paused, capabilities, backends })
    }

    pub(super) fn is_running(&mut self) -> Result<bool, QmpError> {
        let status = self.execute("query-status", json!({}))?;
        status["running"].as_bool().ok_or(QmpError::Answer { command: "query-status", field: "running" })
    }

    /// The parent's name; empty where it has none.
    pub(super) fn name(&mut self) -> Result<String, QmpError> {
        let name = self.execute("query-name", json!({}))?;
        Ok(name["name"].as_str().unwrap_or_default().to_owned())
    }

    pub(super) fn capabilities(&mut self) -> Result<Vec<(String, bool)>, QmpError> {
        let list = self.execute("query-migrate-capabilities", json!({}))?;
        let capability = |entry: &Value| Some((entry["capability"].as_str()?.to_owned(), entry["state"].as_bool()?));
        let list = list.as_array().and_then(|list| list.iter().map(capability).collect());
        list.ok_or(QmpError::Answer { command: "query-migrate-capabilities", field: "capability" })
    }

    pub(super) fn set_capabilities(&mut self, states: &[(String, bool)]) -> Result<(), QmpError> {
        let entry = |(name, state): &(String, bool)| json!({ "capability": name, "state": state });
        let list: Vec<Value> = states.iter().map(entry).collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
    }

    pub(super) fn migration(&mut self) -> Result<Migration, QmpError> {
        let answer = self.execute("query-migrate", json!({}))?;
        let ram = |field: &str| answer["ram"][field].as_u64().unwrap_or(0);
        Ok(Migration {
            status: answer["status"].as_str().unwrap_or("none").to_owned(),
            error: answer["error-desc"].as_str().map(str::to_owned),
            transferred: ram("total").saturating_sub(ram("remaining")),
            total: ram("total"),
            pages: ram("normal").saturating_add(ram("duplicate")),
        })
    }

    /// Gives QEMU a file to migrate to, and says what URI it has there.
    pub(super) fn pass_file(&mut self, file: BorrowedFd<'_>) -> Result<PassedFile, QmpError> {
        // `file:` came with 8.2, and since 9.1 `fd:` is only meant for sockets and pipes.
        let has_file_uri = (self.version().major, self.version().minor) >= (8, 2);
        if has_file_uri {
            let answer = self.execute_with_fd("add-fd", json!({}), file)?;
            let set = answer["fdset-id"].as_u64();
            Ok(PassedFile::Set(set.ok_or(QmpError::Answer { command: "add-fd", field: "fdset-id" })?))
        } else {
            self.execute_with_fd("getfd", json!({ "fdname": FD_NAME }), file)?;
            Ok(PassedFile::Named)
        }
    }

    /// Takes the file back. QEMU has closed it already where a migration to it was begun; that is no failure.
    pub(super) fn close_file(&mut self, file: &PassedFile) -> Result<(), QmpError> {
        let closed = match file {
            PassedFile::Set(set) => self.execute("remove-fd", json!({ "fdset-id": set })),
            PassedFile::Named => self.execute("closefd", json!({ "fdname": FD_NAME })),
        };
        match closed {
            Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn backing_file(&mut self, id: &str) -> Result<Option<(PathBuf, u64)>, QmpError> {
        let path = match self.property(id, "mem-path")? {
            Some(Value::String(path)) => PathBuf::from(path),
            _ => return Ok(None),
        };
        // A folder stands for a file without a name in it, and a relative path counts from QEMU's own folder.
        if !path.is_absolute() || !path.is_file() {
            return Ok(None);
        }
        let offset = self.property(id, "offset")?.and_then(|offset| offset.as_u64()).unwrap_or(0);
        Ok(Some((path, offset)))
    }

    /// A property of an object; `None` when it has no such property.
    fn property(&mut self, id: &str, property: &str) -> Result<Option<Value>, QmpError> {
        let path = if id.starts_with('/') { id.to_owned() } else { format!("/objects/{id}") };
        match self.execute("qom-get", json!({ "path": path, "property": property })) {
            Ok(value) => Ok(Some(value)),
            Err(QmpError::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

const FD_NAME: &str = "snowflock-capture";

/// A file that QEMU was given.
#[derive(Debug)]
pub(super) enum PassedFile {
    Set(u64),
    Named,
}

impl PassedFile {
    pub(super) fn uri(&self) -> String {
        match self {
            PassedFile::Set(set) => format!("file:/dev/fdset/{set}"),
            PassedFile::Named => format!("fd:{FD_NAME}"),
        }
    }
}
