//! A temporary directory that takes its mounts with it.

use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::path::{Path, PathBuf};

/// A temporary directory; at drop everything mounted at or below it is lazily
/// unmounted, the latest mount first, and the directory removed.
#[derive(Debug)]
pub struct TempRoot {
    dir: tempfile::TempDir,
}

impl Default for TempRoot {
    fn default() -> Self {
        Self::new()
    }
}

impl TempRoot {
    /// A fresh directory under the system's temporary one.
    pub fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("longshore-").tempdir().expect("make a temporary directory") }
    }

    /// A fresh directory on a tmpfs of its own of `size` bytes.
    pub fn small_disk(size: u64) -> Self {
        let root = Self::new();
        let options = CString::new(format!("size={size},mode=0755")).expect("options without NUL");
        rustix::mount::mount("tmpfs", root.path(), "tmpfs", MountFlags::empty(), options.as_c_str())
            .expect("mount a small tmpfs (tests run as root)");
        root
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path below it.
    pub fn join(&self, below: impl AsRef<Path>) -> PathBuf {
        self.path().join(below)
    }

    /// Fills the file system that it lies on with the file `filler`, to the last byte.
    pub fn fill(&self) -> PathBuf {
        let path = self.join("filler");
        let mut file = std::fs::File::create(&path).expect("make the filler");
        let mut block = vec![1u8; 64 << 10];
        while !block.is_empty() {
            while std::io::Write::write_all(&mut file, &block).is_ok() {}
            block.truncate(block.len() / 2);
        }
        path
    }
}

impl Drop for TempRoot {
    fn drop(&mut self) {
        let Ok(table) = std::fs::read_to_string("/proc/self/mountinfo") else { return };
        let below: Vec<PathBuf> = table
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .map(|target| PathBuf::from(target.replace("\\040", " ")))
            .filter(|target| target.starts_with(self.path()))
            .collect();
        for target in below.iter().rev() {
            let _ = rustix::mount::unmount(target, UnmountFlags::DETACH);
        }
    }
}
