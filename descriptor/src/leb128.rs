//! LEB128 numbers as they stand in files: seven bits in a byte, the lowest first, in the shortest form.

/// What is wrong with a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NumberError {
    /// The bytes end within it.
    Truncated,
    /// It has more than 64 bits, or superfluous bytes.
    Overlong,
}

/// Appends `number` to `out`.
pub(crate) fn push_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Appends a difference, small when it is near zero on either side.
pub(crate) fn push_signed(out: &mut Vec<u8>, number: i64) {
    push_number(out, ((number << 1) ^ (number >> 63)) as u64);
}

/// The number at the head of `bytes` and its size in bytes.
pub(crate) fn take_number(bytes: &[u8]) -> Result<(u64, usize), NumberError> {
    let mut number = 0u64;
    for (index, byte) in bytes.iter().enumerate() {
        let shift = 7 * index as u32;
        let part = u64::from(byte & 0x7f);
        if shift > 63 || (part << shift) >> shift != part || (index > 0 && *byte == 0) {
            return Err(NumberError::Overlong);
        }
        number |= part << shift;
        if byte & 0x80 == 0 {
            return Ok((number, index + 1));
        }
    }
    Err(NumberError::Truncated)
}

/// The difference that [`push_signed`] wrote as `number`.
pub(crate) fn signed(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trip(number: u64, difference: i64) {
            let mut bytes = Vec::new();
            push_number(&mut bytes, number);
            prop_assert_eq!(take_number(&bytes), Ok((number, bytes.len())));
            prop_assert_eq!(take_number(&bytes[..bytes.len() - 1]), Err(NumberError::Truncated));
            bytes.clear();
            push_signed(&mut bytes, difference);
            prop_assert_eq!(take_number(&bytes).map(|(number, _)| signed(number)), Ok(difference));
        }
    }
}
