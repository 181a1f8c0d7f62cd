//! Errors of commands.

use switchtower_admin_api::codes::{self, Code};

/// A command could not be completed. The message names the attempted action and, if possible, a remedy.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub(crate) struct CliError {
    pub(crate) message: String,
    pub(crate) code: Option<Code>,
}

impl CliError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: None }
    }

    /// Returns true if the controller is unreachable, which may be temporary.
    pub(crate) fn is_unreachable(&self) -> bool {
        self.code == Some(codes::CONTROLLER_UNREACHABLE)
    }

    pub(crate) fn coded(code: Code, message: impl Into<String>) -> Self {
        Self { message: message.into(), code: Some(code) }
    }
}

/// Formats an error with its sources, each once.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}
