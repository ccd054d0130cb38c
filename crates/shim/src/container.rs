//! A container's owner: the one task that holds its state.
//!
//! ```text
//! RPC handler --Msg--> owner --spawn--> runtime call --Msg--> owner
//!                        ^---- reaped, OOM, bound ----'
//! ```
//!
//! It never awaits anything but its next message, so nothing holds up State or
//! Kill. What may be done is decided by `state.rs`; the owner carries it out.

use crate::events::Event;
use crate::exit::Last;
use crate::persist::TaskRecord;
use crate::restore::Restoring;
use crate::shared::Shared;
use crate::state::{Action, Machine, View};
use crate::streams::{Habits, Io, Wanted};
use crate::{log, oom, wire};
use oci::cgroup::Cgroup;
use oci::{Child, Command, Runtime, Status};
use proto::containerd::events as ev;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{mpsc, oneshot, watch};
use types::{Certificate, Error, Result, Signal};

/// How long init's exit waits for what remains of its container.
const BOUND: Duration = Duration::from_secs(10);
/// After what time the processes that are left are killed once more.
const KILL_AGAIN: Duration = Duration::from_millis(100);
/// How long Delete waits for the last bytes of a process that has ended.
pub(crate) const DRAIN: Duration = Duration::from_millis(500);

pub(crate) type Handle = mpsc::UnboundedSender<Msg>;
pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;
/// What a waiter watches: the certificate appears once the exit is published.
pub(crate) type Exited = watch::Receiver<Option<Certificate>>;

/// An exec as it was asked for.
pub(crate) struct NewExec {
    pub id: String,
    pub wanted: Wanted,
    pub spec: Vec<u8>,
    pub labelled: bool,
}

/// What State answers.
pub(crate) struct Seen {
    pub view: View,
    pub pid: i32,
    pub bundle: PathBuf,
    pub wanted: Wanted,
}

/// Requests, and the answers to what the owner has set in motion. An absent or
/// empty exec is init.
pub(crate) enum Msg {
    Start(Option<String>, Reply<i32>),
    Exec(NewExec, Reply<()>),
    Delete(Option<String>, Reply<(i32, Certificate)>),
    Kill {
        exec: Option<String>,
        signal: Signal,
        all: bool,
        reply: Reply<()>,
    },
    State(Option<String>, Reply<Seen>),
    Wait(Option<String>, Reply<Exited>),
    Pids(Reply<Vec<(i32, Option<String>)>>),
    Resize {
        exec: Option<String>,
        width: u32,
        height: u32,
        reply: Reply<()>,
    },
    CloseStdin(Option<String>, Reply<()>),
    Update(Vec<u8>, Reply<()>),
    Pause(bool, Reply<()>),
    Checkpoint(oci::Checkpoint, Reply<()>),
    Stats(Reply<prost_types::Any>),
    ReopenLog(Reply<()>),
    Certificate(Option<String>, Reply<Certificate>),
    Waits(Reply<Vec<String>>),

    InitStarted(Result<()>, Reply<i32>),
    Restored(Result<(Child, Io)>, Reply<i32>),
    ExecStarted(String, Result<(Child, Io)>, Reply<i32>),
    /// Init has ended; `Reaped` comes with the same once its log is complete.
    Ended(Status, Last),
    Reaped(Status, Last),
    ExecReaped(String, Status),
    Bound,
    KillAgain,
    PauseDone(bool, Result<()>, Option<Reply<()>>),
    Deleted(Result<()>),
    OomKill(u64),
}

/// A process of the container.
pub(crate) struct Process {
    pub wanted: Wanted,
    pub io: Option<Io>,
    /// Its input was closed before it had any.
    stdin_closed: bool,
    pub child: Option<Arc<Child>>,
    pub exit: watch::Sender<Option<Certificate>>,
    /// The last signal that was sent through us.
    pub killed_by: Option<Signal>,
    /// An exec's OCI document until it is started.
    pub spec: Option<NewExec>,
    /// An exec's way up, or that of an init that is being restored.
    pub starting: Option<Starting>,
}

/// How to end a start early, and who waits for that.
pub(crate) struct Starting {
    pub abort: watch::Sender<bool>,
    pub killers: Vec<Reply<()>>,
}

impl Starting {
    /// The killer is answered when the start has ended.
    pub fn end(&mut self, killer: Reply<()>) {
        self.abort.send_replace(true);
        self.killers.push(killer);
    }
}

