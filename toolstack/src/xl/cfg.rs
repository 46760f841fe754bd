//! The language of xl's configuration files (xl.cfg(5); `libxlu_cfg_{l.l,y.y}` of Xen's tools): assignments of strings, numbers and lists.

use std::iter::Peekable;
use std::ops::Range;
use std::str::CharIndices;

use thiserror::Error;

/// How deep lists lie in each other; xl itself knows none that do.
const DEPTH_MAX: usize = 8;

/// One `name = value` or `name += value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Assignment {
    pub(super) name: String,
    /// `+=`: the value is appended to the one before.
    pub(super) adds: bool,
    pub(super) value: Value,
    /// Where it stands in the text, in bytes.
    pub(super) place: Range<usize>,
}

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// A string without its quotes, or a number.
    Atom(String),
    List(Vec<Value>),
}

/// A text that is no configuration.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("line {line}: {what}")]
pub struct CfgError {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong there.
    pub what: &'static str,
}

/// The assignments of a configuration, in their order.
///
/// # Errors
/// Names the first line that is none.
pub(super) fn parse(text: &str) -> Result<Vec<Assignment>, CfgError> {
    let mut parser = Parser { text, rest: text.char_indices().peekable() };
    let mut assignments = Vec::new();
    while let Some(assignment) = parser.statement()? {
        assignments.push(assignment);
    }
    Ok(assignments)
}

/// `text` as a string of the language.
pub(super) fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The value that `name` has in the end, as a list of strings; a string alone is a list of one.
pub(super) fn strings(assignments: &[Assignment], name: &str) -> Vec<String> {
    let mut strings = Vec::new();
    for assignment in assignments.iter().filter(|assignment| assignment.name == name) {
        if !assignment.adds {
            strings.clear();
        }
        match &assignment.value {
            Value::Atom(text) => strings.push(text.clone()),
            Value::List(values) => strings.extend(values.iter().filter_map(|value| match value {
                Value::Atom(text) => Some(text.clone()),
                Value::List(_) => None,
            })),
        }
    }
    strings
}

struct Parser<'t> {
    text: &'t str,
    rest: Peekable<CharIndices<'t>>,
}

