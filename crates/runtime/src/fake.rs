//! A runtime in memory, for the tests of what stands above the seam.
//!
//! It keeps the contract of [`Runtime`]: calls go on to their end when their
//! caller drops them, ends come as events, deletions are idempotent. What a real
//! runtime does by itself the test does: it ends tasks ([`FakeRuntime::exit`]),
//! kills shims, and scripts delays and failures per call ([`FakeRuntime::next`]).

use crate::api::{
    ExecOutput, ExecSyncSpec, PodProcess, PodSpec, RecoverPod, RecoveredPod, Runtime, RuntimeEvent, TaskSpec,
    TaskState, now,
};
use async_trait::async_trait;
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;
use types::{Certificate, Error, ErrorKind, ExitStatus, Result, Signal};

/// The calls that can be scripted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is the method of its name")]
pub enum Call {
    StartPod,
    StopPod,
    CreateTask,
    StartTask,
    KillTask,
    DeleteTask,
    TaskState,
    PauseTask,
    ResumeTask,
    UpdateTask,
    ResizeTask,
    CloseStdin,
    ReopenLog,
    ExecSync,
    Recover,
}

/// What the next call of a kind does before, or instead of, its work.
#[derive(Debug, Clone)]
pub enum Script {
    /// Takes this long.
    Delay(Duration),
    /// Waits until the test notifies.
    Gate(Arc<Notify>),
    /// Is done at once, and answers when the test notifies.
    LateAnswer(Arc<Notify>),
    /// Fails with this kind and text, and changes nothing.
    Fail(ErrorKind, String),
}

type Answer = dyn Fn(&str, &str, &ExecSyncSpec) -> Result<ExecOutput> + Send + Sync;

#[derive(Default)]
struct State {
    pods: BTreeMap<String, Pod>,
    scripts: HashMap<Call, VecDeque<Script>>,
    calls: Vec<(Call, String)>,
    deaf: HashSet<String>,
    next_pid: u32,
    exec: Option<Arc<Answer>>,
}

struct Pod {
    pid: Option<u32>,
    tasks: BTreeMap<String, TaskState>,
}

#[derive(Clone)]
struct Shared {
    state: Arc<Mutex<State>>,
    events: UnboundedSender<RuntimeEvent>,
}

/// The fake.
pub struct FakeRuntime {
    shared: Shared,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is scripted before the call's work; what its answer then waits for.
    async fn script(&self, call: Call, object: &str) -> Result<Option<Arc<Notify>>> {
        let next = {
            let mut s = self.lock();
            s.calls.push((call, object.to_string()));
            s.scripts.get_mut(&call).and_then(VecDeque::pop_front)
        };
        match next {
            None => Ok(None),
            Some(Script::Delay(d)) => {
                tokio::time::sleep(d).await;
                Ok(None)
            }
            Some(Script::Gate(gate)) => {
                gate.notified().await;
                Ok(None)
            }
            Some(Script::LateAnswer(gate)) => Ok(Some(gate)),
            Some(Script::Fail(kind, text)) => Err(Error::new(kind, text)),
        }
    }

    fn end(&self, pod: &str, id: &str, certificate: Certificate) {
        let mut s = self.lock();
        let Some(task) = s.pods.get_mut(pod).and_then(|p| p.tasks.get_mut(id)) else { return };
        if !matches!(task, TaskState::Stopped(_)) {
            *task = TaskState::Stopped(certificate.clone());
            let (pod, container) = (pod.to_string(), id.to_string());
            let _ = self.events.send(RuntimeEvent::Exited { pod, container, certificate });
        }
    }

    fn change(&self, pod: &str, id: &str, change: impl FnOnce(&mut TaskState) -> Result<()>) -> Result<()> {
        match self.lock().pods.get_mut(pod).and_then(|p| p.tasks.get_mut(id)) {
            Some(task) => change(task),
            None => Err(unknown(id)),
        }
    }
}

fn unknown(id: &str) -> Error {
    Error::not_found(format!("container {id} has no task"))
}

fn refused(id: &str, state: &TaskState, call: &str) -> Error {
    Error::precondition(format!("{call} container {id}: it is {state:?}"))
}

fn certificate(status: ExitStatus, killed_by: Option<&str>) -> Certificate {
    Certificate {
        status,
        exited_at: now(),
        oom_killed: false,
        oom_cgroup: None,
        killed_by: killed_by.map(str::to_string),
        peak_memory: None,
    }
}

