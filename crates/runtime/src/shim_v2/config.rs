//! What the manager is told, and how long it waits for what.

use std::path::PathBuf;
use std::time::Duration;

/// The bounds of what the manager asks of shims (behaviours.md section 3).
#[derive(Debug, Clone)]
pub struct Timeouts {
    /// From the spawn of `start` to its answer.
    pub launch: Duration,
    /// Finding a shim again after a restart: connection and first answer.
    pub load: Duration,
    /// One `delete` sub-command, or the undoing of one failed step.
    pub cleanup: Duration,
    /// The Shutdown call, and then the wait for the shim's end.
    pub shutdown: Duration,
    /// The State call.
    pub state: Duration,
    /// What runs the OCI runtime: create, start, exec, delete; queueing counts.
    pub create: Duration,
    /// Every other call.
    pub call: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            launch: Duration::from_secs(10),
            load: Duration::from_secs(5),
            cleanup: Duration::from_secs(5),
            shutdown: Duration::from_secs(3),
            state: Duration::from_secs(2),
            create: Duration::from_secs(60),
            call: Duration::from_secs(10),
        }
    }
}

/// One handler: which shim runs pods, with which OCI runtime, and where.
#[derive(Debug, Clone)]
pub struct ShimConfig {
    /// The shim's binary.
    pub shim: PathBuf,
    /// The OCI runtime's binary.
    pub runtime_binary: PathBuf,
    /// The OCI runtime's state directory; the namespace is added below it.
    pub runtime_root: PathBuf,
    /// The systemd cgroup driver instead of cgroupfs.
    pub systemd_cgroup: bool,
    /// The daemon's state directory (on a tmpfs, as a rule).
    pub state: PathBuf,
    /// containerd's word for a group of containers; "k8s.io" as its CRI uses.
    pub namespace: String,
    /// The bounds.
    pub timeouts: Timeouts,
    /// The cgroup that shims are put in, in each hierarchy: "/longshore/shims".
    /// `None` leaves them where the daemon is.
    pub shim_cgroup: Option<String>,
}

impl ShimConfig {
    /// True where the binary bears the name of our own shim. It only saves work
    /// (our shim needs no events address); what a shim can is asked of it.
    pub(super) fn bears_our_name(&self) -> bool {
        self.shim.file_name().is_some_and(|n| n.to_string_lossy().starts_with("containerd-shim-longshore-"))
    }
}
