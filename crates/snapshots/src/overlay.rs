//! Snapshots as directories for overlayfs.
//!
//! ```text
//! <root>/                0700
//!   <number>/            0700; numbers come from the database and are never reused
//!     fs/                a layer's files, or a container's changes
//!     work/              overlayfs's own, beside a container's changes
//! ```
//!
//! The record is made before the directory. A layer's record is removed before
//! its directory, so that nobody builds on half of it; otherwise the directory
//! goes first. At the next opening a directory without a record is a leftover
//! and a record without a directory a lie: both are removed then, drafts too. But a
//! directory that is part of a mount stays, for a container runs on it whose record
//! was lost.
//!
//! In a layer, a removed name is a character device 0:0 and a replaced directory
//! has `trusted.overlay.opaque=y`.

use crate::{Draft, Hold, Holds, IdMap, KeyLocks, Mount, Snapshotter, TotalUsage, Usage, copy, tree};
use async_trait::async_trait;
use fault::Step;
use rustix::fs::{Gid, Mode, Uid};
use std::collections::HashSet;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use store::{SnapshotKind, SnapshotRecord, Store};
use types::{Error, ErrorKind, Result, ResultExt};

/// What mount(2) takes of options: a page, less its final NUL.
const OPTIONS_MAX: usize = 4095;
/// The turn of who removes directories without a record; no snapshot has this key.
const UNRECORDED: &str = "/";
/// A copy of an image's layers that takes so long may outlast whoever waits for it,
const LONG_COPY: Duration = Duration::from_secs(10);
/// and rests so long for the next who wants it.
const LINGER: Duration = Duration::from_secs(600);
const OVERLAYFS_MAGIC: i64 = 0x794c_7630;

/// The overlayfs snapshotter; clones share it.
#[derive(Debug, Clone)]
pub struct Overlay {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    store: Store,
    holds: Holds,
    copies: KeyLocks,
    turns: KeyLocks,
    index_off: bool,
}

impl Overlay {
    /// Opens the snapshots in `root` and removes what a crash left behind.
    ///
    /// # Errors
    /// When the directory can't be made or the database not be read. Leftovers
    /// that can't be removed are logged, not fatal.
    pub async fn open(root: &Path, store: Store) -> Result<Overlay> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .and_then(|()| std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o700)))
            .context(|| format!("make the snapshots' directory {}", root.display()))?;
        if rustix::fs::statfs(root).is_ok_and(|s| s.f_type == OVERLAYFS_MAGIC) {
            tracing::warn!(root = %root.display(),
                "the snapshots' directory lies on an overlayfs, on which no other can be mounted: choose another root");
        }
        let inner = Inner {
            root: root.to_owned(),
            store,
            holds: Holds::default(),
            copies: KeyLocks::default(),
            turns: KeyLocks::default(),
            // Without it a lower directory may not be shared by several mounts.
            index_off: Path::new("/sys/module/overlay/parameters/index").exists(),
        };
        let overlay = Overlay { inner: Arc::new(inner) };
        overlay.inner.forget_halves().await?;
        overlay.inner.clear_leftovers().await?;
        Ok(overlay)
    }
}

/// Runs to its end on a task of its own, whatever becomes of the caller.
async fn detached<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work).await.map_err(|e| Error::internal("work on a snapshot").because(e))?
}

/// Runs file system work where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::internal("work on a snapshot").because(e))?
}

fn now_ns() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// The directories that we may have made ourselves, by number.
fn numbered(root: &Path) -> Result<Vec<i64>> {
    let entries = std::fs::read_dir(root).context(|| format!("read {}", root.display()))?;
    let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
    Ok(names.filter(|n| n.bytes().all(|b| b.is_ascii_digit())).filter_map(|n| n.parse().ok()).collect())
}

/// The snapshots that are part of a mount on this node.
fn in_use(root: &Path) -> Result<HashSet<i64>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").context(|| "read the node's mounts".into())?;
    Ok(in_mounts(root, &table))
}

