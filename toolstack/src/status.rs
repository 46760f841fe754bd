//! `snowflock status`: what runs.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;

use crate::error::ToolError;
use crate::report::RunReport;
use crate::supervise;

/// Each part is asked this long; one that is busy with a fault storm answers late.
const PATIENCE: Duration = Duration::from_secs(2);

/// Show what runs: forks and their clones
///
/// Looks for the runs of this user, below $XDG_RUNTIME_DIR/snowflock or /tmp/snowflock-UID.
#[derive(Args)]
pub struct Options {
    /// Show this run alone
    #[arg(value_name = "RUNDIR")]
    run: Option<PathBuf>,
    /// Print a JSON array of runs
    #[arg(long)]
    json: bool,
}

/// Prints what runs.
///
/// # Errors
/// When the runs cannot be listed, or the one that was asked for cannot be read.
pub fn run(options: &Options) -> Result<(), ToolError> {
    let dirs = match &options.run {
        Some(dir) => vec![dir.clone()],
        None => supervise::runs()?,
    };
    let mut reports = Vec::new();
    for dir in dirs {
        match RunReport::read(&dir, PATIENCE) {
            Ok(report) => reports.push((dir, report)),
            // Without being asked for by name, a run that is just beginning or ending is no error.
            Err(_) if options.run.is_none() => {}
            Err(error) => return Err(error),
        }
    }
    if options.json {
        let reports: Vec<_> =
            reports.iter().map(|(dir, report)| serde_json::json!({"dir": dir, "run": report})).collect();
        println!("{}", serde_json::Value::from(reports));
    } else if reports.is_empty() {
        println!("nothing runs");
    } else {
        for (dir, report) in &reports {
            println!("{}, pid {}, for {}, in {}", report.command, report.pid, age(report), dir.display());
            if let Some(server) = &report.server {
                println!("  serves at {} (pid {})", server.endpoints, server.pid);
            }
            println!("{}", report.table());
        }
    }
    Ok(())
}

fn age(report: &RunReport) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    match now.saturating_sub(report.started_unix_s) {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}
