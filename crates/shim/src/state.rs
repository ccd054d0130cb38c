//! What a container and its execs may do, and what follows: pure.
//!
//! ```text
//! init   Created -> Starting -> Running -> Dying -> Exited
//!            \__________\__________________/
//! exec   Added -> Starting -> Running -> Exited
//!                     \-> Failed
//! ```
//!
//! `Dying` is init's exit, reaped and held back (behaviours.md section 5): for
//! everybody but Start of an exec init still runs. It ends when no exec is
//! starting or running and no process is left, or when the bound has passed.

use std::collections::BTreeMap;
use types::{Certificate, Error, ExitStatus, Result};

/// Init.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Init {
    Created,
    Starting,
    Running,
    /// Reaped; `starting` while the answer to Start is still awaited, `remaining`
    /// while processes of the container may be left.
    Dying {
        exit: Certificate,
        starting: bool,
        remaining: bool,
    },
    Exited {
        exit: Certificate,
    },
}

/// An exec.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Exec {
    Added,
    Starting,
    Running {
        pid: i32,
    },
    Exited {
        pid: i32,
        exit: Certificate,
    },
    /// It never ran, or nobody waits for its start any longer.
    Failed {
        at: std::time::SystemTime,
    },
}

/// What others see of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum View {
    /// Made, not started.
    Created,
    /// Started.
    Running,
    /// Frozen.
    Paused,
    /// Ended, and its exit has been published.
    Stopped(Certificate),
}

/// What has to be done as a consequence, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Publish TaskStart.
    Start,
    /// Publish TaskExit of init, and tell those who wait.
    Exit(Certificate),
    /// Publish TaskExecAdded.
    ExecAdded(String),
    /// Publish TaskExecStarted.
    ExecStarted(String, i32),
    /// Publish TaskExit of an exec, and tell those who wait.
    ExecExit(String, i32, Certificate),
    /// Tell those who wait for an exec that it never ran; no event.
    ExecFailed(String, Certificate),
    /// Kill every process that is left in the container.
    KillRemaining,
    /// Call `bound_passed` after the bound.
    ArmBound,
    /// Kill this process, which came up after its container had been given up.
    KillLate(String),
}

/// One container.
#[derive(Debug, Clone)]
pub struct Machine {
    id: String,
    pid: i32,
    init: Init,
    paused: bool,
    private_pids: bool,
    execs: BTreeMap<String, Exec>,
}

fn unkillable(at: std::time::SystemTime) -> Certificate {
    plain(ExitStatus::Signal(9), at)
}

/// A certificate that knows no more than status and time.
pub fn plain(status: ExitStatus, at: std::time::SystemTime) -> Certificate {
    Certificate { status, exited_at: at, oom_killed: false, oom_cgroup: None, killed_by: None, peak_memory: None }
}

impl Machine {
    /// A container that has just been created. `private_pids`: its pid namespace
    /// is its own, so that the kernel ends everything with init.
    pub fn new(id: &str, pid: i32, private_pids: bool) -> Self {
        Self { id: id.into(), pid, init: Init::Created, paused: false, private_pids, execs: BTreeMap::new() }
    }

    /// Init's pid.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Init has its pid only now: it was restored.
    pub fn set_pid(&mut self, pid: i32) {
        self.pid = pid;
    }

    /// What is seen of init.
    pub fn view(&self) -> View {
        match &self.init {
            Init::Created => View::Created,
            Init::Exited { exit } => View::Stopped(exit.clone()),
            Init::Starting | Init::Running | Init::Dying { .. } if self.paused => View::Paused,
            Init::Starting | Init::Running | Init::Dying { .. } => View::Running,
        }
    }

    /// What is seen of an exec, with its pid (0 before it has one).
    ///
    /// # Errors
    /// `NotFound`.
    pub fn exec_view(&self, exec: &str) -> Result<(View, i32)> {
        Ok(match self.exec(exec)? {
            // One that never ran was never more than created, as containerd's shim
            // has it; only those who wait hear of a status.
            Exec::Added | Exec::Starting | Exec::Failed { .. } => (View::Created, 0),
            // Frozen with its container.
            Exec::Running { pid } if self.paused => (View::Paused, *pid),
            Exec::Running { pid } => (View::Running, *pid),
            Exec::Exited { pid, exit } => (View::Stopped(exit.clone()), *pid),
        })
    }

