//! A few MiB beside the database that are given up when the disk is full, so
//! that Stop and Remove still commit.

use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::path::{Path, PathBuf};

/// Its size in bytes: some thousand small commits of write-ahead log.
const SIZE: u64 = 4 << 20;
/// It is made (again) only where at least this much is free, in bytes.
const COMFORT: u64 = 16 << 20;
/// With less than this free, in bytes, a failed write is put down to the disk.
const TIGHT: u64 = 1 << 20;

#[derive(Debug)]
pub(crate) struct Ballast {
    path: PathBuf,
    held: bool,
}

impl Ballast {
    /// Takes up the ballast in `dir`; without space for it there is none.
    pub(crate) fn new(dir: &Path) -> Self {
        let path = dir.join("ballast");
        let held = std::fs::metadata(&path).is_ok_and(|m| m.len() >= SIZE);
        let mut ballast = Self { path, held };
        ballast.restore();
        ballast
    }

    /// Gives the space back to the file system; false if there was none to give.
    pub(crate) fn give_up(&mut self) -> bool {
        if !std::mem::take(&mut self.held) {
            return false;
        }
        match std::fs::File::options().write(true).open(&self.path).and_then(|f| f.set_len(0)) {
            Ok(()) => {
                tracing::warn!(ballast = %self.path.display(), "the disk is full: gave up the database's ballast");
                true
            }
            Err(error) => {
                tracing::error!(ballast = %self.path.display(), %error, "can't give up the database's ballast");
                false
            }
        }
    }

    /// The same before there is a writer, where the disk has no room at all; false if
    /// that is not what is the matter.
    pub(crate) fn give_up_in(dir: &Path) -> bool {
        let path = dir.join("ballast");
        let held = std::fs::metadata(&path).is_ok_and(|m| m.len() >= SIZE);
        let mut ballast = Self { path, held };
        ballast.disk_is_tight() && ballast.give_up()
    }

    /// Makes it again once there is room.
    pub(crate) fn restore(&mut self) {
        if self.held || self.free() < COMFORT {
            return;
        }
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let made = rustix::fs::open(&self.path, flags, Mode::RUSR | Mode::WUSR)
            .and_then(|fd| rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, SIZE));
        match made {
            Ok(()) => self.held = true,
            // Some file systems have no fallocate: the database works without.
            Err(error) => tracing::debug!(ballast = %self.path.display(), %error, "no ballast for the database"),
        }
    }

    /// True when a failed write is likely the disk's fault.
    pub(crate) fn disk_is_tight(&self) -> bool {
        self.free() < TIGHT
    }

    /// The database's directory.
    pub(crate) fn beside(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    fn free(&self) -> u64 {
        rustix::fs::statvfs(self.beside()).map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize))
    }
}