/// Snapshots in a mountinfo: in an overlay's options, or bound.
fn in_mounts(root: &Path, table: &str) -> HashSet<i64> {
    let mut used = HashSet::new();
    let here = format!("{}/", root.display());
    for line in table.lines() {
        for part in line.split([':', ',', '=', ' ']) {
            let number = part.strip_prefix(&here).and_then(|rest| rest.split('/').next());
            used.extend(number.and_then(|n| n.parse::<i64>().ok()));
        }
        // What is bound is named from its file system's root on.
        let Some(bound) = line.split(' ').nth(3).map(|p| p.trim_start_matches('/')) else { continue };
        if let Some((parents, number)) = bound.strip_suffix("/fs").and_then(|p| p.rsplit_once('/'))
            && root.ends_with(parents)
        {
            used.extend(number.parse::<i64>().ok());
        }
    }
    used
}

fn unknown(key: &str) -> Error {
    Error::not_found(format!("there is no snapshot {key}"))
}

impl Inner {
    fn dir(&self, id: i64) -> PathBuf {
        self.root.join(id.to_string())
    }

    fn fs(&self, id: i64) -> PathBuf {
        self.dir(id).join("fs")
    }

    /// Forgets drafts and what has no directory any more.
    async fn forget_halves(&self) -> Result<()> {
        for record in self.store.snapshots().await? {
            if record.kind == SnapshotKind::Draft || !self.fs(record.id).is_dir() {
                tracing::warn!(snapshot = record.key, id = record.id, "removing an unfinished snapshot");
                self.store.forget_snapshot(record.id).await?;
            }
        }
        Ok(())
    }

    /// Removes directories without a record, and gives their paths.
    async fn clear_leftovers(&self) -> Result<Vec<PathBuf>> {
        let _turn = self.turns.lock(UNRECORDED).await;
        // Listed before the records, which are made first: what is being made has one.
        let root = self.root.clone();
        let dirs = blocking(move || numbered(&root)).await?;
        // Numbers are never used twice, also where the record of one was lost.
        if let Some(last) = dirs.iter().max() {
            self.store.reserve_snapshots(*last).await?;
        }
        let known: HashSet<i64> = self.store.snapshots().await?.into_iter().map(|r| r.id).collect();
        let left: Vec<i64> = dirs.into_iter().filter(|id| !known.contains(id)).collect();
        if left.is_empty() {
            return Ok(Vec::new());
        }
        let root = self.root.clone();
        blocking(move || {
            let used = in_use(&root)?;
            let mut removed = Vec::new();
            for id in left {
                let dir = root.join(id.to_string());
                // A container's goes before its record does, and may have gone meanwhile.
                if !dir.exists() {
                    continue;
                }
                if used.contains(&id) {
                    tracing::warn!(dir = %dir.display(), "a snapshot without a record is in use, and stays");
                    continue;
                }
                match tree::remove(&dir) {
                    Ok(()) => removed.push(dir),
                    Err(error) => tracing::error!(%error, "a leftover snapshot stays"),
                }
            }
            Ok(removed)
        })
        .await
    }

    /// Makes the directory of a new snapshot; its root looks like `like`'s.
    fn make_dirs(&self, id: i64, like: Option<&Path>, owner: (u32, u32), work: bool) -> Result<()> {
        let what = || format!("make the snapshot {}", self.dir(id).display());
        let make = |path: &Path, mode| std::fs::DirBuilder::new().mode(mode).create(path);
        make(&self.dir(id), 0o700).context(what)?;
        let fs = self.fs(id);
        make(&fs, 0o755).context(what)?;
        let (mode, uid, gid) = match like {
            Some(below) => {
                let m = std::fs::symlink_metadata(below).context(what)?;
                (m.mode() & 0o7777, m.uid(), m.gid())
            }
            None => (0o755, owner.0, owner.1),
        };
        rustix::fs::chown(&fs, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).context(what)?;
        rustix::fs::chmod(&fs, Mode::from_raw_mode(mode)).context(what)?;
        if work {
            make(&self.dir(id).join("work"), 0o711).context(what)?;
        }
        Ok(())
    }

    /// Adds the record and the directory of a snapshot, or neither.
    async fn add(
        self: &Arc<Self>,
        key: &str,
        kind: SnapshotKind,
        parent: Option<&str>,
        owner: (u32, u32),
    ) -> Result<SnapshotRecord> {
        let record = fault::around(Step::SnapshotRecord, self.store.add_snapshot(key, kind, parent, now_ns())).await?;
        let inner = self.clone();
        let (id, below) = (record.id, record.parent);
        let made = blocking(move || {
            let like = below.map(|p| inner.fs(p));
            fault::during(Step::SnapshotDirectory, || {
                inner.make_dirs(id, like.as_deref(), owner, kind == SnapshotKind::Active)
            })
        })
        .await;
        match made {
            Ok(()) => Ok(record),
            Err(e) => Err(self.undo(e, key).await),
        }
    }

