//! What the monitor waits for: one epoll, and no runtime around it.
//!
//! ```text
//! level  pipes, sockets that are accepted from, pidfds, signals: told as long as it holds
//! edge   attach clients, terminals, targets of output: told once, since a hang-up
//!        can't be masked and would be told without end
//! ```

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use types::{Result, ResultExt};

pub use rustix::event::epoll::EventFlags as Flags;

/// What a descriptor is to the monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// SIGCHLD and signals to be passed on.
    Signals,
    /// The runtime's call.
    Runtime,
    /// The process itself.
    Process,
    /// Its standard output, or its terminal.
    Stdout,
    /// Its standard error.
    Stderr,
    /// Its standard input has room.
    Stdin,
    /// Attach clients come.
    Listener,
    /// The FIFO `ctl`.
    Control,
    /// The FIFO `winsz`.
    Winsz,
    /// The runtime brings a terminal.
    Console,
    /// The process notifies.
    Notify,
    /// The host's notify socket has room.
    NotifyOut,
    /// The OOM killer may have struck.
    Oom,
    /// The log file, where it is none, has room.
    LogFile,
    /// The journal has room.
    Journal,
    /// An attach client.
    Client(u32),
}

const PLAIN: [Token; 15] = [
    Token::Signals,
    Token::Runtime,
    Token::Process,
    Token::Stdout,
    Token::Stderr,
    Token::Stdin,
    Token::Listener,
    Token::Control,
    Token::Winsz,
    Token::Console,
    Token::Notify,
    Token::NotifyOut,
    Token::Oom,
    Token::LogFile,
    Token::Journal,
];

impl Token {
    fn to_u64(self) -> u64 {
        match self {
            Token::Client(n) => 1000 + u64::from(n),
            plain => PLAIN.iter().position(|t| *t == plain).unwrap_or(0) as u64,
        }
    }

    fn from_u64(n: u64) -> Option<Self> {
        match n.checked_sub(1000) {
            Some(client) => u32::try_from(client).ok().map(Token::Client),
            None => usize::try_from(n).ok().and_then(|n| PLAIN.get(n).copied()),
        }
    }
}

/// Told once per change.
pub const EDGE: Flags = Flags::ET;

/// The epoll.
#[derive(Debug)]
pub struct Poll {
    epoll: OwnedFd,
}

impl Poll {
    /// An empty one.
    ///
    /// # Errors
    /// Where descriptors have run out.
    pub fn new() -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context(|| "make an epoll".into())?;
        Ok(Self { epoll })
    }

    /// Begins to wait for a descriptor.
    ///
    /// # Errors
    /// `EPERM` for a plain file, which is always ready.
    pub fn watch(&self, fd: impl AsFd, token: Token, flags: Flags) -> Result<()> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token.to_u64()), flags)
            .context(|| format!("wait for {token:?}"))
    }

    /// Waits no more for a descriptor.
    pub fn forget(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Waits for the next events, at most until `until`.
    ///
    /// # Errors
    /// Those of epoll_wait, but for EINTR.
    pub fn wait(&self, until: Option<Instant>) -> Result<Vec<(Token, Flags)>> {
        let timeout = until.map(|u| {
            let left = u.saturating_duration_since(Instant::now());
            // Rounded up: to wake too early would be to look in vain.
            let left = if left.is_zero() { left } else { left + Duration::from_millis(1) };
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        let mut events = Vec::with_capacity(16);
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e).context(|| "wait for events".into()),
        }
        Ok(events.iter().filter_map(|e: &epoll::Event| Some((Token::from_u64(e.data.u64())?, e.flags))).collect())
    }
}

/// Makes reads and writes return instead of waiting.
///
/// # Errors
/// Those of fcntl.
pub fn never_block(fd: impl AsFd) -> Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd).context(|| "look at a descriptor".into())?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK).context(|| "make a descriptor wait-free".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        for t in PLAIN.into_iter().chain([Token::Client(0), Token::Client(u32::MAX)]) {
            assert_eq!(Token::from_u64(t.to_u64()), Some(t));
        }
        assert_eq!(Token::from_u64(999), None);
    }

    #[test]
    fn a_deadline_ends_the_wait() {
        let poll = Poll::new().unwrap();
        let until = Instant::now() + Duration::from_millis(20);
        assert!(poll.wait(Some(until)).unwrap().is_empty());
        assert!(Instant::now() >= until);
    }
}
