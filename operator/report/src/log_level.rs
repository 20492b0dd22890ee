//! How much a node logs: the word that a KataConfig, the installer's command line and the CRI's configuration share.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The levels of `crio --log-level`, crio(8).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Only what ends the daemon.
    Fatal,
    /// Also what should never happen.
    Panic,
    /// Also what failed.
    Error,
    /// Also what may become a failure.
    Warn,
    /// The ordinary: the daemon's own default.
    #[default]
    Info,
    /// What helps to find a fault.
    Debug,
    /// Everything.
    Trace,
}

const LEVELS: [LogLevel; 7] = [
    LogLevel::Fatal,
    LogLevel::Panic,
    LogLevel::Error,
    LogLevel::Warn,
    LogLevel::Info,
    LogLevel::Debug,
    LogLevel::Trace,
];

/// A word that is no log level.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no log level: fatal, panic, error, warn, info, debug and trace are")]
pub struct LogLevelError(String);

impl LogLevel {
    /// The word that users write.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            LogLevel::Fatal => "fatal",
            LogLevel::Panic => "panic",
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
}

impl FromStr for LogLevel {
    type Err = LogLevelError;

    fn from_str(word: &str) -> Result<Self, LogLevelError> {
        let known = LEVELS.into_iter().find(|level| level.name() == word);
        known.ok_or_else(|| LogLevelError(word.to_owned()))
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_levels_are_words() {
        let words = ["fatal", "panic", "error", "warn", "info", "debug", "trace"];
        for (level, word) in LEVELS.into_iter().zip(words) {
            assert_eq!(
                (word.parse::<LogLevel>().unwrap(), level.to_string().as_str()),
                (level, word)
            );
        }
        assert!(
            "loud"
                .parse::<LogLevel>()
                .unwrap_err()
                .to_string()
                .starts_with("\"loud\" is no log level")
        );
    }
}
