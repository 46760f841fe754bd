//! Descriptor files, image indices and working sets from anywhere: what fuzzing and property tests share.

use descriptor::Descriptor;
use descriptor::image::ImageIndex;
use descriptor::working_set::Merged;

/// Decodes `bytes` as they are, and as the recipe of a file whose outer form is sound: checksums and lengths are right, and
/// what the sections hold is for the decoders to bear.
///
/// # Panics
/// When what was accepted is not the same after it was encoded and decoded again.
pub fn file(bytes: &[u8]) {
    check(bytes);
    if let Some((kind, recipe)) = bytes.split_first() {
        check(&forge(kind % 3 + 1, recipe));
    }
}

fn check(bytes: &[u8]) {
    if let Ok(descriptor) = Descriptor::decode(bytes) {
        assert_eq!(Descriptor::decode(&descriptor.encode()), Ok(descriptor));
    }
    if let Ok(index) = ImageIndex::decode(bytes) {
        assert_eq!(ImageIndex::decode(&index.encode()), Ok(index));
    }
    if let Ok(set) = Merged::decode(bytes) {
        assert_eq!(Merged::decode(&set.encode()), Ok(set));
    }
}

/// A file of sections that `recipe` lists: a number, flags, a length, for compressed ones the plain length in two bytes, and
/// the contents.
fn forge(kind: u8, recipe: &[u8]) -> Vec<u8> {
    let (mut table, mut bodies) = (Vec::new(), Vec::new());
    let mut rest = recipe;
    let mut count = 0_u32;
    while let [number, flags, length, tail @ ..] = rest {
        let compressed = flags & 2 != 0;
        let (plain, tail) = match tail {
            [low, high, tail @ ..] if compressed => (u64::from(u16::from_le_bytes([*low, *high])), tail),
            _ => (u64::from(*length), tail),
        };
        let (contents, tail) = tail.split_at(tail.len().min((*length).into()));
        let plain = if compressed { plain } else { contents.len() as u64 };
        table.extend_from_slice(&u32::from(*number).to_le_bytes());
        table.extend_from_slice(&u32::from(flags & 3).to_le_bytes());
        table.extend_from_slice(&(contents.len() as u64).to_le_bytes());
        table.extend_from_slice(&plain.to_le_bytes());
        table.extend_from_slice(&checksum(contents));
        bodies.extend_from_slice(contents);
        count += 1;
        rest = tail;
    }
    let length = (24 + table.len() + bodies.len() + 16) as u64;
    let mut file = vec![b'S', b'N', b'O', b'W', kind, 0, 1, 0];
    file.extend_from_slice(&length.to_le_bytes());
    file.extend_from_slice(&count.to_le_bytes());
    file.extend_from_slice(&[0; 4]);
    file.append(&mut table);
    file.append(&mut bodies);
    file.extend_from_slice(&checksum(&file));
    file
}

fn checksum(bytes: &[u8]) -> [u8; 16] {
    let mut checksum = [0; 16];
    checksum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    checksum
}

#[cfg(test)]
mod tests {
    use descriptor::{Gfn, ImageId};
    use proptest::prelude::*;

    use super::*;

    /// A sound index of one file: memory of four frames, of which the second is zero.
    fn recipe() -> Vec<u8> {
        let memory = [&[0; 8][..], &[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, b'r']].concat();
        let files = [&[0, 0x40, 0, 0, 0, 0, 0, 0, 1, 0][..], &[0; 6], b"f"].concat();
        let section = |number: u8, contents: &[u8]| [&[number, 1, contents.len() as u8], contents].concat();
        let sections = [(2, &memory[..]), (5, &[1, 1]), (16, &[7; 16]), (17, &files), (18, &[0, 4, 0, 0, 0])];
        sections.iter().flat_map(|(number, contents)| section(*number, contents)).collect()
    }

    #[test]
    fn a_forged_file_is_accepted_when_its_sections_are_sound() {
        let index = ImageIndex::decode(&forge(2, &recipe())).unwrap();
        assert_eq!(index.image, ImageId::from_bytes([7; 16]));
        assert!(index.zero.contains(Gfn::new(1)) && index.files[0].length == 4 * 4096);
        file(&[&[1], &recipe()[..]].concat());
    }

    #[test]
    fn a_forged_working_set_is_accepted_when_it_is_sound() {
        let section = |number: u8, contents: &[u8]| [&[number, 1, contents.len() as u8], contents].concat();
        let recipe = [section(16, &[7; 16]), section(19, &[64, 1, 1, 10, 3, 1, 1])].concat();
        let set = Merged::decode(&forge(3, &recipe)).unwrap();
        assert_eq!(set.summary().frames, 3);
        file(&[&[2], &recipe[..]].concat());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            file(&bytes);
        }

        #[test]
        fn sound_files_with_a_few_changes(changes in proptest::collection::vec((0..90_usize, 0..20_u8), 1..4)) {
            let mut bytes = [&[1], &recipe()[..]].concat();
            for (position, byte) in changes {
                if let Some(place) = bytes.get_mut(position) {
                    *place = byte;
                }
            }
            file(&bytes);
        }
    }
}
