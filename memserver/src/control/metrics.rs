//! Metrics for Prometheus, over HTTP.

use std::fmt;
use std::io;
use std::sync::Arc;

use descriptor::working_set::Summary;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio_uring::net::TcpStream;

use crate::channel::report::{ChannelStatus, MemberStatus, Report, Sent, Traffic};
use crate::shared::Shared;
use crate::stats::{ABORTS, CLASSES, ClassStats, ENCODINGS, HistogramSnapshot, REFUSALS, RingStats, class_index};

/// The longest head of a request; scrapers send a few hundred bytes.
const MAX_REQUEST: usize = 8 << 10;

const MAX_HEADERS: usize = 64;

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers scrapes.
pub(super) struct Metrics {
    registry: Registry,
}

impl Metrics {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let mut registry = Registry::with_prefix("memserver");
        registry.register_collector(Box::new(Counters(shared)));
        Self { registry }
    }

    /// Answers one request.
    pub(super) async fn serve(&self, stream: &TcpStream) -> io::Result<()> {
        let mut head = Vec::new();
        let response = loop {
            let (result, chunk) = stream.read(Vec::with_capacity(2048)).await;
            if result? == 0 {
                return Ok(());
            }
            head.extend_from_slice(&chunk);
            if let Some(response) = self.respond(&head) {
                break response;
            }
            if head.len() > MAX_REQUEST {
                break plain("431 Request Header Fields Too Large", "the request is too long\n");
            }
        };
        stream.write_all(response.into_bytes()).await.0?;
        stream.shutdown(std::net::Shutdown::Write)
    }

    /// The response to a request; `None` when more of it is to come.
    fn respond(&self, head: &[u8]) -> Option<String> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(head) {
            Ok(httparse::Status::Partial) => return None,
            Ok(httparse::Status::Complete(_)) => {}
            Err(error) => return Some(plain("400 Bad Request", &format!("{error}\n"))),
        }
        let path = request.path.map(|path| path.split('?').next().unwrap_or_default());
        Some(match (request.method, path) {
            (Some("GET"), Some("/metrics")) => {
                let mut body = String::new();
                match text::encode(&mut body, &self.registry) {
                    Ok(()) => response("200 OK", CONTENT_TYPE, &body),
                    Err(error) => plain("500 Internal Server Error", &format!("{error}\n")),
                }
            }
            (Some("GET"), _) => plain("404 Not Found", "the metrics are at /metrics\n"),
            _ => plain("405 Method Not Allowed", "only GET\n"),
        })
    }
}

fn plain(status: &str, body: &str) -> String {
    response(status, "text/plain; charset=utf-8", body)
}

fn response(status: &str, content_type: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

/// Reads the rings' counters at every scrape.
struct Counters(Arc<Shared>);

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Counters")
    }
}

type Encoded = Result<(), fmt::Error>;

/// Adds a counter up over all rings.
type Sum<'a> = dyn Fn(&dyn Fn(&RingStats) -> u64) -> u64 + 'a;

