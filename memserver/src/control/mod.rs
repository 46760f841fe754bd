//! The control plane: one thread with tokio-uring, for what needs convenience rather than speed.
//!
//! It reads what the rings count and tells them what to do; it never waits for them, nor they for it.

mod admin;
pub mod client;
mod metrics;
mod status;

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, oneshot};

use crate::image::Preload;
use crate::shared::Shared;

pub(crate) use status::size;
pub use status::{ClassStatus, ImageStatus, RingStatus, SessionStatus, Status, WorkingSetStatus};

/// Connections to either socket at one time; more wait. Few people and one scraper use them.
const MAX_CONNECTIONS: usize = 16;

/// How long a connection to either socket may keep the server waiting.
const PATIENCE: Duration = Duration::from_secs(30);

/// The sockets of the control plane.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    pub(crate) admin: Option<UnixListener>,
    pub(crate) metrics: Option<TcpListener>,
}

/// What it is to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// For images that are added.
    pub(crate) preload: Preload,
    /// For draining, where no other time is asked for.
    pub(crate) grace: Duration,
    /// Whether to drain at SIGTERM and SIGINT.
    pub(crate) signals: bool,
}

impl Sockets {
    pub(crate) fn is_empty(&self) -> bool {
        self.admin.is_none() && self.metrics.is_none()
    }
}

/// Starts the control plane, which ends when `stop` is used or dropped.
pub(crate) fn start(
    shared: Arc<Shared>,
    sockets: Sockets,
    settings: Settings,
    stop: oneshot::Receiver<()>,
) -> io::Result<JoinHandle<()>> {
    let (ready, started) = std::sync::mpsc::channel();
    let thread = thread::Builder::new().name("control".to_owned()).spawn(move || {
        let runtime = match tokio_uring::Runtime::new(&tokio_uring::builder()) {
            Ok(runtime) => runtime,
            Err(error) => return drop(ready.send(Err(error))),
        };
        runtime.block_on(async {
            match spawn_tasks(&shared, sockets, settings) {
                Ok(()) => {
                    let _ = ready.send(Ok(()));
                    let _ = stop.await;
                }
                Err(error) => drop(ready.send(Err(error))),
            }
        });
    })?;
    started.recv().unwrap_or_else(|_| Err(io::Error::other("it ended at once")))?;
    Ok(thread)
}

fn spawn_tasks(shared: &Arc<Shared>, sockets: Sockets, settings: Settings) -> io::Result<()> {
    if settings.signals {
        let signals = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
        for mut each in signals {
            let shared = Arc::clone(shared);
            tokio_uring::spawn(async move {
                while each.recv().await.is_some() {
                    // Whoever asks twice does not want to wait.
                    let grace = if shared.is_draining() { Duration::ZERO } else { settings.grace };
                    shared.drain(grace);
                }
            });
        }
    }
    if let Some(listener) = sockets.admin {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        tokio_uring::spawn(accept_admin(listener, Arc::clone(shared), settings));
    }
    if let Some(listener) = sockets.metrics {
        tokio_uring::spawn(accept_metrics(tokio_uring::net::TcpListener::from_std(listener), Arc::clone(shared)));
    }
    Ok(())
}

async fn accept_admin(listener: tokio::net::UnixListener, shared: Arc<Shared>, settings: Settings) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let accepted = listener.accept().await.and_then(|(stream, _)| stream.into_std());
        let stream = accepted.and_then(|stream| stream.set_nonblocking(false).map(|()| stream));
        match stream {
            Ok(stream) => {
                let (stream, shared) = (tokio_uring::net::UnixStream::from_std(stream), Arc::clone(&shared));
                tokio_uring::spawn(async move {
                    let _place = place;
                    if let Err(error) = admin::serve(stream, shared, settings).await {
                        tracing::debug!(%error, "admin connection");
                    }
                });
            }
            Err(error) => rest_after(&error).await,
        }
    }
}

async fn accept_metrics(listener: tokio_uring::net::TcpListener, shared: Arc<Shared>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let metrics = Rc::new(metrics::Metrics::new(shared));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let metrics = Rc::clone(&metrics);
                tokio_uring::spawn(async move {
                    let _place = place;
                    let served = tokio::time::timeout(PATIENCE, metrics.serve(&stream)).await;
                    if let Ok(Err(error)) = served {
                        tracing::debug!(%error, "metrics connection");
                    }
                });
            }
            Err(error) => rest_after(&error).await,
        }
    }
}

/// Waits a little, so that a failure that stays (no descriptors left) does not keep the processor busy.
async fn rest_after(error: &io::Error) {
    tracing::warn!(%error, "cannot accept on a control socket");
    tokio::time::sleep(Duration::from_millis(200)).await;
}
