//! What the backend is told, and how long it waits for what.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;
use types::{Error, Result};

/// The bounds of what is asked of monitors and of the OCI runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    /// Create, and the start of an exec: from the monitor's start to the pid.
    pub create: Duration,
    /// Every other call of the OCI runtime.
    pub call: Duration,
    /// The undoing of one failed step, and a monitor's end after its container's.
    pub cleanup: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { create: Duration::from_secs(60), call: Duration::from_secs(20), cleanup: Duration::from_secs(5) }
    }
}

/// What the backend as a whole is told.
#[derive(Debug, Clone)]
pub struct ConmonConfig {
    /// The handlers that monitors run; pods that name none get the first.
    pub handlers: Vec<Handler>,
    /// The daemon's state directory (on a tmpfs, as a rule).
    pub state: PathBuf,
    /// A group of containers; a directory of it is made below the runtime's root.
    pub namespace: String,
    /// The cgroup below which each monitor gets one of its own, in each hierarchy:
    /// "/longshore/shims". `None` leaves them where the daemon is. With systemd's
    /// cgroups it is not used: each monitor gets a scope.
    pub monitor_cgroup: Option<String>,
}

/// One handler: which monitor watches containers, and which OCI runtime runs them.
/// It is kept in each container's bundle, so that what it began can be ended
/// whatever the configuration says then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handler {
    /// What RunPodSandbox calls it.
    pub name: String,
    /// The monitor's binary: a conmon.
    pub monitor: PathBuf,
    /// The OCI runtime's binary.
    pub runtime_binary: PathBuf,
    /// The OCI runtime's state directory; the namespace is added below it.
    pub runtime_root: PathBuf,
    /// The systemd cgroup driver instead of cgroupfs.
    pub systemd_cgroup: bool,
    /// No pivot_root(2): for a root file system on a ramdisk.
    #[serde(default)]
    pub no_pivot_root: bool,
    /// No new session keyring.
    #[serde(default)]
    pub no_new_keyring: bool,
    /// Read an exec's output back from a log file even where the monitor could hand
    /// our own pipes down. Monitors before 2.1 can't, and are never asked to.
    #[serde(default)]
    pub exec_by_log: bool,
    /// The bounds.
    #[serde(skip)]
    pub timeouts: Timeouts,
}

impl ConmonConfig {
    /// A handler by name; the empty name is the default one.
    pub(super) fn handler(&self, name: &str) -> Result<&Handler> {
        let found = if name.is_empty() { self.handlers.first() } else { self.handlers.iter().find(|h| h.name == name) };
        found.ok_or_else(|| {
            Error::precondition(format!("the runtime handler {name:?} is no longer configured"))
                .hint("add it to the configuration again, or stop and remove its pods")
        })
    }

    /// With which handler a container that exists goes on: as its bundle says, with
    /// today's bounds; and with today's binaries, where the old ones are not there any
    /// more.
    pub(super) fn today(&self, mut kept: Handler) -> Handler {
        if let Ok(today) = self.handler(&kept.name) {
            kept.timeouts = today.timeouts.clone();
            if !kept.monitor.exists() {
                kept.monitor.clone_from(&today.monitor);
            }
            if !kept.runtime_binary.exists() {
                kept.runtime_binary.clone_from(&today.runtime_binary);
            }
        }
        kept
    }
}