impl Collector for Counters {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Encoded {
        let classes = CLASSES.map(|class| (name(class), class_index(class)));
        let sum = |read: &dyn Fn(&RingStats) -> u64| self.0.rings.iter().map(|ring| read(&ring.stats)).sum::<u64>();
        let by_class = |read: &dyn Fn(&ClassStats) -> u64| {
            classes.clone().map(|(name, index)| (vec![("class", name)], sum(&|stats| read(&stats.classes[index]))))
        };
        counters(&mut encoder, "requests", "Requests received", by_class(&|class| class.requests.read()))?;
        counters(&mut encoder, "sent_bytes", "Bytes of answers", by_class(&|class| class.bytes.read()))?;
        let pages = classes.iter().flat_map(|(class, index)| {
            ENCODINGS.map(|encoding| {
                let labels = vec![("class", class.clone()), ("encoding", name(encoding))];
                (labels, sum(&|stats| stats.classes[*index].pages[encoding as usize].read()))
            })
        });
        counters(&mut encoder, "pages", "Pages sent", pages)?;
        counters(&mut encoder, "sessions", "Sessions welcomed", [(vec![], sum(&|stats| stats.welcomed.read()))])?;
        let refused = REFUSALS.iter().enumerate();
        let refused =
            refused.map(|(i, reason)| (vec![("reason", name(reason))], sum(&|stats| stats.refused[i].read())));
        counters(&mut encoder, "refused", "Sessions refused", refused)?;
        let aborted = ABORTS.iter().enumerate();
        let aborted =
            aborted.map(|(i, reason)| (vec![("reason", name(reason))], sum(&|stats| stats.aborted[i].read())));
        counters(&mut encoder, "aborted", "Connections closed without further words", aborted)?;
        let sends = [
            (vec![("outcome", "asked".to_owned())], sum(&|stats| stats.zero_copy.read())),
            (vec![("outcome", "copied".to_owned())], sum(&|stats| stats.copied.read())),
        ];
        counters(&mut encoder, "zero_copy_sends", "Sends that were to go without a copy", sends)?;
        gauges(&mut encoder, "queued_requests", "Requests waiting", by_class(&|class| class.queued.read()))?;
        let connections = sum(&|stats| stats.connections.read());
        gauges(&mut encoder, "connections", "Connections open", [(vec![], connections)])?;
        let sessions = self.0.sessions.lock().len() as u64;
        gauges(&mut encoder, "open_sessions", "Sessions open", [(vec![], sessions)])?;
        gauges(&mut encoder, "images", "Images in service", [(vec![], self.0.catalog.list().len() as u64)])?;
        if self.0.keeper.is_some() {
            self.encode_working_sets(&mut encoder, &sum)?;
        }
        self.encode_latency(&mut encoder)?;
        match &self.0.channel {
            Some(channel) => encode_multicast(&mut encoder, &channel.report()),
            None => Ok(()),
        }
    }
}

impl Counters {
    fn encode_working_sets(&self, encoder: &mut DescriptorEncoder<'_>, sum: &Sum<'_>) -> Encoded {
        let ordered = sum(&|stats| stats.ordered_pages.read());
        counters(encoder, "ordered_pages", "Pages that new clones were told to fetch ahead", [(vec![], ordered)])?;
        let touched = sum(&|stats| stats.touched_ranges.read());
        counters(encoder, "touched_ranges", "Ranges that clones told they needed", [(vec![], touched)])?;
        let sets: Vec<(Labels, Summary)> = self
            .0
            .catalog
            .list()
            .iter()
            .map(|image| (vec![("image", image.id().to_string())], image.needed().summary()))
            .collect();
        let of_set = |read: fn(&Summary) -> u64| sets.iter().map(move |(labels, set)| (labels.clone(), read(set)));
        gauges(
            encoder,
            "working_set_pages",
            "Pages that the next clone is told to fetch ahead",
            of_set(|set| set.common),
        )?;
        gauges(encoder, "working_set_clones", "Clones that told all that they needed", of_set(|set| set.clones))
    }

    fn encode_latency(&self, encoder: &mut DescriptorEncoder<'_>) -> Encoded {
        let help = "From the receipt of a request until the kernel has its answer, in seconds";
        let mut family = encoder.encode_descriptor("request_latency_seconds", help, None, MetricType::Histogram)?;
        for class in CLASSES {
            let mut latency = HistogramSnapshot::default();
            self.0.rings.iter().for_each(|r| latency.merge(&r.stats.classes[class_index(class)].latency.snapshot()));
            let labels = [("class", name(class))];
            let mut buckets = latency.doublings();
            if let Some((bound, _)) = buckets.last_mut() {
                *bound = f64::INFINITY;
            }
            let mut metric = family.encode_family(&labels)?;
            metric.encode_histogram::<NoLabelSet>(latency.sum_seconds(), latency.count(), &buckets, None)?;
        }
        Ok(())
    }
}

/// Members that have metrics of their own: those that fare worst, for every one of them is a series that the scraper keeps.
const MAX_MEMBERS: usize = 64;

