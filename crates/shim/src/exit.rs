//! How a process's end becomes a certificate: the owner's share in it.
//!
//! ```text
//! init reaped -> its cgroup's last words -> certificate on disk -> log complete -> told
//! ```

use crate::container::{Msg, Owner};
use crate::{log, oom, persist};
use oci::Status;
use oci::cgroup::Cgroup;
use std::time::Duration;
use tokio::sync::watch;
use types::{Certificate, Signal};

/// How long the watch on the OOM killer is asked for an init that was killed and whose
/// cgroup is gone; its last look is at most 118 ms after the killer's first word.
const OOM_BOUND: Duration = Duration::from_millis(250);
/// How long a log may take to be complete before the exit is told all the same.
const LOG_BOUND: Duration = Duration::from_millis(250);

/// What init's cgroup said when init had just ended.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Last {
    oom_kills: u64,
    peak_memory: Option<u64>,
}

/// Looks at once: systemd removes the cgroup of a scope as soon as nobody is in it.
/// Where that has happened already, the watch on the OOM killer may know more.
async fn last_words(cgroup: &Cgroup, mut oom: watch::Receiver<oom::Seen>, status: Status) -> Last {
    let mut last = Last { oom_kills: cgroup.oom_kills(), peak_memory: cgroup.peak_memory() };
    if last.oom_kills == 0 && status.status == types::ExitStatus::Signal(9) && !cgroup.exists() {
        let told = oom.wait_for(|seen| seen.kills > 0 || seen.gone);
        if let Ok(Ok(seen)) = tokio::time::timeout(OOM_BOUND, told).await {
            last.oom_kills = seen.kills;
        }
    }
    last
}

impl Owner {
    pub(crate) fn watch_init(&self) {
        let (Some(child), Some(io)) = (self.init.child.clone(), self.init.io.as_ref()) else { return };
        let (tx, logged) = (self.tx.clone(), io.logged());
        let (cgroup, oom) = (self.cgroup.clone(), self.oom_seen.subscribe());
        tokio::spawn(async move {
            let status = child.wait().await;
            let last = last_words(&cgroup, oom, status).await;
            let _ = tx.send(Msg::Ended(status, last));
            // Whoever reads the log after the exit shall find all of it.
            let _ = tokio::time::timeout(LOG_BOUND, logged).await;
            let _ = tx.send(Msg::Reaped(status, last));
        });
    }

    /// Makes init's certificate and has it on disk, before anybody hears of it: should we
    /// be killed in between, whoever cleans up finds it.
    pub(crate) fn certify(&mut self, status: Status, last: Last) -> Certificate {
        self.tell_oom(last.oom_kills);
        let oom = self.oom_told > 0;
        let exit = Certificate {
            oom_killed: oom,
            oom_cgroup: oom.then(|| self.cgroup.name()).flatten(),
            killed_by: killed_by(self.init.killed_by, status),
            peak_memory: last.peak_memory,
            ..crate::state::plain(status.status, status.at)
        };
        if self.certified.as_ref() != Some(&exit) {
            if let Err(e) = persist::write_exit(&self.bundle, &exit) {
                log::warn(format_args!("container {}: {e}", self.id));
            }
            self.certified = Some(exit.clone());
        }
        exit
    }

    pub(crate) fn init_reaped(&mut self, status: Status, last: Last) {
        let exit = self.certify(status, last);
        let actions = self.machine.init_reaped(exit);
        self.apply(actions);
    }

    pub(crate) fn exec_reaped(&mut self, exec: &str, status: Status) {
        let sent = self.execs.get(exec).and_then(|p| p.killed_by);
        let exit = Certificate { killed_by: killed_by(sent, status), ..crate::state::plain(status.status, status.at) };
        let actions = self.machine.exec_reaped(exec, exit);
        self.apply(actions);
    }
}

fn killed_by(sent: Option<Signal>, status: Status) -> Option<String> {
    match (sent, status.status) {
        (Some(s), types::ExitStatus::Signal(n)) if s.number() == n => Some(format!("Kill ({s})")),
        _ => None,
    }
}
