//! Why a command cannot answer: a sentence that says what was attempted and what to do.

use switchtower_admin_api::codes::{self, Code};

/// The command's last words.
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

    /// The controller could not be asked; it may be there again soon.
    pub(crate) fn is_unreachable(&self) -> bool {
        self.code == Some(codes::CONTROLLER_UNREACHABLE)
    }

    pub(crate) fn coded(code: Code, message: impl Into<String>) -> Self {
        Self { message: message.into(), code: Some(code) }
    }
}

/// An error with its causes, each once.
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
