use std::io;
use std::time::Duration;

use descriptor::fetch::{FetchError, GoodbyeReason, Refusal};
use descriptor::{Endpoint, ImageId, PageCount};
use thiserror::Error;

/// Why a session with a page server could not begin or came to its end.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The server cannot be reached.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// The connection broke.
    #[error("connection broke: {0}")]
    Broken(#[source] io::Error),
    /// The server closed the connection without a word.
    #[error("the server closed the connection")]
    Closed,
    /// Nothing was heard for too long.
    #[error("the server was silent for {0:?}")]
    Silent(Duration),
    /// The server sends pings and does not read.
    #[error("the server pings and does not read: {0} bytes for it are queued")]
    Backlog(usize),
    /// The server's bytes break the protocol.
    #[error(transparent)]
    Protocol(#[from] FetchError),
    /// The server sent a message that has no place where it came.
    #[error("the server sent {0} out of turn")]
    OutOfTurn(&'static str),
    /// A payload that does not decompress to its pages.
    #[error("a run of {frames} frames does not decompress: {text}")]
    Compression {
        /// The frames in the run.
        frames: PageCount,
        /// The decoder's words.
        text: String,
    },
    /// The server said no.
    #[error("the server refused ({reason:?}): {text}")]
    Refused {
        /// Why.
        reason: Refusal,
        /// The server's words.
        text: String,
    },
    /// The server ended the session.
    #[error("the server said goodbye ({reason:?}): {text}")]
    Goodbye {
        /// Why.
        reason: GoodbyeReason,
        /// The server's words.
        text: String,
    },
    /// The server's image is not the descriptor's.
    #[error("the server offers image {image} of {frames} frames, the descriptor is of {expected} with {universe}")]
    OtherImage {
        /// The server's image.
        image: ImageId,
        /// Its frames.
        frames: PageCount,
        /// The descriptor's image.
        expected: ImageId,
        /// The frames of the descriptor's memory map.
        universe: PageCount,
    },
    /// The local lane was demanded, and the server does not give it.
    #[error("the server does not hand out the image's files (--lane local needs a Unix socket and its consent)")]
    NoLocalLane,
    /// Another number of files came than the message says.
    #[error("{announced} files were announced for the local lane, {came} came")]
    Files {
        /// The number in the message.
        announced: u16,
        /// The descriptors attached.
        came: usize,
    },
    /// The image's files cannot be mapped.
    #[error("cannot map the image's files: {0}")]
    Map(#[source] io::Error),
}

/// A source that has nobody left to ask.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SourceError {
    /// No server is known.
    #[error("no page server is known: the descriptor names none, and none was given")]
    NoServer,
    /// Every server said no for good; the last answer.
    #[error("no server will serve the image; {endpoint}: {error}")]
    Refused {
        /// The server that answered last.
        endpoint: Endpoint,
        /// What it said.
        #[source]
        error: SessionError,
    },
}

impl SessionError {
    /// True when asking the same server again cannot help.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Refused { reason, .. } => !matches!(reason, Refusal::Busy | Refusal::Draining),
            Self::Goodbye { reason, .. } => matches!(reason, GoodbyeReason::ImageGone),
            Self::Protocol(error) => matches!(error, FetchError::Magic(_) | FetchError::Version { .. }),
            Self::OtherImage { .. } | Self::NoLocalLane => true,
            _ => false,
        }
    }
}
