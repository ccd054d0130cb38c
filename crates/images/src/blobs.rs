//! Downloads while they last.
//!
//! ```text
//! <root>/ingest/<n>-<algorithm>-<hex>    a layer on its way, or waiting to be unpacked
//! ```
//!
//! Pulls that want the same blob at the same time share one download. The file
//! is removed when the last of them lets go; what a crash left is removed at the
//! next opening. Configurations and manifests are in the database.

use crate::Digest;
use std::collections::HashMap;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use types::{Result, ResultExt};

#[derive(Debug)]
pub(crate) struct Blobs {
    dir: PathBuf,
    next: AtomicU64,
    open: Mutex<HashMap<Digest, Weak<Blob>>>,
}

/// A file that is removed with the last reference to it.
#[derive(Debug)]
pub(crate) struct Blob {
    pub(crate) path: PathBuf,
    /// True once it is whole and verified; whoever downloads holds the lock.
    pub(crate) ready: tokio::sync::Mutex<bool>,
}

impl Drop for Blob {
    fn drop(&mut self) {
        match std::fs::remove_file(&self.path) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::error!(path = %self.path.display(), %error, "a download stays behind"),
        }
    }
}

impl Blobs {
    /// Opens `<root>/ingest` and empties it.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let dir = root.join("ingest");
        let what = || format!("make the directory {}", dir.display());
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).context(what)?;
        for path in [root, &dir] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).context(what)?;
        }
        for entry in std::fs::read_dir(&dir).context(what)?.flatten() {
            let path = entry.path();
            std::fs::remove_file(&path).context(|| format!("remove the unfinished download {}", path.display()))?;
        }
        Ok(Self { dir, next: AtomicU64::new(0), open: Mutex::default() })
    }

    /// The download of `digest` that is under way, or a new one.
    pub(crate) fn get(&self, digest: &Digest) -> Arc<Blob> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, blob| blob.strong_count() > 0);
        if let Some(blob) = open.get(digest).and_then(Weak::upgrade) {
            return blob;
        }
        let blob = Arc::new(self.scratch(&format!("{}-{}", digest.algorithm(), digest.hex())));
        open.insert(digest.clone(), Arc::downgrade(&blob));
        blob
    }

    /// A file of a name of its own.
    pub(crate) fn scratch(&self, name: &str) -> Blob {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        Blob { path: self.dir.join(format!("{n}-{name}")), ready: tokio::sync::Mutex::new(false) }
    }
}