    /// The execs for which init's exit is held back.
    pub fn unfinished(&self) -> impl Iterator<Item = &str> {
        self.execs.iter().filter(|(_, e)| matches!(e, Exec::Starting | Exec::Running { .. })).map(|(id, _)| id.as_str())
    }

    /// Whether an exec is on its way up.
    pub fn is_starting(&self, exec: &str) -> bool {
        matches!(self.execs.get(exec), Some(Exec::Starting))
    }

    /// Whether init's exit waits to be published.
    pub fn is_dying(&self) -> bool {
        matches!(self.init, Init::Dying { .. })
    }

    fn exec(&self, exec: &str) -> Result<&Exec> {
        self.execs.get(exec).ok_or_else(|| Error::not_found(format!("exec {exec} of container {}", self.id)))
    }

    fn set_exec(&mut self, exec: &str, state: Exec) {
        self.execs.insert(exec.to_string(), state);
    }

    /// Start was asked for.
    ///
    /// # Errors
    /// `FailedPrecondition` unless it was created and never started.
    pub fn begin_start(&mut self) -> Result<()> {
        let state = match &self.init {
            Init::Created => {
                self.init = Init::Starting;
                return Ok(());
            }
            Init::Starting | Init::Running => "running",
            Init::Dying { .. } | Init::Exited { .. } => "stopped",
        };
        Err(Error::precondition(format!("container {} can't be started: it is {state} already", self.id)))
    }

    /// The runtime has answered Start.
    pub fn start_done(&mut self, started: bool) -> Vec<Action> {
        let mut actions = Vec::new();
        match &mut self.init {
            Init::Starting => {
                // A failed start leaves it as it was; whoever asked deletes it.
                self.init = if started { Init::Running } else { Init::Created };
                if started {
                    actions.push(Action::Start);
                }
            }
            Init::Dying { starting, .. } => {
                *starting = false;
                if started {
                    actions.push(Action::Start);
                }
                self.settle(&mut actions);
            }
            // Its exit was published when the bound passed: too late for a start.
            Init::Created | Init::Running | Init::Exited { .. } => {}
        }
        actions
    }

    /// Init was reaped.
    pub fn init_reaped(&mut self, exit: Certificate) -> Vec<Action> {
        let mut actions = Vec::new();
        let starting = match self.init {
            Init::Created | Init::Running => false,
            Init::Starting => true,
            // Recorded once, however often it is reported.
            Init::Dying { .. } | Init::Exited { .. } => return actions,
        };
        self.init = Init::Dying { exit, starting, remaining: !self.private_pids };
        if !self.private_pids {
            actions.push(Action::KillRemaining);
        }
        self.settle(&mut actions);
        if self.is_dying() {
            actions.push(Action::ArmBound);
        }
        actions
    }

    /// Publishes init's exit once nothing holds it back any more.
    fn settle(&mut self, actions: &mut Vec<Action>) {
        if let Init::Dying { exit, starting: false, remaining: false } = &self.init
            && self.unfinished().next().is_none()
        {
            let exit = exit.clone();
            self.init = Init::Exited { exit: exit.clone() };
            actions.push(Action::Exit(exit));
        }
    }

    /// No process of the container is left.
    pub fn remaining_gone(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Init::Dying { remaining, .. } = &mut self.init {
            *remaining = false;
            self.settle(&mut actions);
        }
        actions
    }

    /// The bound on what init's exit waits for has passed.
    pub fn bound_passed(&mut self, now: std::time::SystemTime) -> Vec<Action> {
        let mut actions = Vec::new();
        let Init::Dying { starting, remaining, .. } = &mut self.init else { return actions };
        (*starting, *remaining) = (false, false);
        for (id, exec) in &mut self.execs {
            match exec {
                Exec::Running { pid } => {
                    let (pid, exit) = (*pid, unkillable(now));
                    *exec = Exec::Exited { pid, exit: exit.clone() };
                    actions.push(Action::ExecExit(id.clone(), pid, exit));
                }
                Exec::Starting => {
                    *exec = Exec::Failed { at: now };
                    actions.push(Action::ExecFailed(id.clone(), plain(ExitStatus::Unknown(255), now)));
                }
                Exec::Added | Exec::Exited { .. } | Exec::Failed { .. } => {}
            }
        }
        self.settle(&mut actions);
        actions
    }

