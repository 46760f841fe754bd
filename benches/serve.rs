//! How fast pages are served from memory over loopback TCP: random 4 KiB at depth 1 and 64, and in batches.
//!
//! Peers in the same run: nbdkit and qemu-nbd over the same file, redis with the same blocks as values, and for the batches a
//! bare TCP connection with sends of the same size. One connection each; every answer is compared with the image.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bench_kit::peers::{BlockSource, NbdClient, RedisClient, Server};
use bench_kit::roles::{self, PageServer};
use bench_kit::{Args, AwakeProcessors, median, rounded};
use descriptor::fetch::{self, Class, Delivery, Encoding, Hello, Message, Preamble, Request};
use descriptor::{FrameRange, Gfn, ImageId, PAGE_SIZE, PageCount};
use serde_json::{Value, json};

const BLOCK: usize = PAGE_SIZE as usize;

/// Pages in a batched request: a full run.
const BATCH: u64 = fetch::MAX_PAGES_PER_RUN as u64;

/// Batched requests under way: enough that the server never waits for the next one.
const BATCHES_UNDER_WAY: usize = 8;

fn main() -> ExitCode {
    roles::play().unwrap_or_else(|| bench_kit::run("serve", bench))
}

fn bench(args: &Args) -> anyhow::Result<Value> {
    let mib: u64 = args.pick(256, 1024);
    let rounds = args.pick(3, 5);
    let time = args.pick(Duration::from_millis(400), Duration::from_secs(2));
    let image = bench_kit::image::RandomImage::make(mib)?;
    let _awake = AwakeProcessors::hold().inspect_err(|error| println!("processors may sleep: {error}"));

    let server = PageServer::start(&image.index_path, "tcp://127.0.0.1:0", &["--compress", "off"])?;
    let address = server.endpoints[0].trim_start_matches("tcp://").to_owned();
    let nbdkit = Server::nbdkit(&image.path)?;
    let qemu_nbd = Server::qemu_nbd(&image.path)?;
    let redis = Server::redis()?;
    if let Some(redis) = &redis {
        RedisClient::new(redis.connect()?)?.fill(&image.bytes)?;
    }

    let mut rates: HashMap<(&str, usize), Vec<f64>> = HashMap::new();
    let (mut ours, mut raw) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        for depth in [1, 64] {
            let mut measure = |name, source: &mut dyn BlockSource| -> anyhow::Result<()> {
                let rate = random_reads(source, depth, &image.bytes, time, round)
                    .with_context(|| format!("reading from {name}"))?;
                rates.entry((name, depth)).or_default().push(rate);
                Ok(())
            };
            measure("memserver", &mut FetchClient::connect(&address, image.id)?)?;
            if let Some(server) = &nbdkit {
                measure("nbdkit", &mut NbdClient::new(server.connect()?)?)?;
            }
            if let Some(server) = &qemu_nbd {
                measure("qemu_nbd", &mut NbdClient::new(server.connect()?)?)?;
            }
            if let Some(server) = &redis {
                measure("redis", &mut RedisClient::new(server.connect()?)?)?;
            }
        }
        ours.push(batched(FetchClient::connect(&address, image.id)?, &image.bytes)?);
        raw.push(raw_tcp(image.bytes.len())?);
    }

    let mut rate = |name, depth| rates.get_mut(&(name, depth)).map(|samples| median(samples));
    let qd1 = rate("memserver", 1).unwrap_or_default();
    let qd64 = rate("memserver", 64).unwrap_or_default();
    println!("{:<22}{:>14}{:>14}", "4 KiB random, pages/s", "depth 1", "depth 64");
    for name in ["memserver", "nbdkit", "qemu_nbd", "redis"] {
        match (rate(name, 1), rate(name, 64)) {
            (Some(one), Some(many)) => println!("{name:<22}{one:>14.0}{many:>14.0}"),
            _ => println!("{name:<22}{:>28}", "not installed"),
        }
    }
    let mut ratios: Vec<f64> = ours.iter().zip(&raw).map(|(ours, raw)| ours / raw).collect();
    let (ours, raw, ratio_raw) = (median(&mut ours), median(&mut raw), median(&mut ratios));
    println!("batches of {BATCH} pages: {:.2} GB/s, bare TCP {:.2} GB/s, ratio {ratio_raw:.2}", ours / 1e9, raw / 1e9);
    let ratio = |peer: Option<f64>| peer.map(|peer| rounded(qd64 / peer));
    Ok(json!({
        "image_mib": mib,
        "pages_per_s": { "qd1": rounded(qd1), "qd64": rounded(qd64) },
        "peers": {
            "nbdkit": rate("nbdkit", 64).map(rounded),
            "qemu_nbd": rate("qemu_nbd", 64).map(rounded),
            "redis": rate("redis", 64).map(rounded),
        },
        "ratio_nbdkit": ratio(rate("nbdkit", 64)),
        "ratio_redis": ratio(rate("redis", 64)),
        "batched_bytes_per_s": rounded(ours),
        "bytes_ratio_raw_tcp": rounded(ratio_raw),
    }))
}

