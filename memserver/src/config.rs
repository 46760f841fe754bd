use std::net::SocketAddr;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use descriptor::Endpoint;
use descriptor::fetch::Capabilities;
use mcast_socket::Group;

use crate::image::Preload;
use crate::ring::RingFeatures;
use crate::session::SessionConfig;

/// Everything that a server can be told when it starts.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// Index files of the images to serve; more can be added later.
    pub images: Vec<PathBuf>,
    /// Where to listen, one endpoint at least.
    pub listen: Vec<Endpoint>,
    /// The permission bits of the Unix sockets among them. Whoever may write to one may read guest memory, unless clients must
    /// know a ticket.
    pub socket_mode: u32,
    /// Threads, each with a ring of its own.
    pub threads: NonZeroUsize,
    /// Sessions at one time; those beyond are refused as [`descriptor::fetch::Refusal::Busy`].
    pub max_sessions: NonZeroUsize,
    /// Connections of one thread that have no session, because their handshake is under way or was refused. The oldest is
    /// broken off for one more, so that whoever only connects keeps nobody out.
    pub max_handshakes: NonZeroUsize,
    /// What sessions keep to.
    pub session: SessionConfig,
    /// When pages are compressed.
    pub compress: Compress,
    /// What happens to an image's files at the start.
    pub preload: Preload,
    /// Whether clones are told what their siblings needed, and asked what they need; it is kept beside the images.
    pub working_sets: bool,
    /// The multicast channel; `None` for none.
    pub mcast: Option<MulticastConfig>,
    /// What to use of io_uring.
    pub ring_features: RingFeatures,
    /// The path of the admin socket.
    pub admin: Option<PathBuf>,
    /// Where to serve metrics over HTTP; on the loopback interface only.
    pub metrics: Option<SocketAddr>,
    /// How long sessions may go on when the server is about to stop.
    pub drain_grace: Duration,
}

/// Where and how pages are multicast to the clones of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MulticastConfig {
    /// The group, its port, and the interface.
    pub group: Group,
    /// Bytes per second that the channel of one image sends at most; as fast as its receivers can where missing.
    pub max_rate: Option<NonZeroU64>,
    /// How many routers its datagrams may cross, and one: 1 keeps them in the local network, 0 on this host.
    pub ttl: u8,
    /// Bytes in a datagram at most, where the path is narrower than the interface's MTU.
    pub max_datagram: Option<u16>,
}

/// When pages are compressed for a client that can decompress them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compress {
    /// Bulk for clients on other hosts, as long as it shrinks.
    Auto,
    /// Never.
    Off,
    /// Whatever shrinks.
    Always,
}

impl ServeConfig {
    /// A server of these images at these endpoints, the rest as it comes.
    pub fn new(images: Vec<PathBuf>, listen: Vec<Endpoint>) -> Self {
        let capabilities = Capabilities::LOCAL.union(Capabilities::LZ4);
        let capabilities = capabilities.union(Capabilities::MULTICAST).union(Capabilities::WORKING_SET);
        Self {
            images,
            listen,
            socket_mode: 0o600,
            threads: NonZeroUsize::MIN,
            // Each costs some kilobytes, and a descriptor where the kernel has no direct ones.
            max_sessions: NonZeroUsize::new(1024).unwrap_or(NonZeroUsize::MIN),
            // A whole fleet of clones may connect at once.
            max_handshakes: NonZeroUsize::new(512).unwrap_or(NonZeroUsize::MIN),
            session: SessionConfig { capabilities, ..SessionConfig::default() },
            compress: Compress::Auto,
            preload: Preload::Populate,
            working_sets: true,
            mcast: None,
            ring_features: RingFeatures::Auto,
            admin: None,
            metrics: None,
            drain_grace: Duration::from_secs(5),
        }
    }
}

impl MulticastConfig {
    /// A channel of this group on the local network, with as much as the path and the receivers take.
    pub fn new(group: Group) -> Self {
        Self { group, max_rate: None, ttl: 1, max_datagram: None }
    }
}