impl Process {
    pub fn launched(wanted: Wanted, io: Io, child: Child) -> Self {
        Self { io: Some(io), child: Some(Arc::new(child)), ..Self::planned(wanted) }
    }

    pub fn planned(wanted: Wanted) -> Self {
        let exit = watch::channel(None).0;
        Self { wanted, io: None, stdin_closed: false, child: None, exit, killed_by: None, spec: None, starting: None }
    }

    /// It is there now, with its streams.
    pub fn came_up(&mut self, child: Arc<Child>, mut io: Io) {
        if self.stdin_closed {
            io.close_stdin();
        }
        (self.child, self.io) = (Some(child), Some(io));
    }

    fn close_stdin(&mut self) {
        self.stdin_closed = true;
        if let Some(io) = &mut self.io {
            io.close_stdin();
        }
    }

    pub(crate) fn signal(&mut self, what: &str, signal: Signal) -> Result<()> {
        let gone = || Error::not_found(format!("{what}: process already finished"));
        let child = self.child.as_ref().ok_or_else(gone)?;
        if child.has_ended() {
            return Err(gone());
        }
        child.signal(signal).map_err(|e| e.within(what))?;
        self.killed_by = Some(signal);
        Ok(())
    }
}

/// The owner's state.
pub(crate) struct Owner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) machine: Machine,
    pub(crate) init: Process,
    pub(crate) execs: HashMap<String, Process>,
    pub(crate) runtime: Arc<Command>,
    pub(crate) cgroup: Cgroup,
    pub(crate) habits: Habits,
    pub(crate) record: TaskRecord,
    pub(crate) tx: Handle,
    pub(crate) dying_since: Option<Instant>,
    /// Init's death certificate, as it has been written.
    pub(crate) certified: Option<Certificate>,
    /// How many strikes of the OOM killer have been published.
    pub(crate) oom_told: u64,
    /// What the watch on the OOM killer has seen.
    pub(crate) oom_seen: watch::Sender<oom::Seen>,
    /// What Start needs of a container that comes from a checkpoint.
    pub(crate) restoring: Option<Restoring>,
    /// Who waits for the container to be deleted: whoever asks while it is joins in, for
    /// the first one may have died.
    pub(crate) deleting: Vec<Reply<(i32, Certificate)>>,
}

impl Owner {
    /// Starts the owner of a container that the runtime has just created, or that
    /// Start will restore.
    #[expect(clippy::too_many_arguments, reason = "each is a different thing that only Create knows")]
    pub fn spawn(
        shared: Arc<Shared>,
        id: &str,
        bundle: PathBuf,
        init: Process,
        runtime: Arc<Command>,
        cgroup: Cgroup,
        habits: Habits,
        private_pids: bool,
        record: TaskRecord,
        restoring: Option<Restoring>,
    ) {
        let (tx, rx) = mpsc::unbounded_channel();
        let pid = init.child.as_ref().map_or(0, |c| c.pid());
        let owner = Self {
            shared: shared.clone(),
            id: id.into(),
            bundle,
            machine: Machine::new(id, pid, private_pids),
            init,
            execs: HashMap::new(),
            runtime,
            cgroup,
            habits,
            record,
            tx: tx.clone(),
            dying_since: None,
            certified: None,
            oom_told: 0,
            oom_seen: watch::channel(oom::Seen::default()).0,
            restoring,
            deleting: Vec::new(),
        };
        owner.watch_init();
        owner.watch_oom();
        shared.fill(id, tx);
        tokio::spawn(owner.run(rx));
    }

    pub(crate) fn watch_oom(&self) {
        if self.init.child.is_none() {
            return;
        }
        match oom::Watch::new(&self.cgroup) {
            Ok(mut watch) => {
                let (tx, told) = (self.tx.clone(), self.oom_seen.clone());
                tokio::spawn(async move {
                    loop {
                        tokio::select! {
                            struck = watch.next() => {
                                let Some(kills) = struck else { break };
                                told.send_modify(|seen| seen.kills = kills);
                                if tx.send(Msg::OomKill(kills)).is_err() {
                                    return;
                                }
                            }
                            () = tx.closed() => return,
                        }
                    }
                    told.send_modify(|seen| seen.gone = true);
                });
            }
            Err(e) => log::warn(format_args!("container {}: no word of the OOM killer: {e}", self.id)),
        }
    }

