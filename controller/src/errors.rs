//! Errors as one line.

use std::error::Error;
use std::fmt;

/// Displays an error and what caused it, separated by colons.
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(formatter, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_shown_in_order() {
        let error = crate::metrics::MetricsError::Listen {
            address: "127.0.0.1:1".parse().unwrap(),
            source: std::io::Error::other("in use"),
        };
        assert!(Chain(&error).to_string().ends_with("--metrics-listen: in use"), "{}", Chain(&error));
    }
}
