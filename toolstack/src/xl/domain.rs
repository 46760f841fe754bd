//! Domains, as `xl list` shows them.

use thiserror::Error;

/// A line of `xl list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Domain {
    pub(super) name: String,
    pub(super) id: u32,
    /// The memory that it has, in MiB.
    pub(super) mib: u64,
    pub(super) vcpus: u32,
    pub(super) state: DomainState,
}

/// What a domain is doing, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DomainState {
    /// It runs, or would if it had something to do.
    Running,
    /// Somebody paused it.
    Paused,
    /// It suspended itself because the toolstack asked for it, and waits to be resumed.
    Suspended,
    /// It shut itself down.
    ShutDown,
    /// It crashed.
    Crashed,
    /// It is being destroyed.
    Dying,
}

/// A text that is no list of domains.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no line of a list of domains")]
pub struct ParseDomainError(String);

impl DomainState {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::ShutDown => "shut down",
            Self::Crashed => "crashed",
            Self::Dying => "being destroyed",
        }
    }

    /// The state behind xl's six letters: running, blocked, paused, shut down and for which reason, dying; a `-` for each that
    /// is not the case.
    fn of_letters(letters: &[u8]) -> Option<Self> {
        let &[running, blocked, paused, shutdown, reason, dying] = letters else { return None };
        let is = |letter: u8, name: u8| (letter == name || letter == b'-').then_some(letter == name);
        let (_, _) = (is(running, b'r')?, is(blocked, b'b')?);
        let (paused, shutdown, dying) = (is(paused, b'p')?, is(shutdown, b's')?, is(dying, b'd')?);
        Some(match reason {
            _ if dying => Self::Dying,
            b's' if shutdown => Self::Suspended,
            b'c' | b'w' if shutdown => Self::Crashed,
            b'-' | b'r' | b'S' | b'?' if shutdown => Self::ShutDown,
            b'-' if paused => Self::Paused,
            b'-' => Self::Running,
            _ => return None,
        })
    }
}

/// The domains of `xl list`: a line of titles, then for each domain its name, number, MiB, processors, state, seconds.
///
/// # Errors
/// Names the first line that is none.
pub(super) fn parse_list(text: &str) -> Result<Vec<Domain>, ParseDomainError> {
    let lines = text.lines().skip_while(|line| !line.starts_with("Name ")).skip(1);
    lines.map(|line| parse_line(line).ok_or_else(|| ParseDomainError(line.to_owned()))).collect()
}

fn parse_line(line: &str) -> Option<Domain> {
    // From the right, for a name may have blanks in it.
    let mut rest = line;
    let mut word = || {
        let (before, word) = rest.trim_end().rsplit_once(char::is_whitespace)?;
        rest = before;
        Some(word)
    };
    let (seconds, letters, vcpus, mib, id) = (word()?, word()?, word()?, word()?, word()?);
    // Only to be sure that these are the columns that they seem to be.
    seconds.parse::<f64>().ok()?;
    let name = rest.trim_end().to_owned();
    let (id, mib, vcpus) = (id.parse().ok()?, mib.parse().ok()?, vcpus.parse().ok()?);
    Some(Domain { name, id, mib, vcpus, state: DomainState::of_letters(letters.as_bytes())? })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIST: &str = "\
Name                                        ID   Mem VCPUs\tState\tTime(s)
Domain-0                                     0  1024     1     r-----     146.1
cl1                                          3    33     2     ------     136.5
left behind                                  7   128     1     ---ss-       8.0
";

    #[test]
    fn lists_of_xl_are_understood() {
        let domains = parse_list(LIST).unwrap();
        let seen: Vec<_> =
            domains.iter().map(|domain| (domain.name.as_str(), domain.id, domain.vcpus, domain.state)).collect();
        use DomainState::*;
        assert_eq!(seen, [("Domain-0", 0, 1, Running), ("cl1", 3, 2, Running), ("left behind", 7, 1, Suspended)]);
        assert_eq!(parse_list("").unwrap(), []);
        let cut = LIST.trim_end().trim_end_matches("8.0");
        assert!(parse_list(cut).is_err());
    }

    #[test]
    fn letters_tell_the_state() {
        let of = |letters: &str| DomainState::of_letters(letters.as_bytes());
        use DomainState::*;
        let seen = ["-b----", "--p---", "--pss-", "---sc-", "---s--", "-----d"].map(of);
        assert_eq!(seen, [Some(Running), Some(Paused), Some(Suspended), Some(Crashed), Some(ShutDown), Some(Dying)]);
        assert_eq!(["", "rbps", "x-----", "-----x"].map(of), [None; 4]);
    }

    proptest! {
        #[test]
        fn any_domain_is_read_as_it_was_written(
            name in "[a-zA-Z0-9._ -]{0,60}", id in any::<u32>(), mib in any::<u32>(), vcpus in 0_u32..1000, seconds in 0.0..1e9,
            letters in "[r-][b-][p-][s-][rscwS-][d-]",
        ) {
            let line = format!("{name:<40} {id:>5} {mib:>5} {vcpus:>5}     {letters}  {seconds:>8.1}");
            match parse_line(&line) {
                Some(domain) => prop_assert_eq!((domain.name, domain.id, domain.vcpus), (name.trim_end().to_owned(), id, vcpus)),
                None => prop_assert!(DomainState::of_letters(letters.as_bytes()).is_none()),
            }
        }

        #[test]
        fn any_text_is_no_reason_to_panic(text in ".*") {
            let _ = parse_list(&format!("Name \n{text}"));
        }
    }
}