    /// Removes what `error` interrupted, and says so if that fails too.
    async fn undo(self: &Arc<Self>, error: Error, key: &str) -> Error {
        match self.drop_snapshot(key).await {
            Ok(()) => error,
            Err(second) => Error::new(error.kind(), format!("{error}; and undoing it failed: {second}")),
        }
    }

    /// Removes a draft or a container's snapshot. The directory goes first: on a
    /// full disk that makes the room in which the record can be deleted.
    async fn drop_snapshot(self: &Arc<Self>, key: &str) -> Result<()> {
        let Some(record) = self.store.snapshot(key).await? else { return Ok(()) };
        if record.kind != SnapshotKind::Layer {
            let dir = self.dir(record.id);
            blocking(move || fault::during(Step::SnapshotUnmake, || tree::remove(&dir))).await?;
        }
        fault::around(Step::SnapshotForget, self.store.delete_snapshot(key)).await.map(drop)
    }

    async fn sweep(self: &Arc<Self>) -> Result<()> {
        let _turn = self.turns.lock(UNRECORDED).await;
        let holds = self.holds.clone();
        let free = self.store.sweep_layers(move |key| holds.is_held(key)).await?;
        if free.is_empty() {
            return Ok(());
        }
        let dirs: Vec<PathBuf> = free.into_iter().map(|id| self.dir(id)).collect();
        blocking(move || {
            let errors = dirs.iter().filter_map(|dir| tree::remove(dir).err()).collect();
            Error::join("remove unused layers", errors)
        })
        .await
    }

    async fn commit(self: &Arc<Self>, id: i64) -> Result<Usage> {
        let fs = self.fs(id);
        let usage = blocking(move || tree::usage(&fs)).await?;
        self.store.commit_snapshot(id, usage.bytes, usage.inodes).await?;
        Ok(usage)
    }

    /// The layers from `chain_id` down copied for `map`, where they aren't yet;
    /// returns the copy's key.
    async fn mapped_layers(self: &Arc<Self>, chain_id: &str, map: &IdMap) -> Result<(String, Hold)> {
        // Before they are looked at: whoever removes the image meanwhile leaves them whole.
        let base = self.holds.hold(vec![chain_id.to_owned()]);
        let top = self.store.snapshot(chain_id).await?.ok_or_else(|| unknown(chain_id))?;
        let mut chain = vec![top.clone()];
        chain.extend(self.store.ancestors(top.id).await?);
        let key_of = |layer: &SnapshotRecord| format!("{}+{}", layer.key, map.key());
        let hold = self.holds.hold(chain.iter().flat_map(|l| [l.key.clone(), key_of(l)]).collect());
        drop(base);
        let begun = Instant::now();
        let mut below: Option<String> = None;
        for layer in chain.iter().rev() {
            let key = key_of(layer);
            let _turn = self.copies.lock(&key).await;
            let there = self.store.snapshot(&key).await?.is_some_and(|s| s.kind == SnapshotKind::Layer);
            if !there {
                let draft = self.add(&key, SnapshotKind::Draft, below.as_deref(), (0, 0)).await?;
                let (from, to, map) = (self.fs(layer.id), self.fs(draft.id), map.clone());
                let copied = blocking(move || copy::copy_mapped(&from, &to, &map)).await;
                let done = match copied {
                    Ok(()) => self.commit(draft.id).await.map(drop),
                    Err(e) => Err(e),
                };
                if let Err(e) = done {
                    return Err(self.undo(e, &key).await);
                }
            }
            below = Some(key);
        }
        if begun.elapsed() > LONG_COPY {
            self.linger(self.holds.hold(chain.iter().map(key_of).collect()));
        }
        Ok((below.unwrap_or_default(), hold))
    }

