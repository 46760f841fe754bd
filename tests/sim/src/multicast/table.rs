//! Figures of plain groups, as a table that is kept in the repository and compared exactly: what a change of the protocol
//! costs or gains shows in the review.

use std::fmt::Write;

use super::{Report, Scenario, World};

/// The groups: receivers, and the losses of each in a thousand.
const RECEIVERS: [usize; 5] = [1, 2, 8, 32, 128];
const LOSSES: [u32; 5] = [0, 10, 50, 100, 200];

/// Frames of the image.
const FRAMES: u64 = 2048;

/// What stands above the figures.
const HEAD: &str = "\
# Figures of the multicast channel in simulation, by receivers and independent loss at each of them; made by
# MCAST_TABLE=write cargo test --release -p snowflock-tests --test multicast
#
# bytes     multicast by the server, all headers included, for each byte of the image (8 MiB, MTU 1500): first a push alone,
#           then with guests that touch 60 pages in near lockstep
# nacks     blocks named in NACKs for each datagram that somebody lost
# p99       what 99 of 100 waits of the guests were no longer than, in ms of virtual time
# unicast   pages that came by unicast, in a hundred
# seconds   until all were complete, in virtual time, on links of 10 Gbit/s
#
# receivers loss%   bytes   bytes   nacks     p99 unicast seconds
";

/// The lines of the table for groups of up to `most` receivers.
pub fn lines(most: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for receivers in RECEIVERS.into_iter().filter(|receivers| *receivers <= most) {
        for loss in LOSSES {
            lines.push(line(receivers, loss));
        }
    }
    lines
}

/// The whole file.
pub fn file() -> String {
    let mut file = HEAD.to_owned();
    for line in lines(usize::MAX) {
        let _infallible = writeln!(file, "{line}");
    }
    file
}

fn line(receivers: usize, loss: u32) -> String {
    let scenario = Scenario::plain(u64::from(loss), receivers, f64::from(loss) / 1000.0, FRAMES);
    let mut alone = scenario.clone();
    alone.clones.iter_mut().for_each(|member| member.accesses.clear());
    let alone = World::new(alone).run();
    let report = World::new(scenario).run();
    let percent = |report: &Report| {
        let pages = report.clones.unicast + report.clones.multicast;
        report.clones.unicast as f64 * 100.0 / pages.max(1) as f64
    };
    format!(
        "{receivers:11} {:5.1} {:7.3} {:7.3} {:7.2} {:7.2} {:7.2} {:7.3}",
        f64::from(loss) / 10.0,
        alone.bytes_ratio(),
        report.bytes_ratio(),
        alone.nacks_per_lost(),
        report.wait_p99().as_secs_f64() * 1000.0,
        percent(&report),
        alone.time.as_secs_f64(),
    )
}
