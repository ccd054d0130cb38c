//! The directory of network configurations, and what is in use of it.
//!
//! A file that can't be read any more leaves what it said before in use; one that
//! goes takes its network with it. The kernel tells of changes (inotify).

use super::config::NetworkList;
use ::types::{Error, Result, ResultExt};
use rustix::fs::inotify;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A longer file is no configuration.
const LONGEST: u64 = 1 << 20;
/// Endings of names that count, as libcni has them.
const ENDINGS: [&str; 3] = ["conflist", "conf", "json"];
/// How long after a directory could not be watched that is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// The networks in use.
#[derive(Debug, Default)]
pub struct Loaded {
    /// With the files that they are from, in the order of the files' names.
    pub networks: Vec<(PathBuf, Arc<NetworkList>)>,
    /// Files that can't be used, each with its reason.
    pub complaints: Vec<String>,
}

impl Loaded {
    /// Reads the directory; `before` stands in for files that have broken.
    pub fn load(dir: &Path, before: &Self) -> Self {
        let mut loaded = Self::default();
        let files = match files(dir) {
            Ok(files) => files,
            Err(e) => {
                loaded.networks.clone_from(&before.networks);
                loaded.complaints.push(e.to_string());
                return loaded;
            }
        };
        let mut names = BTreeSet::new();
        for path in files {
            let list = match read(&path) {
                Ok(None) => continue,
                Ok(Some(list)) => Arc::new(list),
                Err(e) => match before.networks.iter().find(|(p, _)| *p == path) {
                    Some((_, old)) => {
                        loaded.complaints.push(format!("{e}; what it said before stays in use"));
                        old.clone()
                    }
                    None => {
                        loaded.complaints.push(e.to_string());
                        continue;
                    }
                },
            };
            if names.insert(list.name.clone()) {
                loaded.networks.push((path, list));
            } else {
                let complaint = format!("{}: an earlier file has the network {} too", path.display(), list.name);
                loaded.complaints.push(complaint);
            }
        }
        loaded
    }
}

/// The files that may be configurations, by name; none where there is no directory.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.context(|| format!("list {}", dir.display()))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.context(|| format!("list {}", dir.display()))?.path();
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if ENDINGS.contains(&ending) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// `None` where it has just gone.
fn read(path: &Path) -> Result<Option<NetworkList>> {
    let what = || format!("the network configuration {}", path.display());
    let text = match std::fs::metadata(path).and_then(|m| Ok((m.len(), std::fs::read_to_string(path)?))) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Ok((length, _)) if length > LONGEST => {
            return Err(Error::invalid(format!("{} has more than {LONGEST} bytes", what())));
        }
        other => other.context(what)?.1,
    };
    NetworkList::parse(&text).map(Some).map_err(|e| e.within(what()))
}

/// The directory, watched. Clones share it.
#[derive(Debug, Clone)]
pub struct ConfDir {
    dir: PathBuf,
    loaded: Arc<RwLock<Arc<Loaded>>>,
}

impl ConfDir {
    /// Reads the directory and goes on watching it, on a task that ends with the
    /// last clone. One that is missing is made, as both peers do.
    pub fn watch(dir: &Path) -> Self {
        let this = Self { dir: dir.to_owned(), loaded: Arc::default() };
        let watched = Watch::on(dir);
        this.reload();
        tokio::spawn(follow(this.dir.clone(), Arc::downgrade(&this.loaded), watched));
        this
    }

    /// What is in use now.
    pub fn loaded(&self) -> Arc<Loaded> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn reload(&self) {
        reload(&self.dir, &self.loaded);
    }
}

fn reload(dir: &Path, loaded: &RwLock<Arc<Loaded>>) {
    let before = loaded.read().unwrap_or_else(PoisonError::into_inner).clone();
    let now = Arc::new(Loaded::load(dir, &before));
    // Before it is told: whoever has read of it shall meet it.
    *loaded.write().unwrap_or_else(PoisonError::into_inner) = now.clone();
    for complaint in now.complaints.iter().filter(|c| !before.complaints.contains(c)) {
        tracing::warn!("{complaint}");
    }
    let names = |l: &Loaded| l.networks.iter().map(|(_, n)| n.name.clone()).collect::<Vec<_>>();
    if names(&now) != names(&before) {
        tracing::info!("CNI networks in {}: {}", dir.display(), names(&now).join(", "));
    }
}

async fn follow(dir: PathBuf, loaded: std::sync::Weak<RwLock<Arc<Loaded>>>, mut watch: Result<Watch>) {
    loop {
        match &mut watch {
            Ok(w) => w.changed(&dir).await,
            Err(e) => {
                tracing::warn!("changes of CNI configurations are not seen: {e}");
                tokio::time::sleep(AGAIN).await;
            }
        }
        let Some(loaded) = loaded.upgrade() else { return };
        // The directory itself may have been replaced.
        watch = match watch {
            Ok(w) => w.renew(&dir).map(|()| w),
            Err(_) => Watch::on(&dir),
        };
        reload(&dir, &loaded);
    }
}

/// What has just been created: a link is complete at once, a file once it was closed, or
/// where it had no name before.
fn is_complete(path: &Path) -> bool {
    let link = std::fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink() || m.nlink() > 1);
    link || matches!(read(path), Ok(Some(_)))
}

