//! Log to standard error; settings may change its level at run time.

use anyhow::Context as _;
use switchtower_telemetry::spans::{self, BoxedLayer};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt, reload};

use crate::cli::LogFormat;

/// Handle for the level of the log.
pub(crate) struct LogLevel {
    default: String,
    current: String,
    set: Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send>,
}

impl LogLevel {
    /// Creates a handle that changes the level by `set`; `default` is the filter of the command line.
    pub(crate) fn new(
        default: &str,
        set: impl Fn(EnvFilter) -> Result<(), reload::Error> + Send + 'static,
    ) -> Self {
        LogLevel { default: default.to_owned(), current: default.to_owned(), set: Box::new(set) }
    }

    /// Applies `level`; empty selects the filter of the command line. Returns whether the level changed.
    pub(crate) fn apply(&mut self, level: &str) -> bool {
        let wanted = if level.is_empty() { &self.default } else { level };
        if self.current == wanted {
            return false;
        }
        let filter = match EnvFilter::try_new(wanted) {
            Ok(filter) => filter,
            Err(error) => {
                tracing::warn!(level = wanted, %error, "unknown log level; keeping the current one");
                return false;
            }
        };
        if let Err(error) = (self.set)(filter) {
            tracing::warn!(level = wanted, %error, "cannot change the log level");
            return false;
        }
        tracing::info!(level = wanted, "log level changed");
        self.current = wanted.to_owned();
        true
    }
}

/// Starts the log to standard error; `exported` is the layer that exports spans.
///
/// # Errors
/// `filter` is invalid, or a log exists already.
pub(crate) fn to_stderr(
    filter: &str,
    format: LogFormat,
    exported: Option<BoxedLayer>,
) -> anyhow::Result<LogLevel> {
    let parsed = EnvFilter::try_new(filter).with_context(|| format!("invalid --log-level {filter:?}"))?;
    let (level, handle) = reload::Layer::new(parsed);
    let wanted = spans::in_log(level);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let log = match format {
        LogFormat::Text => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            lines.with_ansi(colours).with_filter(wanted).boxed()
        }
        LogFormat::Json => lines.json().flatten_event(true).with_filter(wanted).boxed(),
    };
    spans::subscriber(log, exported).try_init().context("start the log")?;
    Ok(LogLevel::new(filter, move |filter| handle.reload(filter)))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn empty_level_restores_the_command_line() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let mut level = LogLevel::new("info", move |filter| {
            log.lock().unwrap().push(filter.to_string());
            Ok(())
        });
        for wanted in ["", "debug", "debug", "warn", "no=such=level=", ""] {
            level.apply(wanted);
        }
        assert_eq!(*seen.lock().unwrap(), ["debug", "warn", "info"]);
    }
}