    /// Keeps what a long copy has made for whoever tries again: who waited for it may have
    /// given it up, and removed the container that it was for.
    fn linger(self: &Arc<Self>, hold: Hold) {
        let this = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LINGER).await;
            drop(hold);
            if let Err(e) = this.sweep().await {
                tracing::warn!("layers of a user namespace that nobody has used stay: {e}");
            }
        });
    }

    async fn prepare(self: &Arc<Self>, key: &str, parent: Option<&str>, map: Option<&IdMap>) -> Result<Vec<Mount>> {
        let owner = match map {
            Some(map) => (map.uid(0)?, map.gid(0)?),
            None => (0, 0),
        };
        let (mapped, hold) = match (parent, map) {
            (Some(chain_id), Some(map)) => {
                let (key, hold) = self.mapped_layers(chain_id, map).await?;
                (Some(key), Some(hold))
            }
            _ => (None, None),
        };
        let parent = mapped.as_deref().or(parent);
        let added = self.add(key, SnapshotKind::Active, parent, owner).await;
        drop(hold);
        let mounts = match added {
            Ok(record) => match self.mounts_of(&record).await {
                Ok(mounts) => Ok(mounts),
                Err(e) => Err(self.undo(e, key).await),
            },
            Err(e) => Err(e),
        };
        if mounts.is_err() && mapped.is_some() {
            self.sweep().await?;
        }
        mounts
    }

    async fn mounts_of(&self, record: &SnapshotRecord) -> Result<Vec<Mount>> {
        let text = |path: PathBuf| {
            // overlayfs splits its options at these.
            match path.to_str() {
                Some(s) if !s.contains([',', ':', '\\']) => Ok(s.to_owned()),
                _ => Err(Error::precondition(format!(
                    "{}: a snapshot's path may not contain a comma, colon or backslash",
                    path.display()
                ))),
            }
        };
        let upper = text(self.fs(record.id))?;
        let below = self.store.ancestors(record.id).await?;
        if below.is_empty() {
            return Ok(vec![Mount {
                kind: "bind".into(),
                source: upper,
                target: String::new(),
                options: vec!["rw".into(), "rbind".into()],
            }]);
        }
        let lower: Vec<String> = below.iter().map(|l| text(self.fs(l.id))).collect::<Result<_>>()?;
        let mut options = Vec::new();
        if self.index_off {
            options.push("index=off".to_owned());
        }
        options.push(format!("workdir={}", text(self.dir(record.id).join("work"))?));
        options.push(format!("upperdir={upper}"));
        options.push(format!("lowerdir={}", lower.join(":")));
        let length = options.iter().map(|o| o.len() + 1).sum::<usize>();
        if length > OPTIONS_MAX {
            return Err(Error::precondition(format!(
                "an image of {} layers needs {length} bytes of mount options, the kernel takes {OPTIONS_MAX}",
                lower.len()
            ))
            .hint("squash the image, or choose a shorter root directory"));
        }
        Ok(vec![Mount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options }])
    }
}

#[async_trait]
impl Snapshotter for Overlay {
    fn root(&self) -> &Path {
        &self.inner.root
    }

    fn hold(&self, chain_ids: Vec<String>) -> Hold {
        self.inner.holds.hold(chain_ids)
    }

    async fn layer(&self, chain_id: &str) -> Result<Option<Usage>> {
        let record = self.inner.store.snapshot(chain_id).await?;
        Ok(record.filter(|r| r.kind == SnapshotKind::Layer).map(|r| Usage { bytes: r.bytes, inodes: r.inodes }))
    }

    async fn begin_layer(&self, chain_id: &str, parent: Option<&str>) -> Result<Draft> {
        let inner = self.inner.clone();
        let (chain_id, parent) = (chain_id.to_owned(), parent.map(str::to_owned));
        detached(async move {
            let record = inner.add(&chain_id, SnapshotKind::Draft, parent.as_deref(), (0, 0)).await?;
            let below = inner.store.ancestors(record.id).await?;
            let parents = below.iter().map(|l| inner.fs(l.id)).collect();
            Ok(Draft { id: record.id, chain_id, path: inner.fs(record.id), parents })
        })
        .await
    }

    async fn commit_layer(&self, draft: Draft) -> Result<Usage> {
        let inner = self.inner.clone();
        detached(async move {
            match inner.commit(draft.id).await {
                Ok(usage) => Ok(usage),
                Err(e) => Err(inner.undo(e, &draft.chain_id).await),
            }
        })
        .await
    }

    async fn abort_layer(&self, draft: Draft) -> Result<()> {
        let inner = self.inner.clone();
        detached(async move { inner.drop_snapshot(&draft.chain_id).await }).await
    }

