use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use super::super::qmp::{Qmp, QmpError};
use super::monitor::PassedFile;
use super::{CaptureError, DiskOverlay, Method, Observer, Progress, tell};

/// How often QEMU is asked how far it is, when no event says more.
const POLL: Duration = Duration::from_millis(50);
/// How long a migration may make no progress. A disk that has to write gigabytes first can take that long.
const STALLED: Duration = Duration::from_secs(60);
/// How long QEMU may take to cancel a migration.
const CANCEL: Duration = Duration::from_secs(10);
/// No bound on how fast memory is written: 1 TiB/s. QEMU's own default is made for networks.
const BANDWIDTH: u64 = 1 << 40;

/// One try at a capture, and the way back.
pub(super) struct Session<'q> {
    qmp: &'q mut Qmp,
    /// True when the parent ran before, and so has to run afterwards.
    running: bool,
    old_capabilities: Vec<(String, bool)>,
    old_parameters: Option<Value>,
    passed: Option<PassedFile>,
    stopped: Option<SystemTime>,
    resumed: Option<SystemTime>,
}

impl<'q> Session<'q> {
    pub(super) fn new(qmp: &'q mut Qmp, running: bool) -> Self {
        Self {
            qmp,
            running,
            old_capabilities: Vec::new(),
            old_parameters: None,
            passed: None,
            stopped: None,
            resumed: None,
        }
    }

    /// Migrates the parent into `stream`. After a method that does not work in the background it stands still then.
    pub(super) fn migrate(
        &mut self,
        method: Method,
        stream: &File,
        disks: &[DiskOverlay],
        progress: &mut Observer<'_>,
    ) -> Result<(), CaptureError> {
        while self.qmp.next_event(Duration::ZERO)?.is_some() {}
        self.set_capabilities(method)?;
        self.set_parameters()?;
        self.passed = Some(self.qmp.pass_file(stream.as_fd())?);
        if !disks.is_empty() {
            self.qmp.execute("stop", json!({}))?;
            self.freeze_disks(disks)?;
        }
        let uri = self.passed.as_ref().map(PassedFile::uri);
        self.qmp.execute("migrate", json!({ "uri": uri }))?;
        let cont_early = self.running && method.in_background() && !disks.is_empty();
        self.wait(cont_early, progress)
    }

    /// Puts the parent back as it was, as far as possible: all of it is tried, and the first failure returned.
    pub(super) fn restore(&mut self) -> Result<(), QmpError> {
        let cancelled = self.cancel();
        let continued = self.cont();
        let closed = self.passed.take().map_or(Ok(()), |passed| self.qmp.close_file(&passed));
        let parameters = match self.old_parameters.take() {
            Some(old) => self.qmp.execute("migrate-set-parameters", old).map(drop),
            None => Ok(()),
        };
        let capabilities = match std::mem::take(&mut self.old_capabilities) {
            none if none.is_empty() => Ok(()),
            old => self.qmp.set_capabilities(&old),
        };
        self.see_events()?;
        cancelled.and(continued).and(closed).and(parameters).and(capabilities)
    }

    /// When the parent stood still, and for how long if it ran.
    pub(super) fn pause(&self) -> (Option<SystemTime>, Option<Duration>) {
        let pause = self.stopped.zip(self.resumed).filter(|_| self.running);
        (self.stopped, pause.and_then(|(stopped, resumed)| resumed.duration_since(stopped).ok()))
    }

    /// Turns on what the method needs, and everything else off: other capabilities change the stream in ways that nobody
    /// could read, or do not go with these.
    fn set_capabilities(&mut self, method: Method) -> Result<(), CaptureError> {
        let wanted = method.capabilities();
        let is_wanted = |name: &str| name == "events" || wanted.contains(&name);
        let mut old = self.qmp.capabilities()?;
        old.retain(|(name, state)| *state != is_wanted(name));
        let new: Vec<_> = old.iter().map(|(name, state)| (name.clone(), !state)).collect();
        let set = self.qmp.set_capabilities(&new);
        set.map_err(|refused| CaptureError::of_capabilities(method, refused))?;
        self.old_capabilities = old;
        Ok(())
    }