    async fn run(mut self, mut rx: mpsc::UnboundedReceiver<Msg>) {
        while let Some(msg) = rx.recv().await {
            if let Msg::Deleted(result) = msg {
                if self.deleted(result) {
                    return;
                }
                continue;
            }
            self.handle(msg);
        }
    }

    fn handle(&mut self, msg: Msg) {
        match msg {
            Msg::Start(None, reply) => self.start_init(reply),
            Msg::Start(Some(exec), reply) => self.start_exec(exec, reply),
            Msg::Exec(new, reply) => {
                let _ = reply.send(self.add_exec(new));
            }
            Msg::Delete(None, reply) => self.delete_init(reply),
            Msg::Delete(Some(exec), reply) => self.delete_exec(&exec, reply),
            Msg::Kill { exec: Some(exec), signal: Signal::KILL, reply, .. } if self.machine.is_starting(&exec) => {
                self.end_start(&exec, reply);
            }
            Msg::Kill { exec: None, signal, reply, .. } if self.init.child.is_none() => {
                self.kill_unrestored(signal, reply);
            }
            Msg::Kill { exec, signal, all, reply } => {
                let _ = reply.send(self.kill(exec.as_deref(), signal, all));
            }
            Msg::State(exec, reply) => {
                let _ = reply.send(self.state(exec.as_deref()));
            }
            Msg::Wait(exec, reply) => {
                let _ = reply.send(self.process(exec.as_deref()).map(|p| p.exit.subscribe()));
            }
            Msg::Pids(reply) => {
                let _ = reply.send(Ok(self.pids()));
            }
            Msg::Resize { exec, width, height, reply } => {
                let _ = reply.send(self.resize(exec.as_deref(), width, height));
            }
            Msg::CloseStdin(exec, reply) => {
                let _ = reply.send(self.process(exec.as_deref()).map(Process::close_stdin));
            }
            Msg::Update(resources, reply) => self.update(resources, reply),
            Msg::Pause(on, reply) => self.pause(on, Some(reply)),
            Msg::Checkpoint(wanted, reply) => self.checkpoint(wanted, reply),
            Msg::Stats(reply) => {
                let _ = reply.send(Ok(crate::stats::stats(&self.cgroup)));
            }
            Msg::ReopenLog(reply) => self.reopen_log(reply),
            Msg::Certificate(exec, reply) => {
                let _ = reply.send(self.certificate(exec.as_deref()));
            }
            Msg::Waits(reply) => {
                let _ = reply.send(Ok(self.waits()));
            }
            Msg::InitStarted(result, reply) => self.init_started(result, reply),
            Msg::Restored(result, reply) => self.restored(result, reply),
            Msg::ExecStarted(exec, result, reply) => self.exec_started(&exec, result, reply),
            Msg::Ended(status, last) => drop(self.certify(status, last)),
            Msg::Reaped(status, last) => self.init_reaped(status, last),
            Msg::ExecReaped(exec, status) => self.exec_reaped(&exec, status),
            Msg::Bound => {
                let actions = self.machine.bound_passed(SystemTime::now());
                self.apply(actions);
            }
            Msg::KillAgain => self.kill_remaining(),
            Msg::PauseDone(on, result, reply) => self.pause_done(on, result, reply),
            Msg::OomKill(kills) => self.tell_oom(kills),
            // Handled by `run`, which it ends.
            Msg::Deleted(_) => {}
        }
    }

    pub(crate) fn process(&mut self, exec: Option<&str>) -> Result<&mut Process> {
        match exec {
            None => Ok(&mut self.init),
            Some(e) => {
                let id = &self.id;
                self.execs.get_mut(e).ok_or_else(|| Error::not_found(format!("exec {e} of container {id}")))
            }
        }
    }

    fn start_init(&mut self, reply: Reply<i32>) {
        if let Err(e) = self.machine.begin_start() {
            let _ = reply.send(Err(e));
            return;
        }
        if let Some(restoring) = self.restoring.take() {
            self.restore(restoring, reply);
            return;
        }
        let (runtime, id, tx, shared) = (self.runtime.clone(), self.id.clone(), self.tx.clone(), self.shared.clone());
        tokio::spawn(async move {
            let result = match shared.turn().await {
                Ok(_turn) => runtime.start(&id).await,
                Err(e) => Err(e),
            };
            let _ = tx.send(Msg::InitStarted(result, reply));
        });
    }