    async fn sync(&self) -> Result<()> {
        let root = self.inner.root.clone();
        detached(blocking(move || {
            let fd = tree::open_dir(&root)?;
            rustix::fs::syncfs(&fd).context(|| format!("write {} to the disk", root.display()))
        }))
        .await
    }

    async fn keep(&self, chain_ids: Vec<String>) -> Result<()> {
        let inner = self.inner.clone();
        detached(async move {
            inner.store.keep_layers(chain_ids).await?;
            inner.sweep().await
        })
        .await
    }

    async fn sweep(&self) -> Result<()> {
        let inner = self.inner.clone();
        detached(async move { inner.sweep().await }).await
    }

    async fn prepare(&self, key: &str, parent: Option<&str>, idmap: Option<&IdMap>) -> Result<Vec<Mount>> {
        let inner = self.inner.clone();
        let (key, parent, idmap) = (key.to_owned(), parent.map(str::to_owned), idmap.cloned());
        let work = async move {
            // A removal that comes while a prepare goes on without its caller waits
            // for it, and then removes what it made.
            let _turn = inner.turns.lock(&key).await;
            inner.prepare(&key, parent.as_deref(), idmap.as_ref()).await
        };
        detached(work).await
    }

    async fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        match self.inner.store.snapshot(key).await? {
            Some(record) if record.kind == SnapshotKind::Active => self.inner.mounts_of(&record).await,
            _ => Err(unknown(key)),
        }
    }

    async fn remove(&self, key: &str) -> Result<()> {
        let inner = self.inner.clone();
        let key = key.to_owned();
        detached(async move {
            let _turn = inner.turns.lock(&key).await;
            let removed = inner.drop_snapshot(&key).await;
            let swept = inner.sweep().await;
            Error::join(
                &format!("remove snapshot {key}"),
                [removed, swept].into_iter().filter_map(Result::err).collect(),
            )
        })
        .await
    }

    async fn usage(&self, key: &str) -> Result<Usage> {
        let record = self.inner.store.snapshot(key).await?.ok_or_else(|| unknown(key))?;
        if record.kind == SnapshotKind::Layer {
            return Ok(Usage { bytes: record.bytes, inodes: record.inodes });
        }
        let fs = self.inner.fs(record.id);
        blocking(move || tree::usage(&fs)).await
    }

    async fn total_usage(&self) -> Result<TotalUsage> {
        let mut total = TotalUsage::default();
        let mut active = Vec::new();
        for record in self.inner.store.snapshots().await? {
            match record.kind {
                SnapshotKind::Layer => total.layers += Usage { bytes: record.bytes, inodes: record.inodes },
                SnapshotKind::Active => active.push(self.inner.fs(record.id)),
                SnapshotKind::Draft => {}
            }
        }
        blocking(move || {
            for fs in active {
                match tree::usage(&fs) {
                    Ok(usage) => total.active += usage,
                    // Removed since it was listed.
                    Err(e) if e.kind() == ErrorKind::NotFound => {}
                    // What can't be counted of one container hides no other's.
                    Err(e) => tracing::warn!("the disk use of a container is not counted: {e}"),
                }
            }
            Ok(total)
        })
        .await
    }

    async fn clear_leftovers(&self) -> Result<Vec<PathBuf>> {
        let inner = self.inner.clone();
        detached(async move { inner.clear_leftovers().await }).await
    }

    async fn list(&self) -> Result<Vec<String>> {
        let all = self.inner.store.snapshots().await?;
        Ok(all.into_iter().filter(|s| s.kind == SnapshotKind::Active).map(|s| s.key).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_is_in_use() {
        let table = "36 35 0:40 / /s/b/rootfs rw - overlay overlay rw,lowerdir=/r/snapshots/3/fs:/r/snapshots/2/fs,\
                     upperdir=/r/snapshots/7/fs,workdir=/r/snapshots/7/work\n\
                     37 35 8:1 /deep/r/snapshots/9/fs /s/c/rootfs rw - ext4 /dev/sda rw\n\
                     38 35 8:1 /other/snapshots/11/fs /x rw - ext4 /dev/sda rw\n\
                     39 35 8:1 / /r rw - ext4 /dev/sda rw,a=/r/snapshotsx/5\n";
        assert_eq!(in_mounts(Path::new("/r/snapshots"), table), HashSet::from([2, 3, 7]));
        assert_eq!(in_mounts(Path::new("/m/deep/r/snapshots"), table), HashSet::from([9]));
    }
}