impl Parser<'_> {
    /// The next assignment and the end of its line.
    fn statement(&mut self) -> Result<Option<Assignment>, CfgError> {
        self.skip(|c| c.is_ascii_whitespace() || c == ';');
        let start = self.at();
        if self.peek().is_none() {
            return Ok(None);
        }
        let name = self.word(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.' || c == '_');
        if !name.starts_with(|first: char| first.is_ascii_lowercase()) {
            return Err(self.error("expected a setting, such as `memory = 512`"));
        }
        self.skip(is_blank);
        let adds = self.take('+');
        if !self.take('=') {
            return Err(self.error("expected `=` behind the setting's name"));
        }
        self.skip(is_blank);
        let value = self.value(0)?;
        let place = start..self.at();
        self.skip(is_blank);
        match self.peek() {
            None | Some('\n' | '\r' | ';') => Ok(Some(Assignment { name, adds, value, place })),
            Some(_) => Err(self.error("expected the end of the line behind the value")),
        }
    }

    fn value(&mut self, depth: usize) -> Result<Value, CfgError> {
        match self.peek() {
            Some(quote @ ('"' | '\'')) => self.string(quote).map(Value::Atom),
            Some('0'..='9') => {
                Ok(Value::Atom(self.word(|c| c.is_ascii_digit() || ('a'..='f').contains(&c) || c == 'x')))
            }
            Some('[') if depth == DEPTH_MAX => Err(self.error("lists lie too deep in each other")),
            Some('[') => self.list(depth),
            _ => Err(self.error("expected a number, a list, or a string in quotes")),
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value, CfgError> {
        self.rest.next();
        let mut values = Vec::new();
        loop {
            self.skip(|c| c.is_ascii_whitespace());
            if self.take(']') {
                return Ok(Value::List(values));
            }
            values.push(self.value(depth + 1)?);
            self.skip(|c| c.is_ascii_whitespace());
            if !self.take(',') && self.peek() != Some(']') {
                return Err(self.error("expected `,` or `]` in the list"));
            }
        }
    }

    fn string(&mut self, quote: char) -> Result<String, CfgError> {
        self.rest.next();
        let mut string = String::new();
        while let Some((_, c)) = self.rest.next() {
            match c {
                c if c == quote => return Ok(string),
                '\n' => break,
                // The escapes of letters and numbers have no place in what is looked at here, and stay as they are.
                '\\' => match self.rest.next() {
                    Some((_, c @ ('"' | '\'' | '\\'))) => string.push(c),
                    Some((_, c)) if c != '\n' => string.extend(['\\', c]),
                    _ => break,
                },
                c => string.push(c),
            }
        }
        Err(self.error("the string has no end in its line"))
    }

    fn word(&mut self, is_part: impl Fn(char) -> bool) -> String {
        let start = self.at();
        while self.rest.next_if(|(_, c)| is_part(*c)).is_some() {}
        self.text[start..self.at()].to_owned()
    }

    /// Passes over characters of a kind, and comments.
    fn skip(&mut self, is_skipped: impl Fn(char) -> bool) {
        loop {
            if self.rest.next_if(|(_, c)| is_skipped(*c)).is_none() {
                if self.peek() != Some('#') {
                    return;
                }
                while self.rest.next_if(|(_, c)| *c != '\n').is_some() {}
            }
        }
    }

    fn take(&mut self, wanted: char) -> bool {
        self.rest.next_if(|(_, c)| *c == wanted).is_some()
    }

    fn peek(&mut self) -> Option<char> {
        self.rest.peek().map(|(_, c)| *c)
    }

    fn at(&mut self) -> usize {
        self.rest.peek().map_or(self.text.len(), |(at, _)| *at)
    }

    fn error(&mut self, what: &'static str) -> CfgError {
        let line = 1 + self.text[..self.at()].matches('\n').count();
        CfgError { line, what }
    }
}

fn is_blank(c: char) -> bool {
    c == ' ' || c == '\t'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn atom(text: &str) -> Value {
        Value::Atom(text.to_owned())
    }

    #[test]
    fn configurations_of_people_are_understood() {
        let text = "# A web server\nname = 'web' # its name\nmemory=512; vcpus = 2\n\nvif = [ 'bridge=xenbr0',\n  # the other\n  \
                    \"mac=00:16:3e:00:00:01\", ]\nvif += [ '' ]\nextra = \"a='b' \\\"c\\\"\"";
        let assignments = parse(text).unwrap();
        let names: Vec<&str> = assignments.iter().map(|assignment| assignment.name.as_str()).collect();
        assert_eq!(names, ["name", "memory", "vcpus", "vif", "vif", "extra"]);
        assert_eq!((&assignments[0].value, &assignments[1].value), (&atom("web"), &atom("512")));
        assert_eq!(&text[assignments[1].place.clone()], "memory=512");
        assert_eq!(strings(&assignments, "vif"), ["bridge=xenbr0", "mac=00:16:3e:00:00:01", ""]);
        assert_eq!(strings(&assignments, "extra"), ["a='b' \"c\""]);
        assert_eq!(strings(&assignments, "disk"), [""; 0]);
        assert_eq!(parse(" \n# nothing"), Ok(vec![]));
    }

    #[test]
    fn errors_name_the_line() {
        let line = |text: &str| parse(text).unwrap_err().line;
        let lines = ["memory 512", "\nname = web", "a=1\nb='", "a=[1\n2]", "a = 1 2", "\n\n= 1", "a=["].map(line);
        assert_eq!(lines, [1, 2, 2, 2, 1, 3, 1]);
        assert!(parse(&format!("a = {}1{}", "[".repeat(9), "]".repeat(9))).is_err());
    }

    proptest! {
        #[test]
        fn any_string_survives_its_quotes(text in "[^\n\\\\]*", tail in "[\\\\\"']{0,4}") {
            let text = text + &tail;
            let assignments = parse(&format!("name = {}\nmemory = 1", quoted(&text))).unwrap();
            prop_assert_eq!(&assignments[0].value, &Value::Atom(text));
            prop_assert_eq!(assignments.len(), 2);
        }

        #[test]
        fn any_text_is_no_reason_to_panic(text in "([a-z]{1,3}|[=+\\[\\],;#'\" \n\\\\0-9]|\\PC){0,40}") {
            for assignment in parse(&text).unwrap_or_default() {
                prop_assert!(text[assignment.place].starts_with(&assignment.name));
            }
        }
    }
}
