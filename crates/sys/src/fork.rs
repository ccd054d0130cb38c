//! What a single-threaded daemon needs beyond `std`: fork, and the descriptors
//! that its caller has left open for it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Which of the two a process is after [`fork`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forked {
    /// The one that goes on, with the other's number.
    Parent(i32),
    /// The new one.
    Child,
}

/// Makes a copy of this process.
///
/// # Errors
/// Those of fork; `Unsupported` in a process with threads, whose locks the copy
/// would keep for ever.
pub fn fork() -> io::Result<Forked> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "a process with threads can't be copied"));
    }
    // SAFETY: there is no other thread (looked at above, and only this one could
    // have started one since), so no lock is held and no memory is half-written.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid)),
    }
}

/// Takes up every descriptor beyond the standard streams that this process was
/// started with, by its number; each is made close-on-exec. Once per process,
/// before anything else is opened.
///
/// # Errors
/// Where /proc can't be read; `AlreadyExists` the second time.
pub fn take_all_inherited() -> io::Result<BTreeMap<RawFd, OwnedFd>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the inherited descriptors were taken before"));
    }
    let numbers: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")?
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|n| *n > 2)
        .collect();
    let mut all = BTreeMap::new();
    for number in numbers {
        // The descriptor of the listing itself is closed by now.
        // SAFETY: fcntl on a number is harmless whatever the number is.
        if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            continue;
        }
        // SAFETY: it is open (checked above), it came with exec, since nothing has
        // been opened before and kept, and the flag above makes this the only owner.
        #[expect(clippy::disallowed_methods, reason = "this is where descriptors are made")]
        all.insert(number, unsafe { OwnedFd::from_raw_fd(number) });
    }
    Ok(all)
}
