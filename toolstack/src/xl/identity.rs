use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What makes a clone itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Its number in the fork, from 1.
    pub(super) id: u32,
    pub(super) name: String,
    pub(super) uuid: Uuid,
    /// The addresses of its network interfaces, in their order.
    pub(super) macs: Vec<Mac>,
}

/// An Ethernet address under Xen's prefix 00:16:3e.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Mac(u32);

/// Addresses that no other clone of a fork has, nor its parent.
#[derive(Debug)]
pub(super) struct Macs {
    next: u32,
    taken: HashSet<String>,
}

/// The lower half of Xen's addresses, as xl draws them too.
const COUNT: u32 = 1 << 23;

impl Macs {
    /// Addresses from `first` on, but for those of the parent, as people write them.
    pub(super) fn new(first: u32, taken: impl IntoIterator<Item = String>) -> Self {
        let taken = taken.into_iter().map(|mac| mac.to_ascii_lowercase()).collect();
        Self { next: first % COUNT, taken }
    }

    /// The next one. There are far more than a fork can want.
    pub(super) fn draw(&mut self) -> Mac {
        loop {
            let mac = Mac(self.next);
            self.next = (self.next + 1) % COUNT;
            if !self.taken.contains(&mac.to_string()) {
                return mac;
            }
        }
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [_, a, b, c] = self.0.to_be_bytes();
        write!(f, "00:16:3e:{a:02x}:{b:02x}:{c:02x}")
    }
}

/// A clone's domain, for reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainReport {
    /// Its number.
    pub domid: u32,
    /// Its UUID.
    pub uuid: Uuid,
    /// The addresses of its network interfaces.
    pub macs: Vec<String>,
    /// How long `xl restore` took, in milliseconds.
    pub restore_ms: f64,
    /// How long it took to page its memory out, in milliseconds, as soon as that is done.
    pub prepare_ms: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_differ_from_each_other_and_from_the_parents() {
        let mut macs = Macs::new(COUNT - 2, ["00:16:3E:7f:FF:ff".to_owned()]);
        let drawn = [macs.draw(), macs.draw(), macs.draw()].map(|mac| mac.to_string());
        assert_eq!(drawn, ["00:16:3e:7f:ff:fe", "00:16:3e:00:00:00", "00:16:3e:00:00:01"]);
    }
}
