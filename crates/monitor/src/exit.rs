//! How an end is made known: the exit files, and the program that is run then.
//!
//! ```text
//! <exit-dir>/<id>      the decimal status, no newline
//! <persist-dir>/exit   the same
//! ```
//!
//! Room for both is taken when the monitor starts, in files without a name, so that
//! a disk that is full by then refuses neither (cri-o#9274); a name comes in one
//! step, with the content.

use crate::settings::ExitCommand;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use sys::fork::{Forked, fork};
use types::{Result, ResultExt};

/// As long as the longest status.
const ROOM: &[u8] = b"    ";

/// One exit file that is still to come.
#[derive(Debug)]
pub struct ExitFile {
    dir: PathBuf,
    name: String,
    room: Option<File>,
}

impl ExitFile {
    /// Takes room for it. Where that can't be had it is tried again at the end.
    pub fn reserve(dir: &Path, name: &str) -> Self {
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let room =
            rustix::fs::open(dir, flags, mode()).map(File::from).ok().filter(|f| f.write_all_at(ROOM, 0).is_ok());
        Self { dir: dir.to_path_buf(), name: name.to_string(), room }
    }

    fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// Writes the status and gives the file its name, in one step.
    ///
    /// # Errors
    /// Those of the file system, naming the file.
    pub fn write(&mut self, status: i32) -> Result<()> {
        let text = status.to_string();
        let room = self.room.take();
        let what = || format!("write {status} to exit file {}", self.path().display());
        let named = room.map(|file| self.name_room(&file, &text));
        match named {
            Some(Ok(())) => Ok(()),
            // No room was to be had at first, or it can't be named there.
            Some(Err(_)) | None => self.write_anew(&text).context(what),
        }
    }

    fn temporary(&self) -> PathBuf {
        self.dir.join(format!(".{}.new", self.name))
    }

    fn name_room(&self, file: &File, text: &str) -> std::io::Result<()> {
        file.write_all_at(text.as_bytes(), 0)?;
        file.set_len(text.len() as u64)?;
        let source = format!("/proc/self/fd/{}", file.as_raw_fd());
        let link = |to: &Path| rustix::fs::linkat(CWD, &source, CWD, to, AtFlags::SYMLINK_FOLLOW);
        match link(&self.path()) {
            // An earlier end of the same container.
            Err(rustix::io::Errno::EXIST) => {
                let temporary = self.temporary();
                let _ = std::fs::remove_file(&temporary);
                link(&temporary)?;
                std::fs::rename(&temporary, self.path())
            }
            other => Ok(other?),
        }
    }

    fn write_anew(&self, text: &str) -> std::io::Result<()> {
        write_whole(&self.path(), &self.temporary(), text)
    }
}

/// Writes a small file so that nobody ever sees a part of it.
///
/// # Errors
/// Those of the file system.
pub fn write_whole(path: &Path, temporary: &Path, text: &str) -> std::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let done = rustix::fs::open(temporary, flags, mode())
        .map_err(std::io::Error::from)
        .and_then(|fd| File::from(fd).write_all_at(text.as_bytes(), 0))
        .and_then(|()| std::fs::rename(temporary, path));
    if done.is_err() {
        let _ = std::fs::remove_file(temporary);
    }
    done
}

fn mode() -> Mode {
    Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH
}

/// Starts the program in a process of its own, which waits for the delay first; its
/// number is returned. Processes that it leaves behind are no longer ours. `let_go` is
/// called in the new process: what that kept open during the delay, clients and file
/// systems would wait for.
///
/// # Errors
/// Those of fork.
pub fn start_exit_command(command: &ExitCommand, oom_score: Option<&str>, let_go: impl FnOnce()) -> Result<i32> {
    // It may double-fork to outlive us; a subreaper would get the second one back.
    if let Err(e) = rustix::process::set_child_subreaper(None) {
        crate::say::warn(format_args!("stop being a subreaper: {e}"));
    }
    let mut exit = std::process::Command::new(&command.program);
    exit.args(&command.args);
    match fork().context(|| format!("fork for the exit command {}", command.program.display()))? {
        Forked::Parent(pid) => Ok(pid),
        Forked::Child => {
            use std::os::unix::process::CommandExt;
            let_go();
            if let Some(score) = oom_score {
                let _ = std::fs::write("/proc/self/oom_score_adj", score);
            }
            sys::signals::unblock_all();
            std::thread::sleep(command.delay);
            let e = exit.exec();
            crate::say::error(format_args!("exit command {}: {e}", command.program.display()));
            std::process::exit(1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_status_is_written_whole_and_over_an_earlier_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = ExitFile::reserve(dir.path(), "id");
        assert!(names(dir.path()).is_empty(), "room has no name");
        first.write(137).unwrap();
        assert_eq!(std::fs::read(dir.path().join("id")).unwrap(), b"137");
        ExitFile::reserve(dir.path(), "id").write(-1).unwrap();
        assert_eq!(std::fs::read(dir.path().join("id")).unwrap(), b"-1");
        assert_eq!(names(dir.path()), ["id"]);
    }

    #[test]
    fn a_directory_that_came_late_is_no_fault() {
        let dir = tempfile::tempdir().unwrap();
        let late = dir.path().join("late");
        let mut file = ExitFile::reserve(&late, "id");
        assert!(file.write(0).unwrap_err().to_string().contains("late/id"));
        std::fs::create_dir(&late).unwrap();
        file.write(0).unwrap();
        assert_eq!(std::fs::read(late.join("id")).unwrap(), b"0");
    }
}
