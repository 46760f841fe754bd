use std::collections::HashMap;

use descriptor::{FrameRange, Gfn, PAGE_SIZE};

use super::workload::mix;

/// What a guest's thread did to its pages, and so what they must hold.
#[derive(Default)]
pub(super) struct Model {
    changes: HashMap<Gfn, Change>,
}

/// What became of a page since the fork.
#[derive(Clone, Copy, Default)]
struct Change {
    base: Base,
    /// The word written since, if any.
    stamp: Option<u64>,
}

/// What a page holds apart from the word written last.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Base {
    #[default]
    Image,
    /// Its contents were given up.
    Zeros,
    /// It was wholly overwritten, see [`filling`].
    Filled(u64),
}

impl Model {
    /// Notes a write to the page of `gfn`; returns the word to write.
    pub(super) fn write(&mut self, gfn: Gfn) -> u64 {
        let change = self.changes.entry(gfn).or_default();
        // Never what was there, whatever that was, but by chance.
        let stamp = mix(change.stamp.unwrap_or(gfn.index()).wrapping_add(1));
        change.stamp = Some(stamp);
        stamp
    }

    /// Notes that the pages of `range` were given up.
    pub(super) fn discard(&mut self, range: FrameRange) {
        for gfn in range.frames() {
            self.changes.insert(gfn, Change { base: Base::Zeros, stamp: None });
        }
    }

    /// Notes that the page of `gfn` is about to be overwritten; returns what to [fill](filling) it with.
    pub(super) fn overwrite(&mut self, gfn: Gfn) -> u64 {
        let seed = self.write(gfn);
        self.changes.insert(gfn, Change { base: Base::Filled(seed), stamp: None });
        seed
    }

    /// True when the page holds what it held in the image, a written word aside.
    pub(super) fn needs_image(&self, gfn: Gfn) -> bool {
        self.changes.get(&gfn).is_none_or(|change| change.base == Base::Image)
    }

    /// Makes of the image's page what the guest's must be.
    pub(super) fn apply(&self, gfn: Gfn, page: &mut [u8; PAGE_SIZE as usize]) {
        let Some(change) = self.changes.get(&gfn) else { return };
        match change.base {
            Base::Image => {}
            Base::Zeros => page.fill(0),
            Base::Filled(seed) => {
                page.as_chunks_mut::<8>()
                    .0
                    .iter_mut()
                    .zip(filling(seed))
                    .for_each(|(word, value)| *word = value.to_ne_bytes());
            }
        }
        if let Some(stamp) = change.stamp
            && let Some(word) = page.as_chunks_mut::<8>().0.get_mut(word_of(gfn))
        {
            *word = stamp.to_ne_bytes();
        }
    }
}

/// The words of a page that is overwritten with `seed`.
pub(super) fn filling(seed: u64) -> impl Iterator<Item = u64> {
    (0..PAGE_SIZE / 8).map(move |word| seed.wrapping_add(word))
}

/// The word of a page that writes go to: another for each page, so that a page in the wrong place shows.
pub(super) fn word_of(gfn: Gfn) -> usize {
    (mix(gfn.index()) % (PAGE_SIZE / 8)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_change_counts() {
        let (mut model, gfn) = (Model::default(), Gfn::new(7));
        let image = [0xaa; PAGE_SIZE as usize];
        let expect = |model: &Model| {
            let mut page = image;
            model.apply(gfn, &mut page);
            page
        };
        assert_eq!(expect(&model), image);
        let first = model.write(gfn);
        let second = model.write(gfn);
        assert_ne!(first, second);
        let at = word_of(gfn) * 8;
        assert_eq!(expect(&model)[at..at + 8], second.to_ne_bytes());
        assert!(model.needs_image(gfn));
        model.discard(FrameRange::single(gfn));
        assert_eq!(expect(&model), [0; PAGE_SIZE as usize]);
        assert!(!model.needs_image(gfn));
        let third = model.write(gfn);
        assert_eq!(expect(&model)[at..at + 8], third.to_ne_bytes());
        assert_eq!(expect(&model)[(at + 8) % 4096], 0);
        let seed = model.overwrite(gfn);
        assert_ne!(seed, third);
        assert_eq!(expect(&model)[4088..], seed.wrapping_add(511).to_ne_bytes());
        assert!(!model.needs_image(gfn));
    }
}
