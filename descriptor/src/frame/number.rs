use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub, SubAssign};

use serde::{Deserialize, Serialize};

/// Bytes in a page, the unit in which memory is traced, fetched and installed.
pub const PAGE_SIZE: u64 = 4096;

/// A guest frame number: the index of a 4096-byte frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Gfn(u64);

/// A number of 4096-byte pages.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageCount(u64);

impl Gfn {
    /// The largest frame number: one page below 2^64 bytes, so that byte addresses never overflow.
    pub const MAX: Gfn = Gfn(u64::MAX / PAGE_SIZE);

    /// The frame number `index`; `None` above [`Gfn::MAX`].
    pub const fn checked(index: u64) -> Option<Self> {
        if index <= Self::MAX.0 { Some(Self(index)) } else { None }
    }

    /// The frame number `index`.
    ///
    /// # Panics
    /// Above [`Gfn::MAX`]; use [`Gfn::checked`] for numbers from outside.
    pub const fn new(index: u64) -> Self {
        assert!(index <= Self::MAX.0, "frame number beyond 2^52");
        Self(index)
    }

    /// The frame that holds byte `address`.
    pub const fn containing(address: u64) -> Self {
        Self(address / PAGE_SIZE)
    }

    /// The frame number as a plain integer.
    pub const fn index(self) -> u64 {
        self.0
    }

    /// The address of the frame's first byte.
    pub const fn address(self) -> u64 {
        self.0 * PAGE_SIZE
    }

    /// The frame `count` pages further on; `None` above [`Gfn::MAX`].
    pub fn checked_add(self, count: PageCount) -> Option<Self> {
        self.0.checked_add(count.0).and_then(Self::checked)
    }
}

impl PageCount {
    /// No pages.
    pub const ZERO: PageCount = PageCount(0);
    /// One page.
    pub const ONE: PageCount = PageCount(1);

    /// This many pages.
    pub const fn new(pages: u64) -> Self {
        Self(pages)
    }

    /// The pages in `bytes`; `None` unless `bytes` is a multiple of [`PAGE_SIZE`].
    pub const fn from_bytes_exact(bytes: u64) -> Option<Self> {
        if bytes.is_multiple_of(PAGE_SIZE) { Some(Self(bytes / PAGE_SIZE)) } else { None }
    }

    /// The number as a plain integer.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The size in bytes, saturating at `u64::MAX`.
    pub const fn bytes(self) -> u64 {
        self.0.saturating_mul(PAGE_SIZE)
    }

    /// True for no pages.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl Add<PageCount> for Gfn {
    type Output = Gfn;

    /// # Panics
    /// When the sum is above [`Gfn::MAX`]; use [`Gfn::checked_add`] for numbers from outside.
    fn add(self, count: PageCount) -> Gfn {
        Gfn::new(self.0 + count.0)
    }
}

impl Sub for Gfn {
    type Output = PageCount;

    /// The pages from `start` up to `self`.
    ///
    /// # Panics
    /// When `start` is above `self`.
    fn sub(self, start: Gfn) -> PageCount {
        assert!(start <= self, "frame {start} is above {self}");
        PageCount(self.0 - start.0)
    }
}

impl Add for PageCount {
    type Output = PageCount;

    fn add(self, other: PageCount) -> PageCount {
        PageCount(self.0 + other.0)
    }
}

impl AddAssign for PageCount {
    fn add_assign(&mut self, other: PageCount) {
        *self = *self + other;
    }
}

impl Sub for PageCount {
    type Output = PageCount;

    /// # Panics
    /// When `other` is larger.
    fn sub(self, other: PageCount) -> PageCount {
        assert!(other <= self, "cannot take {other} from {self} pages");
        PageCount(self.0 - other.0)
    }
}

impl SubAssign for PageCount {
    fn sub_assign(&mut self, other: PageCount) {
        *self = *self - other;
    }
}

impl Sum for PageCount {
    fn sum<I: Iterator<Item = PageCount>>(iter: I) -> PageCount {
        iter.fold(PageCount::ZERO, Add::add)
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gfn({self})")
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageCount({})", self.0)
    }
}