fn encode_multicast(encoder: &mut DescriptorEncoder<'_>, report: &Report) -> Encoded {
    let Traffic { data, repair, parity, control, suppressed, nacks, reports, strange } = report.total;
    let kinds = [("data", data), ("repair", repair), ("parity", parity), ("control", control)];
    let by_kind = |read: fn(Sent) -> u64| kinds.map(|(kind, sent)| (vec![("kind", kind.to_owned())], read(sent)));
    counters(encoder, "multicast_datagrams", "Datagrams sent to the group", by_kind(|sent| sent.datagrams))?;
    counters(encoder, "multicast_sent_bytes", "Bytes sent to the group", by_kind(|sent| sent.bytes))?;
    let single = |value| [(vec![], value)];
    let help = "Pages asked for that were on their way already";
    counters(encoder, "multicast_suppressed_pages", help, single(suppressed))?;
    counters(encoder, "multicast_nacks", "Blocks that repair was asked for", single(nacks))?;
    counters(encoder, "multicast_reports", "Reports received", single(reports))?;
    counters(encoder, "multicast_strange_feedback", "Feedback that made no sense", single(strange))?;
    counters(encoder, "multicast_dropped_requests", "Requests dropped as a flood", single(report.dropped))?;
    counters(encoder, "multicast_refused_sends", "Sends that the network did not take", single(report.refused))?;
    counters(encoder, "multicast_joined", "Sessions that became members", single(report.joined))?;
    let moved = report.moved.iter().map(|(reason, count)| (vec![("reason", reason.to_lowercase())], *count));
    counters(encoder, "multicast_moved", "Sessions moved to unicast", moved)?;
    let of_image = |channel: &ChannelStatus, value| (vec![("image", channel.image.to_string())], value);
    let members = report.channels.iter().map(|channel| of_image(channel, channel.members.len() as u64));
    gauges(encoder, "multicast_members", "Sessions that are members", members)?;
    let rates = report.channels.iter().map(|channel| of_image(channel, channel.rate));
    gauges(encoder, "multicast_rate_bytes", "Bytes per second that may be sent", rates)?;
    let mut members: Vec<&MemberStatus> = report.channels.iter().flat_map(|channel| &channel.members).collect();
    let loss = |member: &MemberStatus| member.loss.unwrap_or_default();
    members.sort_by(|a, b| loss(b).total_cmp(&loss(a)).then(a.rate.cmp(&b.rate)).then(a.session.cmp(&b.session)));
    members.truncate(MAX_MEMBERS);
    let of_member = |member: &&MemberStatus| vec![("session", member.session.to_string())];
    let mut family = encoder.encode_descriptor(
        "multicast_receiver_loss",
        "Share of datagrams lost lately",
        None,
        MetricType::Gauge,
    )?;
    for member in &members {
        ConstGauge::new(loss(member)).encode(family.encode_family(&of_member(member))?)?;
    }
    let rates = members.iter().map(|member| (of_member(member), member.rate));
    gauges(encoder, "multicast_receiver_rate_bytes", "Bytes per second received lately", rates)
}

type Labels = Vec<(&'static str, String)>;

fn counters(
    encoder: &mut DescriptorEncoder<'_>,
    metric: &str,
    help: &str,
    values: impl IntoIterator<Item = (Labels, u64)>,
) -> Encoded {
    let mut family = encoder.encode_descriptor(metric, help, None, MetricType::Counter)?;
    for (labels, value) in values {
        // A family without labels is no family.
        match labels.is_empty() {
            true => family.encode_counter::<NoLabelSet, u64, u64>(&value, None)?,
            false => ConstCounter::new(value).encode(family.encode_family(&labels)?)?,
        }
    }
    Ok(())
}

fn gauges(
    encoder: &mut DescriptorEncoder<'_>,
    metric: &str,
    help: &str,
    values: impl IntoIterator<Item = (Labels, u64)>,
) -> Encoded {
    let mut family = encoder.encode_descriptor(metric, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        let value = i64::try_from(value).unwrap_or(i64::MAX);
        match labels.is_empty() {
            true => family.encode_gauge(&value)?,
            false => ConstGauge::new(value).encode(family.encode_family(&labels)?)?,
        }
    }
    Ok(())
}

/// A variant's name as a label.
fn name(variant: impl fmt::Debug) -> String {
    format!("{variant:?}").to_lowercase()
}
