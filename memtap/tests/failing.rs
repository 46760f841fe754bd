//! Engines that cannot go on.
//!
//! Goal: whatever goes wrong, the guest is failed by policy, and a guest that is held costs nothing. Method: a port that fails
//! as it is told, and a guest that notes what is done to it.

#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod common;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use common::Image;
use descriptor::{Descriptor, Endpoint, FrameRange, Gfn, PageCount};
use memtap::engine::{
    Command, ControlHandle, Engine, EngineConfig, OnFailure, Outcome, StopReason, WorkingSetPolicy, control, exit_code,
};
use memtap::guest::{Guest, GuestError};
use memtap::pager::{Hydrate, Pager, PagerConfig};
use memtap::port::{Event, FaultPort, Installed, PortError, PortFigures, PortTraits, Waiter};
use memtap::source::{Lane, Source, SourceConfig};
use rustix::event::EventfdFlags;

/// Always has events, and fails when they are read.
struct FailingPort {
    ready: OwnedFd,
    panics: bool,
    watched: Arc<AtomicU32>,
}

impl FaultPort for FailingPort {
    fn fd(&self) -> BorrowedFd<'_> {
        self.watched.fetch_add(1, Ordering::Relaxed);
        self.ready.as_fd()
    }

    fn traits(&self) -> PortTraits {
        PortTraits { granule: PageCount::ONE, needs_zeros: false }
    }

    fn read_events(&mut self, _events: &mut Vec<Event>) -> Result<(), PortError> {
        assert!(!self.panics, "a defect");
        Err(PortError::Protocol { peer: "the test".into(), what: "nothing works".into() })
    }

    fn install(&mut self, _start: Gfn, _pages: &[u8]) -> Result<Installed, PortError> {
        Ok(Installed { count: PageCount::ZERO, stopped: None })
    }

    fn install_zeros(&mut self, range: FrameRange) -> Result<Installed, PortError> {
        Ok(Installed { count: range.count(), stopped: None })
    }

    fn resume(&mut self, _gfn: Gfn, _waiter: Waiter) -> Result<(), PortError> {
        Ok(())
    }

    fn complete(&mut self) -> Result<(), PortError> {
        Ok(())
    }

    fn figures(&self) -> Option<PortFigures> {
        None
    }
}

struct NotedGuest(Arc<AtomicU32>);

impl Guest for NotedGuest {
    fn watch(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn ready(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn kill(&mut self) -> Result<(), GuestError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

struct Failing {
    engine: Engine,
    handle: ControlHandle,
    kills: Arc<AtomicU32>,
    watched: Arc<AtomicU32>,
}

fn failing(panics: bool, on_failure: OnFailure) -> Failing {
    let image = Image::new(1024);
    let descriptor = Descriptor::read(&image.descriptor()).unwrap();
    let (kills, watched) = (Arc::default(), Arc::default());
    let ready = rustix::event::eventfd(1, EventfdFlags::CLOEXEC).unwrap();
    let port = FailingPort { ready, panics, watched: Arc::clone(&watched) };
    let pager = Pager::new(Duration::ZERO, PagerConfig::for_clone(&descriptor, port.traits()), 1).unwrap();
    let source = Source::new(SourceConfig {
        endpoints: vec![Endpoint::Unix(image.path("nobody"))],
        image: image.id,
        universe: image.memory.universe(),
        ticket: vec![],
        lane: Lane::Auto,
        multicast: false,
        working_set: false,
        granule: PageCount::ONE,
        seed: 1,
    });
    let config = EngineConfig {
        image: image.id,
        hydrate: Hydrate::Off,
        spin: Duration::ZERO,
        on_failure,
        patience: Duration::from_secs(60),
        progress: false,
        channel_interface: None,
        working_set: WorkingSetPolicy::Off,
    };
    let (control, handle) = control().unwrap();
    let guest = Box::new(NotedGuest(Arc::clone(&kills)));
    let engine = Engine::new(config, pager, Box::new(port), source.unwrap(), guest, control, Instant::now());
    Failing { engine, handle, kills, watched }
}

#[test]
fn a_panic_fails_the_guest_by_policy() {
    let Failing { engine, kills, .. } = failing(true, OnFailure::Kill);
    let ended = engine.run();
    assert_eq!(ended.outcome.exit_code(), exit_code::PORT);
    assert!(ended.outcome.to_string().contains("panicked"), "{}", ended.outcome);
    assert_eq!(kills.load(Ordering::Relaxed), 1);
}

#[test]
fn while_a_guest_is_held_its_faults_wake_nobody() {
    let Failing { engine, handle, kills, watched } = failing(false, OnFailure::Hold);
    let running = std::thread::spawn(move || engine.run());
    let state = || {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        handle.send(Command::Status(sender));
        receiver.recv_timeout(common::LONG).unwrap().state
    };
    common::until("the guest is held", || state() == "holding");
    let before = watched.load(Ordering::Relaxed);
    (0..20).for_each(|_| assert_eq!(state(), "holding"));
    assert_eq!(watched.load(Ordering::Relaxed), before, "the port is watched");
    handle.send(Command::Stop(StopReason::Admin));
    assert!(matches!(running.join().unwrap().outcome, Outcome::Failed(_)));
    assert_eq!(kills.load(Ordering::Relaxed), 0);
}
