//! The agent's own log: to standard error, with a level that settings may change while it runs.

use anyhow::Context as _;
use switchtower_telemetry::spans::{self, BoxedLayer};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt, reload};

use crate::cli::LogFormat;

/// Changes what is logged.
pub struct LogLevel {
    default: String,
    current: String,
    set: Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send>,
}

impl LogLevel {
    /// A level that is changed by `set`; `default` is the command line's filter.
    pub fn new(default: &str, set: impl Fn(EnvFilter) -> Result<(), reload::Error> + Send + 'static) -> Self {
        LogLevel { default: default.to_owned(), current: default.to_owned(), set: Box::new(set) }
    }

    /// Logs at `level` from now on; empty: as the command line says. Returns whether that is a change.
    pub fn apply(&mut self, level: &str) -> bool {
        let wanted = if level.is_empty() { &self.default } else { level };
        if self.current == wanted {
            return false;
        }
        let filter = match EnvFilter::try_new(wanted) {
            Ok(filter) => filter,
            Err(error) => {
                tracing::warn!(level = wanted, %error, "the log level is unknown and stays as it is");
                return false;
            }
        };
        if let Err(error) = (self.set)(filter) {
            tracing::warn!(level = wanted, %error, "the log level cannot be changed");
            return false;
        }
        tracing::info!(level = wanted, "the log level was changed");
        self.current = wanted.to_owned();
        true
    }
}

/// Logs to standard error from now on; `exported` is the layer that exports spans.
///
/// # Errors
/// `filter` is none, or something logs already.
pub fn to_stderr(filter: &str, format: LogFormat, exported: Option<BoxedLayer>) -> anyhow::Result<LogLevel> {
    let parsed =
        EnvFilter::try_new(filter).with_context(|| format!("--log-level {filter:?} is not a filter"))?;
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
    fn the_level_follows_and_returns_to_the_command_lines() {
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
