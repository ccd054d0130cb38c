//! The OCI runtime seam: the trait, and a runc-compatible binary behind it.
//!
//! ```text
//! Runtime (trait)  what a shim or a monitor asks of a runtime
//!   command.rs     a runc-compatible binary (runc, crun, youki)
//!   message.rs     what such a binary's own words mean
//! children.rs      whose process is whose: the one reaper of a shim or monitor
//! detect.rs        which runtime this node has, and why others are passed over
//! mounts.rs idmap.rs  the root file system's mounts in a bundle
//! cgroup.rs        where a container's cgroups are, and what they tell
//! oom.rs           the kernel's word that the OOM killer struck in one
//! ```

pub mod cgroup;
mod children;
mod command;
mod detect;
pub mod idmap;
mod message;
pub mod mounts;
pub mod oom;

pub use children::{Call, Child, Children, Claim, Status, ended};
pub use command::{Command, Config, DEATHS, Unfinished, kill_call, remove_own_binary, unfinished_calls};
pub use detect::{Found, detect, find_binary};
pub use message::{kind as kind_of, last_error};

use async_trait::async_trait;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use types::Result;

/// The standard streams that a container's or an exec's process inherits; what
/// is absent is /dev/null.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Descriptor 0.
    pub stdin: Option<OwnedFd>,
    /// Descriptor 1.
    pub stdout: Option<OwnedFd>,
    /// Descriptor 2.
    pub stderr: Option<OwnedFd>,
}

/// What `create` and `exec` need beside the container's name.
#[derive(Debug)]
pub struct Launch {
    /// The process's standard streams; unused where there is a terminal.
    pub stdio: Stdio,
    /// Where the runtime sends a terminal's master end.
    pub console_socket: Option<PathBuf>,
    /// The file that the runtime writes the pid to; removed afterwards.
    pub pid_file: PathBuf,
}

/// How a container's processes are written to disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// The directory that gets the image.
    pub image: PathBuf,
    /// The directory of criu's own files; its log stays there.
    pub work: PathBuf,
    /// An earlier image that this one adds to.
    pub parent: Option<PathBuf>,
    /// End the container afterwards.
    pub exit: bool,
    /// Established TCP connections are allowed.
    pub open_tcp: bool,
    /// Unix sockets whose other end is outside are allowed.
    pub external_unix_sockets: bool,
    /// A terminal is allowed.
    pub terminal: bool,
    /// File locks are allowed.
    pub file_locks: bool,
    /// Namespaces that are made anew and not restored.
    pub empty_namespaces: Vec<String>,
    /// How cgroups are kept: `soft`, `full`, `strict`; the runtime's own choice
    /// where it is empty.
    pub cgroups_mode: String,
}

/// An image of processes that a container is made from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Restore {
    /// The directory of the image.
    pub image: PathBuf,
    /// The directory of criu's own files; its log stays there.
    pub work: PathBuf,
}

/// What the runtime itself says of a container.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct State {
    /// `creating`, `created`, `running`, `paused` or `stopped`.
    pub status: String,
    /// Init's pid; 0 where it has none.
    #[serde(default)]
    pub pid: i32,
    /// The bundle's path.
    #[serde(default)]
    pub bundle: PathBuf,
}

/// An OCI runtime. Every call has a deadline of its own, after which the
/// runtime is killed and the error says so.
///
/// Dropping a call's future kills nothing: whoever calls from a task that may
/// be cancelled must let another task own the call.
#[async_trait]
pub trait Runtime: Send + Sync {
    /// Creates the container; its init waits for `start`.
    async fn create(&self, id: &str, bundle: &Path, launch: Launch) -> Result<Child>;
    /// Lets a created container's init run.
    async fn start(&self, id: &str) -> Result<()>;
    /// Runs one more process, whose OCI process document is the file `process`.
    async fn exec(&self, id: &str, process: &Path, launch: Launch) -> Result<Child>;
    /// Sends a signal to init by its number.
    async fn kill(&self, id: &str, signal: types::Signal) -> Result<()>;
    /// Removes what the runtime keeps of the container; `force` kills it first.
    async fn delete(&self, id: &str, force: bool) -> Result<()>;
    /// What the runtime knows of the container.
    async fn state(&self, id: &str) -> Result<State>;
    /// Freezes the container.
    async fn pause(&self, id: &str) -> Result<()>;
    /// Thaws it.
    async fn resume(&self, id: &str) -> Result<()>;
    /// Changes its limits; `resources` is the OCI document's JSON.
    async fn update(&self, id: &str, resources: &[u8]) -> Result<()>;
    /// Writes its processes to disk; `FailedPrecondition` where criu can't do it,
    /// with criu's own last error.
    async fn checkpoint(&self, id: &str, checkpoint: &Checkpoint) -> Result<()>;
    /// Makes a container from a checkpoint; it runs at once. `FailedPrecondition`
    /// where criu can't do it, with criu's own last error.
    async fn restore(&self, id: &str, bundle: &Path, restore: &Restore, launch: Launch) -> Result<Child>;
    /// The runtime's features document, `None` where it is too old to have one.
    async fn features(&self) -> Result<Option<serde_json::Value>>;
    /// Its version as it prints it, first line's last word.
    async fn version(&self) -> Result<String>;
}
