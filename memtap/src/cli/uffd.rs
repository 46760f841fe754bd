use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;

use super::CliError;
use super::options::CloneOptions;
use crate::engine::exit_code;
use crate::port::firecracker::{AcceptError, HandshakeSocket};

/// Serve a VMM that hands its memory over by Firecracker's handshake.
#[derive(Debug, Args)]
pub(super) struct UffdArgs {
    /// Where to wait for the VMM.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// How long to wait for it.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = super::options::duration)]
    accept_timeout: Duration,
    #[command(flatten)]
    clone: CloneOptions,
}

pub(super) fn run(arguments: &UffdArgs, epoch: Instant) -> Result<u8, CliError> {
    // The socket first: a VMM may be started at the same time.
    let socket = HandshakeSocket::bind(&arguments.socket)?;
    let stop = signal_pipe().map_err(|error| CliError::Start("cannot watch for signals", error))?;
    let prepared = arguments.clone.prepare(epoch)?;
    let (mut guest, connection) = match socket.accept(arguments.accept_timeout, stop.as_fd()) {
        Err(error @ AcceptError::Stopped { .. }) => {
            tracing::info!("{error}");
            return Ok(exit_code::STOPPED);
        }
        accepted => accepted?,
    };
    let port = match connection.receive(&prepared.descriptor.memory) {
        Ok(port) => port,
        Err(error) => {
            tracing::error!("{}", descriptor::Report(&error));
            arguments.clone.fail(&mut guest);
            return Ok(exit_code::PORT);
        }
    };
    let none = prepared.none();
    let (engine, _admin) = prepared.engine(Box::new(port), Box::new(guest), none)?;
    let ended = engine.run();
    arguments.clone.write_stats(&ended)?;
    drop(connection);
    Ok(ended.outcome.exit_code())
}

/// Readable once a signal came that asks to stop: the engine, which is told of them too, does not run before a VMM is there.
fn signal_pipe() -> io::Result<UnixStream> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let (stop, signalled) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(SIGTERM, signalled.try_clone()?)?;
    signal_hook::low_level::pipe::register(SIGINT, signalled)?;
    Ok(stop)
}
