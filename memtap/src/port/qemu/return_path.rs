//! The return path, from the destination back to the source: messages `be16 type, be16 length, payload`.
//!
//! | type | message | payload |
//! |---|---|---|
//! | 1 | SHUT | be32, 0 when the migration ended well |
//! | 2 | PONG | be32 of the PING |
//! | 3 | REQ_PAGES_ID | be64 offset, be32 bytes, block name behind its one-byte length |
//! | 4 | REQ_PAGES | be64 offset, be32 bytes, of the block of the last REQ_PAGES_ID |
//! | 5 | RECV_BITMAP | block name behind its length; **after** the message: be64 size, bitmap, be64 end mark |
//! | 6 | RESUME_ACK | be32, 1 |

use thiserror::Error;

/// The mark behind a bitmap.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// The value of a RESUME_ACK that means yes.
pub(super) const RESUME_YES: u32 = 1;

mod kind {
    pub(super) const SHUT: u16 = 1;
    pub(super) const PONG: u16 = 2;
    pub(super) const REQUEST_PAGES_OF: u16 = 3;
    pub(super) const REQUEST_PAGES: u16 = 4;
    pub(super) const RECEIVED_BITMAP: u16 = 5;
    pub(super) const RESUME_ACK: u16 = 6;
}

/// A message of the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The destination is done.
    Shut {
        /// Zero when everything arrived, otherwise QEMU's error.
        error: u32,
    },
    /// The answer to a PING.
    Pong {
        /// The PING's value.
        value: u32,
    },
    /// Somebody waits for a page.
    RequestPages {
        /// The block; the one of the request before when there is none.
        block: Option<String>,
        /// The offset in bytes within the block.
        offset: u64,
        /// The length in bytes: one host page.
        length: u32,
    },
    /// Which pages of a block have arrived.
    ReceivedBitmap {
        /// The block.
        block: String,
        /// One bit for every 4 KiB page, lowest bit first, padded to a multiple of eight bytes.
        bits: Vec<u8>,
    },
    /// The answer to RESUME.
    ResumeAck {
        /// 1 for yes.
        value: u32,
    },
}

/// Bytes that are no message.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReturnPathError {
    /// A type that a destination never sends to such a source.
    #[error("return path message of unknown type {kind} with {length} bytes")]
    Kind {
        /// The type.
        kind: u16,
        /// The length of its payload.
        length: u16,
    },
    /// A payload whose length does not fit the type.
    #[error("return path message of type {kind} with a payload of {length} bytes does not add up")]
    Length {
        /// The type.
        kind: u16,
        /// The length of its payload.
        length: u16,
    },
    /// A block name that is not text.
    #[error("return path message of type {kind} with a block name that is not UTF-8")]
    Name {
        /// The type.
        kind: u16,
    },
    /// A bitmap larger than that of the largest block, or of no whole number of words.
    #[error("bitmap of {size} bytes for block {block:?}, where at most {max} are possible in words of eight")]
    BitmapSize {
        /// The block.
        block: String,
        /// The size in bytes.
        size: u64,
        /// The largest possible.
        max: u64,
    },
    /// A bitmap without its end mark.
    #[error("bitmap of block {block:?} ends with {mark:#018x} in place of its mark")]
    BitmapEnd {
        /// The block.
        block: String,
        /// What stood there.
        mark: u64,
    },
}

/// Decodes the return path from pieces of any size. After an error the stream is lost.
#[derive(Debug)]
pub struct ReturnPath {
    buffer: Vec<u8>,
    /// How much of the buffer has been decoded.
    decoded: usize,
    bitmap_max: u64,
}

impl ReturnPath {
    /// A decoder for a machine whose largest block has a bitmap of `bitmap_max` bytes. It buffers at most one message and
    /// what was pushed with it.
    pub fn new(bitmap_max: u64) -> Self {
        Self { buffer: Vec::new(), decoded: 0, bitmap_max }
    }

    /// Takes in more of the stream. Call [`ReturnPath::next_message`] until it has none before pushing again.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.decoded);
        self.decoded = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next message, if there is a whole one.
    ///
    /// # Errors
    /// When the bytes are no message.
    pub fn next_message(&mut self) -> Result<Option<Message>, ReturnPathError> {
        let mut input = Input(&self.buffer[self.decoded..]);
        let message = decode(&mut input, self.bitmap_max)?;
        if message.is_some() {
            self.decoded = self.buffer.len() - input.0.len();
        }
        Ok(message)
    }
}

