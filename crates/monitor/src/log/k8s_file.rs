//! `TIME stream F|P text`, one line each, with local time and its offset.
//!
//! A full file is thrown away (a new one takes its name) or rotated:
//! `log` -> `log.1` -> `log.2` … A disk that refuses bytes loses them, and the
//! process goes on. What is no plain file (a FIFO, say) may have no room: then the
//! rest is kept and nothing more is read until it has.

use crate::settings::LogSettings;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use stdio::Stream;
use stdio::cri_log::{local_timestamp, pieces};
use types::{Error, Result, ResultExt};

/// One-byte lines grow forty-fold: beyond this the buffer goes out.
const BUFFER: usize = 16 << 10;

/// The file and how full it is.
#[derive(Debug)]
pub struct K8sFile {
    path: PathBuf,
    file: File,
    /// Writes to it may find no room and are continued later.
    waits: bool,
    rest: Vec<u8>,
    /// The last write broke off inside a line.
    torn: bool,
    refused: bool,
    written: u64,
    total: u64,
    size_max: u64,
    total_max: u64,
    rotate: Option<u32>,
    /// Where it may lie; anywhere, where it is empty.
    allowed: Vec<PathBuf>,
}

fn open(path: &Path, flags: OFlags) -> Result<File> {
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP;
    rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC | flags, mode)
        .map(File::from)
        .context(|| format!("Failed to open log file {}", path.display()))
}

/// Opens it for appending, where it may be; made where it is missing.
fn open_allowed(path: &Path, allowed: &[PathBuf]) -> Result<File> {
    check_allowed(path, allowed)?;
    // What was no symlink a moment ago may be one now.
    let follow = if allowed.is_empty() { OFlags::empty() } else { OFlags::NOFOLLOW };
    open(path, OFlags::APPEND | OFlags::CREATE | follow)
}

/// `name` with something behind it.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(suffix);
    name.into()
}

