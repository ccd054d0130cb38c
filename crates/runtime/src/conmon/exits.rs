//! The exit directory: one inotify watch for all containers.
//!
//! `<exit-dir>/<id>` holds the decimal status; the monitor puts it there in one
//! step, after the log is complete (behaviours.md section 2).

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use std::collections::HashMap;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use types::{Error, ExitStatus, Result, ResultExt};

/// What an exit file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exit {
    /// The status, or what is wrong with it.
    pub(crate) status: std::result::Result<ExitStatus, String>,
    /// When it was written.
    pub(crate) at: SystemTime,
}

/// The watched directory.
pub(crate) struct Exits {
    dir: PathBuf,
    waiting: Mutex<HashMap<String, Arc<Notify>>>,
}

impl Exits {
    /// Makes the directory and watches it for as long as the returned value lives.
    ///
    /// # Errors
    /// Where it can't be made or watched.
    pub(crate) fn watch(dir: PathBuf) -> Result<Arc<Self>> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.context(|| format!("create {}", dir.display()))?;
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .context(|| "make an inotify instance".into())?;
        // Renamed to its name as by the original, linked to it as by ours, or written in
        // place.
        let ways = WatchFlags::MOVED_TO | WatchFlags::CREATE | WatchFlags::CLOSE_WRITE;
        inotify::add_watch(&fd, &dir, ways).context(|| format!("watch {}", dir.display()))?;
        let fd = stdio::watch(fd, Interest::READABLE).context(|| format!("watch {}", dir.display()))?;
        let exits = Arc::new(Self { dir, waiting: Mutex::default() });
        let weak = Arc::downgrade(&exits);
        tokio::spawn(async move {
            while let Ok(mut ready) = fd.readable().await {
                let Some(exits) = weak.upgrade() else { return };
                exits.wake(&fd);
                ready.clear_ready();
            }
        });
        Ok(exits)
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<String, Arc<Notify>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes those whose files have come; all of them where events were lost.
    fn wake(&self, fd: &AsyncFd<OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(fd.get_ref(), &mut space);
        while let Ok(event) = reader.next() {
            let waiting = self.waiting();
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                waiting.values().for_each(|n| n.notify_one());
            } else if let Some(found) = event.file_name().and_then(|n| waiting.get(n.to_str().ok()?)) {
                found.notify_one();
            }
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the file of `id` says now; `None` where there is none.
    pub(crate) fn look(&self, id: &str) -> Option<Exit> {
        read(&self.dir.join(id))
    }

    /// Waits until the file of `id` is there.
    pub(crate) async fn wait(&self, id: &str) -> Exit {
        let bell = self.waiting().entry(id.to_string()).or_default().clone();
        loop {
            if let Some(exit) = self.look(id) {
                return exit;
            }
            bell.notified().await;
        }
    }

    /// Forgets a container and its file.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn forget(&self, id: &str) -> Result<()> {
        self.waiting().remove(id);
        let path = self.dir.join(id);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).context(|| format!("remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }
}

fn read(path: &Path) -> Option<Exit> {
    let text = match fs::read(path) {
        // Somebody is about to write it.
        Ok(text) if text.is_empty() => return None,
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
        Err(e) => {
            return Some(Exit { status: Err(format!("read {}: {e}", path.display())), at: SystemTime::now() });
        }
    };
    let at = path.metadata().ok().and_then(|m| {
        let since = Duration::new(u64::try_from(m.ctime()).ok()?, u32::try_from(m.ctime_nsec()).ok()?);
        SystemTime::UNIX_EPOCH.checked_add(since)
    });
    Some(Exit { status: parse(path, &text), at: at.unwrap_or_else(SystemTime::now) })
}

fn parse(path: &Path, text: &[u8]) -> std::result::Result<ExitStatus, String> {
    let text = String::from_utf8_lossy(text);
    match text.trim().parse::<i64>() {
        Ok(code) => Ok(u32::try_from(code).map_or(ExitStatus::Unknown(255), ExitStatus::from_code)),
        Err(_) => {
            let shown: String = text.chars().take(64).collect();
            Err(format!("the exit file {} holds {shown:?}, which is no number", path.display()))
        }
    }
}

/// The error of an exit file that says nothing.
pub(crate) fn unreadable(reason: &str) -> Error {
    Error::internal(reason).hint("a monitor writes a decimal exit status there; who else does?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_a_number_and_nothing_else() {
        let parse = |text: &str| parse(Path::new("/x/c"), text.as_bytes());
        assert_eq!(parse("0"), Ok(ExitStatus::Code(0)));
        assert_eq!(parse("137"), Ok(ExitStatus::Signal(9)));
        assert_eq!(parse("-1"), Ok(ExitStatus::Unknown(255)));
        let e = parse("no number").unwrap_err();
        assert!(e.contains("/x/c") && e.contains("\"no number\""), "{e}");
        assert!(parse("").is_err());
    }

    #[tokio::test]
    async fn who_waits_is_woken_by_its_own_file() {
        let root = tempfile::tempdir().unwrap();
        let exits = Exits::watch(root.path().join("exits")).unwrap();
        let mine = tokio::spawn({
            let exits = exits.clone();
            async move { exits.wait("c").await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        fs::write(exits.dir().join("other"), "1").unwrap();
        fs::write(exits.dir().join(".c.tmp"), "7").unwrap();
        fs::rename(exits.dir().join(".c.tmp"), exits.dir().join("c")).unwrap();
        let exit = tokio::time::timeout(Duration::from_secs(10), mine).await.unwrap().unwrap();
        assert_eq!(exit.status, Ok(ExitStatus::Code(7)));
        assert!(exit.at.elapsed().unwrap() < Duration::from_secs(60));
        exits.forget("c").unwrap();
        exits.forget("c").unwrap();
        assert_eq!(exits.look("c"), None);
    }

    #[tokio::test]
    async fn a_file_may_be_linked_to_its_name_or_written_in_place() {
        let root = tempfile::tempdir().unwrap();
        let exits = Exits::watch(root.path().join("exits")).unwrap();
        for (id, linked) in [("linked", true), ("in-place", false)] {
            let waits = {
                let exits = exits.clone();
                tokio::spawn(async move { exits.wait(id).await })
            };
            while !exits.waiting().contains_key(id) {
                tokio::task::yield_now().await;
            }
            let name = exits.dir().join(id);
            // Kept open: a close would be told, too.
            let file = if linked {
                use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
                let file = fs::File::from(open(exits.dir(), OFlags::TMPFILE | OFlags::RDWR, Mode::RUSR).unwrap());
                std::os::unix::fs::FileExt::write_all_at(&file, b"7", 0).unwrap();
                let source = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
                linkat(CWD, source, CWD, &name, AtFlags::SYMLINK_FOLLOW).unwrap();
                Some(file)
            } else {
                let file = fs::File::create(&name).unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
                std::os::unix::fs::FileExt::write_all_at(&file, b"7", 0).unwrap();
                None
            };
            let exit = tokio::time::timeout(Duration::from_secs(20), waits).await.unwrap().unwrap();
            assert_eq!(exit.status, Ok(ExitStatus::Code(7)), "{id}");
            drop(file);
        }
    }
}
