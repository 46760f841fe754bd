use std::time::Duration;

/// The shortest: clones' timers are no better than that.
const MIN: Duration = Duration::from_millis(1);

/// In round trips, K of RFC 5740.
const ROUND_TRIPS: u32 = 4;

/// What each member adds. It keeps a group from sending more than 50,000 NACKs a second on average whatever they ask for and
/// whoever hears of it, so that the server is not buried even when its answers are lost. Mostly far fewer go: the first of
/// a group of any size waits a tenth of the longest back-off, and then there is time to confirm its NACK before others
/// follow. In ten thousand members all have lost something of each block, and their needs differ: with round trips alone
/// they sent more than one NACK each.
const EACH: Duration = Duration::from_micros(20);

/// The longest time that a member of a group waits before it asks for something again. How long each does is random.
pub(crate) fn longest_back_off(members: u32, round_trip: Duration) -> Duration {
    MIN.max(round_trip * ROUND_TRIPS).max(EACH * members)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_offs_grow_with_distance_and_size() {
        let (us, ms) = (Duration::from_micros, Duration::from_millis);
        assert_eq!(longest_back_off(2, us(100)), ms(1));
        assert_eq!(longest_back_off(8, ms(3)), ms(12));
        assert_eq!(longest_back_off(10_000, ms(3)), ms(200));
    }
}
