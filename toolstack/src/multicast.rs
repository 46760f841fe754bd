//! The multicast group of a run.

use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use mcast_socket::{Group, ParseGroupError};

/// The UDP port of groups that nobody chose; receivers bind to group and port, so that several runs may share it.
const PORT: u16 = 7071;

/// What was said by `--multicast[=GROUP:PORT[%IFACE]]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Multicast {
    /// Any group.
    Any,
    /// This one.
    Group(Group),
}

impl Multicast {
    /// The value of the option without one.
    pub(crate) const ANY: &'static str = "any";

    /// The group asked for, or else one for this run alone, on `interface` or on that which the routing table chooses.
    pub(crate) fn group(&self, interface: Option<&str>) -> Group {
        match self {
            Self::Group(group) => group.clone(),
            Self::Any => {
                // RFC 2365: 239.255.0.0/16 is for everybody and stays on the site; drawn, so that runs do not hear each other.
                let address = Ipv4Addr::new(239, 255, fastrand::u8(..), fastrand::u8(..));
                Group { address: IpAddr::V4(address), port: PORT, interface: interface.map(str::to_owned) }
            }
        }
    }
}

impl FromStr for Multicast {
    type Err = ParseGroupError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == Self::ANY { Ok(Self::Any) } else { text.parse().map(Self::Group) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_drawn_or_taken() {
        let any: Multicast = Multicast::ANY.parse().unwrap();
        let drawn = any.group(Some("lo"));
        assert!(drawn.to_string().starts_with("239.255.") && drawn.to_string().ends_with(":7071%lo"), "{drawn}");
        assert_eq!(drawn.to_string().parse(), Ok(drawn));
        let given: Multicast = "239.1.2.3:7000%eth0".parse().unwrap();
        assert_eq!(given.group(Some("lo")).to_string(), "239.1.2.3:7000%eth0");
        assert!("10.0.0.1:7000".parse::<Multicast>().is_err());
    }
}