    fn refuse_exec_without_init(&self) -> Result<()> {
        let not = match &self.init {
            Init::Running if self.paused => "is paused",
            Init::Running => return Ok(()),
            Init::Created | Init::Starting => "init process has not been started",
            Init::Dying { .. } | Init::Exited { .. } => "init process is not running",
        };
        Err(Error::precondition(format!("container {} {not}", self.id)))
    }

    /// Exec was asked for.
    ///
    /// # Errors
    /// `AlreadyExists`, or `FailedPrecondition` once init's exit has been published:
    /// until then init counts as running, and only Start is refused.
    pub fn add_exec(&mut self, exec: &str) -> Result<Vec<Action>> {
        if self.execs.contains_key(exec) {
            return Err(Error::exists(format!("exec {exec} of container {} exists already", self.id)));
        }
        if matches!(self.init, Init::Exited { .. }) {
            return Err(Error::precondition(format!("container {} init process is not running", self.id)));
        }
        self.set_exec(exec, Exec::Added);
        Ok(vec![Action::ExecAdded(exec.into())])
    }

    /// Start of an exec was asked for.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` if it was started before or init does
    /// not run.
    pub fn begin_exec(&mut self, exec: &str) -> Result<()> {
        if *self.exec(exec)? != Exec::Added {
            return Err(Error::precondition(format!("exec {exec} of container {} was started before", self.id)));
        }
        self.refuse_exec_without_init()?;
        self.set_exec(exec, Exec::Starting);
        Ok(())
    }

    /// The runtime has answered an exec's start: its pid, or `None` if it failed.
    pub fn exec_done(&mut self, exec: &str, pid: Option<i32>, now: std::time::SystemTime) -> Vec<Action> {
        let mut actions = Vec::new();
        match (self.execs.get(exec), pid) {
            (Some(Exec::Starting), Some(pid)) => {
                self.set_exec(exec, Exec::Running { pid });
                actions.push(Action::ExecStarted(exec.into(), pid));
                if self.is_dying() && !self.private_pids {
                    // It may have come up after everything else was killed.
                    actions.push(Action::KillRemaining);
                }
            }
            (Some(Exec::Starting), None) => {
                self.set_exec(exec, Exec::Failed { at: now });
                actions.push(Action::ExecFailed(exec.into(), plain(ExitStatus::Unknown(255), now)));
                self.settle(&mut actions);
            }
            (_, Some(_)) => actions.push(Action::KillLate(exec.into())),
            (_, None) => {}
        }
        actions
    }

