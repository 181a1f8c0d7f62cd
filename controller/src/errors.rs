//! Errors on one line, and classification of API errors.

use std::error::Error;
use std::fmt;

/// Displays an error and its causes, separated by colons.
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

/// Returns true if the API server does not know the kind because its CRD is not installed. The error for a missing
/// object contains its name.
pub(crate) fn is_missing_kind(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else { return false };
    status.code == 404 && status.details.as_ref().is_none_or(|details| details.name.is_empty())
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
