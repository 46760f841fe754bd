//! Forward error correction: rows of parity over the shards of a block, and shards back from them.
//!
//! The code is a systematic Reed-Solomon code over GF(2^8) with [`Geometry::MAX_SHARDS`] source shards and
//! [`Geometry::MAX_PARITY`] rows of parity, made of a Cauchy matrix: row `j` is the sum over all `i` of
//! `shard[i] / (MAX_SHARDS + j + i)`. A shorter block stands for one whose other shards are zero, and a shard that is shorter than
//! the others for one that ends in zeros. Any `n` rows give any `n` missing shards back, since every square part of a Cauchy
//! matrix is invertible (Blömer et al., "An XOR-Based Erasure-Resilient Coding Scheme", 1995). Rows do not depend on each
//! other, so more can be made when more are lost.
//!
//! Only the field arithmetic is the codec crate's (vectorised, some 8 µs for a row over 192 shards of 1448 bytes). Its own
//! decoder inverts a matrix as large as the block; this one solves for the missing shards alone. The tests compare the two.

use std::ops::Range;

use rustfs_erasure_codec::galois_8::{div, mul, mul_slice, mul_slice_xor};

use crate::{Geometry, ShardSet};

/// Rows of parity over shards, in the making; the shards may come in any order, and in pieces.
#[derive(Debug)]
pub struct Parity<'a> {
    rows: Range<u8>,
    payload: usize,
    out: &'a mut [u8],
}

impl<'a> Parity<'a> {
    /// Begins `rows` over shards of up to `payload` bytes in `out`, one row after the other, each of `payload` bytes.
    ///
    /// # Panics
    /// When there are no such rows, or `out` is not of their size.
    pub fn new(rows: Range<u8>, payload: usize, out: &'a mut [u8]) -> Self {
        assert!(rows.end <= Geometry::MAX_PARITY, "rows {rows:?} of parity");
        assert_eq!(out.len(), rows.len() * payload, "a buffer for {} rows of {payload} bytes", rows.len());
        out.fill(0);
        Self { rows, payload, out }
    }

    /// Adds bytes of a shard, from `offset` on. Bytes that are never added count as zero.
    ///
    /// # Panics
    /// When there is no such shard, or it would be longer than a row.
    pub fn add(&mut self, shard: u8, offset: usize, bytes: &[u8]) {
        let span = offset..offset + bytes.len();
        for (row, out) in self.rows.clone().zip(self.out.chunks_exact_mut(self.payload)) {
            mul_slice_xor(coefficient(row, shard), bytes, &mut out[span.clone()]);
        }
    }
}

/// Makes `rows` of parity in `out` from the `stream` of a block, which is cut into shards of `payload` bytes.
///
/// # Panics
/// When there are no such rows, `out` is not of their size, or the stream is longer than a block's.
pub fn parity(rows: Range<u8>, payload: usize, stream: &[u8], out: &mut [u8]) {
    let mut parity = Parity::new(rows, payload, out);
    for (at, shard) in stream.chunks(payload).enumerate() {
        parity.add(shard_index(at), 0, shard);
    }
}

/// Computes the `missing` shards in place. `stream` holds all shards of the block, each of `payload` bytes (the last one padded
/// with zeros); what it holds where the missing ones belong makes no difference. `parity` has the rows numbered `rows`, one
/// after the other, as many as shards are missing, all different; it is used up.
///
/// # Panics
/// When the numbers do not fit.
pub fn recover(stream: &mut [u8], payload: usize, missing: ShardSet, rows: &[u8], parity: &mut [u8]) {
    assert_eq!(rows.len(), usize::from(missing.len()), "rows of parity for the missing shards");
    assert_eq!(parity.len(), rows.len() * payload, "bytes of parity");
    // What the known shards contributed to the rows is taken out of them.
    for (at, shard) in stream.chunks_exact(payload).enumerate() {
        let index = shard_index(at);
        if missing.contains(index) {
            continue;
        }
        for (row, sum) in rows.iter().zip(parity.chunks_exact_mut(payload)) {
            mul_slice_xor(coefficient(*row, index), shard, sum);
        }
    }
    // What is left is the product of a square part of the matrix and the missing shards.
    let unknowns: Vec<u8> = missing.iter().collect();
    let inverse = invert(rows, &unknowns);
    for (shard, factors) in unknowns.iter().zip(inverse.chunks_exact(rows.len())) {
        let start = usize::from(*shard) * payload;
        let shard = &mut stream[start..start + payload];
        let mut terms = factors.iter().zip(parity.chunks_exact(payload));
        if let Some((factor, sum)) = terms.next() {
            mul_slice(*factor, sum, shard);
        }
        terms.for_each(|(factor, sum)| mul_slice_xor(*factor, sum, shard));
    }
}

/// What `shard` is multiplied with in `row`.
fn coefficient(row: u8, shard: u8) -> u8 {
    // Never a division by zero: rows and shards have numbers of their own.
    div(1, (Geometry::MAX_SHARDS + row) ^ shard)
}

