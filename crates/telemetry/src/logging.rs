//! Where log lines go and what they look like.

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use types::{Error, Result};

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// One line of text. Without a time where stderr is the journal, which has its own.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Starts logging to stderr for the whole process.
///
/// `level` is a level ("info") or a list of directives ("info,h2=warn").
///
/// # Errors
/// `InvalidArgument` for a level that can't be read; `FailedPrecondition` when
/// logging was started before.
pub fn init_logging(level: &str, format: LogFormat) -> Result<()> {
    let filter = filter(level)?;
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(BoxMakeWriter::new(std::io::stderr))
        .with_ansi(std::io::stderr().is_terminal());
    let started = match format {
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        LogFormat::Text if journal => builder.without_time().try_init(),
        LogFormat::Text => builder.try_init(),
    };
    started.map_err(|e| Error::precondition(format!("start logging: {e}")))
}

fn filter(level: &str) -> Result<EnvFilter> {
    // EnvFilter takes a lone word that is no level for a target's name and would
    // then log nothing at all.
    let known = ["off", "error", "warn", "info", "debug", "trace"];
    let word = level.trim().to_ascii_lowercase();
    let bare = word.bytes().all(|b| b.is_ascii_alphanumeric());
    let refused = || {
        Error::invalid(format!("log level {level:?} is none"))
            .hint("use one of off, error, warn, info, debug, trace, or directives such as 'info,h2=warn'")
    };
    if bare && !known.contains(&word.as_str()) {
        return Err(refused());
    }
    EnvFilter::try_new(&word).map_err(|e| refused().because(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_directives_are_read_and_typing_errors_refused() {
        for good in ["info", "DEBUG", "warn,h2=error", "off"] {
            assert!(filter(good).is_ok(), "{good}");
        }
        for bad in ["", "inof", "info,h2=loud", "3x"] {
            let e = filter(bad).unwrap_err().to_string();
            assert!(e.contains("one of off"), "{bad}: {e}");
        }
    }
}
