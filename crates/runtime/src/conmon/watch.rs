//! Who tells how a container ended: one task for each.
//!
//! ```text
//!  exit file there ───────────────────────────► its status, its ctime
//!  init dead ─► the rest of a shared pid namespace is killed
//!            └─ no file within 3.7 s ─────────► the kernel's word, see below
//!  monitor dead ─┬─ a file ───────────────────► its status
//!                ├─ init dead ────────────────► the kernel's word
//!                └─ init alive ─► killed ─────► 137, "the death of its monitor"
//!
//!  the kernel's word: a zombie's status in /proc; from 6.15 on a pidfd's record of one
//!  that others have reaped; else 137 where we have sent SIGKILL, and 255
//! ```
//!
//! Recorded once, written into the bundle before it is told. A monitor that can't
//! write its file (a full disk) or never notices the exit leaves no container
//! running for ever.

use super::Inner;
use super::exits::Exit;
use super::process::Process;
use super::task::{EXIT_BOUND, Live, Pod, Task, no_status};
use crate::api::RuntimeEvent;
use crate::bundle::{self, blocking};
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use types::{Certificate, ExitStatus, Signal};

/// How long a death by SIGKILL is waited for.
const AFTER_KILL: Duration = Duration::from_secs(10);
/// Between two looks at what is left in a cgroup.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What was found out.
enum Found {
    File(Exit),
    /// No file, but this.
    Nothing {
        status: ExitStatus,
        reason: String,
    },
}

async fn ended(process: Option<&Process>) {
    // One that could never be held is dead.
    if let Some(p) = process {
        p.ended().await;
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(t) => tokio::time::sleep_until(t).await,
        None => pending().await,
    }
}

impl Inner {
    /// Watches a container from its creation to its end.
    pub(super) fn watch_task(self: &Arc<Self>, pod: &Arc<Pod>, task: &Arc<Task>) {
        let (inner, pod, task) = (self.clone(), pod.clone(), task.clone());
        tokio::spawn(async move {
            let Some(live) = task.live() else { return };
            let found = inner.find_out(&task, live).await;
            if !task.record.private_pids {
                // The exit file may have been quicker than the news of init's death.
                end_rest(live).await;
            }
            inner.record(&pod, &task, live, found).await;
            if let Some(monitor) = &live.monitor {
                // Its cgroup goes when it does; a delete may hurry it.
                monitor.ended().await;
                if !task.record.handler.systemd_cgroup {
                    super::monitor::remove_cgroup(inner.cfg.monitor_cgroup.as_deref(), &task.id).await;
                }
            }
        });
    }

    async fn find_out(&self, task: &Task, live: &Live) -> Found {
        let (init, monitor) = (live.init.as_ref(), live.monitor.as_deref());
        let (mut init_dead, mut deadline, mut known) = (false, None, None);
        loop {
            tokio::select! {
                biased;
                exit = self.exits.wait(&task.id) => return Found::File(exit),
                () = ended(init), if !init_dead => {
                    init_dead = true;
                    known = init.and_then(Process::status);
                    deadline = Some(Instant::now() + EXIT_BOUND);
                    if !task.record.private_pids {
                        end_rest(live).await;
                    }
                }
                () = ended(monitor) => return self.without_monitor(task, live, known).await,
                () = at(deadline) => {
                    if let Some(exit) = self.exits.look(&task.id) {
                        return Found::File(exit);
                    }
                    let status = known.or_else(|| init.and_then(Process::status));
                    let reason = format!("the monitor has told no exit status {EXIT_BOUND:?} after the process's end");
                    return Found::Nothing { status: task.of_death(status), reason };
                }
            }
        }
    }

    /// The monitor has gone: whatever it still has told stands in the file.
    async fn without_monitor(&self, task: &Task, live: &Live, known: Option<ExitStatus>) -> Found {
        if let Some(exit) = self.exits.look(&task.id) {
            return Found::File(exit);
        }
        // One that was found alive and without a monitor is killed for that, and may have
        // died with another that was.
        let found_alone = live.monitor.is_none() && known.is_none();
        if let Some(init) = live.init.as_ref().filter(|i| found_alone || !i.has_ended()) {
            tracing::warn!(container = task.id, "its monitor has died, so it is killed");
            if let Err(e) = init.signal(Signal::KILL) {
                tracing::error!(container = task.id, error = %e, "it outlives its monitor");
            }
            end_rest(live).await;
            if !init.ended_within(AFTER_KILL).await {
                tracing::error!(container = task.id, pid = init.pid(), "it does not die of SIGKILL");
            }
            return Found::Nothing { status: ExitStatus::Signal(9), reason: "the death of its monitor".into() };
        }
        let status = known.or_else(|| live.init.as_ref().and_then(Process::status));
        Found::Nothing {
            status: task.of_death(status),
            reason: "the monitor has ended without telling an exit status: is the disk full?".into(),
        }
    }

    /// Writes the certificate, records the end, and tells it, once.
    async fn record(&self, pod: &Pod, task: &Task, live: &Live, found: Found) {
        let (status, exited_at, reason) = match found {
            Found::File(Exit { status: Ok(status), at }) => (status, at, None),
            Found::File(Exit { status: Err(reason), at }) => (ExitStatus::Unknown(255), at, Some(no_status(&reason))),
            Found::Nothing { status, reason } => (status, crate::now(), Some(reason)),
        };
        if let Some(reason) = &reason {
            tracing::warn!(container = task.id, code = status.code(), "{reason}");
        }
        let dir = self.bundle(&pod.id, &task.id);
        let ours = task.complete(Certificate {
            status,
            exited_at,
            oom_killed: dir.join("oom").exists() || live.cgroup.oom_kills() > 0,
            oom_cgroup: live.cgroup.name().filter(|_| live.cgroup.oom_kills() > 0),
            killed_by: reason,
            peak_memory: live.cgroup.peak_memory(),
        });
        let copy = ours.clone();
        let certificate = blocking(move || Ok(bundle::certify(&dir, ours))).await.unwrap_or(copy);
        if task.end(certificate.clone()) && !task.is_condemned() {
            self.tell(RuntimeEvent::Exited { pod: pod.id.clone(), container: task.id.clone(), certificate });
        }
    }
}

/// Kills what init's death leaves in a pid namespace that isn't its own; its streams
/// would stay open, and its monitor with them.
async fn end_rest(live: &Live) {
    let until = Instant::now() + AFTER_KILL;
    while live.cgroup.kill_once() > 0 {
        if Instant::now() >= until {
            tracing::error!("processes of a dead container do not die of SIGKILL: {:?}", live.cgroup.processes());
            return;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
