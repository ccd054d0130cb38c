//! How a process ended.

use serde::{Deserialize, Serialize};
use std::time::SystemTime;

/// How a process ended, as `wait` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It called exit; 0 to 255.
    Code(u8),
    /// A signal killed it; the signal's number.
    Signal(u8),
    /// Nobody could tell (its watcher died too); counted as this code.
    Unknown(u8),
}

impl ExitStatus {
    /// The code that every wire uses: the exit code, or 128 + signal.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(c) | Self::Unknown(c) => i32::from(c),
            Self::Signal(s) => 128 + i32::from(s),
        }
    }

    /// The status behind a wire code, where no more is known than the code.
    pub fn from_code(code: u32) -> Self {
        match u8::try_from(code) {
            Ok(c) if c > 128 && c <= 128 + 64 => Self::Signal(c - 128),
            Ok(c) => Self::Code(c),
            Err(_) => Self::Unknown(255),
        }
    }
}

/// A death certificate: all that is known of one process's end.
///
/// The shim writes it into the bundle, atomically, before the exit is published
/// (behaviours.md section 5); code and time never change afterwards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// Exit code or signal.
    pub status: ExitStatus,
    /// When it was reaped.
    pub exited_at: SystemTime,
    /// The kernel's OOM killer struck in its cgroup while it ran.
    #[serde(default)]
    pub oom_killed: bool,
    /// The cgroup whose limit was hit, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oom_cgroup: Option<String>,
    /// Who sent the signal, where it was us: "StopContainer", "exec timeout", …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub killed_by: Option<String>,
    /// Peak memory of the container's cgroup in bytes, where the kernel tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_128_plus_n_on_every_wire() {
        assert_eq!(ExitStatus::Signal(9).code(), 137);
        assert_eq!(ExitStatus::from_code(137), ExitStatus::Signal(9));
        assert_eq!(ExitStatus::from_code(7), ExitStatus::Code(7));
        assert_eq!(ExitStatus::from_code(128).code(), 128);
        assert_eq!(ExitStatus::from_code(70_000).code(), 255);
    }
}
