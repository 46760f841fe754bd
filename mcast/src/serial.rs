use std::fmt;

/// A number that wraps, compared as RFC 1982 does: of two numbers less than 2^31 apart it is known which is later.
///
/// It has no `Ord`, since that comparison is not transitive; [`Serial::extend`] makes an ordinary number of it.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Serial(u32);

impl Serial {
    /// The number as it is on the wire.
    pub const fn new(value: u32) -> Self {
        Self(value)
    }

    /// The number as a plain integer.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number `count` further on.
    #[must_use]
    pub const fn plus(self, count: u32) -> Self {
        Self(self.0.wrapping_add(count))
    }

    /// The number `count` before.
    #[must_use]
    pub const fn minus(self, count: u32) -> Self {
        Self(self.0.wrapping_sub(count))
    }

    /// The next number.
    #[must_use]
    pub const fn next(self) -> Self {
        self.plus(1)
    }

    /// How far `self` lies behind `earlier`, negative when it comes before it.
    pub const fn since(self, earlier: Serial) -> i32 {
        self.0.wrapping_sub(earlier.0) as i32
    }

    /// True when `self` comes before `other`.
    pub const fn is_before(self, other: Serial) -> bool {
        self.since(other) < 0
    }

    /// The later of the two.
    #[must_use]
    pub const fn later(self, other: Serial) -> Serial {
        if self.is_before(other) { other } else { self }
    }

    /// The number of 64 bits that ends in this one and is nearest to `near`, never below zero. A side that passes the last
    /// number it extended as `near` gets numbers which do not wrap and are ordered.
    pub fn extend(self, near: u64) -> u64 {
        let step = i64::from(self.since(Serial(near as u32)));
        near.checked_add_signed(step).unwrap_or(u64::from(self.0))
    }
}

impl From<u32> for Serial {
    fn from(value: u32) -> Self {
        Self(value)
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serial({})", self.0)
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparison_survives_the_wrap() {
        let last = Serial::new(u32::MAX);
        assert_eq!(last.next(), Serial::new(0));
        assert!(last.is_before(last.next()) && !last.next().is_before(last));
        assert_eq!(Serial::new(5).since(Serial::new(u32::MAX - 4)), 10);
        assert_eq!(last.later(Serial::new(3)), Serial::new(3));
        assert_eq!(Serial::new(3).minus(4), last);
        assert!(!last.is_before(last));
    }

    #[test]
    fn extension_is_nearest() {
        assert_eq!(Serial::new(2).extend(0xffff_fffe), 0x1_0000_0002);
        assert_eq!(Serial::new(0xffff_fffe).extend(0x1_0000_0002), 0xffff_fffe);
        assert_eq!(Serial::new(0xffff_fffe).extend(2), 0xffff_fffe, "nothing lies below zero");
        assert_eq!(Serial::new(7).extend(7), 7);
    }
}