/// `None` when `input` ends before the message does.
fn decode(input: &mut Input<'_>, bitmap_max: u64) -> Result<Option<Message>, ReturnPathError> {
    let (Some(kind), Some(length)) = (input.u16(), input.u16()) else {
        return Ok(None);
    };
    let fits = match kind {
        kind::SHUT | kind::PONG | kind::RESUME_ACK => length == 4,
        kind::REQUEST_PAGES => length == 12,
        kind::REQUEST_PAGES_OF => (14..=12 + 256).contains(&length),
        kind::RECEIVED_BITMAP => (2..=256).contains(&length),
        _ => return Err(ReturnPathError::Kind { kind, length }),
    };
    let wrong_length = ReturnPathError::Length { kind, length };
    if !fits {
        return Err(wrong_length);
    }
    let Some(payload) = input.take(usize::from(length)) else {
        return Ok(None);
    };
    let mut payload = Input(payload);
    let message = match kind {
        kind::SHUT => payload.u32().map(|error| Message::Shut { error }),
        kind::PONG => payload.u32().map(|value| Message::Pong { value }),
        kind::RESUME_ACK => payload.u32().map(|value| Message::ResumeAck { value }),
        kind::RECEIVED_BITMAP => match payload.rest_as_name(kind)? {
            Some(block) => return bitmap(input, block, bitmap_max),
            None => None,
        },
        _ => match (payload.u64(), payload.u32()) {
            (Some(offset), Some(length)) if kind == kind::REQUEST_PAGES => {
                Some(Message::RequestPages { block: None, offset, length })
            }
            (Some(offset), Some(length)) => {
                let block = payload.rest_as_name(kind)?;
                block.map(|block| Message::RequestPages { block: Some(block), offset, length })
            }
            _ => None,
        },
    };
    message.map(Some).ok_or(wrong_length)
}