impl FakeRuntime {
    /// A runtime without pods that tells its events to `events`.
    pub fn new(events: UnboundedSender<RuntimeEvent>) -> Arc<Self> {
        let state = State { next_pid: 1000, ..State::default() };
        Arc::new(Self { shared: Shared { state: Arc::new(Mutex::new(state)), events } })
    }

    /// Scripts the next call of this kind that is not scripted yet.
    pub fn next(&self, call: Call, script: Script) {
        self.shared.lock().scripts.entry(call).or_default().push_back(script);
    }

    /// Ends a task, as if its init had exited.
    pub fn exit(&self, pod: &str, id: &str, status: ExitStatus) {
        self.shared.end(pod, id, certificate(status, None));
    }

    /// Ends a task with this certificate.
    pub fn exit_with(&self, pod: &str, id: &str, certificate: Certificate) {
        self.shared.end(pod, id, certificate);
    }

    /// Makes a task ignore every signal but SIGKILL.
    pub fn ignore_signals(&self, id: &str) {
        self.shared.lock().deaf.insert(id.to_string());
    }

    /// Kills a pod's shim: its tasks end with 137, then the shim is gone.
    pub fn kill_shim(&self, pod: &str) {
        let ids: Vec<String> = {
            let mut s = self.shared.lock();
            let Some(p) = s.pods.get_mut(pod) else { return };
            if p.pid.take().is_none() {
                return;
            }
            p.tasks.keys().cloned().collect()
        };
        for id in ids {
            self.shared.end(pod, &id, certificate(ExitStatus::Signal(9), Some("the death of the pod's shim")));
        }
        let _ = self.shared.events.send(RuntimeEvent::ShimGone { pod: pod.to_string() });
    }

    /// Answers every ExecSync from now on; the arguments are pod, container, spec.
    /// Without it the answer is empty and the code 0.
    pub fn answer_execs(
        &self,
        answer: impl Fn(&str, &str, &ExecSyncSpec) -> Result<ExecOutput> + Send + Sync + 'static,
    ) {
        self.shared.lock().exec = Some(Arc::new(answer));
    }

    /// All calls so far, each with the pod or container that it was about.
    pub fn calls(&self) -> Vec<(Call, String)> {
        self.shared.lock().calls.clone()
    }

    /// The pods that have a shim or tasks.
    pub fn pods(&self) -> Vec<String> {
        self.shared.lock().pods.keys().cloned().collect()
    }

    /// A pod's tasks and their states.
    pub fn tasks(&self, pod: &str) -> Vec<(String, TaskState)> {
        let s = self.shared.lock();
        s.pods.get(pod).map(|p| p.tasks.iter().map(|(k, v)| (k.clone(), v.clone())).collect()).unwrap_or_default()
    }

    async fn detached<T: Send + 'static>(
        &self,
        call: Call,
        object: &str,
        work: impl FnOnce(&Shared) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (shared, object) = (self.shared.clone(), object.to_string());
        let run = tokio::spawn(async move {
            let late = shared.script(call, &object).await?;
            let done = work(&shared);
            if let Some(gate) = late {
                gate.notified().await;
            }
            done
        });
        run.await.unwrap_or_else(|e| Err(Error::internal("the fake ended early").because(e)))
    }
}

fn ensure(s: &mut State, pod: &str) -> PodProcess {
    s.next_pid += 1;
    let fresh = s.next_pid;
    let entry = s.pods.entry(pod.to_string()).or_insert(Pod { pid: None, tasks: BTreeMap::new() });
    PodProcess::Shim { pid: *entry.pid.get_or_insert(fresh), own: true }
}

#[async_trait]
impl Runtime for FakeRuntime {
    async fn start_pod(&self, pod: &PodSpec) -> Result<PodProcess> {
        let id = pod.id.clone();
        self.detached(Call::StartPod, &pod.id, move |s| Ok(ensure(&mut s.lock(), &id))).await
    }

    async fn stop_pod(&self, pod: &str) -> Result<()> {
        let id = pod.to_string();
        self.detached(Call::StopPod, pod, move |s| {
            let tasks: Vec<String> =
                s.lock().pods.get(&id).map(|p| p.tasks.keys().cloned().collect()).unwrap_or_default();
            for task in tasks {
                s.end(&id, &task, certificate(ExitStatus::Signal(9), None));
            }
            s.lock().pods.remove(&id);
            Ok(())
        })
        .await
    }

