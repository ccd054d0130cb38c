//! What ends, freezes or changes a container: Delete, Kill, Pause, Update.

use crate::container::{DRAIN, Msg, Owner, Reply};
use crate::events::Event;
use crate::state::View;
use crate::wire;
use oci::Runtime;
use proto::containerd::events as ev;
use std::time::SystemTime;
use types::{Certificate, Error, ErrorKind, Result, Signal};

impl Owner {
    pub(crate) fn delete_init(&mut self, reply: Reply<(i32, Certificate)>) {
        if !self.deleting.is_empty() {
            self.deleting.push(reply);
            return;
        }
        match self.machine.may_delete() {
            Err(e) => {
                let _ = reply.send(Err(e));
            }
            Ok(true) => {
                self.deleting.push(reply);
                self.delete_now();
            }
            Ok(false) => {
                // Created and never started: its exit comes first.
                self.deleting.push(reply);
                match &self.init.child {
                    Some(child) => {
                        let _ = child.signal(Signal::KILL);
                    }
                    // To be restored, and never was: there is nobody to kill.
                    None => self.delete_now(),
                }
            }
        }
    }

    pub(crate) fn delete_now(&mut self) {
        let (runtime, id, tx, shared) = (self.runtime.clone(), self.id.clone(), self.tx.clone(), self.shared.clone());
        let (io, rootfs, mounts) = (self.init.io.take(), self.bundle.join("rootfs"), self.record.rootfs_mounts);
        tokio::spawn(async move {
            let mut errors = Vec::new();
            if let Some(io) = io {
                io.drain(DRAIN).await;
            }
            let deleted = match shared.turn_to_end().await {
                Ok(_turn) => runtime.delete(&id, false).await,
                Err(e) => Err(e),
            };
            errors.extend(deleted.err().filter(|e| !e.is_not_found()));
            // It may sync a file system; that must hold up nobody else.
            if mounts > 0 {
                let done = tokio::task::spawn_blocking(move || oci::mounts::unmount_rootfs(&rootfs, mounts)).await;
                errors.extend(done.ok().and_then(Result::err));
            }
            let _ = tx.send(Msg::Deleted(Error::join("clean up", errors)));
        });
    }

    /// The container is gone (true), or what is left of it stays to be deleted
    /// once more.
    pub(crate) fn deleted(&mut self, result: Result<()>) -> bool {
        let waiters = std::mem::take(&mut self.deleting);
        let exit = match (result, self.machine.view()) {
            (Ok(()), View::Stopped(exit)) => exit,
            (Ok(()), _) => crate::state::plain(types::ExitStatus::Unknown(255), SystemTime::now()),
            (Err(e), _) => {
                for reply in waiters {
                    let _ = reply.send(Err(e.copy()));
                }
                return false;
            }
        };
        let pid = self.machine.pid();
        self.shared.events.publish(&Event::Delete(ev::TaskDelete {
            container_id: self.id.clone(),
            pid: wire::pid(pid),
            exit_status: wire::exit_status(exit.status),
            exited_at: Some(wire::timestamp(exit.exited_at)),
            id: String::new(),
        }));
        self.shared.release(&self.id);
        for reply in waiters {
            let _ = reply.send(Ok((pid, exit.clone())));
        }
        true
    }

    pub(crate) fn pause(&mut self, on: bool, reply: Option<Reply<()>>) {
        if let Err(e) = self.machine.may_pause() {
            if let Some(reply) = reply {
                let _ = reply.send(Err(e));
            }
            return;
        }
        let (runtime, id, tx, shared) = (self.runtime.clone(), self.id.clone(), self.tx.clone(), self.shared.clone());
        tokio::spawn(async move {
            // Nobody asked for it but a kill, which must wait for no other call.
            let turn = if reply.is_some() { Some(shared.turn().await) } else { None };
            let result = match &turn {
                Some(Err(e)) => Err(e.copy()),
                _ if on => runtime.pause(&id).await,
                _ => runtime.resume(&id).await,
            };
            let _ = tx.send(Msg::PauseDone(on, result, reply));
        });
    }

    pub(crate) fn pause_done(&mut self, on: bool, result: Result<()>, reply: Option<Reply<()>>) {
        if result.is_ok() {
            self.machine.set_paused(on);
            let container_id = self.id.clone();
            self.shared.events.publish(&if on {
                Event::Paused(ev::TaskPaused { container_id })
            } else {
                Event::Resumed(ev::TaskResumed { container_id })
            });
        }
        // A kill that came while it was being frozen.
        if on && result.is_ok() && self.init.killed_by == Some(Signal::KILL) {
            self.pause(false, None);
        }
        if let Some(reply) = reply {
            let _ = reply.send(result);
        }
    }

    pub(crate) fn update(&mut self, resources: Vec<u8>, reply: Reply<()>) {
        let (runtime, id, shared) = (self.runtime.clone(), self.id.clone(), self.shared.clone());
        tokio::spawn(async move {
            let updated = match shared.turn().await {
                Ok(_turn) => runtime.update(&id, &resources).await,
                Err(e) => Err(e),
            };
            let _ = reply.send(updated);
        });
    }

    /// Kill(SIGKILL) of an exec that the runtime is starting: the start ends early, and
    /// the answer comes with its end.
    pub(crate) fn end_start(&mut self, exec: &str, reply: Reply<()>) {
        match self.execs.get_mut(exec).and_then(|p| p.starting.as_mut()) {
            Some(starting) => starting.end(reply),
            None => {
                let _ = reply.send(Err(Error::internal(format!("exec {exec} starts and nobody starts it"))));
            }
        }
    }

    pub(crate) fn kill(&mut self, exec: Option<&str>, signal: Signal, all: bool) -> Result<()> {
        let what = match exec {
            None => format!("container {}", self.id),
            Some(e) => format!("exec {e} of container {}", self.id),
        };
        if exec.is_none() && all {
            // Init by itself: its cgroup may be unknown, or shared with others.
            let init = self.init.signal(&what, signal);
            let found = self.cgroup.signal_others(signal, self.machine.pid());
            if found == 0 {
                init?;
            }
        } else {
            let not_started = exec.is_some_and(|e| matches!(self.machine.exec_view(e), Ok((View::Created, _))));
            let process = self.process(exec)?;
            if not_started {
                return Err(Error::new(ErrorKind::FailedPrecondition, format!("{what} has not been started")));
            }
            process.signal(&what, signal)?;
        }
        // A frozen process on cgroup v1 dies only once it is thawed.
        if signal == Signal::KILL && self.machine.view() == View::Paused {
            self.pause(false, None);
        }
        Ok(())
    }
}