fn bitmap(input: &mut Input<'_>, block: String, max: u64) -> Result<Option<Message>, ReturnPathError> {
    let Some(size) = input.u64() else {
        return Ok(None);
    };
    let length = usize::try_from(size).ok().filter(|_| size <= max && size.is_multiple_of(8));
    let Some(length) = length else {
        return Err(ReturnPathError::BitmapSize { block, size, max });
    };
    let (Some(bits), Some(mark)) = (input.take(length), input.u64()) else {
        return Ok(None);
    };
    if mark != BITMAP_END {
        return Err(ReturnPathError::BitmapEnd { block, mark });
    }
    Ok(Some(Message::ReceivedBitmap { block, bits: bits.to_vec() }))
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// The rest as a name behind its one-byte length; `None` when the lengths differ.
    fn rest_as_name(&mut self, kind: u16) -> Result<Option<String>, ReturnPathError> {
        let Some([length]) = self.array() else {
            return Ok(None);
        };
        if usize::from(length) != self.0.len() {
            return Ok(None);
        }
        let name = std::str::from_utf8(self.0).map_err(|_| ReturnPathError::Name { kind })?;
        Ok(Some(name.to_owned()))
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// The bytes in which a destination sends `message`.
    pub(crate) fn encode(message: &Message) -> Vec<u8> {
        let (kind, payload) = match message {
            Message::Shut { error } => (kind::SHUT, error.to_be_bytes().to_vec()),
            Message::Pong { value } => (kind::PONG, value.to_be_bytes().to_vec()),
            Message::ResumeAck { value } => (kind::RESUME_ACK, value.to_be_bytes().to_vec()),
            Message::RequestPages { block, offset, length } => {
                let mut payload = offset.to_be_bytes().to_vec();
                payload.extend_from_slice(&length.to_be_bytes());
                if let Some(block) = block {
                    payload.push(block.len() as u8);
                    payload.extend_from_slice(block.as_bytes());
                }
                (if block.is_some() { kind::REQUEST_PAGES_OF } else { kind::REQUEST_PAGES }, payload)
            }
            Message::ReceivedBitmap { block, .. } => {
                (kind::RECEIVED_BITMAP, [&[block.len() as u8], block.as_bytes()].concat())
            }
        };
        let mut out = kind.to_be_bytes().to_vec();
        out.extend_from_slice(&(payload.len() as u16).to_be_bytes());
        out.extend_from_slice(&payload);
        if let Message::ReceivedBitmap { bits, .. } = message {
            out.extend_from_slice(&(bits.len() as u64).to_be_bytes());
            out.extend_from_slice(bits);
            out.extend_from_slice(&BITMAP_END.to_be_bytes());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::testing::encode;
    use super::*;
    use proptest::prelude::*;

    fn all(decoder: &mut ReturnPath) -> Result<Vec<Message>, ReturnPathError> {
        std::iter::from_fn(|| decoder.next_message().transpose()).collect()
    }

    fn decode_all(bytes: &[u8]) -> Result<Vec<Message>, ReturnPathError> {
        let mut decoder = ReturnPath::new(64);
        decoder.push(bytes);
        all(&mut decoder)
    }

    #[test]
    fn golden_bytes() {
        let request = b"\0\x03\0\x13\0\0\0\0\0\0\x50\0\0\0\x10\0\x06pc.ram\0\x04\0\x0c\0\0\0\0\0\0\x60\0\0\0\x10\0";
        let block = Some("pc.ram".to_owned());
        let expected = [
            Message::RequestPages { block, offset: 0x5000, length: 4096 },
            Message::RequestPages { block: None, offset: 0x6000, length: 4096 },
        ];
        assert_eq!(decode_all(request).unwrap(), expected);
        assert_eq!(decode_all(b"\0\x01\0\x04\0\0\0\0").unwrap(), [Message::Shut { error: 0 }]);
        assert_eq!(decode_all(b"\0\x02\0\x04\0\0\0\x07").unwrap(), [Message::Pong { value: 7 }]);
        assert_eq!(decode_all(b"\0\x06\0\x04\0\0\0\x01").unwrap(), [Message::ResumeAck { value: 1 }]);
        let bitmap = b"\0\x05\0\x04\x03rom\0\0\0\0\0\0\0\x08\x07\0\0\0\0\0\0\0\x01\x23\x45\x67\x89\xab\xcd\xef";
        let bits = vec![7, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(decode_all(bitmap).unwrap(), [Message::ReceivedBitmap { block: "rom".to_owned(), bits }]);
    }

    #[test]
    fn foreign_bytes_are_errors() {
        assert_eq!(decode_all(b"\0\x07\0\0"), Err(ReturnPathError::Kind { kind: 7, length: 0 }));
        assert_eq!(decode_all(b"\0\x01\0\x05"), Err(ReturnPathError::Length { kind: 1, length: 5 }));
        let name_too_long = b"\0\x03\0\x0e\0\0\0\0\0\0\x50\0\0\0\x10\0\x06p";
        assert_eq!(decode_all(name_too_long), Err(ReturnPathError::Length { kind: 3, length: 14 }));
        let not_text = b"\0\x03\0\x0e\0\0\0\0\0\0\x50\0\0\0\x10\0\x01\xff";
        assert_eq!(decode_all(not_text), Err(ReturnPathError::Name { kind: 3 }));
        let huge = b"\0\x05\0\x02\x01r\xff\xff\xff\xff\xff\xff\xff\xf8";
        assert!(matches!(decode_all(huge), Err(ReturnPathError::BitmapSize { max: 64, .. })));
        let unmarked = b"\0\x05\0\x02\x01r\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01";
        assert!(matches!(decode_all(unmarked), Err(ReturnPathError::BitmapEnd { mark: 1, .. })));
    }

    fn messages() -> impl Strategy<Value = Message> {
        let name = "[a-z@/.]{1,255}";
        let bits = prop::collection::vec(any::<[u8; 8]>(), 0..8).prop_map(|words| words.concat());
        prop_oneof![
            any::<u32>().prop_map(|error| Message::Shut { error }),
            any::<u32>().prop_map(|value| Message::Pong { value }),
            any::<u32>().prop_map(|value| Message::ResumeAck { value }),
            (prop::option::of(name), any::<u64>(), any::<u32>())
                .prop_map(|(block, offset, length)| Message::RequestPages { block, offset, length }),
            (name, bits).prop_map(|(block, bits)| Message::ReceivedBitmap { block, bits }),
        ]
    }

    proptest! {
        #[test]
        fn messages_survive_any_cutting(sent in prop::collection::vec(messages(), 0..6), piece in 1usize..40) {
            let stream: Vec<u8> = sent.iter().flat_map(encode).collect();
            let mut decoder = ReturnPath::new(64);
            let mut received = Vec::new();
            for bytes in stream.chunks(piece) {
                decoder.push(bytes);
                received.extend(all(&mut decoder).unwrap());
            }
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0u8..8) {
            let _ = decode_all(&[&[0, kind, 0], &bytes[..]].concat());
            let _ = decode_all(&bytes);
        }
    }
}
