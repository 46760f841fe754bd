use crate::PAGE_SIZE;

const ZERO_PAGE: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// True when all `bytes` are zero.
///
/// The comparison with a page of zeros is the C library's `memcmp`: it uses the widest vectors of the machine that it runs
/// on, where code compiled here would have to do with those that every machine has, and stops at the first difference.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZERO_PAGE.len()).all(|chunk| *chunk == ZERO_PAGE[..chunk.len()])
}

/// The runs of zero pages in `bytes`, which are whole pages: index of the first page and number of pages of each.
pub(super) fn zero_runs(bytes: &[u8]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let mut pages = bytes.chunks_exact(ZERO_PAGE.len()).map(is_zero).enumerate();
    std::iter::from_fn(move || {
        let (first, _) = pages.find(|(_, zero)| *zero)?;
        let more = pages.by_ref().take_while(|(_, zero)| *zero).count();
        Some((first as u64, 1 + more as u64))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_counts() {
        for length in [0, 1, 63, 4096, 5000] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for position in 0..length {
                bytes[position] = 0x10;
                assert!(!is_zero(&bytes), "byte {position} of {length}");
                bytes[position] = 0;
            }
        }
    }

    #[test]
    fn runs_of_zero_pages() {
        let runs = |pages: &[u8]| {
            let bytes: Vec<u8> = pages.iter().flat_map(|byte| [*byte; PAGE_SIZE as usize]).collect();
            zero_runs(&bytes).collect::<Vec<_>>()
        };
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[1, 1]), []);
        assert_eq!(runs(&[0, 0]), [(0, 2)]);
        assert_eq!(runs(&[1, 0, 0, 1, 0]), [(1, 2), (4, 1)]);
    }
}
