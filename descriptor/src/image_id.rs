use std::str::FromStr;
use std::{fmt, io};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The 128-bit name of an image: the immutable memory of a parent at the moment of its fork.
///
/// It is drawn at random when the image is captured, shown and parsed as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ImageId([u8; 16]);

/// A text that is no image id.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("image id {0:?} is not 32 hexadecimal digits")]
pub struct ParseImageIdError(String);

impl ImageId {
    /// A new name, from the system's random numbers.
    ///
    /// # Errors
    /// When the system has none.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        // The kernel gives up to 256 bytes at once or not at all.
        let length = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        if length == bytes.len() { Ok(Self(bytes)) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// The image id with these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes as they stand in files and messages.
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageId({self})")
    }
}

impl FromStr for ImageId {
    type Err = ParseImageIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseImageIdError(text.chars().take(64).collect());
        if text.len() != 32 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(error());
        }
        let mut bytes = [0; 16];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| error())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| error())?;
        }
        Ok(Self(bytes))
    }
}

impl From<ImageId> for String {
    fn from(id: ImageId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for ImageId {
    type Error = ParseImageIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_names_differ() {
        assert_ne!(ImageId::random().unwrap(), ImageId::random().unwrap());
    }

    #[test]
    fn text_round_trip() {
        let id = ImageId::from_bytes(*b"\x00\x01\xfeabcdefghijklm");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("+1".repeat(16).parse::<ImageId>().is_err());
        assert!("00".repeat(15).parse::<ImageId>().is_err());
        assert!("é".repeat(16).parse::<ImageId>().is_err());
    }
}
