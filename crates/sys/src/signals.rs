//! Signals as something to poll for.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use types::Signal;

/// Signals that are blocked and read one by one. Readable when there is one.
#[derive(Debug)]
pub struct SignalFd {
    fd: OwnedFd,
}

impl SignalFd {
    /// Blocks these signals in the calling thread. Programs that it starts inherit
    /// that: they want [`unblock_all`] first.
    ///
    /// # Errors
    /// Those of sigprocmask and signalfd.
    pub fn block(signals: &[Signal]) -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: the set is initialised by sigemptyset before it is read.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for s in signals {
                libc::sigaddset(set.as_mut_ptr(), libc::c_int::from(s.number()));
            }
            if libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) < 0 {
                return Err(io::Error::last_os_error());
            }
            let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            #[expect(clippy::disallowed_methods, reason = "this is where descriptors are made")]
            Ok(Self { fd: OwnedFd::from_raw_fd(fd) })
        }
    }

    /// The next signal that has come; `None` when there is none (more).
    pub fn next(&self) -> Option<Signal> {
        // struct signalfd_siginfo has 128 bytes, the first four are the number.
        let mut info = [0u8; 128];
        match rustix::io::read(&self.fd, &mut info) {
            Ok(n) if n >= 4 => {
                let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
                Signal::from_number(number).ok()
            }
            _ => None,
        }
    }
}

/// Makes children stay until they are waited for. A caller that ignores SIGCHLD hands
/// that on to whom it starts, and the kernel then reaps our children itself: nobody
/// would learn how they ended.
pub fn keep_children() {
    // SAFETY: the default disposition runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Blocks no signal any more in the calling thread.
pub fn unblock_all() {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the set is initialised by sigemptyset before it is read.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut());
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_is_blocked_is_read_once() {
        // On a thread of its own: the mask is the thread's.
        std::thread::spawn(|| {
            let winch: Signal = "WINCH".parse().unwrap();
            let s = SignalFd::block(&[winch]).unwrap();
            assert_eq!(s.next(), None);
            // SAFETY: a signal to ourselves, blocked above.
            unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGWINCH) };
            assert_eq!(s.next(), Some(winch));
            assert_eq!(s.next(), None);
        })
        .join()
        .unwrap();
    }
}
