//! Whose process is whose: the one reaper of a shim or a monitor.
//!
//! ```text
//! known      pidfd each; reaped by whoever waits for it, at once
//! unknown    seen as zombies; reaped when every runtime call that had begun
//!            before the first sight has ended: its pid file may name them
//! ```
//!
//! A process is born inside a runtime call and known to us only once that call
//! has read its pid file. It may be dead by then. As long as it is not reaped
//! its number is nobody else's, so the pidfd that is opened then is surely its
//! own. Unknown children are listed from `/proc/self/task/*/children`, because
//! `waitid(P_ALL, WNOWAIT)` shows the same first zombie for ever.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use sys::pidfd::{PidFd, Waited, peek_child, reap_child};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use types::{ExitStatus, Result, ResultExt, Signal};

/// The book of this process's children. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Children {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    book: Mutex<Book>,
    /// Something may have become reapable other than by a signal.
    look_again: Notify,
}

/// The decisions, without any IO.
#[derive(Debug, Default)]
struct Book {
    /// How often each is held: a number may be reused while its first holder,
    /// reaped long ago, is still remembered.
    known: HashMap<i32, usize>,
    /// Unknown zombies with the time of first sight, in ticks.
    unknown: HashMap<i32, u64>,
    /// Runtime calls under way, by the tick of their beginning.
    calls: BTreeSet<u64>,
    tick: u64,
}

impl Book {
    fn next_tick(&mut self) -> u64 {
        self.tick += 1;
        self.tick
    }

    fn begin(&mut self) -> u64 {
        let t = self.next_tick();
        self.calls.insert(t);
        t
    }

    /// Takes the list of unknown zombies as they are now and says which of them
    /// no runtime call can name any more.
    fn reapable(&mut self, zombies: &[i32]) -> Vec<i32> {
        self.unknown.retain(|pid, _| zombies.contains(pid));
        let now = self.next_tick();
        let oldest_call = self.calls.first().copied();
        zombies
            .iter()
            .copied()
            .filter(|pid| !self.known.contains_key(pid))
            .filter(|pid| {
                let seen = *self.unknown.entry(*pid).or_insert(now);
                oldest_call.is_none_or(|begun| begun > seen)
            })
            .collect()
    }

    fn hold(&mut self, pid: i32) {
        self.unknown.remove(&pid);
        *self.known.entry(pid).or_default() += 1;
    }

    fn let_go(&mut self, pid: i32) {
        if let Some(n) = self.known.get_mut(&pid) {
            *n -= 1;
            if *n == 0 {
                self.known.remove(&pid);
            }
        }
    }
}

impl Children {
    /// An empty book.
    pub fn new() -> Self {
        Self::default()
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.inner.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces a runtime call; until the returned guard is dropped, no zombie
    /// is reaped whose number the call might still deliver.
    pub fn begin_call(&self) -> Call {
        Call { tick: self.book().begin(), children: self.clone() }
    }

    /// Makes a process known and takes over waiting for it. Has to be called
    /// before the guard of the call that bore it is dropped.
    ///
    /// # Errors
    /// `NotFound` where no process has this number, so that it can't be the one.
    pub fn adopt(&self, pid: i32) -> Result<Child> {
        let pidfd = PidFd::open(pid).context(|| format!("open process {pid}"))?;
        let fd = watch(pidfd).context(|| format!("watch process {pid}"))?;
        self.book().hold(pid);
        Ok(Child { fd, pid, children: self.clone() })
    }

    /// Makes a child known that another waits for, by a pidfd of its own. Has to
    /// be called before anything is awaited after its birth.
    pub fn claim(&self, pid: i32) -> Claim {
        self.book().hold(pid);
        Claim { pid, children: self.clone() }
    }

    /// Reaps what nobody knows and nobody will; returns how many.
    ///
    /// # Errors
    /// Where /proc can't be read.
    pub fn sweep(&self) -> Result<usize> {
        let mut zombies = Vec::new();
        for pid in list_children()? {
            if self.book().known.contains_key(&pid) {
                continue;
            }
            if matches!(peek_child(pid), Ok(Waited::Ended(_))) {
                zombies.push(pid);
            }
        }
        let reapable = self.book().reapable(&zombies);
        for pid in &reapable {
            // A failure means that it is gone, which is what was wanted.
            let _ = reap_child(*pid);
            self.book().unknown.remove(pid);
        }
        Ok(reapable.len())
    }

    /// Sweeps whenever a child has ended or a runtime call has. Never returns.
    ///
    /// # Errors
    /// Where SIGCHLD can't be had.
    pub async fn run(&self) -> Result<()> {
        let mut chld = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::child())
            .context(|| "listen for SIGCHLD".into())?;
        loop {
            // What died before we listened is swept too.
            let _ = self.sweep();
            tokio::select! {
                _ = chld.recv() => {}
                () = self.inner.look_again.notified() => {}
            }
        }
    }

    /// How many zombies are held back for a runtime call.
    pub fn held_back(&self) -> usize {
        self.book().unknown.len()
    }
}

#[expect(deprecated, reason = "its successor is unsafe; a PidFd owns its descriptor and never exchanges it")]
fn watch(pidfd: PidFd) -> std::io::Result<AsyncFd<PidFd>> {
    AsyncFd::with_interest(pidfd, Interest::READABLE)
}

/// Waits until each of these processes has ended, whosever child it is. Those that are
/// gone already have.
pub async fn ended(pids: Vec<i32>) {
    let watched: Vec<AsyncFd<PidFd>> = pids.into_iter().filter_map(|p| watch(PidFd::open(p).ok()?).ok()).collect();
    for process in watched {
        let _ = process.readable().await;
    }
}