    async fn create_task(&self, pod: &PodSpec, task: &TaskSpec) -> Result<u32> {
        let (pod, id) = (pod.id.clone(), task.id.clone());
        self.detached(Call::CreateTask, &task.id, move |s| {
            let mut s = s.lock();
            ensure(&mut s, &pod);
            s.next_pid += 1;
            let pid = s.next_pid;
            let Some(p) = s.pods.get_mut(&pod) else { return Err(unknown(&id)) };
            if p.tasks.contains_key(&id) {
                return Err(Error::exists(format!("container {id} has a task already")));
            }
            p.tasks.insert(id, TaskState::Created);
            Ok(pid)
        })
        .await
    }

    async fn start_task(&self, pod: &str, id: &str) -> Result<()> {
        let (pod, task) = (pod.to_string(), id.to_string());
        self.detached(Call::StartTask, id, move |s| {
            let pid = {
                let mut s = s.lock();
                s.next_pid += 1;
                s.next_pid
            };
            s.change(&pod, &task, |t| match t {
                TaskState::Created => {
                    *t = TaskState::Running { pid };
                    Ok(())
                }
                other => Err(refused(&task, other, "start")),
            })
        })
        .await
    }

    async fn kill_task(&self, pod: &str, id: &str, signal: Signal, _all: bool, why: &str) -> Result<()> {
        let (pod, task, why) = (pod.to_string(), id.to_string(), why.to_string());
        self.detached(Call::KillTask, id, move |s| {
            if signal == Signal::KILL || !s.lock().deaf.contains(&task) {
                s.end(&pod, &task, certificate(ExitStatus::Signal(signal.number()), Some(&why)));
            }
            Ok(())
        })
        .await
    }

    async fn condemn_task(&self, _pod: &str, _id: &str) -> Result<()> {
        Ok(())
    }

    async fn delete_task(&self, pod: &str, id: &str) -> Result<()> {
        let (pod, task) = (pod.to_string(), id.to_string());
        self.detached(Call::DeleteTask, id, move |s| {
            let mut s = s.lock();
            let Some(p) = s.pods.get_mut(&pod) else { return Ok(()) };
            match p.tasks.get(&task) {
                Some(state @ (TaskState::Running { .. } | TaskState::Paused { .. })) => {
                    Err(refused(&task, state, "delete"))
                }
                _ => {
                    p.tasks.remove(&task);
                    Ok(())
                }
            }
        })
        .await
    }

    async fn task_state(&self, pod: &str, id: &str) -> Result<TaskState> {
        let (pod, task) = (pod.to_string(), id.to_string());
        self.detached(Call::TaskState, id, move |s| {
            s.lock().pods.get(&pod).and_then(|p| p.tasks.get(&task).cloned()).ok_or_else(|| unknown(&task))
        })
        .await
    }

    async fn pause_task(&self, pod: &str, id: &str) -> Result<()> {
        let (pod, task) = (pod.to_string(), id.to_string());
        self.detached(Call::PauseTask, id, move |s| {
            s.change(&pod, &task, |t| match *t {
                TaskState::Running { pid } => {
                    *t = TaskState::Paused { pid };
                    Ok(())
                }
                _ => Err(refused(&task, t, "pause")),
            })
        })
        .await
    }

    async fn resume_task(&self, pod: &str, id: &str) -> Result<()> {
        let (pod, task) = (pod.to_string(), id.to_string());
        self.detached(Call::ResumeTask, id, move |s| {
            s.change(&pod, &task, |t| match *t {
                TaskState::Paused { pid } => {
                    *t = TaskState::Running { pid };
                    Ok(())
                }
                _ => Err(refused(&task, t, "resume")),
            })
        })
        .await
    }

    async fn update_task(&self, pod: &str, id: &str, _resources_json: &str) -> Result<()> {
        let (pod, task) = (pod.to_string(), id.to_string());
        self.detached(Call::UpdateTask, id, move |s| s.change(&pod, &task, |_| Ok(()))).await
    }

    async fn resize_task(&self, pod: &str, id: &str, _width: u32, _height: u32) -> Result<()> {
        let (pod, task) = (pod.to_string(), id.to_string());
        self.detached(Call::ResizeTask, id, move |s| s.change(&pod, &task, |_| Ok(()))).await
    }