/// An inotify instance that watches one directory.
struct Watch {
    fd: AsyncFd<OwnedFd>,
}

impl Watch {
    #[expect(deprecated, reason = "its successor is unsafe; an OwnedFd never exchanges its descriptor")]
    fn on(dir: &Path) -> Result<Self> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .context(|| "make an inotify instance".into())?;
        let fd = AsyncFd::with_interest(fd, Interest::READABLE).context(|| "watch an inotify instance".into())?;
        let watch = Self { fd };
        watch.renew(dir)?;
        Ok(watch)
    }

    /// Watches what has the path now. The same directory once more is no change.
    fn renew(&self, dir: &Path) -> Result<()> {
        use inotify::WatchFlags as W;
        let _ = std::fs::create_dir_all(dir);
        // A file counts once it is complete; so no MODIFY, and CREATE of links alone.
        let events = W::CREATE | W::CLOSE_WRITE | W::MOVE | W::DELETE | W::DELETE_SELF | W::MOVE_SELF | W::ONLYDIR;
        inotify::add_watch(self.fd.get_ref().as_fd(), dir, events)
            .map(drop)
            .context(|| format!("watch {}", dir.display()))
    }

    /// Waits for an event that counts and takes all that there are.
    async fn changed(&mut self, dir: &Path) {
        loop {
            let Ok(mut ready) = self.fd.readable().await else { return std::future::pending().await };
            let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
            let mut events = inotify::Reader::new(self.fd.get_ref(), &mut buffer);
            let mut counts = false;
            while let Ok(event) = events.next() {
                let created = event.events().contains(inotify::ReadFlags::CREATE);
                let name = event.file_name().map(|n| std::ffi::OsStr::from_bytes(n.to_bytes()));
                counts |= !created || name.is_some_and(|n| is_complete(&dir.join(n)));
            }
            ready.clear_ready();
            if counts {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn conf(name: &str) -> String {
        format!(r#"{{"cniVersion":"1.0.0","name":"{name}","plugins":[{{"type":"x"}}]}}"#)
    }

    fn names(dir: &ConfDir) -> Vec<String> {
        dir.loaded().networks.iter().map(|(_, n)| n.name.clone()).collect()
    }

    async fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < deadline, "{what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn files_come_change_break_and_go() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("etc/net.d");
        let dir = ConfDir::watch(&path);
        assert!(path.is_dir() && dir.loaded().networks.is_empty() && dir.loaded().complaints.is_empty());
        std::fs::write(path.join("20-b.conflist"), conf("b")).unwrap();
        until("a new file is seen", || names(&dir) == ["b"]).await;
        std::fs::write(path.join("README"), "not one").unwrap();
        std::fs::write(path.join("tmp"), conf("a")).unwrap();
        std::fs::rename(path.join("tmp"), path.join("10-a.json")).unwrap();
        until("one that is moved there is seen, and comes first", || names(&dir) == ["a", "b"]).await;
        std::fs::write(path.join("10-a.json"), "{").unwrap();
        until("a broken one is complained of", || !dir.loaded().complaints.is_empty()).await;
        assert_eq!(names(&dir), ["a", "b"], "what it said stays");
        let complaint = dir.loaded().complaints[0].clone();
        assert!(complaint.contains("10-a.json") && complaint.contains("stays in use"), "{complaint}");
        std::fs::write(path.join("30-c.conf"), "}").unwrap();
        until("one that was never good is passed over", || dir.loaded().complaints.len() == 2).await;
        std::fs::remove_file(path.join("10-a.json")).unwrap();
        until("one that goes takes its network with it", || names(&dir) == ["b"]).await;
        std::fs::write(path.join("30-c.conf"), conf("b")).unwrap();
        std::fs::write(root.path().join("elsewhere"), conf("l")).unwrap();
        std::os::unix::fs::symlink(root.path().join("elsewhere"), path.join("40-l.conf")).unwrap();
        until("a link counts as it comes", || names(&dir).contains(&"l".to_owned())).await;
        std::fs::remove_file(path.join("40-l.conf")).unwrap();
        until("and goes", || names(&dir) == ["b"]).await;
        std::fs::hard_link(root.path().join("elsewhere"), path.join("40-l.conf")).unwrap();
        until("of either kind", || names(&dir).contains(&"l".to_owned())).await;
        until("a name is in use once", || {
            dir.loaded().complaints.len() == 1 && dir.loaded().complaints[0].contains("earlier file")
        })
        .await;
    }

    #[tokio::test]
    async fn a_directory_that_is_replaced_is_followed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("net.d");
        let dir = ConfDir::watch(&path);
        std::fs::write(path.join("1.conf"), conf("a")).unwrap();
        until("the first", || names(&dir) == ["a"]).await;
        std::fs::rename(&path, root.path().join("old")).unwrap();
        until("it is made anew", || path.is_dir() && names(&dir).is_empty()).await;
        std::fs::write(path.join("1.conf"), conf("b")).unwrap();
        until("the new one is watched", || names(&dir) == ["b"]).await;
        std::fs::remove_dir_all(&path).unwrap();
        until("it is made anew", || path.is_dir() && names(&dir).is_empty()).await;
        std::fs::write(path.join("1.conf"), conf("c")).unwrap();
        until("the newest is watched", || names(&dir) == ["c"]).await;
    }
}