fn shard_index(at: usize) -> u8 {
    assert!(at < Geometry::MAX_SHARDS.into(), "shard {at} of a block");
    at as u8
}

/// The inverse of the part of the matrix that has these rows and columns, row by row: Gauss and Jordan's elimination.
///
/// # Panics
/// When a row or a column occurs twice.
fn invert(rows: &[u8], shards: &[u8]) -> Vec<u8> {
    let n = rows.len();
    let mut matrix: Vec<Vec<u8>> = Vec::with_capacity(n);
    for (at, row) in rows.iter().enumerate() {
        let mut line: Vec<u8> = shards.iter().map(|shard| coefficient(*row, *shard)).collect();
        line.extend((0..n).map(|column| u8::from(column == at)));
        matrix.push(line);
    }
    for column in 0..n {
        let pivot = (column..n).find(|row| matrix[*row][column] != 0).expect("parts of a Cauchy matrix are regular");
        matrix.swap(column, pivot);
        let mut line = std::mem::take(&mut matrix[column]);
        let scale = div(1, line[column]);
        line.iter_mut().for_each(|value| *value = mul(*value, scale));
        for other in matrix.iter_mut().filter(|other| !other.is_empty()) {
            mul_slice_xor(other[column], &line, other);
        }
        matrix[column] = line;
    }
    matrix.iter().flat_map(|line| &line[n..]).copied().collect()
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;
    use proptest::prelude::*;
    use rustfs_erasure_codec::galois_8::ReedSolomon;
    use rustfs_erasure_codec::{CodecOptions, MatrixMode};

    use super::*;

    fn stream(rng: &mut Rng, length: usize) -> Vec<u8> {
        (0..length).map(|_| rng.u8(..)).collect()
    }

    #[test]
    fn rows_are_those_of_the_crate() {
        let (shards, rows) = (Geometry::MAX_SHARDS, Geometry::MAX_PARITY);
        let options = CodecOptions::builder().matrix_mode(MatrixMode::Cauchy).build();
        let codec = ReedSolomon::with_options(shards.into(), rows.into(), options).unwrap();
        let payload = 100;
        for count in [1, 2, 5, 191, 192_usize] {
            let stream = stream(&mut Rng::with_seed(count as u64), count * payload - 30);
            let mut padded = stream.clone();
            padded.resize(usize::from(shards) * payload, 0);
            let data: Vec<&[u8]> = padded.chunks(payload).collect();
            let mut theirs = vec![vec![0; payload]; rows.into()];
            codec.encode_sep(&data, &mut theirs).unwrap();
            let mut ours = vec![0; usize::from(rows) * payload];
            parity(0..rows, payload, &stream, &mut ours);
            assert_eq!(ours, theirs.concat(), "{count} shards");
            let mut some = vec![0xff; 3 * payload];
            parity(20..23, payload, &stream, &mut some);
            assert_eq!(some, theirs[20..23].concat(), "rows do not depend on each other");
        }
    }

    #[test]
    fn golden_parity() {
        let mut rows = [0; 8];
        parity(0..2, 4, b"SnowFlock!", &mut rows);
        assert_eq!(rows, [0x6f, 0x69, 0x2c, 0x0a, 0x8c, 0x98, 0x2c, 0xff]);
    }

    #[test]
    fn pieces_in_any_order_make_the_same_rows() {
        let stream = stream(&mut Rng::with_seed(1), 1000);
        let (mut whole, mut pieces) = (vec![0; 5 * 300], vec![0; 5 * 300]);
        parity(7..12, 300, &stream, &mut whole);
        let mut parity = Parity::new(7..12, 300, &mut pieces);
        for (shard, offset, length) in [(3, 0, 100), (1, 100, 200), (0, 0, 300), (2, 0, 300), (1, 0, 100)] {
            let start = usize::from(shard) * 300 + offset;
            parity.add(shard, offset, &stream[start..start + length]);
        }
        assert_eq!(whole, pieces);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_rows_recover_as_many_shards(seed: u64, count in 1..=192_u8, lost in 1..=63_u8) {
            let mut rng = Rng::with_seed(seed);
            let payload = 64;
            let original = stream(&mut rng, usize::from(count) * payload);
            let missing: ShardSet = rng.choose_multiple(0..count, lost.min(count).into()).into_iter().collect();
            let mut rows = rng.choose_multiple(0..Geometry::MAX_PARITY, missing.len().into());
            rng.shuffle(&mut rows);
            let mut sums = Vec::new();
            for row in &rows {
                let mut sum = vec![0; payload];
                parity(*row..row + 1, payload, &original, &mut sum);
                sums.extend(sum);
            }
            let mut damaged = original.clone();
            for shard in missing.iter() {
                damaged[usize::from(shard) * payload..][..payload].fill(0xee);
            }
            recover(&mut damaged, payload, missing, &rows, &mut sums);
            prop_assert!(damaged == original);
        }
    }
}