    async fn close_stdin(&self, pod: &str, id: &str) -> Result<()> {
        let (pod, task) = (pod.to_string(), id.to_string());
        self.detached(Call::CloseStdin, id, move |s| s.change(&pod, &task, |_| Ok(()))).await
    }

    async fn reopen_log(&self, pod: &str, id: &str) -> Result<()> {
        let (pod, task) = (pod.to_string(), id.to_string());
        self.detached(Call::ReopenLog, id, move |s| s.change(&pod, &task, |_| Ok(()))).await
    }

    async fn exec_sync(&self, pod: &str, id: &str, exec: ExecSyncSpec) -> Result<ExecOutput> {
        let (pod, task) = (pod.to_string(), id.to_string());
        self.detached(Call::ExecSync, id, move |s| {
            s.change(&pod, &task, |t| match t {
                TaskState::Running { .. } => Ok(()),
                other => Err(refused(&task, other, "exec in")),
            })?;
            let answer = s.lock().exec.clone();
            match answer {
                Some(answer) => answer(&pod, &task, &exec),
                None => Ok(ExecOutput { stdout: Bytes::new(), stderr: Bytes::new(), status: ExitStatus::Code(0) }),
            }
        })
        .await
    }

    fn owns(&self, pod: &str) -> bool {
        self.shared.lock().pods.contains_key(pod)
    }

    /// What is asked and still stands here is found; pods that nobody asks for go.
    async fn recover(&self, pods: Vec<RecoverPod>) -> Vec<Result<RecoveredPod>> {
        if let Err(e) = self.shared.script(Call::Recover, "").await {
            return pods.iter().map(|_| Err(e.copy())).collect();
        }
        let mut s = self.shared.lock();
        let asked: HashSet<&str> = pods.iter().map(|p| p.spec.id.as_str()).collect();
        s.pods.retain(|id, _| asked.contains(id.as_str()));
        let find = |p: &RecoverPod| {
            let found = s.pods.get(&p.spec.id);
            let state = |c: &String| (c.clone(), found.and_then(|f| f.tasks.get(c).cloned()));
            Ok(RecoveredPod {
                id: p.spec.id.clone(),
                process: found.and_then(|f| f.pid).map(|pid| PodProcess::Shim { pid, own: true }),
                containers: p.containers.iter().map(state).collect(),
            })
        };
        pods.iter().map(find).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> PodSpec {
        PodSpec { id: "p".into(), handler: String::new(), annotations: BTreeMap::new(), bundle_gid: None }
    }

    fn task() -> TaskSpec {
        let io = crate::TaskIo { log_path: None, log_limit: 0, terminal: false, stdin: None };
        TaskSpec { id: "c".into(), config_json: "{}".into(), rootfs: vec![], io }
    }

    #[tokio::test]
    async fn a_dropped_call_goes_on_and_ends_are_told_once() {
        let (tx, mut rx) = tokio::sync::mpsc::unbounded_channel();
        let fake = FakeRuntime::new(tx);
        let gate = Arc::new(Notify::new());
        fake.next(Call::CreateTask, Script::Gate(gate.clone()));
        let create = tokio::time::timeout(Duration::from_millis(10), fake.create_task(&pod(), &task())).await;
        assert!(create.is_err());
        assert!(fake.tasks("p").is_empty());
        gate.notify_one();
        while fake.tasks("p").is_empty() {
            tokio::task::yield_now().await;
        }
        fake.start_task("p", "c").await.unwrap();
        fake.next(Call::KillTask, Script::Fail(ErrorKind::Unavailable, "no".into()));
        assert!(fake.kill_task("p", "c", Signal::TERM, false, "test").await.is_err());
        fake.kill_task("p", "c", Signal::TERM, false, "test").await.unwrap();
        fake.exit("p", "c", ExitStatus::Code(0));
        let Some(RuntimeEvent::Exited { certificate, .. }) = rx.recv().await else { panic!("no exit") };
        assert_eq!((certificate.status, certificate.killed_by.as_deref()), (ExitStatus::Signal(15), Some("test")));
        assert!(rx.try_recv().is_err());
        fake.delete_task("p", "c").await.unwrap();
        fake.delete_task("p", "c").await.unwrap();
        fake.stop_pod("p").await.unwrap();
        assert!(fake.pods().is_empty());
    }
}
