//! Control messages: what the kernel says and is told about a message beside its bytes (cmsg(3)).

/// The head of a control message: `cmsg_len`, `cmsg_level`, `cmsg_type`.
const HEAD: usize = size_of::<libc::cmsghdr>();
const _: () = assert!(HEAD == size_of::<usize>() + 8);

/// Control messages begin at multiples of this.
const ALIGN: usize = size_of::<usize>();

/// Bytes for the control messages that a receiver asks for: the size of segments and the overflow counter.
pub(crate) const ROOM: usize = 2 * (HEAD + ALIGN);

/// Bytes of the control message that asks for segmentation.
pub(crate) const SEGMENT: usize = HEAD + ALIGN;

/// What the kernel says about a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// The message is datagrams of this size, coalesced; the last may be shorter.
    pub(crate) segment: Option<u16>,
    /// Messages that the socket dropped for want of room before this one; absent while that is none.
    pub(crate) overflow: Option<u32>,
}

/// Reads control messages; unknown ones are skipped.
pub(crate) fn read(mut control: &[u8]) -> Facts {
    let mut facts = Facts::default();
    while let Some((length, level, kind)) = head(control) {
        let Some(data) = control.get(HEAD..length) else { break };
        let number = data.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes));
        match (level, kind, number) {
            (libc::SOL_UDP, libc::UDP_GRO, Some(size)) => {
                facts.segment = u16::try_from(size).ok().filter(|size| *size > 0)
            }
            (libc::SOL_SOCKET, libc::SO_RXQ_OVFL, Some(count)) => facts.overflow = Some(count.cast_unsigned()),
            _ => {}
        }
        control = control.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
    }
    facts
}

/// The control message that has the kernel cut a message into datagrams of `size` bytes.
pub(crate) fn segment(size: u16) -> [u8; SEGMENT] {
    let mut message = [0; SEGMENT];
    message[..ALIGN].copy_from_slice(&(HEAD + size_of::<u16>()).to_ne_bytes());
    message[ALIGN..ALIGN + 4].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
    message[ALIGN + 4..HEAD].copy_from_slice(&libc::UDP_SEGMENT.to_ne_bytes());
    message[HEAD..HEAD + 2].copy_from_slice(&size.to_ne_bytes());
    message
}

fn head(control: &[u8]) -> Option<(usize, i32, i32)> {
    let length = usize::from_ne_bytes(*control.first_chunk()?);
    let level = i32::from_ne_bytes(*control.get(ALIGN..)?.first_chunk()?);
    let kind = i32::from_ne_bytes(*control.get(ALIGN + 4..)?.first_chunk()?);
    (HEAD..=control.len()).contains(&length).then_some((length, level, kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(level: i32, kind: i32, data: &[u8]) -> Vec<u8> {
        let mut message = (HEAD + data.len()).to_ne_bytes().to_vec();
        message.extend(level.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(data);
        message.resize(message.len().next_multiple_of(ALIGN), 0);
        message
    }

    #[test]
    fn both_facts_are_found_among_others() {
        let mut control = message(libc::SOL_SOCKET, 77, &[1; 13]);
        control.extend(message(libc::SOL_SOCKET, libc::SO_RXQ_OVFL, &u32::MAX.to_ne_bytes()));
        control.extend(message(libc::SOL_UDP, libc::UDP_GRO, &1472i32.to_ne_bytes()));
        assert_eq!(read(&control), Facts { segment: Some(1472), overflow: Some(u32::MAX) });
    }

    #[test]
    fn nonsense_ends_the_reading() {
        let good = message(libc::SOL_UDP, libc::UDP_GRO, &1472i32.to_ne_bytes());
        assert_eq!(read(&good[..good.len() - ALIGN]), Facts::default());
        for length in [0, 1, HEAD - 1, usize::MAX, usize::MAX - 7] {
            let mut bad = good.clone();
            bad[..ALIGN].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(read(&bad), Facts::default());
        }
        assert_eq!(read(&message(libc::SOL_UDP, libc::UDP_GRO, &(-1i32).to_ne_bytes())).segment, None);
    }

    #[test]
    fn segmentation_is_asked_for_as_the_kernel_reads_it() {
        assert_eq!(segment(1472).to_vec(), message(libc::SOL_UDP, libc::UDP_SEGMENT, &1472u16.to_ne_bytes()));
    }
}