    /// An exec was reaped.
    pub fn exec_reaped(&mut self, exec: &str, exit: Certificate) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Some(Exec::Running { pid }) = self.execs.get(exec) {
            let pid = *pid;
            self.set_exec(exec, Exec::Exited { pid, exit: exit.clone() });
            actions.push(Action::ExecExit(exec.into(), pid, exit));
            self.settle(&mut actions);
        }
        actions
    }

    /// Forgets an exec; returns its pid and exit.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while it starts or runs.
    pub fn delete_exec(&mut self, exec: &str, now: std::time::SystemTime) -> Result<(i32, Certificate)> {
        let gone = match self.exec(exec)? {
            Exec::Added => (0, plain(ExitStatus::Code(0), now)),
            Exec::Failed { at } => (0, plain(ExitStatus::Unknown(255), *at)),
            Exec::Exited { pid, exit } => (*pid, exit.clone()),
            Exec::Starting | Exec::Running { .. } => {
                return Err(Error::precondition(format!("exec {exec} of container {} is running", self.id))
                    .hint("kill it first"));
            }
        };
        self.execs.remove(exec);
        Ok(gone)
    }

    /// Whether the container may be deleted: `Ok(true)` at once, `Ok(false)`
    /// once its init, which never ran, has been killed.
    ///
    /// # Errors
    /// `FailedPrecondition` while it runs.
    pub fn may_delete(&self) -> Result<bool> {
        match &self.init {
            Init::Exited { .. } => Ok(true),
            Init::Created => Ok(false),
            Init::Starting | Init::Running | Init::Dying { .. } => {
                Err(Error::precondition(format!("container {} is running", self.id)).hint("kill it first"))
            }
        }
    }

    /// Frozen or thawed.
    pub fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Whether it may be frozen or thawed.
    ///
    /// # Errors
    /// `FailedPrecondition` unless init runs.
    pub fn may_pause(&self) -> Result<()> {
        match self.init {
            Init::Running => Ok(()),
            _ => Err(Error::precondition(format!("container {} is not running", self.id))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::SystemTime;
    use types::ErrorKind;

    fn died(code: u8) -> Certificate {
        plain(ExitStatus::Code(code), SystemTime::UNIX_EPOCH)
    }

    fn running(private: bool) -> Machine {
        let mut m = Machine::new("c", 10, private);
        m.begin_start().unwrap();
        assert_eq!(m.start_done(true), [Action::Start]);
        m
    }

    #[test]
    fn an_exit_during_start_waits_for_the_start() {
        let mut m = Machine::new("c", 10, true);
        m.begin_start().unwrap();
        assert_eq!(m.init_reaped(died(3)), [Action::ArmBound]);
        assert_eq!(m.view(), View::Running);
        assert_eq!(m.start_done(true), [Action::Start, Action::Exit(died(3))]);
        assert_eq!(m.view(), View::Stopped(died(3)));
    }

    #[test]
    fn a_failed_start_of_a_dead_init_is_an_exit_without_start() {
        let mut m = Machine::new("c", 10, true);
        m.begin_start().unwrap();
        m.init_reaped(died(1));
        assert_eq!(m.start_done(false), [Action::Exit(died(1))]);
    }

    #[test]
    fn init_s_exit_is_the_last_and_only_new_execs_are_refused_meanwhile() {
        let mut m = running(false);
        let now = SystemTime::UNIX_EPOCH;
        for e in ["a", "b", "late"] {
            m.add_exec(e).unwrap();
        }
        m.begin_exec("a").unwrap();
        m.begin_exec("b").unwrap();
        m.exec_done("a", Some(11), now);
        assert_eq!(m.init_reaped(died(0)), [Action::KillRemaining, Action::ArmBound]);
        assert_eq!(m.view(), View::Running);
        assert_eq!(m.add_exec("later").unwrap(), [Action::ExecAdded("later".into())], "init counts as running");
        let e = m.begin_exec("late").unwrap_err();
        assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
        assert!(e.to_string().contains("container c init process is not running"), "{e}");
        assert!(m.delete_exec("late", now).is_ok());
        assert_eq!(m.exec_view("b").unwrap(), (View::Created, 0));
        assert_eq!(m.exec_done("b", None, now).len(), 1, "a failed start counts as gone, but a still runs");
        assert_eq!(m.exec_view("b").unwrap(), (View::Created, 0), "it never ran");
        assert_eq!(m.exec_reaped("a", died(137)), [Action::ExecExit("a".into(), 11, died(137))]);
        assert_eq!(m.view(), View::Running, "something is left");
        assert_eq!(m.remaining_gone(), [Action::Exit(died(0))]);
        assert!(m.remaining_gone().is_empty());
    }

    #[test]
    fn what_can_t_be_killed_is_reported_after_the_bound() {
        let mut m = running(false);
        let now = SystemTime::UNIX_EPOCH;
        for e in ["a", "b"] {
            m.add_exec(e).unwrap();
            m.begin_exec(e).unwrap();
        }
        m.exec_done("a", Some(11), now);
        m.init_reaped(died(0));
        let actions = m.bound_passed(now);
        assert_eq!(actions.last(), Some(&Action::Exit(died(0))));
        assert_eq!(actions.len(), 3);
        assert!(m.exec_reaped("a", died(1)).is_empty(), "recorded once");
        assert_eq!(m.exec_done("b", Some(12), now), [Action::KillLate("b".into())]);
        assert_eq!(m.exec_view("a").unwrap().0, View::Stopped(unkillable(now)));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Start,
        StartDone(bool),
        Reap(u8),
        Add(u8),
        Begin(u8),
        Done(u8, bool),
        ReapExec(u8, u8),
        DeleteExec(u8),
        Bound,
        Gone,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let exec = 0u8..4;
        proptest::collection::vec(
            prop_oneof![
                2 => Just(Step::Start),
                2 => any::<bool>().prop_map(Step::StartDone),
                1 => any::<u8>().prop_map(Step::Reap),
                3 => exec.clone().prop_map(Step::Add),
                3 => exec.clone().prop_map(Step::Begin),
                3 => (exec.clone(), any::<bool>()).prop_map(|(e, ok)| Step::Done(e, ok)),
                3 => (exec.clone(), any::<u8>()).prop_map(|(e, c)| Step::ReapExec(e, c)),
                2 => exec.prop_map(Step::DeleteExec),
                1 => Just(Step::Bound),
                2 => Just(Step::Gone),
            ],
            0..80,
        )
    }

    proptest! {
        /// The invariants of behaviours.md section 5, whatever the order.
        #[test]
        fn exits_are_ordered_and_counted_once(script in steps(), private in any::<bool>()) {
            let now = SystemTime::UNIX_EPOCH;
            let mut m = Machine::new("c", 10, private);
            let (mut started, mut exited, mut reaped, mut start_open) = (false, None, false, false);
            // Per generation of an exec: ids are used again after a delete.
            let mut live: BTreeMap<String, (bool, bool)> = BTreeMap::new();
            let mut pid = 100;
            for step in script {
                let before = m.unfinished().count();
                let actions = match step {
                    Step::Start => { if m.begin_start().is_ok() { prop_assert!(!reaped); start_open = true; } vec![] }
                    Step::StartDone(ok) if start_open => { start_open = false; m.start_done(ok) }
                    Step::StartDone(_) => vec![],
                    Step::Reap(c) => { reaped = true; m.init_reaped(died(c)) }
                    Step::Add(e) => match m.add_exec(&e.to_string()) {
                        Ok(a) => { prop_assert!(exited.is_none()); live.insert(e.to_string(), (false, false)); a }
                        Err(_) => vec![],
                    },
                    Step::Begin(e) => { if m.begin_exec(&e.to_string()).is_ok() { prop_assert!(!reaped && started); } vec![] }
                    Step::Done(e, ok) => { pid += 1; m.exec_done(&e.to_string(), ok.then_some(pid), now) }
                    Step::ReapExec(e, c) => m.exec_reaped(&e.to_string(), died(c)),
                    Step::DeleteExec(e) => {
                        if m.delete_exec(&e.to_string(), now).is_ok() { live.remove(&e.to_string()); }
                        prop_assert_eq!(m.unfinished().count(), before, "deleting never counts down");
                        vec![]
                    }
                    Step::Bound => m.bound_passed(now),
                    Step::Gone => m.remaining_gone(),
                };
                for a in actions {
                    if !matches!(a, Action::KillLate(_)) {
                        prop_assert!(exited.is_none(), "{:?} after init's exit", a);
                    }
                    match a {
                        Action::Start => { prop_assert!(!started); started = true; }
                        Action::Exit(c) => {
                            prop_assert!(reaped && m.unfinished().next().is_none());
                            exited = Some(c);
                        }
                        Action::ExecStarted(e, _) => {
                            let l = live.get_mut(&e).expect("added");
                            prop_assert!(!l.0);
                            l.0 = true;
                        }
                        Action::ExecExit(e, _, _) => {
                            let l = live.get_mut(&e).expect("added");
                            prop_assert!(l.0 && !l.1, "exit without start, or twice");
                            l.1 = true;
                        }
                        _ => {}
                    }
                }
                if let (Some(c), View::Stopped(seen)) = (&exited, m.view()) {
                    prop_assert_eq!(c, &seen, "code and time never change");
                }
                prop_assert_eq!(m.is_dying(), reaped && exited.is_none());
            }
            // Nothing is held back for ever.
            m.bound_passed(now);
            prop_assert!(!m.is_dying());
        }
    }
}
