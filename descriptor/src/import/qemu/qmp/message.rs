use std::fmt;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde_json::Value;

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// What it says.
    pub data: Value,
    /// When it happened, by the host's clock.
    pub at: SystemTime,
}

/// QEMU's version.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// A line from QEMU.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    Greeting(Version),
    Event(Event),
    Return { id: Option<u64>, value: Value },
    Error { id: Option<u64>, description: String },
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    event: Option<String>,
    data: Option<Value>,
    timestamp: Option<Timestamp>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Failure>,
    id: Option<u64>,
}

#[derive(Deserialize)]
struct Greeting {
    version: FullVersion,
}

#[derive(Deserialize)]
struct FullVersion {
    qemu: Version,
}

/// Both are -1 where the host's clock could not be read.
#[derive(Deserialize)]
struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

#[derive(Deserialize)]
struct Failure {
    desc: String,
}

impl Message {
    /// What a line says; `None` when it says nothing that QMP knows.
    pub(super) fn parse(line: &[u8]) -> Option<Self> {
        let line: Line = serde_json::from_slice(line).ok()?;
        if let Some(greeting) = line.greeting {
            return Some(Self::Greeting(greeting.version.qemu));
        }
        if let Some(name) = line.event {
            let at = line.timestamp.and_then(|timestamp| timestamp.time())?;
            return Some(Self::Event(Event { name, data: line.data.unwrap_or_default(), at }));
        }
        if let Some(error) = line.error {
            return Some(Self::Error { id: line.id, description: error.desc });
        }
        line.value.map(|value| Self::Return { id: line.id, value })
    }
}

impl Timestamp {
    fn time(&self) -> Option<SystemTime> {
        let microseconds = u32::try_from(self.microseconds).ok().filter(|part| *part < 1_000_000)?;
        let seconds = u64::try_from(self.seconds).ok()?;
        SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, microseconds * 1000))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_of_qemu() {
        let greeting = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;
        assert_eq!(Message::parse(greeting), Some(Message::Greeting(Version { major: 7, minor: 2, micro: 22 })));
        let event = br#"{"timestamp": {"seconds": 5, "microseconds": 250000}, "event": "STOP"}"#;
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(5250);
        assert_eq!(Message::parse(event), Some(Message::Event(Event { name: "STOP".into(), data: Value::Null, at })));
        let value = json!({"a": 1});
        assert_eq!(Message::parse(br#"{"return": {"a": 1}, "id": 3}"#), Some(Message::Return { id: Some(3), value }));
        let error = br#"{"id": 4, "error": {"class": "GenericError", "desc": "no"}}"#;
        assert_eq!(Message::parse(error), Some(Message::Error { id: Some(4), description: "no".into() }));
        for line in ["", "{}", "[]", "null", r#"{"id": 1}"#, r#"{"QMP": {}}"#, r#"{"event": "STOP"}"#] {
            assert_eq!(Message::parse(line.as_bytes()), None, "{line}");
        }
    }
}