    fn set_parameters(&mut self) -> Result<(), CaptureError> {
        let current = self.qmp.execute("query-migrate-parameters", json!({}))?;
        let (mut old, mut new) = (json!({}), json!({}));
        old["max-bandwidth"] = current["max-bandwidth"].clone();
        new["max-bandwidth"] = json!(BANDWIDTH);
        // With credentials set, QEMU would encrypt what it writes into the file.
        if let Some(credentials) = current["tls-creds"].as_str().filter(|credentials| !credentials.is_empty()) {
            old["tls-creds"] = json!(credentials);
            new["tls-creds"] = json!("");
        }
        self.qmp.execute("migrate-set-parameters", new)?;
        self.old_parameters = Some(old);
        Ok(())
    }

    fn freeze_disks(&mut self, disks: &[DiskOverlay]) -> Result<(), CaptureError> {
        let mut actions = Vec::with_capacity(disks.len());
        for disk in disks {
            // A relative path would count from QEMU's own folder.
            let path = std::path::absolute(&disk.overlay);
            let path = path.map_err(|source| CaptureError::Write { path: disk.overlay.clone(), source })?;
            let data = json!({ "device": disk.device, "snapshot-file": path, "format": "qcow2" });
            actions.push(json!({ "type": "blockdev-snapshot-sync", "data": data }));
        }
        self.qmp.execute("transaction", json!({ "actions": actions }))?;
        Ok(())
    }

    /// Waits for the end of the migration; `cont_early` has the parent go on as soon as its writes are tracked.
    fn wait(&mut self, mut cont_early: bool, progress: &mut Observer<'_>) -> Result<(), CaptureError> {
        let mut last = None;
        let mut moved = Instant::now();
        loop {
            let event = self.qmp.next_event(POLL)?;
            if let Some(event) = &event {
                self.see(&event.name, event.at);
                if event.name != "MIGRATION" {
                    continue;
                }
            }
            let migration = self.qmp.migration()?;
            match migration.status.as_str() {
                "completed" => break,
                "failed" | "cancelled" | "none" => {
                    let description = migration.error.unwrap_or_else(|| "QEMU gives no reason".to_owned());
                    return Err(CaptureError::Migration { status: migration.status, description });
                }
                _ => {}
            }
            // Pages are only written once their tracking is on.
            if cont_early && migration.pages > 0 {
                self.qmp.execute("cont", json!({}))?;
                cont_early = false;
            }
            tell(progress, Progress::Memory { done: migration.transferred, total: migration.total })?;
            if last.as_ref() != Some(&migration) {
                last = Some(migration);
                moved = Instant::now();
            } else if moved.elapsed() > STALLED {
                return Err(CaptureError::Stalled(STALLED));
            }
        }
        self.see_events()?;
        Ok(())
    }

    fn see_events(&mut self) -> Result<(), QmpError> {
        while let Some(event) = self.qmp.next_event(Duration::ZERO)? {
            self.see(&event.name, event.at);
        }
        Ok(())
    }

    fn see(&mut self, event: &str, at: SystemTime) {
        match event {
            "STOP" => _ = self.stopped.get_or_insert(at),
            "RESUME" => _ = self.resumed.get_or_insert(at),
            _ => {}
        }
    }

    fn cancel(&mut self) -> Result<(), QmpError> {
        let deadline = Instant::now() + CANCEL;
        let mut migration = self.qmp.migration()?;
        if !migration.is_over() {
            self.qmp.execute("migrate_cancel", json!({}))?;
        }
        while !migration.is_over() && Instant::now() < deadline {
            if let Some(event) = self.qmp.next_event(POLL)? {
                self.see(&event.name, event.at);
            }
            migration = self.qmp.migration()?;
        }
        Ok(())
    }

    fn cont(&mut self) -> Result<(), QmpError> {
        if self.running && !self.qmp.is_running()? {
            self.qmp.execute("cont", json!({}))?;
        }
        Ok(())
    }
}
