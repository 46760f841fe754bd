//! What a stream says of its guest beside the memory: a name, and which frames are not ordinary memory.

use serde_json::Value;

use super::stream::Stream;
use crate::{FrameRange, Gfn, PageCount};

/// The end of the low memory's address space.
const FOUR_GIB: u64 = 1 << 20;

/// Where memory below 4 GiB ends at the latest, in frames: at the ACPI tables that the toolstack makes for a guest without a
/// device model (`ACPI_INFO_PHYSICAL_ADDRESS`), …
const PVH_LOW_END: u64 = 0xf_c000;
/// … or where a device model's PCI devices begin (`HVM_BELOW_4G_RAM_END`).
const HVM_LOW_END: u64 = 0xf_0000;

/// The most pages of ioreq servers that are believed; Xen has eight.
const MAX_IOREQ_SERVERS: u64 = 64;

/// Numbers of parameters whose values lead to frames.
mod param {
    pub(super) const STORE_PFN: u64 = 1;
    pub(super) const IOREQ_PFN: u64 = 5;
    pub(super) const BUFIOREQ_PFN: u64 = 6;
    pub(super) const IDENT_PT: u64 = 12;
    pub(super) const CONSOLE_PFN: u64 = 17;
    pub(super) const PAGING_RING_PFN: u64 = 27;
    pub(super) const MONITOR_RING_PFN: u64 = 28;
    pub(super) const SHARING_RING_PFN: u64 = 29;
    pub(super) const IOREQ_SERVER_PFN: u64 = 32;
    pub(super) const NR_IOREQ_SERVER_PAGES: u64 = 33;
    pub(super) const VM_GENERATION_ID_ADDR: u64 = 34;
    pub(super) const VM86_TSS_SIZED: u64 = 37;
}

/// What a domain's configuration says; nothing where it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Config {
    pub(super) name: String,
    /// `pvh` or `hvm`.
    pub(super) kind: String,
    /// The size of the hole for devices below 4 GiB, where it is not the usual one.
    mmio_hole: Option<PageCount>,
}

impl Config {
    pub(super) fn of(stream: &Stream) -> Self {
        let json = stream.config.as_deref().and_then(|text| serde_json::from_str::<Value>(text).ok());
        let Some(json) = json else {
            return Self::default();
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mmio_hole = json["b_info"]["type.hvm"]["mmio_hole_memkb"].as_u64();
        Self {
            name: text(&json["c_info"]["name"]),
            kind: text(&json["c_info"]["type"]),
            mmio_hole: mmio_hole.map(|kib| PageCount::new(kib / 4)),
        }
    }
}

/// The frames that are not ordinary memory: the hole for devices below 4 GiB, in which the toolstack puts pages of its own, and
/// what the parameters name, wherever it is. What of them has pages must be there when a clone is made, because the toolstack
/// and the hypervisor use it without asking a pager.
pub(super) fn special_frames(stream: &Stream, config: &Config) -> Vec<FrameRange> {
    let usual = if stream.has_device_model || config.kind == "hvm" { HVM_LOW_END } else { PVH_LOW_END };
    let low_end = config.mmio_hole.map_or(usual, |hole| usual.min(FOUR_GIB.saturating_sub(hole.get())));
    let value = |number| stream.params.iter().find(|(index, _)| *index == number).map_or(0, |(_, value)| *value);
    let address = |number| value(number) >> 12;
    let tss = value(param::VM86_TSS_SIZED);
    let (tss_start, tss_end) = ((tss & 0xffff_ffff) >> 12, ((tss & 0xffff_ffff) + (tss >> 32)).div_ceil(4096));
    let named = [
        (value(param::STORE_PFN), 1),
        (value(param::IOREQ_PFN), 1),
        (value(param::BUFIOREQ_PFN), 1),
        (value(param::CONSOLE_PFN), 1),
        (value(param::PAGING_RING_PFN), 1),
        (value(param::MONITOR_RING_PFN), 1),
        (value(param::SHARING_RING_PFN), 1),
        (value(param::IOREQ_SERVER_PFN), value(param::NR_IOREQ_SERVER_PAGES).min(MAX_IOREQ_SERVERS)),
        (address(param::IDENT_PT), 1),
        (address(param::VM_GENERATION_ID_ADDR), 1),
        // A task state segment and its bitmaps take no more than three pages.
        (tss_start, (tss_end - tss_start).min(3)),
    ];
    // A parameter that was never set is zero.
    let named = named.into_iter().filter(|(start, _)| *start != 0);
    let all = [(low_end, FOUR_GIB - low_end)].into_iter().chain(named);
    all.filter_map(|(start, count)| FrameRange::checked(Gfn::checked(start)?, PageCount::new(count))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::stream::testing::StreamBuilder;
    use super::*;

    fn stream(config: &str, params: &[(u64, u64)]) -> Stream {
        let bytes = StreamBuilder::new(config).page_data(&[(0, Some(1))]).state(1, params).end().bytes;
        Stream::parse(&mut bytes.as_slice()).unwrap()
    }

    fn special(config: &str, params: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let stream = stream(config, params);
        let frames = special_frames(&stream, &Config::of(&stream));
        frames.iter().map(|range| (range.start().index(), range.count().get())).collect()
    }

    #[test]
    fn the_hole_depends_on_the_kind_of_guest() {
        assert_eq!(special("", &[]), [(0xfc000, 0x4000)]);
        assert_eq!(special("not JSON", &[]), [(0xfc000, 0x4000)]);
        assert_eq!(special(r#"{"c_info": {"type": "pvh", "name": 7}}"#, &[]), [(0xfc000, 0x4000)]);
        assert_eq!(special(r#"{"c_info": {"type": "hvm"}}"#, &[]), [(0xf0000, 0x10000)]);
        let large = r#"{"c_info": {"type": "hvm"}, "b_info": {"type.hvm": {"mmio_hole_memkb": 1048576}}}"#;
        assert_eq!(special(large, &[]), [(0xc0000, 0x40000)]);
        let absurd = r#"{"b_info": {"type.hvm": {"mmio_hole_memkb": 18446744073709551615}}}"#;
        assert_eq!(special(absurd, &[]), [(0, 1 << 20)]);
    }

    #[test]
    fn parameters_name_pages_anywhere() {
        let params = [(1, 0xfeffc), (12, 0xfeff_e000), (17, 0), (32, 0x200), (33, 1000), (37, 0x100_0000_5fff)];
        let named = special("", &params);
        assert_eq!(named[1..], [(0xfeffc, 1), (0x200, 64), (0xfeffe, 1), (5, 2)]);
        assert_eq!(special("", &[(1, u64::MAX)]).len(), 1);
    }

    #[test]
    fn the_configuration_names_the_domain() {
        let config = Config::of(&stream(r#"{"c_info": {"type": "pvh", "name": "lin"}}"#, &[]));
        assert_eq!((config.name.as_str(), config.kind.as_str()), ("lin", "pvh"));
    }
}