/// The directory must be one of `allowed`, or below one.
fn check_allowed(path: &Path, allowed: &[PathBuf]) -> Result<()> {
    if allowed.is_empty() {
        return Ok(());
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let real = parent.canonicalize().context(|| format!("Failed to open log file {}", path.display()))?;
    let allows = |dir: &PathBuf| dir.canonicalize().is_ok_and(|d| real.starts_with(d));
    if allowed.iter().any(allows) && !path.is_symlink() {
        return Ok(());
    }
    let text = format!("log file {} is in none of the directories of --log-allowlist-dir", path.display());
    Err(Error::new(types::ErrorKind::PermissionDenied, text))
}

impl K8sFile {
    /// Opens it for appending; made with mode 0640 where it is missing.
    ///
    /// # Errors
    /// Those of the file system; `PermissionDenied` outside of the allowed directories.
    pub fn open(path: &Path, settings: &LogSettings) -> Result<Self> {
        let file = open_allowed(path, &settings.allowed)?;
        let meta = file.metadata().context(|| format!("stat log file {}", path.display()))?;
        let waits = !meta.is_file();
        if waits {
            crate::poll::never_block(&file)?;
        }
        Ok(Self {
            path: path.to_path_buf(),
            file,
            waits,
            rest: Vec::new(),
            torn: false,
            refused: false,
            written: meta.len(),
            total: meta.len(),
            size_max: settings.size_max.unwrap_or(u64::MAX),
            total_max: settings.total_max.unwrap_or(u64::MAX),
            rotate: settings.rotate,
            allowed: settings.allowed.clone(),
        })
    }

    /// What to wait for while it is stalled.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether it has no room.
    pub fn stalled(&self) -> bool {
        !self.rest.is_empty()
    }

    /// Writes the lines of one read, all with one time.
    pub fn write(&mut self, stream: Stream, bytes: &[u8]) {
        let now = SystemTime::now();
        let unix = now.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0));
        let head = format!("{} {} ", local_timestamp(now, sys::clock::offset(unix)), stream.name());
        let mut out = Vec::with_capacity(bytes.len() + 256);
        for (text, tag) in pieces(bytes) {
            if self.total >= self.total_max {
                break;
            }
            let length = (head.len() + 2 + text.len() + 1) as u64;
            if self.written.saturating_add(length) > self.size_max {
                self.put(&out);
                out.clear();
                self.begin_new();
            }
            out.extend_from_slice(head.as_bytes());
            out.extend_from_slice(&[tag, b' ']);
            out.extend_from_slice(text);
            out.push(b'\n');
            self.written += length;
            self.total += length;
            if out.len() > BUFFER {
                self.put(&out);
                out.clear();
            }
        }
        self.put(&out);
    }

    fn put(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if self.waits {
            self.rest.extend_from_slice(bytes);
            self.go_on();
            return;
        }
        match self.append(bytes) {
            Ok(()) => self.refused = false,
            Err(e) => {
                if !std::mem::replace(&mut self.refused, true) {
                    crate::say::warn(format_args!("log {} takes no more: {e}", self.path.display()));
                }
            }
        }
    }

    fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.torn {
            self.file.write_all(b"\n")?;
            self.torn = false;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    // What is refused now leaves a line without its end, or nothing at all.
                    self.torn = rest[n - 1] != b'\n';
                    rest = &rest[n..];
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Writes what had no room.
    pub fn go_on(&mut self) {
        while !self.rest.is_empty() {
            match rustix::io::write(&self.file, &self.rest) {
                Ok(n) => drop(self.rest.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(e) => {
                    crate::say::warn(format_args!("log {} takes no more: {e}", self.path.display()));
                    self.rest.clear();
                }
            }
        }
        self.rest.shrink_to(BUFFER);
    }

    /// The file is full.
    fn begin_new(&mut self) {
        let done = match self.rotate {
            Some(keep) => self.rotate(keep),
            None => self.replace(".tmp").map(drop),
        };
        if let Err(e) = done {
            crate::say::warn(format_args!("log {} goes on in the same file: {e}", self.path.display()));
        }
        // Where it failed, the next attempt comes after as many bytes, not with each line.
        self.written = 0;
    }

    /// An empty file takes the name; the old one's bytes are gone, unless they have
    /// another name.
    fn replace(&mut self, suffix: &str) -> Result<()> {
        if self.waits {
            return Ok(());
        }
        let new = beside(&self.path, suffix);
        // Left by one who died between the two steps.
        let _ = std::fs::remove_file(&new);
        let file = open(&new, OFlags::APPEND | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW)?;
        std::fs::rename(&new, &self.path).context(|| format!("give {} its name", self.path.display()))?;
        self.file = file;
        self.torn = false;
        Ok(())
    }

    fn rotate(&mut self, keep: u32) -> Result<()> {
        if self.waits || self.path.is_symlink() {
            return Err(Error::invalid("it is no plain file that could be rotated"));
        }
        for n in (1..keep).rev() {
            let (from, to) = (beside(&self.path, &format!(".{n}")), beside(&self.path, &format!(".{}", n + 1)));
            match std::fs::rename(&from, &to) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    crate::say::warn(format_args!("rename {} to {}: {e}", from.display(), to.display()));
                }
                _ => {}
            }
        }
        // A second name for the old file first: at no moment is the name missing.
        let first = beside(&self.path, ".1");
        let _ = std::fs::remove_file(&first);
        std::fs::hard_link(&self.path, &first)
            .or_else(|_| std::fs::rename(&self.path, &first))
            .context(|| format!("keep {} as {}", self.path.display(), first.display()))?;
        self.replace(".new")
    }

    /// Told that somebody has moved the file away: opens it under its name again, or
    /// rotates where we rotate ourselves. If that fails, the old file is kept.
    pub fn reopen(&mut self) {
        if let Err(e) = check_allowed(&self.path, &self.allowed) {
            crate::say::warn(format_args!("log {} goes on in the old file: {e}", self.path.display()));
            return;
        }
        if let Some(keep) = self.rotate {
            if let Err(e) = self.rotate(keep) {
                crate::say::warn(format_args!("log {} goes on in the same file: {e}", self.path.display()));
            }
            self.written = 0;
            return;
        }
        if self.waits {
            return;
        }
        match open_allowed(&self.path, &self.allowed) {
            Ok(file) => {
                self.written = file.metadata().map_or(0, |m| m.len());
                self.torn = false;
                self.file = file;
            }
            Err(e) => crate::say::warn(format_args!("log {} goes on in the old file: {e}", self.path.display())),
        }
    }

    /// Brings it to the disk.
    pub fn sync(&self) {
        if !self.waits
            && let Err(e) = self.file.sync_all()
        {
            crate::say::warn(format_args!("sync log {}: {e}", self.path.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    fn read(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap()
    }

    fn texts(path: &Path) -> Vec<String> {
        read(path).lines().map(|l| l.splitn(3, ' ').nth(2).unwrap().to_string()).collect()
    }

    #[test]
    fn lines_have_time_stream_and_tag() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = K8sFile::open(&path, &LogSettings::default()).unwrap();
        log.write(Stream::Stdout, b"one\ntwo");
        log.write(Stream::Stderr, b"\n");
        assert_eq!(texts(&path), ["F one", "P two", "F "]);
        let first = read(&path).lines().next().unwrap().to_string();
        let (time, stream) = first.split_once(' ').unwrap();
        assert_eq!((time.len(), &stream[..7]), (35, "stdout "), "{first}");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(log.written, path.metadata().unwrap().len());
    }

    #[test]
    fn a_full_file_is_thrown_away_or_rotated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let small = LogSettings { size_max: Some(120), ..LogSettings::default() };
        let mut log = K8sFile::open(&path, &small).unwrap();
        for i in 0..10 {
            log.write(Stream::Stdout, format!("line {i}\n").as_bytes());
        }
        assert_eq!(texts(&path), ["F line 8", "F line 9"]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

        let rotated = dir.path().join("rotated");
        let mut log = K8sFile::open(&rotated, &LogSettings { rotate: Some(2), ..small }).unwrap();
        for i in 0..10 {
            log.write(Stream::Stdout, format!("line {i}\n").as_bytes());
        }
        assert_eq!(texts(&rotated), ["F line 8", "F line 9"]);
        assert_eq!(texts(&beside(&rotated, ".1")), ["F line 6", "F line 7"]);
        assert_eq!(texts(&beside(&rotated, ".2")), ["F line 4", "F line 5"]);
        assert!(!beside(&rotated, ".3").exists() && !beside(&rotated, ".new").exists());
    }

    #[test]
    fn a_total_limit_ends_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let limited = LogSettings { total_max: Some(60), size_max: Some(1000), ..LogSettings::default() };
        let mut log = K8sFile::open(&path, &limited).unwrap();
        log.write(Stream::Stdout, b"one\ntwo\nthree\nfour\n");
        assert_eq!(texts(&path), ["F one", "F two"]);
    }

    #[test]
    fn a_file_that_was_moved_is_opened_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("log"), dir.path().join("old"));
        let mut log = K8sFile::open(&path, &LogSettings::default()).unwrap();
        log.write(Stream::Stdout, b"one\n");
        std::fs::rename(&path, &old).unwrap();
        log.write(Stream::Stdout, b"two\n");
        log.reopen();
        log.write(Stream::Stdout, b"three\n");
        log.reopen();
        log.write(Stream::Stdout, b"four\n");
        assert_eq!(
            (texts(&old), texts(&path)),
            (vec!["F one".into(), "F two".into()], vec!["F three".into(), "F four".into()])
        );
    }

    #[test]
    fn directories_that_are_not_allowed_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("in-side"));
        std::fs::create_dir(&inside).unwrap();
        std::fs::create_dir(&outside).unwrap();
        let settings = LogSettings { allowed: vec![inside.clone()], ..LogSettings::default() };
        K8sFile::open(&inside.join("log"), &settings).unwrap();
        for bad in [outside.join("log"), inside.join("../in-side/log")] {
            let e = K8sFile::open(&bad, &settings).unwrap_err();
            assert_eq!(e.kind(), types::ErrorKind::PermissionDenied, "{e}");
        }
    }

    #[test]
    fn a_link_that_has_taken_the_log_s_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("in/log"), dir.path().join("in/old"));
        let outside = dir.path().join("outside");
        std::fs::create_dir(dir.path().join("in")).unwrap();
        let settings = LogSettings { allowed: vec![dir.path().join("in")], ..LogSettings::default() };
        let mut log = K8sFile::open(&path, &settings).unwrap();
        std::fs::rename(&path, &old).unwrap();
        std::os::unix::fs::symlink(&outside, &path).unwrap();
        log.reopen();
        log.write(Stream::Stdout, b"one\n");
        assert!(!outside.exists());
        assert_eq!(texts(&old), ["F one"]);
        // Looked at and opened at once: the check alone would come too early.
        let open = |path: &Path| open(path, OFlags::APPEND | OFlags::NOFOLLOW);
        assert!(open(&path).is_err() && open(&old).is_ok());
    }

    #[test]
    fn a_disk_that_refuses_everything_leaves_no_empty_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = K8sFile::open(&path, &LogSettings::default()).unwrap();
        // It takes no byte: it is open for reading only.
        let good = std::mem::replace(&mut log.file, File::open(&path).unwrap());
        log.write(Stream::Stdout, b"lost\n");
        assert!(log.refused);
        log.file = good;
        log.write(Stream::Stdout, b"next\n");
        assert_eq!(texts(&path), ["F next"]);
    }

    #[test]
    fn a_fifo_without_room_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        stdio::fifo::make(&path).unwrap();
        let mut reader = File::from(stdio::fifo::open_reader(&path).unwrap());
        let mut log = K8sFile::open(&path, &LogSettings::default()).unwrap();
        let mut lines = 0;
        while !log.stalled() {
            log.write(Stream::Stdout, b"0123456789\n");
            lines += 1;
        }
        let mut all = Vec::new();
        loop {
            let mut some = [0u8; 4096];
            match reader.read(&mut some) {
                Ok(n) => all.extend_from_slice(&some[..n]),
                Err(_) if log.stalled() => log.go_on(),
                Err(_) => break,
            }
        }
        assert_eq!(String::from_utf8(all).unwrap().lines().filter(|l| l.ends_with("F 0123456789")).count(), lines);
    }

    #[test]
    fn a_line_that_broke_off_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = K8sFile::open(&path, &LogSettings::default()).unwrap();
        std::fs::write(&path, "2024 stdout F ha").unwrap();
        log.torn = true;
        log.write(Stream::Stdout, b"next\n");
        assert_eq!(read(&path).lines().count(), 2);
    }
}