/// All children of this process, whichever thread bore or inherited them.
fn list_children() -> Result<Vec<i32>> {
    children_of("self").context(|| "list the threads of this process".into())
}

fn children_of(process: &str) -> std::io::Result<Vec<i32>> {
    let mut all = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{process}/task"))?.flatten() {
        // A thread may be gone by now; its children have moved to another.
        let Ok(text) = std::fs::read_to_string(task.path().join("children")) else { continue };
        all.extend(text.split_ascii_whitespace().filter_map(|p| p.parse::<i32>().ok()));
    }
    Ok(all)
}

/// What a process has borne and what these have; at most a thousand.
pub(crate) fn descendants(pid: i32) -> Vec<i32> {
    let mut all = children_of(&pid.to_string()).unwrap_or_default();
    let mut next = 0;
    while next < all.len() && all.len() < 1000 {
        all.extend(children_of(&all[next].to_string()).unwrap_or_default());
        next += 1;
    }
    all
}

/// A runtime call under way.
#[derive(Debug)]
pub struct Call {
    tick: u64,
    children: Children,
}

impl Drop for Call {
    fn drop(&mut self) {
        let waiting = {
            let mut book = self.children.book();
            book.calls.remove(&self.tick);
            !book.unknown.is_empty()
        };
        if waiting {
            self.children.inner.look_again.notify_one();
        }
    }
}

/// A process that another waits for. Dropped before it was reaped, it becomes
/// the sweeper's.
#[derive(Debug)]
pub struct Claim {
    pid: i32,
    children: Children,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.children.book().let_go(self.pid);
        self.children.inner.look_again.notify_one();
    }
}

/// How and when a child has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Exit code or signal; 255 where it was no child of ours.
    pub status: ExitStatus,
    /// When it was reaped.
    pub at: SystemTime,
}

/// A known process. Dropped unwaited, it becomes the sweeper's.
#[derive(Debug)]
pub struct Child {
    fd: AsyncFd<PidFd>,
    pid: i32,
    children: Children,
}

impl Child {
    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// `NotFound` once it has been reaped.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.fd.get_ref().signal(signal).map_err(|e| {
            let gone = e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error());
            let kind = if gone { types::ErrorKind::NotFound } else { types::ErrorKind::Internal };
            types::Error::new(kind, format!("send {signal} to process {}", self.pid)).because(e)
        })
    }

    /// Whether it has ended, reaped or not.
    pub fn has_ended(&self) -> bool {
        !matches!(self.fd.get_ref().peek(), Ok(Waited::Running))
    }

    /// Waits until it has ended, and reaps it. May be cancelled and called again,
    /// but only one answer is the true one: the first.
    pub async fn wait(&self) -> Status {
        loop {
            let Ok(mut ready) = self.fd.readable().await else {
                // The runtime is shutting down; nobody is interested any more.
                return Status { status: ExitStatus::Unknown(255), at: SystemTime::now() };
            };
            match self.fd.get_ref().try_wait() {
                Ok(Waited::Running) => ready.clear_ready(),
                Ok(Waited::Ended(status)) => return Status { status, at: SystemTime::now() },
                Ok(Waited::NotOurs) | Err(_) => {
                    return Status { status: ExitStatus::Unknown(255), at: SystemTime::now() };
                }
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.children.book().let_go(self.pid);
        if matches!(self.fd.get_ref().peek(), Ok(Waited::Ended(_))) {
            self.children.inner.look_again.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_zombie_waits_for_older_calls_only() {
        let mut b = Book::default();
        let old = b.begin();
        assert!(b.reapable(&[10]).is_empty(), "the older call may name it");
        let young = b.begin();
        b.calls.remove(&old);
        assert_eq!(b.reapable(&[10]), [10], "the younger one can't");
        b.calls.remove(&young);
        assert_eq!(b.reapable(&[11]), [11]);
    }

    #[test]
    fn a_number_is_known_until_its_last_holder_lets_go() {
        let mut b = Book::default();
        b.hold(10);
        b.hold(10);
        b.let_go(10);
        assert!(b.reapable(&[10]).is_empty(), "the second process of that number is still waited for");
        b.let_go(10);
        assert_eq!(b.reapable(&[10]), [10]);
    }

    #[test]
    fn a_recycled_number_is_seen_anew() {
        let mut b = Book::default();
        let call = b.begin();
        assert!(b.reapable(&[10]).is_empty());
        assert!(b.reapable(&[]).is_empty());
        b.calls.remove(&call);
        let _second = b.begin();
        assert!(b.reapable(&[10]).is_empty(), "first seen after the second call began");
    }

    proptest! {
        /// Whatever the order of calls and sights, a pid that is delivered by a
        /// call that began before the process was born is never swept first.
        #[test]
        fn nothing_that_a_call_may_name_is_swept(steps in proptest::collection::vec(0u8..4, 1..60)) {
            let mut b = Book::default();
            let mut open: Vec<(u64, i32)> = Vec::new();
            let mut next_pid = 100;
            for s in steps {
                match s {
                    // A call begins and bears a process that dies at once.
                    0 => { open.push((b.begin(), next_pid)); next_pid += 1; }
                    1 | 2 => {
                        let zombies: Vec<i32> = open.iter().map(|o| o.1).collect();
                        let swept = b.reapable(&zombies);
                        prop_assert!(swept.is_empty(), "{swept:?}");
                    }
                    _ => if !open.is_empty() {
                        let (tick, pid) = open.remove(0);
                        b.hold(pid);
                        b.calls.remove(&tick);
                    }
                }
            }
        }
    }
}
