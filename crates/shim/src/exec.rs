//! Execs, and what else is asked of a container's processes: the owner's other
//! half.

use crate::container::{DRAIN, Exited, NewExec, Owner, Process, Reply, Seen, Starting};
use crate::state::View;
use crate::streams::{self, Habits, Io};
use crate::{container::Msg, shared::Shared};
use oci::{Child, Command, Launch, Runtime};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;
use types::{Certificate, Error, ErrorKind, Result, ResultExt, Signal};

impl Owner {
    pub(crate) fn add_exec(&mut self, new: NewExec) -> Result<()> {
        let actions = self.machine.add_exec(&new.id)?;
        let id = new.id.clone();
        let mut process = Process::planned(new.wanted.clone());
        process.spec = Some(new);
        self.execs.insert(id, process);
        self.apply(actions);
        Ok(())
    }

    pub(crate) fn start_exec(&mut self, exec: String, reply: Reply<i32>) {
        let begun = self.machine.begin_exec(&exec);
        let spec = self.execs.get_mut(&exec).and_then(|p| p.spec.take());
        let new = match (begun, spec) {
            (Ok(()), Some(new)) => new,
            (Ok(()), None) => {
                let _ = reply.send(Err(Error::internal(format!("exec {exec} has lost its specification"))));
                return;
            }
            (Err(e), spec) => {
                if let Some(p) = self.execs.get_mut(&exec) {
                    p.spec = spec;
                }
                let _ = reply.send(Err(e));
                return;
            }
        };
        let (abort, aborted) = watch::channel(false);
        if let Some(p) = self.execs.get_mut(&exec) {
            p.starting = Some(Starting { abort, killers: Vec::new() });
        }
        let job = Job {
            shared: self.shared.clone(),
            runtime: self.runtime.clone(),
            container: self.id.clone(),
            bundle: self.bundle.clone(),
            habits: Habits { labelled: new.labelled, ..self.habits },
            aborted,
            new,
        };
        let tx = self.tx.clone();
        tokio::spawn(async move {
            let result = job.run().await;
            if let Err(unsent) = tx.send(Msg::ExecStarted(exec, result, reply))
                && let Msg::ExecStarted(_, Ok((child, _)), _) = unsent.0
            {
                // Its container is gone.
                let _ = child.signal(Signal::KILL);
            }
        });
    }

    pub(crate) fn exec_started(&mut self, exec: &str, result: Result<(Child, Io)>, reply: Reply<i32>) {
        let now = SystemTime::now();
        let given_up = !self.machine.is_starting(exec);
        let killers = self.execs.get_mut(exec).and_then(|p| p.starting.take()).map(|s| s.killers).unwrap_or_default();
        let answer = match result {
            Ok((child, io)) => {
                let pid = child.pid();
                let child = Arc::new(child);
                if let Some(p) = self.execs.get_mut(exec) {
                    p.came_up(child.clone(), io);
                    // It has come up as it was killed.
                    if !killers.is_empty() {
                        let _ = p.signal("an exec on its way up", Signal::KILL);
                    }
                } else {
                    // Given up and deleted meanwhile.
                    let _ = child.signal(Signal::KILL);
                }
                let actions = self.machine.exec_done(exec, Some(pid), now);
                self.apply(actions);
                let (tx, exec) = (self.tx.clone(), exec.to_string());
                tokio::spawn(async move {
                    let status = child.wait().await;
                    let _ = tx.send(Msg::ExecReaped(exec, status));
                });
                Ok(pid)
            }
            Err(e) => {
                let actions = self.machine.exec_done(exec, None, now);
                self.apply(actions);
                self.remove_own_binary();
                Err(e)
            }
        };
        for killer in killers {
            let _ = killer.send(Ok(()));
        }
        let answer = if given_up {
            let text = format!("exec {exec} of container {}: init has exited and the exec was not up yet", self.id);
            Err(Error::precondition(text))
        } else {
            answer
        };
        let _ = reply.send(answer);
    }

    /// After an exec that has failed: the runtime may have been killed on its way, by us
    /// or with the container. While another exec is on its way the mount may be that
    /// one's, and waits for the next time or for Delete.
    fn remove_own_binary(&self) {
        let busy = self.execs.keys().any(|exec| self.machine.is_starting(exec));
        if let Some(root) = self.runtime.config().root.as_ref().filter(|_| !busy) {
            oci::remove_own_binary(root, &self.id);
        }
    }

    pub(crate) fn delete_exec(&mut self, exec: &str, reply: Reply<(i32, Certificate)>) {
        let gone = self.machine.delete_exec(exec, SystemTime::now());
        let process = if gone.is_ok() { self.execs.remove(exec) } else { None };
        match process.and_then(|p| p.io) {
            // What the process wrote last may still be on its way.
            Some(io) => {
                let last = self.execs.is_empty();
                tokio::spawn(async move {
                    io.drain(DRAIN).await;
                    let _ = reply.send(gone);
                    // After a burst of execs its memory goes back to the kernel.
                    if last {
                        sys::malloc::trim();
                    }
                });
            }
            None => {
                let _ = reply.send(gone);
            }
        }
    }

