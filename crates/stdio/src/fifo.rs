//! Named pipes, held at both ends, so that a reader that restarts is no hang-up
//! (behaviours.md section 4), and the anonymous pipes of a process.

use rustix::fs::{FileType, Mode, OFlags};
use std::os::fd::OwnedFd;
use std::path::Path;
use types::{Error, Result, ResultExt};

/// A FIFO that takes a process's output.
#[derive(Debug)]
pub struct Out {
    /// The end to write to; blocking, for the process itself.
    pub write: OwnedFd,
    /// A reading end that is never read. While it is open no writer gets
    /// SIGPIPE and no byte in the FIFO is lost, whoever else comes and goes; it
    /// is no writer, so a reader still sees the end of the stream.
    pub hold: OwnedFd,
}

/// A FIFO that a process reads its input from.
#[derive(Debug)]
pub struct In {
    /// The end to read from; blocking, for the process itself.
    pub read: OwnedFd,
    /// A writing end that is never written to: until it is dropped (CloseIO),
    /// the process sees no end of its input.
    pub hold: OwnedFd,
}

fn open(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
        .context(|| format!("open FIFO {}", path.display()))
}

/// Opened read-write a FIFO never makes us wait for its other side; with that
/// end open, none of the following opens does either.
fn anchor(path: &Path) -> Result<OwnedFd> {
    let fd = open(path, OFlags::RDWR | OFlags::NONBLOCK)?;
    let stat = rustix::fs::fstat(&fd).context(|| format!("stat {}", path.display()))?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo {
        Ok(fd)
    } else {
        Err(Error::invalid(format!("{} is no FIFO", path.display())))
    }
}

/// Opens a FIFO for a process's output; never blocks.
///
/// # Errors
/// `NotFound`, or `InvalidArgument` where it is no FIFO.
pub fn open_out(path: &Path) -> Result<Out> {
    let _anchor = anchor(path)?;
    Ok(Out { write: open(path, OFlags::WRONLY)?, hold: open(path, OFlags::RDONLY | OFlags::NONBLOCK)? })
}

/// Opens a FIFO for a process's input; never blocks.
///
/// # Errors
/// `NotFound`, or `InvalidArgument` where it is no FIFO.
pub fn open_in(path: &Path) -> Result<In> {
    let _anchor = anchor(path)?;
    Ok(In { hold: open(path, OFlags::WRONLY | OFlags::NONBLOCK)?, read: open(path, OFlags::RDONLY)? })
}

/// Opens a FIFO for reading without waiting for a writer: the daemon's side.
///
/// # Errors
/// `NotFound`, or `InvalidArgument` where it is no FIFO.
pub fn open_reader(path: &Path) -> Result<OwnedFd> {
    open(path, OFlags::RDONLY | OFlags::NONBLOCK)
}

/// Makes a FIFO that only its owner can use (mode 0600).
///
/// # Errors
/// `AlreadyExists`, and those of the file system.
pub fn make(path: &Path) -> Result<()> {
    rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .context(|| format!("make FIFO {}", path.display()))
}

/// An anonymous pipe (reading end, writing end), close-on-exec.
///
/// # Errors
/// Where descriptors have run out.
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context(|| "make a pipe".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    #[test]
    fn bytes_outlive_a_reader_and_the_end_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        make(&path).unwrap();
        let out = open_out(&path).unwrap();
        let reader = open_reader(&path).unwrap();
        let mut w = File::from(out.write);
        w.write_all(b"one").unwrap();
        drop(reader);
        w.write_all(b"two").unwrap();
        drop(w);
        let mut text = String::new();
        File::from(open_reader(&path).unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "onetwo");
        drop(out.hold);
    }

    #[test]
    fn what_is_no_fifo_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "").unwrap();
        assert!(open_out(&path).unwrap_err().to_string().contains("is no FIFO"));
        assert!(open_in(&dir.path().join("missing")).unwrap_err().is_not_found());
    }
}
