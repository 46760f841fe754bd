//! A running server: its threads, and the way they start and stop.

use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use descriptor::image::ImageIndex;
use descriptor::{Endpoint, ImageId};
use thiserror::Error;
use tokio::sync::oneshot;

use crate::channel::{self, Hub, Order};
use crate::config::ServeConfig;
use crate::control::{self, Sockets, Status};
use crate::image::{ImageError, Preload, ServedImage};
use crate::listen::{self, Listener, SocketFile};
use crate::ring::{Features, Ring};
use crate::shared::{Command, Shared};
use crate::working_set::Keeper;

/// The shortest idle time-out: clients that keep quiet must have the time to answer a ping.
const MIN_IDLE_MS: u32 = 100;

/// Why a server cannot start, or has stopped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The kernel gives no ring.
    #[error(
        "cannot set up io_uring (it needs Linux 5.11 or later, sysctl kernel.io_uring_disabled=0, and in a container a \
         seccomp profile that allows io_uring_setup)"
    )]
    NoRing(#[source] io::Error),
    /// The kernel's io_uring is too old.
    #[error("this kernel's io_uring is too old: memserver needs Linux 5.11 or later")]
    OldKernel,
    /// An endpoint cannot be bound.
    #[error("cannot listen at {endpoint}")]
    Listen {
        /// The endpoint.
        endpoint: String,
        /// Why not.
        source: io::Error,
    },
    /// No endpoint was given.
    #[error("no endpoint to listen at: give --listen tcp://HOST:PORT or unix:PATH")]
    NoEndpoint,
    /// Metrics are for this host only.
    #[error("metrics would be readable from the network at {0}: give a loopback address, such as 127.0.0.1:9100")]
    PublicMetrics(std::net::SocketAddr),
    /// Sessions would end at once.
    #[error("an idle time-out of {0} ms would end sessions at once: give {MIN_IDLE_MS} ms or more")]
    IdleTimeout(u32),
    /// The group cannot be sent to.
    #[error("cannot multicast")]
    Multicast(#[from] mcast_socket::SocketError),
    /// The path to the group carries too little in a datagram.
    #[error("cannot multicast in datagrams of {datagram} bytes: {least} are needed")]
    SmallDatagrams {
        /// What a datagram can have in bytes.
        datagram: u16,
        /// What it must have.
        least: u16,
    },
    /// An image cannot be served.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The index of an image cannot be read.
    #[error(transparent)]
    Index(#[from] descriptor::file::FileError),
    /// A thread cannot be started, or has failed.
    #[error("the {thread} thread failed")]
    Thread {
        /// Which one.
        thread: String,
        /// Why.
        source: io::Error,
    },
}

/// A server at work. Dropping it stops it at once.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    rings: Vec<JoinHandle<io::Result<()>>>,
    channel: Option<JoinHandle<()>>,
    keeper: Option<Keeper>,
    control: Option<(JoinHandle<()>, oneshot::Sender<()>)>,
    metrics: Option<std::net::SocketAddr>,
    _files: Vec<SocketFile>,
}

impl Server {
    /// Starts a server. When this returns, everything is bound and clients can connect.
    ///
    /// # Errors
    /// When an image cannot be opened, an endpoint not be bound, or the kernel gives no io_uring.
    pub fn start(config: &ServeConfig) -> Result<Self, ServeError> {
        Self::start_with(config, false)
    }

    /// As [`Server::start`]; with `signals` it drains at SIGTERM and SIGINT.
    pub(crate) fn start_with(config: &ServeConfig, signals: bool) -> Result<Self, ServeError> {
        if config.listen.is_empty() {
            return Err(ServeError::NoEndpoint);
        }
        if let Some(address) = config.metrics.filter(|address| !address.ip().is_loopback()) {
            return Err(ServeError::PublicMetrics(address));
        }
        let idle = config.session.limits.idle_timeout_ms;
        if idle < MIN_IDLE_MS {
            return Err(ServeError::IdleTimeout(idle));
        }
        let setup = |source| ServeError::Thread { thread: "main".to_owned(), source };
        let channel = config.mcast.as_ref().map(channel::open).transpose()?;
        let (channel, station) = channel.unzip();
        let failed = |source| ServeError::Thread { thread: "working-sets".to_owned(), source };
        let keeper = config.working_sets.then(Keeper::start).transpose().map_err(failed)?;
        let shared = Arc::new(Shared::new(config, channel, keeper.as_ref().map(Keeper::handle)).map_err(setup)?);
        for path in &config.images {
            add_image(&shared, path, config.preload)?;
        }
        let mut by_ring: Vec<Vec<Listener>> = vec![Vec::new(); config.threads.get()];
        let mut files = Vec::new();
        let mut endpoints = Vec::new();
        for endpoint in &config.listen {
            let (listeners, file) = listen::bind(endpoint, config.threads.get(), config.socket_mode)?;
            files.extend(file);
            endpoints.extend(listeners.first().map(|listener| listener.endpoint.clone()));
            by_ring.iter_mut().zip(listeners).for_each(|(ring, listener)| ring.push(listener));
        }
        if config.session.ticket.is_none() {
            for endpoint in endpoints.iter().filter(|endpoint| is_public(endpoint)) {
                tracing::warn!(%endpoint, "ANYONE WHO REACHES THIS ADDRESS CAN READ GUEST MEMORY: give --ticket-file");
            }
        }
        // It is set here and nowhere else.
        let _ = shared.endpoints.set(endpoints);
        let (sockets, metrics) = bind_control(config, &mut files)?;
        let rings = start_rings(config, &shared, by_ring)?;
        let mut server = Self { shared, rings, channel: None, keeper, control: None, metrics, _files: files };
        if let Some((config, station)) = config.mcast.as_ref().zip(station) {
            if config.ttl > 0 && !station.local().ip().is_loopback() {
                tracing::warn!(group = %config.group, "WHOEVER IS IN THE GROUP'S NETWORK CAN READ GUEST MEMORY: datagrams are not encrypted");
            }
            let hub = Hub::new(Arc::clone(&server.shared), config.clone(), station);
            server.channel = Some(start_channel(hub, Arc::clone(&server.shared))?);
        }
        if signals || !sockets.is_empty() {
            let (stop, stopped) = oneshot::channel();
            let shared = Arc::clone(&server.shared);
            let settings = control::Settings { preload: config.preload, grace: config.drain_grace, signals };
            let control = control::start(shared, sockets, settings, stopped)
                .map_err(|source| ServeError::Thread { thread: "control".to_owned(), source })?;
            server.control = Some((control, stop));
        }
        Ok(server)
    }

    /// Where it listens, with the ports that were given where they were asked to be any.
    pub fn endpoints(&self) -> &[Endpoint] {
        self.shared.endpoints.get().map_or(&[], Vec::as_slice)
    }

    /// Where it serves metrics.
    pub fn metrics(&self) -> Option<std::net::SocketAddr> {
        self.metrics
    }

    /// Puts one more image into service.
    ///
    /// # Errors
    /// When it cannot be opened, or is served already.
    pub fn add_image(&self, index: &Path, preload: Preload) -> Result<ImageId, ServeError> {
        add_image(&self.shared, index, preload)
    }

    /// Takes an image out of service; its sessions are told and end.
    ///
    /// # Errors
    /// When it is not served.
    pub fn drop_image(&self, image: ImageId) -> Result<(), ServeError> {
        Ok(self.shared.drop_image(image)?)
    }

    /// What it is doing.
    pub fn status(&self) -> Status {
        Status::of(&self.shared)
    }

    /// Begins to stop: no new sessions; those that there are get what they have asked for, and a goodbye. What is not done
    /// after `grace` is broken off.
    pub fn drain(&self, grace: Duration) {
        self.shared.drain(grace);
    }

    /// Waits until it has stopped, after [`Server::drain`] or a signal.
    ///
    /// # Errors
    /// When one of its threads has failed.
    pub fn wait(mut self) -> Result<(), ServeError> {
        self.join()
    }

    fn join(&mut self) -> Result<(), ServeError> {
        let mut result = Ok(());
        for (index, ring) in self.rings.drain(..).enumerate() {
            let ended = ring.join().unwrap_or_else(|_| Err(io::Error::other("it panicked")));
            if let Err(source) = ended {
                result = Err(ServeError::Thread { thread: format!("ring {index}"), source });
            }
        }
        if let Some(thread) = self.channel.take() {
            if let Some(channel) = &self.shared.channel {
                channel.tell(Order::Stop);
            }
            // It has said what went wrong, and nobody depended on it.
            let _ = thread.join();
        }
        // Waits until all is saved.
        drop(self.keeper.take());
        if let Some((control, stop)) = self.control.take() {
            // It may have ended by itself.
            let _ = stop.send(());
            let _ = control.join();
        }
        result
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.drain(Duration::ZERO);
        if let Err(error) = self.join() {
            tracing::error!(error = %descriptor::Report(&error), "server");
        }
    }
}

/// Stops the server when a ring ends that nobody has told to, by a failure or a panic: better the whole server is started
/// anew than that some of its clients hang.
struct EndsAll(Arc<Shared>);

impl Drop for EndsAll {
    fn drop(&mut self) {
        if !self.0.is_draining() {
            tracing::error!("a ring has failed; stopping");
            self.0.drain(Duration::ZERO);
        }
    }
}

/// Has the rings tell their clients when the channel thread ends, for whatever reason.
struct ClosesChannels(Arc<Shared>);

impl Drop for ClosesChannels {
    fn drop(&mut self) {
        if let Some(channel) = &self.0.channel {
            channel.close();
        }
        self.0.tell(&Command::ChannelClosed);
    }
}

fn start_channel(hub: Hub, shared: Arc<Shared>) -> Result<JoinHandle<()>, ServeError> {
    let run = move || {
        let _all = ClosesChannels(shared);
        if let Err(error) = hub.run() {
            tracing::error!(%error, "the multicast channels have failed; going on by unicast");
        }
    };
    let failed = |source| ServeError::Thread { thread: "channel".to_owned(), source };
    thread::Builder::new().name("channel".to_owned()).spawn(run).map_err(failed)
}

/// True for a bound endpoint that other hosts may reach.
fn is_public(endpoint: &Endpoint) -> bool {
    match endpoint {
        Endpoint::Tcp(address) => {
            address.parse::<std::net::SocketAddr>().is_ok_and(|address| !address.ip().to_canonical().is_loopback())
        }
        Endpoint::Unix(_) => false,
    }
}

/// Opens the image of an index file and puts it into service.
pub(crate) fn add_image(shared: &Shared, path: &Path, preload: Preload) -> Result<ImageId, ServeError> {
    let index = ImageIndex::read(path)?;
    let base = path.parent().unwrap_or(Path::new(""));
    let mut image = ServedImage::open(index, base)?;
    if shared.keeper.is_some() {
        image = image.with_working_set(path);
    }
    let image = Arc::new(image);
    shared.catalog.add(Arc::clone(&image))?;
    let id = image.id();
    tracing::info!(image = %id, pages = %image.present(), zeros = %image.zeros(), "image in service");
    let job = move || {
        if let Err(error) = image.preload(preload) {
            tracing::warn!(error = %descriptor::Report(&error), "image not in memory");
        }
    };
    if preload != Preload::Off {
        let preloading = thread::Builder::new().name("preload".to_owned()).spawn(job);
        preloading.map_err(|source| ServeError::Thread { thread: "preload".to_owned(), source })?;
    }
    Ok(id)
}

fn bind_control(
    config: &ServeConfig,
    files: &mut Vec<SocketFile>,
) -> Result<(Sockets, Option<std::net::SocketAddr>), ServeError> {
    let mut sockets = Sockets::default();
    if let Some(path) = &config.admin {
        let failed = |source| ServeError::Listen { endpoint: format!("unix:{}", path.display()), source };
        let (socket, file) = listen::bind_unix(path, 0o600).map_err(failed)?;
        files.push(file);
        sockets.admin = Some(socket.into());
    }
    let mut bound = None;
    if let Some(address) = config.metrics {
        let failed = |source| ServeError::Listen { endpoint: format!("http://{address}/metrics"), source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        bound = Some(listener.local_addr().map_err(failed)?);
        sockets.metrics = Some(listener);
    }
    Ok((sockets, bound))
}

fn start_rings(
    config: &ServeConfig,
    shared: &Arc<Shared>,
    by_ring: Vec<Vec<Listener>>,
) -> Result<Vec<JoinHandle<io::Result<()>>>, ServeError> {
    let mut rings = Vec::new();
    for (index, listeners) in by_ring.into_iter().enumerate() {
        let (ready, started) = mpsc::channel::<Result<Features, ServeError>>();
        let (features, limits) = (config.ring_features, (config.max_sessions.get(), config.max_handshakes.get()));
        let mine = Arc::clone(shared);
        // A ring belongs to the thread that makes it.
        let run = move || match Ring::new(Arc::clone(&mine), index, listeners, features, limits) {
            Ok(ring) => {
                let _ = ready.send(Ok(ring.features()));
                let _all = EndsAll(mine);
                ring.run()
            }
            Err(error) => {
                let _ = ready.send(Err(error));
                Ok(())
            }
        };
        let failed = |source| ServeError::Thread { thread: format!("ring {index}"), source };
        let thread = thread::Builder::new().name(format!("ring-{index}")).spawn(run).map_err(failed)?;
        rings.push(thread);
        let features = started.recv().unwrap_or_else(|_| Err(failed(io::Error::other("it ended at once"))));
        let features = match features {
            Ok(features) => features,
            Err(error) => {
                shared.drain(Duration::ZERO);
                rings.into_iter().for_each(|ring| drop(ring.join()));
                return Err(error);
            }
        };
        if index == 0 && !features.lacking().is_empty() {
            tracing::warn!(lacking = features.lacking().join(", "), "this kernel's io_uring is not the newest");
        }
        if let Some(ring) = shared.rings.get(index) {
            let _ = ring.features.set(features);
        }
    }
    Ok(rings)
}
