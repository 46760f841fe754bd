use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::CliError;
use super::options::print_json;
use crate::admin;
use crate::engine::exit_code;

/// Show how a pager is doing.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// The pager's admin socket.
    #[arg(long, value_name = "PATH")]
    admin: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &StatusArgs) -> Result<u8, CliError> {
    let answer = admin::ask(&arguments.admin, &json!({"cmd": "status"}))?;
    let status = &answer["status"];
    if arguments.json {
        print_json(status)?;
    } else {
        print!("{}", text(status));
    }
    Ok(exit_code::DONE)
}

fn text(status: &Value) -> String {
    let word = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let us = |value: &Value| value.as_f64().unwrap_or(0.0);
    let (source, progress, pager) = (&status["source"], &status["progress"], &status["pager"]);
    let demand = &status["latency"]["demand"];
    let mut lines = vec![
        format!("image      {}", word(&status["image"])),
        format!("state      {}, for {:.1} s", word(&status["state"]), us(&status["uptime_s"])),
    ];
    if let Some(reason) = status["reason"].as_str() {
        lines.push(format!("reason     {reason}"));
    }
    let lane = match (source["connected"] == true, source["local"] == true) {
        (_, true) => "the image's own files",
        (true, false) => "connected",
        (false, false) => "not connected",
    };
    lines.push(format!("server     {} ({lane})", word(&source["endpoint"])));
    lines.extend(channel(&status["channel"]));
    let (total, missing) = (number(&progress["total"]), number(&progress["missing"]));
    let present = total.saturating_sub(missing + number(&progress["avoided"]));
    lines.push(format!(
        "memory     {} MiB: {present} pages present, {missing} to fetch, {} need none",
        total / 256,
        number(&progress["avoided"])
    ));
    lines.push(format!("hydration  {}", word(&status["hydrate"])));
    lines.push(format!(
        "faults     {}: {} answered with zeros, {} on pages under way, {} coalesced",
        number(&pager["faults"]),
        number(&pager["avoided"]),
        number(&pager["covered"]),
        number(&pager["coalesced"])
    ));
    lines.push(format!(
        "fetched    {} demand, {} prefetch, {} as siblings needed them, {} hydration, {} pushed pages, {} bytes over the socket",
        number(&pager["demand_pages"]),
        number(&pager["prefetch_pages"]),
        number(&pager["order_pages"]),
        number(&pager["hydrate_pages"]),
        number(&pager["unasked_pages"]),
        number(&source["bytes_received"])
    ));
    lines.push(format!(
        "latency    p50 {:.0} µs, p99 {:.0} µs, max {:.0} µs over {} demand faults",
        us(&demand["p50_us"]),
        us(&demand["p99_us"]),
        us(&demand["max_us"]),
        number(&demand["count"])
    ));
    lines.join("\n") + "\n"
}

/// The multicast channel in two lines, where there is one.
fn channel(channel: &Value) -> Vec<String> {
    let Some(group) = channel["group"].as_str() else { return vec![] };
    let number = |name: &str| channel[name].as_u64().unwrap_or(0);
    let interface = channel["interface"].as_str().map(|name| format!(" on {name}")).unwrap_or_default();
    let link = match channel["link"].as_str() {
        Some("live") => "live",
        Some("probing") => "nothing has come yet",
        Some("blocked") => "nothing arrives, see the log",
        Some("silent") => "nothing comes any more",
        _ => "ended",
    };
    vec![
        format!("multicast  {group}{interface} ({link}), {} clones", number("members")),
        format!(
            "           {} datagrams, {:.2} % lost, {} recovered, {} repaired, {} NACKs, {} of {} requests fell back to unicast",
            number("received"),
            channel["loss"].as_f64().unwrap_or(0.0) * 100.0,
            number("recovered"),
            number("repaired"),
            number("nacks"),
            number("fallbacks"),
            number("requests"),
        ),
    ]
}
