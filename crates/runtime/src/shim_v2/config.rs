//! What the manager is told, and how long it waits for what.

use crate::api::SandboxKind;
use crate::bundle::write_atomic;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;
use types::{Error, ErrorKind, Result, ResultExt};

/// In a pod's bundle: with what it was begun.
const FILE: &str = "handler.json";

/// The bounds of what the manager asks of shims (behaviours.md section 3).
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// What the manager as a whole is told.
#[derive(Debug, Clone)]
pub struct ShimConfig {
    /// The handlers that shims run; pods that name none get the first.
    pub handlers: Vec<Handler>,
    /// The daemon's state directory (on a tmpfs, as a rule).
    pub state: PathBuf,
    /// containerd's word for a group of containers; "k8s.io" as its CRI uses.
    pub namespace: String,
    /// The cgroup that shims are put in, in each hierarchy: "/longshore/shims".
    /// `None` leaves them where the daemon is.
    pub shim_cgroup: Option<String>,
}

/// One handler: which shim runs pods, and with which OCI runtime. It is kept in each
/// bundle, so that what it began can be ended whatever the configuration says then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handler {
    /// What RunPodSandbox calls it.
    pub name: String,
    /// The shim's binary.
    pub shim: PathBuf,
    /// The OCI runtime's binary.
    pub runtime_binary: PathBuf,
    /// The OCI runtime's state directory; the namespace is added below it.
    pub runtime_root: PathBuf,
    /// The systemd cgroup driver instead of cgroupfs.
    pub systemd_cgroup: bool,
    /// What Create gets.
    pub options: TaskOptions,
    /// What a pod's own task is.
    #[serde(default)]
    pub sandbox: SandboxKind,
    /// The bounds.
    #[serde(skip)]
    pub timeouts: Timeouts,
}

/// The options that a shim gets with each Create.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskOptions {
    /// `containerd.runc.v1.Options`: the runtime's binary and root, and these.
    Runc {
        /// No pivot_root(2): for a root file system on a ramdisk.
        no_pivot_root: bool,
        /// No new session keyring.
        no_new_keyring: bool,
    },
    /// `runtimeoptions.v1.Options`: what kata, runsc and most others take.
    Generic {
        /// What the shim calls the type of its configuration.
        type_url: String,
        /// Its configuration file.
        config_path: String,
        /// Its configuration itself.
        config_body: String,
    },
    /// None at all.
    #[default]
    None,
}

impl TaskOptions {
    /// runc's options, nothing special.
    pub fn runc() -> Self {
        Self::Runc { no_pivot_root: false, no_new_keyring: false }
    }
}

impl Handler {
    /// True where the binary bears the name of our own shim. It only saves work
    /// (our shim needs no events address); what a shim can is asked of it.
    pub(super) fn bears_our_name(&self) -> bool {
        self.shim.file_name().is_some_and(|n| n.to_string_lossy().starts_with("containerd-shim-longshore-"))
    }

    /// Keeps it in a pod's bundle.
    pub(super) fn store(&self, bundle: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).context_kind(ErrorKind::Internal, || "encode handler.json".to_string())?;
        write_atomic(&bundle.join(FILE), &text)
    }

    /// What a pod's bundle says; `None` where it says nothing that can be read.
    pub(super) fn load(bundle: &Path) -> Option<Self> {
        let path = bundle.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) => {
                if e.kind() != std::io::ErrorKind::NotFound {
                    tracing::warn!(path = %path.display(), error = %e, "can't be read");
                }
                return None;
            }
        };
        serde_json::from_slice(&text)
            .inspect_err(|e| tracing::warn!(path = %path.display(), error = %e, "names no handler"))
            .ok()
    }
}

impl ShimConfig {
    /// A handler by name; the empty name is the default one.
    pub(super) fn handler(&self, name: &str) -> Result<&Handler> {
        let found = if name.is_empty() { self.handlers.first() } else { self.handlers.iter().find(|h| h.name == name) };
        found.ok_or_else(|| {
            Error::precondition(format!("the runtime handler {name:?} is no longer configured"))
                .hint("add it to the configuration again, or stop and remove its pods")
        })
    }

    /// With which handler a pod that exists goes on: as its bundle says, with today's
    /// bounds; and with today's binaries, where the old ones are not there any more.
    pub(super) fn handler_of(&self, bundle: &Path) -> Result<Handler> {
        let Some(mut kept) = Handler::load(bundle) else { return self.handler("").cloned() };
        if let Ok(today) = self.handler(&kept.name) {
            kept.timeouts = today.timeouts.clone();
            if !kept.shim.exists() {
                kept.shim.clone_from(&today.shim);
            }
            if !kept.runtime_binary.exists() {
                kept.runtime_binary.clone_from(&today.runtime_binary);
            }
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_goes_on_with_the_handler_that_began_it() {
        let dir = tempfile::tempdir().unwrap();
        let handler = |name: &str, shim: &str, seconds| Handler {
            name: name.into(),
            shim: shim.into(),
            runtime_binary: "/usr/sbin/runc".into(),
            runtime_root: "/run/oci".into(),
            systemd_cgroup: false,
            options: TaskOptions::runc(),
            sandbox: SandboxKind::Pinned,
            timeouts: Timeouts { load: Duration::from_secs(seconds), ..Timeouts::default() },
        };
        let config = ShimConfig {
            handlers: vec![handler("runc", "/bin/true", 1), handler("vm", "/bin/false", 7)],
            state: dir.path().into(),
            namespace: "n".into(),
            shim_cgroup: None,
        };
        assert_eq!(config.handler_of(dir.path()).unwrap().name, "runc");
        // Moved: today's place counts. Today's bounds do in any case.
        handler("vm", "/no/such/shim", 99).store(dir.path()).unwrap();
        assert_eq!(config.handler_of(dir.path()).unwrap(), handler("vm", "/bin/false", 7));
        handler("vm", "/bin/sh", 99).store(dir.path()).unwrap();
        assert_eq!(config.handler_of(dir.path()).unwrap(), handler("vm", "/bin/sh", 7));
        // No longer configured: as it was.
        handler("gone", "/bin/sh", 99).store(dir.path()).unwrap();
        let gone = config.handler_of(dir.path()).unwrap();
        assert_eq!((gone.name.as_str(), gone.timeouts), ("gone", Timeouts::default()));
        let e = config.handler("gone").unwrap_err();
        assert!(e.to_string().contains("\"gone\" is no longer configured"), "{e}");
    }
}
