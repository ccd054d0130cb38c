//! The files that say that the OOM killer struck, and not being its choice
//! ourselves (CVE-2019-14891).

use crate::poll::{Flags, Poll, Token};
use oci::cgroup::Cgroup;
use oci::oom::{Kills, RECHECK, RECHECKS, acknowledge, descriptor};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

const SCORE: &str = "/proc/self/oom_score_adj";

/// Asks not to be chosen; returns what the process and the exit command are to
/// have: what we had. Without the privilege nothing changes.
pub fn spare_us() -> Option<String> {
    let before = std::fs::read_to_string(SCORE).ok()?.trim().to_string();
    if let Err(e) = std::fs::write(SCORE, "-1000") {
        crate::say::debug(format_args!("{SCORE}: {e}"));
        return None;
    }
    Some(before)
}

/// The watch on the process's cgroup.
#[derive(Debug)]
pub struct OomWatch {
    /// `None` where the kernel has no way to tell; then the count alone is looked at,
    /// at the end.
    fd: Option<OwnedFd>,
    kills: Kills,
    /// The kernel may count a moment after it has spoken.
    looks_left: u32,
    next_look: Option<Instant>,
    directories: Vec<PathBuf>,
    found: bool,
}

impl OomWatch {
    /// Begins to watch the cgroup of `pid`; `None` where it has none of its own, or
    /// has ended already.
    pub fn begin(pid: i32, new: bool, directories: Vec<PathBuf>, poll: &Poll) -> Option<Self> {
        let cgroup = match Cgroup::of(pid) {
            Ok(cgroup) => cgroup,
            Err(e) => {
                crate::say::debug(format_args!("no word of the OOM killer: {e}"));
                return None;
            }
        };
        let fd = descriptor(&cgroup).and_then(|fd| poll.watch(&fd, Token::Oom, Flags::IN).map(|()| fd));
        if let Err(e) = &fd {
            crate::say::debug(format_args!("no early word of the OOM killer: {e}"));
        }
        let kills = if new { Kills::from_none(&cgroup) } else { Kills::from_now(&cgroup) };
        Some(Self { fd: fd.ok(), kills, looks_left: 0, next_look: None, directories, found: false })
    }

    /// The kernel has spoken. False: the cgroup is gone, and the watch over.
    pub fn spoken(&mut self) -> bool {
        if let Some(fd) = &self.fd {
            acknowledge(fd);
        }
        self.looks_left = RECHECKS;
        self.look();
        !self.kills.gone()
    }

    /// When to look again.
    pub fn due(&self) -> Option<Instant> {
        self.next_look
    }

    /// Looks at the count.
    pub fn look(&mut self) {
        self.next_look = None;
        if self.kills.struck() {
            self.looks_left = 0;
            self.say_so();
        } else if self.looks_left > 0 {
            self.looks_left -= 1;
            self.next_look = Some(Instant::now() + RECHECK);
        }
    }

    /// The process has ended: whether the killer did it has to be known now.
    pub fn last_look(&mut self, killed: bool) {
        let mut event = [0u8; 1024];
        let unread = self.fd.as_ref().is_some_and(|fd| rustix::io::read(fd, &mut event).is_ok());
        let spoken = unread || self.looks_left > 0;
        self.look();
        for _ in 0..if spoken && killed { RECHECKS } else { 0 } {
            if self.found {
                return;
            }
            std::thread::sleep(RECHECK);
            self.look();
        }
    }

    fn say_so(&mut self) {
        self.found = true;
        crate::say::info(format_args!("the OOM killer struck"));
        for dir in &self.directories {
            let file = dir.join("oom");
            if let Err(e) = std::fs::OpenOptions::new().create(true).append(true).open(&file) {
                crate::say::warn(format_args!("make {}: {e}", file.display()));
            }
        }
    }
}
