//! How long clones take from their descriptor to their first instruction: 1, 8 and 32 embedded clones, each a process of
//! its own, started one after the other as fast as can be, of one server over loopback TCP.

use std::io::Read;
use std::process::{Child, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bench_kit::image::RandomImage;
use bench_kit::roles::{self, PageServer};
use bench_kit::{Args, AwakeProcessors, quantile, rounded};
use serde_json::{Value, json};

fn main() -> ExitCode {
    roles::play().unwrap_or_else(|| bench_kit::run("clone_start", bench))
}

fn bench(args: &Args) -> anyhow::Result<Value> {
    let image = RandomImage::make(64)?;
    let server = PageServer::start(&image.index_path, "tcp://127.0.0.1:0", &[])?;
    let _awake = AwakeProcessors::hold().inspect_err(|error| println!("processors may sleep: {error}"));
    let mut runs = Vec::new();
    println!("{:>8}{:>24}{:>24}", "clones", "first instruction p50", "last clone's");
    for clones in [1, 8, 32] {
        let mut rounds = Vec::new();
        for _ in 0..args.pick(3, 9) {
            let mut starts = started(&image, &server.endpoints[0], clones)?;
            rounds.push((quantile(&mut starts, 1.0), quantile(&mut starts, 0.5)));
        }
        rounds.sort_unstable();
        let (last, half) = rounds[rounds.len() / 2];
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        println!("{clones:>8}{:>21.1} ms{:>21.1} ms", ms(half), ms(last));
        runs.push(
            json!({ "clones": clones, "first_instruction_ms": { "p50": rounded(ms(half)), "max": rounded(ms(last)) } }),
        );
    }
    Ok(json!({ "runs": runs }))
}

/// When each of `clones` clones had the page of its first touch, from the moment on when the first of them was started.
fn started(image: &RandomImage, endpoint: &str, clones: usize) -> anyhow::Result<Vec<Duration>> {
    let begin = Instant::now();
    let mut children: Vec<(Child, Duration)> = Vec::new();
    let result = (|| {
        for _ in 0..clones {
            let mut command = roles::command("memtap")?;
            command.args(["embedded", "--guest-threads", "1", "--workload", "random,touches=1%", "--server", endpoint]);
            command.arg("--descriptor").arg(&image.descriptor_path).env("RUST_LOG", "error").stdout(Stdio::piped());
            let child = command.spawn().context("starting memtap")?;
            // The program runs now: the call returns when the child has become it.
            children.push((child, begin.elapsed()));
        }
        let mut starts = Vec::new();
        for (child, at) in &mut children {
            let mut text = String::new();
            child.stdout.take().context("the clone's output")?.read_to_string(&mut text)?;
            let status = child.wait()?;
            let report: Value =
                serde_json::from_str(&text).with_context(|| format!("a clone ended with {status}: {text}"))?;
            let first_touch = report["first_touch_ms"].as_f64().filter(|ms| *ms > 0.0).context("first_touch_ms")?;
            ensure!(status.success(), "a clone ended with {status}");
            starts.push(*at + Duration::from_secs_f64(first_touch / 1e3));
        }
        Ok(starts)
    })();
    for (child, _) in &mut children {
        let _ = child.kill();
        let _ = child.wait();
    }
    result
}
