//! What follows the process's end, in order. Nothing here stops at a failure: the
//! exit command is what makes the manager see an end at all.
//!
//! ```text
//! OOM   what the pipes hold   exit files   sync pipe   attach socket closed
//! log synced   exit command started   clients get the rest   exit command awaited
//! ```
//!
//! The exit is known before anybody is waited for: neither a client that does not
//! read nor a slow disk delays it.

use crate::exit::start_exit_command;
use crate::log::Logs;
use crate::monitor::{Monitor, Outcome};
use crate::poll::Token;
use crate::say;
use crate::streams::Got;
use crate::sync_pipe::SyncPipe;
use rustix::process::{Pid, WaitOptions, waitpid};
use std::time::{Duration, Instant};
use types::{ExitStatus, Signal};

/// conmon's words, which its callers look for.
const TIMED_OUT: &str = "command timed out";
/// The most that is read of a terminal after the end.
const TERMINAL: usize = 1 << 20;
/// How long a client that takes nothing keeps us, while it holds what is left of the
/// output: somebody may be reading a pager.
const PATIENCE: Duration = Duration::from_secs(600);

impl Monitor {
    /// Does all of it; returns the code to exit with.
    pub(crate) fn finish(mut self, outcome: &Outcome, caller: &mut SyncPipe) -> i32 {
        let code = match outcome {
            Outcome::Failed(reason) => {
                say::error(format_args!("{reason}"));
                caller.send(-1, Some(reason));
                1
            }
            Outcome::TimedOut => {
                self.report(ExitStatus::Signal(9), -1, Some(TIMED_OUT), caller);
                -1
            }
            Outcome::Ended(status) => {
                self.report(*status, status.code(), None, caller);
                status.code()
            }
        };
        // The caller waits for the end of the pipe.
        *caller = SyncPipe::new(None, self.settings.api, true);
        (self.control, self.notify, self.oom) = (None, None, None);
        self.sources.clear();
        self.inherited.clear();
        if let Some(attach) = &mut self.attach {
            attach.close_door();
        }
        if self.settings.sync_log {
            self.logs.sync();
        }
        let (command, score) = (self.settings.exit_command.clone(), self.oom_score.clone());
        let started = command.map(|c| {
            start_exit_command(&c, score.as_deref(), || {
                self.attach = None;
                self.logs = Logs::default();
            })
        });
        self.linger();
        // The exit command may still have to wait for its time: nobody else does.
        (self.attach, self.logs) = (None, Logs::default());
        match started {
            None => code,
            Some(Ok(pid)) => wait_for(pid).filter(|c| *c != 0).unwrap_or(code),
            Some(Err(e)) => {
                say::error(format_args!("{e}"));
                1
            }
        }
    }

    fn report(&mut self, status: ExitStatus, code: i32, message: Option<&str>, caller: &mut SyncPipe) {
        if code != 0 {
            say::info(format_args!("container {} exited with status {code}", self.settings.id));
        }
        if let Some(oom) = &mut self.oom {
            oom.last_look(status == ExitStatus::Signal(9));
        }
        self.drain();
        self.logs.finish();
        // Ports that these kept busy are free once the end is known.
        self.inherited.clear();
        for file in &mut self.exit_files {
            if let Err(e) = file.write(code) {
                say::error(format_args!("{e}"));
            }
        }
        if self.settings.mode.is_exec() {
            caller.send(code, message);
        }
    }

    /// Takes what the process has left in its pipes: no more than was there, for who
    /// has inherited them may write on without end.
    fn drain(&mut self) {
        for i in (0..self.sources.len()).rev() {
            let mut left = if self.sources[i].is_terminal() {
                TERMINAL
            } else {
                usize::try_from(self.sources[i].waiting()).unwrap_or(usize::MAX)
            };
            while left > 0 {
                match self.pump(i) {
                    Got::Bytes(n) => left = left.saturating_sub(n),
                    Got::Nothing | Got::End => break,
                }
            }
        }
    }

    /// Stays for clients, and for a log, that have not taken everything yet.
    fn linger(&mut self) {
        let behind = |m: &Self| m.attach.as_ref().map_or(0, |a| a.behind());
        let mut last = behind(self);
        let mut until = Instant::now() + PATIENCE;
        while (behind(self) > 0 || self.logs.stalled()) && Instant::now() < until {
            self.logs.watch(&self.poll);
            let Ok(events) = self.poll.wait(Some(until)) else { return };
            for (token, flags) in events {
                match token {
                    Token::Client(id) => {
                        if let Some(attach) = &mut self.attach {
                            attach.event(id, flags);
                            attach.close_door();
                        }
                    }
                    Token::LogFile | Token::Journal => self.logs.go_on(),
                    Token::Signals => {
                        while let Some(signal) = self.signals.next() {
                            if signal != Signal::CHLD {
                                return;
                            }
                        }
                    }
                    _ => {}
                }
            }
            if behind(self) < last {
                last = behind(self);
                until = Instant::now() + PATIENCE;
            }
        }
    }
}

/// Waits for the exit command and for whatever else is still a child of ours.
fn wait_for(pid: i32) -> Option<i32> {
    let (_, status) = waitpid(Pid::from_raw(pid), WaitOptions::empty()).ok()??;
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|s| 128 + s));
    while let Ok(Some(_)) = waitpid(None, WaitOptions::NOHANG) {}
    code
}
