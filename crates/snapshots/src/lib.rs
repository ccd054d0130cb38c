//! Root file systems: the trait and its overlayfs implementation.
//!
//! A layer is known by its chain id (the digest of it and all that is under it)
//! and never changes once committed. A container's writable top is known by a
//! key of the caller's. Nothing here mounts: [`Mount`]s are handed to whoever
//! makes the container's rootfs.
//!
//! A layer lives while an image names it ([`Snapshotter::keep`]), an operation
//! holds it ([`Snapshotter::hold`]), or another snapshot lies on it; what
//! becomes free is removed at once, with the call that freed it.

mod copy;
mod holds;
mod idmap;
mod overlay;
mod tree;

pub use holds::{Hold, Holds, KeyLocks};
pub use idmap::{IdMap, IdRange};
pub use overlay::Overlay;
pub use tree::empty as empty_directory;

use async_trait::async_trait;
use std::path::{Path, PathBuf};
use types::Result;

/// A mount as a shim is told of it (`containerd.types.Mount`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// File system type: `overlay` or `bind`.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// Where, below the rootfs; "" is the rootfs itself.
    pub target: String,
    /// Options as in fstab.
    pub options: Vec<String>,
}

/// Disk use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes of allocated blocks.
    pub bytes: u64,
    /// Inodes, hard links counted once.
    pub inodes: u64,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.inodes += other.inodes;
    }
}

/// Disk use of everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TotalUsage {
    /// Layers, as measured when each was committed.
    pub layers: Usage,
    /// Containers' writable tops, walked now.
    pub active: Usage,
}

/// A layer that is being unpacked: fill `path`, then commit or abort it.
#[derive(Debug)]
pub struct Draft {
    /// Its number in the database.
    pub id: i64,
    /// The chain id that it is to have.
    pub chain_id: String,
    /// The directory to fill. Its root has the owner and mode of the layer beneath.
    pub path: PathBuf,
    /// The directories of the layers beneath, topmost first, for the attributes
    /// of directories that the layer's tar leaves out.
    pub parents: Vec<PathBuf>,
}

/// A store of layers and containers' root file systems.
///
/// Each call that changes something goes on to its end even if its future is
/// dropped. After a failed or dropped `prepare`, `remove` of the key cleans up.
#[async_trait]
pub trait Snapshotter: Send + Sync + std::fmt::Debug {
    /// The directory that holds everything, for `ImageFsInfo`.
    fn root(&self) -> &Path;

    /// Keeps these layers, there already or not, from being removed while the
    /// returned value lives. Hold first, then look.
    fn hold(&self, chain_ids: Vec<String>) -> Hold;

    /// The disk use of a committed layer, or `None` where it is not here.
    async fn layer(&self, chain_id: &str) -> Result<Option<Usage>>;

    /// Begins a layer on top of the committed layer `parent`. Two drafts of one
    /// chain id at a time are the caller's fault.
    async fn begin_layer(&self, chain_id: &str, parent: Option<&str>) -> Result<Draft>;

    /// Makes a filled draft a layer and measures it. It survives a power loss
    /// only after `sync`.
    async fn commit_layer(&self, draft: Draft) -> Result<Usage>;

    /// Removes a draft with its directory.
    async fn abort_layer(&self, draft: Draft) -> Result<()>;

    /// Writes everything unpacked so far to the disk, before an image is recorded.
    async fn sync(&self) -> Result<()>;

    /// Says which layers (topmost ones suffice) the images name, all of them at
    /// once, and removes those that became free.
    async fn keep(&self, chain_ids: Vec<String>) -> Result<()>;

    /// Removes the layers that nothing keeps any more, after a hold was dropped.
    async fn sweep(&self) -> Result<()>;

    /// Makes the writable snapshot `key` on top of the layer `parent`, for a
    /// container whose ids are mapped by `idmap`, and returns its rootfs's mounts.
    ///
    /// `AlreadyExists` for a key in use, `NotFound` when the layer is not here
    /// (its image was removed meanwhile).
    async fn prepare(&self, key: &str, parent: Option<&str>, idmap: Option<&IdMap>) -> Result<Vec<Mount>>;

    /// The mounts of a prepared snapshot, again.
    async fn mounts(&self, key: &str) -> Result<Vec<Mount>>;

    /// Removes a container's snapshot, and layers that only it kept. An unknown
    /// key is no error.
    async fn remove(&self, key: &str) -> Result<()>;

    /// The disk use of a container's own changes, walked now; of a layer, as measured.
    async fn usage(&self, key: &str) -> Result<Usage>;

    /// The disk use of all snapshots.
    async fn total_usage(&self) -> Result<TotalUsage>;

    /// Removes directories of snapshots that have no record and that nothing is
    /// mounted from, and gives their paths.
    async fn clear_leftovers(&self) -> Result<Vec<PathBuf>>;

    /// The keys of all containers' snapshots, so that a recovery can remove
    /// those that no container has.
    async fn list(&self) -> Result<Vec<String>>;
}
