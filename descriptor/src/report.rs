use std::error::Error;
use std::fmt;

/// Shows an error with all of its causes in one line, the outermost first. Errors here do not repeat their source in their
/// own text.
///
/// ```
/// use descriptor::{Descriptor, Report};
///
/// let error = Descriptor::read("/nowhere".as_ref()).unwrap_err();
/// assert!(Report(&error).to_string().starts_with("cannot open /nowhere: No such file"));
/// ```
pub struct Report<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut error = self.0;
        while let Some(source) = error.source() {
            write!(f, ": {source}")?;
            error = source;
        }
        Ok(())
    }
}
