//! Loss on the way to a host.

use std::os::fd::{AsFd, OwnedFd};

use crate::NetworkError;
use crate::host::INTERFACE;
use crate::namespace::Namespace;
use crate::sys::{Instruction, attach_xdp, interface_index, load_xdp};

/// What a host loses of what is sent to it, independently of other hosts, as a share from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Loss {
    /// Nothing.
    #[default]
    None,
    /// Frames as they would be on a wire, whatever their protocol but ARP: by XDP in the driver. The kernel then cuts coalesced
    /// frames into single ones, which cross the bridge one by one, and puts together again what is left, as a real network card
    /// would have it; that costs processor time. MTU 1500 only.
    Frames(f64),
    /// Frames as they cross the bridge, of UDP only: by nftables. Coalesced ones (segmentation offload) are lost whole.
    Coalesced(f64),
}

impl Loss {
    /// Makes the host lose this from now on, and nothing else.
    pub(crate) fn impose(self, namespace: &Namespace, before: &mut Option<OwnedFd>) -> Result<(), NetworkError> {
        if before.take().is_some() {
            coalesce(namespace, false)?;
        }
        namespace.order(&["nft", "-f", "-"], "table inet loss\ndelete table inet loss\n")?;
        match self {
            Self::None => Ok(()),
            Self::Frames(share) => {
                let link = namespace.run(move || {
                    let program = load_xdp(&program(share))?;
                    attach_xdp(program.as_fd(), interface_index(INTERFACE)?)
                });
                *before = Some(link.map_err(|error| NetworkError::Kernel("lose frames by XDP", error))?);
                coalesce(namespace, true)
            }
            Self::Coalesced(share) => {
                // Early: before anything is counted as received.
                let chain = "type filter hook prerouting priority -300";
                let rule = format!("meta l4proto udp numgen random mod 100000 < {} drop", (share * 1e5).round());
                let table = format!("table inet loss {{ chain loss {{ {chain}; {rule}; }}; }}\n");
                namespace.order(&["nft", "-f", "-"], &table)
            }
        }
    }
}

/// Whether frames that arrive one by one are put together (GRO).
fn coalesce(namespace: &Namespace, on: bool) -> Result<(), NetworkError> {
    namespace.order(&["ethtool", "-K", INTERFACE, "gro", if on { "on" } else { "off" }], "")
}

const PASS: i32 = 2;
const DROP: i32 = 1;

/// `bpf_get_prandom_u32` among the helper functions of eBPF.
const RANDOM: i32 = 7;

/// `if (!is_arp(frame) && random() < share) return XDP_DROP; return XDP_PASS;`
fn program(share: f64) -> [Instruction; 13] {
    // Arithmetic on the registers; the classes and codes are those of Documentation/bpf/standardization/instruction-set.rst.
    let i =
        |code, to: u8, from: u8, offset, immediate| Instruction { code, registers: to | from << 4, offset, immediate };
    let arp = i32::from(0x0806_u16.to_be());
    let below = (share.clamp(0.0, 1.0) * f64::from(u32::MAX)) as u32 as i32;
    [
        i(0x61, 2, 1, 0, 0),      // r2 = data
        i(0x61, 3, 1, 4, 0),      // r3 = data_end
        i(0xbf, 4, 2, 0, 0),      // r4 = r2
        i(0x07, 4, 0, 0, 14),     // r4 += 14, the Ethernet header
        i(0x2d, 4, 3, 4, 0),      // if r4 > r3 goto pass
        i(0x69, 5, 2, 12, 0),     // r5 = the EtherType
        i(0x15, 5, 0, 2, arp),    // if r5 == ARP goto pass
        i(0x85, 0, 0, 0, RANDOM), // r0 = random()
        i(0xa6, 0, 0, 2, below),  // if w0 < below goto drop
        i(0xb7, 0, 0, 0, PASS),   // pass: r0 = PASS
        i(0x95, 0, 0, 0, 0),      // return r0
        i(0xb7, 0, 0, 0, DROP),   // drop: r0 = DROP
        i(0x95, 0, 0, 0, 0),      // return r0
    ]
}