    pub(crate) fn state(&mut self, exec: Option<&str>) -> Result<Seen> {
        let (view, pid) = match exec {
            None => (self.machine.view(), self.machine.pid()),
            Some(e) => self.machine.exec_view(e)?,
        };
        let bundle = self.bundle.clone();
        let wanted = self.process(exec)?.wanted.clone();
        Ok(Seen { view, pid, bundle, wanted })
    }

    pub(crate) fn certificate(&mut self, exec: Option<&str>) -> Result<Certificate> {
        let name = exec.map_or_else(|| format!("container {}", self.id), |e| format!("exec {e}"));
        let exit: Exited = self.process(exec)?.exit.subscribe();
        let found = exit.borrow().clone();
        found.ok_or_else(|| Error::not_found(format!("{name} has not ended")))
    }

    pub(crate) fn pids(&self) -> Vec<(i32, Option<String>)> {
        let exec_of = |pid: i32| {
            self.execs
                .iter()
                .find(|(id, _)| matches!(self.machine.exec_view(id), Ok((View::Running | View::Paused, p)) if p == pid))
                .map(|(id, _)| id.clone())
        };
        self.cgroup.processes().into_iter().map(|pid| (pid, exec_of(pid))).collect()
    }

    pub(crate) fn resize(&mut self, exec: Option<&str>, width: u32, height: u32) -> Result<()> {
        let what = format!("{} of container {}", exec.unwrap_or("init"), self.id);
        match &self.process(exec)?.io {
            Some(io) => io.resize(width, height).map_err(|e| e.within(what)),
            None => Err(Error::precondition(format!("{what} is not running"))),
        }
    }

    pub(crate) fn reopen_log(&mut self, reply: Reply<()>) {
        match &self.init.io {
            Some(io) => {
                let reopening = io.reopen();
                tokio::spawn(async move {
                    let _ = reply.send(reopening.await);
                });
            }
            None => {
                let _ = reply.send(Err(Error::precondition(format!("container {} is being deleted", self.id))));
            }
        }
    }

    /// What the container waits for now, in sentences.
    pub(crate) fn waits(&self) -> Vec<String> {
        let mut all = Vec::new();
        if let Some(since) = self.dying_since {
            let held: Vec<&str> = self.machine.unfinished().collect();
            all.push(format!(
                "container {}: init has exited, its exit waits for execs [{}] since {} ms",
                self.id,
                held.join(", "),
                since.elapsed().as_millis()
            ));
        }
        for exec in self.execs.keys().filter(|e| self.machine.is_starting(e)) {
            all.push(format!("container {}: the OCI runtime is starting exec {exec}", self.id));
        }
        if !self.deleting.is_empty() {
            all.push(format!("container {}: it is being deleted", self.id));
        }
        all
    }
}

/// One exec on its way up. It stands on its own: the owner goes on meanwhile.
struct Job {
    shared: Arc<Shared>,
    runtime: Arc<Command>,
    container: String,
    bundle: PathBuf,
    habits: Habits,
    /// Becomes true when the exec is killed before it is up.
    aborted: watch::Receiver<bool>,
    new: NewExec,
}

impl Job {
    async fn run(self) -> Result<(Child, Io)> {
        let document = self.bundle.join(format!("exec-{}.json", self.new.id));
        let result = self.launch(&document).await;
        let _ = std::fs::remove_file(&document);
        result
    }

    async fn launch(&self, document: &Path) -> Result<(Child, Io)> {
        write_new(document, &self.new.spec)?;
        let place = self.shared.place(&self.new.id);
        let mut aborted = self.aborted.clone();
        let ready = async {
            let prepared = streams::prepare(&self.new.wanted, self.habits, &place).await?;
            // Only now: a logging binary that is slow to come up must hold up no other.
            Ok((prepared, self.shared.turn().await?))
        };
        let (mut prepared, _turn) = tokio::select! {
            ready = ready => ready?,
            Ok(_) = aborted.wait_for(|a| *a) => {
                return Err(Error::new(ErrorKind::Cancelled, "it was killed before the OCI runtime was called"));
            }
        };
        let launch = Launch {
            stdio: std::mem::take(&mut prepared.stdio),
            console_socket: prepared.console.as_ref().map(|c| c.path.clone()),
            pid_file: self.bundle.join(format!("exec-{}.pid", self.new.id)),
        };
        let runtime = self.runtime.until(self.aborted.clone(), |_| {});
        let child = runtime.exec(&self.container, document, launch).await?;
        match prepared.attach(place.writer).await {
            Ok(io) => Ok((child, io)),
            Err(e) => {
                let _ = child.signal(Signal::KILL);
                // It may hang; the sweeper has it then.
                let _ = tokio::time::timeout(oci::DEATHS, child.wait()).await;
                Err(e)
            }
        }
    }
}

/// The document may hold secrets in its environment.
fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut f| f.write_all(bytes))
        .context(|| format!("write {}", path.display()))
}