/// Blocks per second from `source` with `depth` requests under way, for about `time`; every answer is checked.
fn random_reads(
    source: &mut dyn BlockSource,
    depth: usize,
    image: &[u8],
    time: Duration,
    seed: u64,
) -> anyhow::Result<f64> {
    let blocks = (image.len() / BLOCK) as u64;
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..depth {
        source.request(random.u64(..blocks))?;
    }
    let start = Instant::now();
    let mut answers = 0u64;
    while start.elapsed() < time {
        for _ in 0..depth {
            let (index, block) = source.receive()?;
            let offset = index as usize * BLOCK;
            ensure!(image.get(offset..offset + BLOCK) == Some(block), "block {index} is wrong");
            answers += 1;
            source.request(random.u64(..blocks))?;
        }
    }
    let rate = answers as f64 / start.elapsed().as_secs_f64();
    for _ in 0..depth {
        source.receive()?;
    }
    Ok(rate)
}

/// Bytes per second when the whole image is asked for in full runs.
fn batched(mut client: FetchClient, image: &[u8]) -> anyhow::Result<f64> {
    let pages = (image.len() / BLOCK) as u64;
    let mut batches = FrameRange::new(Gfn::new(0), PageCount::new(pages)).chunks(PageCount::new(BATCH));
    let start = Instant::now();
    for range in batches.by_ref().take(BATCHES_UNDER_WAY) {
        client.ask(Class::Bulk, range)?;
    }
    let mut received = 0;
    while received < pages {
        let (first, bytes, last) = client.next_run()?;
        let offset = first as usize * BLOCK;
        // Comparing everything would measure the comparison: the first page of each run stands for it.
        ensure!(image.get(offset..offset + BLOCK) == bytes.get(..BLOCK), "page {first} is wrong");
        received += (bytes.len() / BLOCK) as u64;
        if last && let Some(range) = batches.next() {
            client.ask(Class::Bulk, range)?;
        }
    }
    Ok(image.len() as f64 / start.elapsed().as_secs_f64())
}

/// Bytes per second over a bare connection, with the same size of sends, for `total` bytes.
fn raw_tcp(total: usize) -> anyhow::Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let sender = std::thread::spawn(move || -> io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let batch = vec![0x5a; BATCH as usize * BLOCK];
        for _ in 0..total / batch.len() {
            stream.write_all(&batch)?;
        }
        Ok(())
    });
    let mut stream = TcpStream::connect(address)?;
    let mut buffer = vec![0; RECEIVE_BUFFER];
    let start = Instant::now();
    let mut received = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count => received += count,
        }
    }
    let rate = received as f64 / start.elapsed().as_secs_f64();
    sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    Ok(rate)
}

/// Room for two messages of the largest size.
const RECEIVE_BUFFER: usize = 2 * fetch::MAX_MESSAGE;

/// A blocking client of the fetch protocol on one connection.
struct FetchClient {
    stream: TcpStream,
    out: Vec<u8>,
    tag: u64,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl FetchClient {
    fn connect(address: &str, image: ImageId) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        let buffer = vec![0; RECEIVE_BUFFER];
        let mut client = Self { stream, out: Vec::new(), tag: 0, buffer, start: 0, end: 0 };
        Preamble.encode(&mut client.out);
        Message::Hello(Hello { image, capabilities: Default::default(), ticket: &[] }).encode(&mut client.out);
        client.flush()?;
        while client.end < size_of::<fetch::wire::Preamble>() {
            client.fill()?;
        }
        let (_, length) = fetch::decode_preamble(&client.buffer[..client.end])?.context("no preamble")?;
        client.start = length;
        loop {
            match fetch::decode(&client.buffer[client.start..client.end])? {
                Some((Message::Welcome(_), length)) => {
                    client.start += length;
                    return Ok(client);
                }
                Some((message, _)) => bail!("the server answered {message:?}"),
                None => client.fill()?,
            }
        }
    }

    fn ask(&mut self, class: Class, range: FrameRange) -> io::Result<()> {
        self.tag += 1;
        Request::encode(self.tag, class, Delivery::Unicast, &[range], &mut self.out);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    fn fill(&mut self) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < fetch::MAX_MESSAGE {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        match self.stream.read(&mut self.buffer[self.end..])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.end += count;
                Ok(())
            }
        }
    }

    /// The next run of raw pages: its first frame, the bytes, and whether its request is answered.
    fn next_run(&mut self) -> anyhow::Result<(u64, &[u8], bool)> {
        loop {
            let (first, payload, last, length) = match fetch::decode(&self.buffer[self.start..self.end])? {
                Some((Message::Pages(run), length)) if run.encoding == Encoding::Raw => {
                    (run.frames.start().index(), run.payload.len(), run.last, length)
                }
                Some((message, _)) => bail!("the server answered {message:?}"),
                None => {
                    self.flush()?;
                    self.fill()?;
                    continue;
                }
            };
            self.start += length;
            return Ok((first, &self.buffer[self.start - payload..self.start], last));
        }
    }
}

impl BlockSource for FetchClient {
    fn request(&mut self, index: u64) -> io::Result<()> {
        self.ask(Class::Demand, FrameRange::single(Gfn::new(index)))
    }

    fn receive(&mut self) -> io::Result<(u64, &[u8])> {
        let (first, bytes, _) = self.next_run().map_err(io::Error::other)?;
        Ok((first, bytes))
    }
}
