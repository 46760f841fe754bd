use std::time::Instant;

use clap::Args;

use super::CliError;
use super::options::CloneOptions;
use crate::engine::OnFailure;
use crate::guest::{Guest, XenGuest};
use crate::pager::Hydrate;
use crate::port::xen::{AttachError, Domain, Left, XenError, XenPort, domain_by_name};

/// Serve a Xen domain that `xl restore -p` made from the stream of `descriptor export xl`, and let it run.
///
/// Runs in the control domain. Needs a Xen with CONFIG_MEM_PAGING, a domain of type pvh or hvm with hardware-assisted paging, and no
/// device passed through to it. While it runs, the domain has only the memory that it touched.
///
/// When its page server stays away, the domain is destroyed or paused as --on-failure says. A memtap that is gone is replaced
/// by one with --take-over; where it paused the domain, or someone else did, `xl unpause` lets it go on after that.
#[derive(Debug, Args)]
pub(super) struct XenArgs {
    #[command(flatten)]
    target: TargetOptions,
    /// Leave the domain paused when it is ready, for someone else to unpause.
    #[arg(long)]
    keep_paused: bool,
    /// Take over a domain whose pager died. No page is lost, as Xen knows which are paged out. But what was asked of the dead
    /// pager cannot be told: vCPUs wait for such pages until they come with all the others, so that everything is fetched at
    /// once, whatever --hydrate says, and the domain needs memory for all of it.
    #[arg(long)]
    take_over: bool,
    #[command(flatten)]
    clone: CloneOptions,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct TargetOptions {
    /// The domain's number.
    #[arg(long, value_name = "N")]
    domid: Option<u16>,
    /// The domain's name.
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
}

pub(super) fn run(arguments: &XenArgs, epoch: Instant) -> Result<u8, CliError> {
    let hydrate = if arguments.take_over { Hydrate::Now } else { arguments.clone.hydrate };
    let mut prepared = CloneOptions { hydrate, ..arguments.clone.clone() }.prepare(epoch)?;
    prepared.zero_around = XenPort::ZERO_AROUND;
    let domain = Domain::open(arguments.target.domid()?)?;
    let control = domain.reopen()?;
    let attached = if arguments.take_over {
        XenPort::take_over(domain, &prepared.descriptor)
    } else {
        XenPort::attach(domain, &prepared.descriptor)
    };
    let mut guest = XenGuest::new(control, arguments.keep_paused)?;
    let (port, present) = attached.map_err(|AttachError { error, left }| {
        arguments.fail(&mut guest, left);
        error
    })?;
    let figures = port.figures();
    tracing::info!(
        domain = figures.domain,
        taken_over = figures.taken_over,
        prepare_us = figures.prepare.as_micros() as u64,
        us_per_page = format!("{:.1}", figures.evict_us_per_page),
        "the domain's memory is paged out"
    );
    let (engine, _admin) = prepared.engine(Box::new(port), Box::new(guest), present)?;
    let ended = engine.run();
    arguments.clone.write_stats(&ended)?;
    Ok(ended.outcome.exit_code())
}

impl TargetOptions {
    fn domid(&self) -> Result<u16, XenError> {
        match (self.domid, &self.domain) {
            (Some(domid), _) => Ok(domid),
            (None, Some(name)) => domain_by_name(name),
            (None, None) => Err(XenError::NoDomain("without a name".into())),
        }
    }
}

impl XenArgs {
    /// Fails a domain whose memory is partly made, which nobody can use any more. Any other is left as it is: it may be
    /// somebody else's.
    fn fail(&self, guest: &mut XenGuest, left: Left) {
        match left {
            Left::Untouched => {}
            Left::Unfinished if self.clone.on_failure == OnFailure::Kill => match guest.kill() {
                Ok(()) => tracing::error!("the domain was destroyed"),
                Err(error) => tracing::error!("{}", descriptor::Report(&error)),
            },
            Left::Unfinished => tracing::error!("the domain stays paused, and can never run: destroy it"),
            Left::Paused => tracing::error!("the domain stays paused: try --take-over again, or destroy it"),
        }
    }
}
