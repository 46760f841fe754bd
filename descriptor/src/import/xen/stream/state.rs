//! The records of libxc's that say something about memory.

use super::StreamError;

/// The type of a processor's registers in an HVM context, of which there is one for each.
const CPU: u16 = 2;

/// The frequency in an X86_TSC_INFO record, whose body lies at `offset`.
pub(super) fn tsc_khz(body: &[u8], offset: u64) -> Result<u32, StreamError> {
    match body.len() {
        24 => Ok(u32_at(body, 4)),
        length => Err(StreamError::Length { field: "X86_TSC_INFO", offset, length: length as u64 }),
    }
}

/// The processors in an HVM_CONTEXT record, which is a sequence of `u16 type, u16 instance, u32 length` and as many bytes.
pub(super) fn vcpus(body: &[u8], offset: u64) -> Result<u32, StreamError> {
    let mut rest = body;
    let mut vcpus = 0;
    while !rest.is_empty() {
        let at = offset + (body.len() - rest.len()) as u64;
        let cut = StreamError::Length { field: "an entry of HVM_CONTEXT", offset: at, length: rest.len() as u64 };
        let length = rest.get(..8).map(|header| u32_at(header, 4) as usize);
        let Some(next) = length.and_then(|length| rest.get(8..)?.get(length..)) else {
            return Err(cut);
        };
        vcpus += u32::from(u16::from_le_bytes([rest[0], rest[1]]) == CPU);
        rest = next;
    }
    Ok(vcpus)
}

/// The parameters in an HVM_PARAMS record: `u32 count, zero [4]`, and as many pairs of `u64 number, u64 value`.
pub(super) fn params(body: &[u8], offset: u64) -> Result<Vec<(u64, u64)>, StreamError> {
    let length = StreamError::Length { field: "HVM_PARAMS", offset, length: body.len() as u64 };
    let Some((header, pairs)) = body.split_at_checked(8) else {
        return Err(length);
    };
    let (pairs, []) = pairs.as_chunks::<16>() else {
        return Err(length);
    };
    if pairs.len() as u64 != u64::from(u32_at(header, 0)) {
        return Err(length);
    }
    Ok(pairs.iter().map(|pair| (u64_at(pair, 0), u64_at(pair, 8))).collect())
}

/// The number at `at`, which lies within `bytes`.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}