    pub(crate) fn init_started(&mut self, result: Result<()>, reply: Reply<i32>) {
        let actions = self.machine.start_done(result.is_ok());
        self.apply(actions);
        let _ = reply.send(result.map(|()| self.machine.pid()));
    }

    /// Carries out what a transition entails, in its order.
    pub(crate) fn apply(&mut self, actions: Vec<Action>) {
        let events = self.shared.events.clone();
        let container_id = self.id.clone();
        for action in actions {
            match action {
                Action::Start => {
                    let pid = wire::pid(self.machine.pid());
                    events.publish(&Event::Start(ev::TaskStart { container_id: container_id.clone(), pid }));
                }
                Action::Exit(exit) => {
                    self.dying_since = None;
                    let event = self.exit_event(&container_id, self.machine.pid(), &exit);
                    events.publish(&event);
                    self.init.exit.send_replace(Some(exit));
                    if !self.deleting.is_empty() {
                        self.delete_now();
                    }
                }
                Action::ExecAdded(exec_id) => {
                    let container_id = container_id.clone();
                    events.publish(&Event::ExecAdded(ev::TaskExecAdded { container_id, exec_id }));
                }
                Action::ExecStarted(exec_id, pid) => {
                    let (container_id, pid) = (container_id.clone(), wire::pid(pid));
                    events.publish(&Event::ExecStarted(ev::TaskExecStarted { container_id, exec_id, pid }));
                }
                Action::ExecExit(exec, pid, exit) => {
                    events.publish(&self.exit_event(&exec, pid, &exit));
                    if let Some(p) = self.execs.get_mut(&exec) {
                        p.exit.send_replace(Some(exit));
                    }
                }
                Action::ExecFailed(exec, exit) => {
                    if let Some(p) = self.execs.get_mut(&exec) {
                        // Nobody waits for its start any longer: the bound has passed.
                        if let Some(starting) = &p.starting {
                            starting.abort.send_replace(true);
                        }
                        p.exit.send_replace(Some(exit));
                    }
                }
                Action::KillRemaining => self.kill_remaining(),
                // What remained may have been nothing.
                Action::ArmBound if !self.machine.is_dying() => {}
                Action::ArmBound => {
                    self.dying_since = Some(Instant::now());
                    self.later(BOUND, Msg::Bound);
                }
                Action::KillLate(exec) => {
                    if let Some(child) = self.execs.get(&exec).and_then(|p| p.child.as_ref()) {
                        let _ = child.signal(Signal::KILL);
                    }
                }
            }
        }
    }

    fn exit_event(&self, process: &str, pid: i32, exit: &Certificate) -> Event {
        Event::Exit(ev::TaskExit {
            container_id: self.id.clone(),
            id: process.to_string(),
            pid: wire::pid(pid),
            exit_status: wire::exit_status(exit.status),
            exited_at: Some(wire::timestamp(exit.exited_at)),
        })
    }

    pub(crate) fn later(&self, after: Duration, msg: Msg) {
        let tx = self.tx.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let _ = tx.send(msg);
        });
    }

    /// Kills what is left of a container whose init has gone; again and again
    /// while anything is, for a process may be forking at this moment. Init's exit is
    /// told once they have ended: killed is not yet gone, and whoever hears of the exit
    /// takes the container for empty.
    fn kill_remaining(&mut self) {
        let left = self.cgroup.kill_once();
        if !self.machine.is_dying() {
            return;
        }
        if left == 0 {
            let actions = self.machine.remaining_gone();
            self.apply(actions);
            return;
        }
        if let Some(since) = self.dying_since
            && since.elapsed() > Duration::from_secs(1)
        {
            log::warn(format_args!("container {}: {left} processes are left after SIGKILL", self.id));
        }
        let (tx, left) = (self.tx.clone(), self.cgroup.processes());
        tokio::spawn(async move {
            let _ = tokio::time::timeout(KILL_AGAIN, oci::ended(left)).await;
            let _ = tx.send(Msg::KillAgain);
        });
    }

    /// Publishes TaskOOM once per strike, whoever has noticed it first.
    pub(crate) fn tell_oom(&mut self, kills: u64) {
        if kills > self.oom_told {
            self.oom_told = kills;
            self.shared.events.publish(&Event::Oom(ev::TaskOom { container_id: self.id.clone() }));
        }
    }
}
