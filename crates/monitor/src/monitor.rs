//! The process's life, from the runtime's call to its end.
//!
//! ```text
//! Calling ── the runtime has ended, its pid file names the process ──► Running
//!    └── it has not: told on the sync pipe ──► Failed                     │
//!                                        reaped by its pidfd ──► Ended ◄──┘
//! ```
//!
//! No child is reaped before the runtime's call has ended: until then any of them
//! may be the process (conmon#545). All signals go by pidfd, so never to a stranger
//! who has taken over a number.

use crate::attach::Attach;
use crate::console::Console;
use crate::control::{Control, Order};
use crate::exit::ExitFile;
use crate::log::Logs;
use crate::notify::Notify;
use crate::oom::OomWatch;
use crate::poll::{Flags, Poll, Token, never_block};
use crate::runtime_call::{Given, forget_pid_file, launch, read_pid_file};
use crate::say;
use crate::settings::{Api, Settings};
use crate::streams::{CHUNK, Got, Pipes, Source, Stdin};
use crate::sync_pipe::SyncPipe;
use oci::{Call, Children, Claim};
use std::collections::BTreeMap;
use std::os::fd::{OwnedFd, RawFd};
use std::time::{Duration, Instant};
use stdio::Stream;
use sys::pidfd::{PidFd, Waited};
use sys::signals::SignalFd;
use types::{ExitStatus, Result, ResultExt, Signal};

/// How long a process that was killed may take to end.
const DEATH: Duration = Duration::from_secs(2);
/// How long the runtime may take to start an exec, beside the exec's own time.
const STARTS: Duration = Duration::from_secs(240);
/// The most of a runtime's own words that the caller is told.
const WORDS: usize = 8191;

/// What the caller has handed over beside the flags.
pub struct Origin {
    /// Descriptors that are kept for the process, or kept busy until its end.
    pub inherited: BTreeMap<RawFd, OwnedFd>,
    /// The start pipe, where the exec waits for a second word.
    pub start: Option<OwnedFd>,
    /// Told when clients can attach.
    pub attach: Option<OwnedFd>,
    /// What the process's oom_score_adj is to be.
    pub oom_score: Option<String>,
}

/// Where the process is in its life.
enum Phase {
    Calling { runtime: PidFd, claim: Claim, call: Call },
    Running { process: PidFd, _claim: Claim },
    Ended(ExitStatus),
    Failed(String),
}

/// How it came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The process has ended.
    Ended(ExitStatus),
    /// It was killed, having run too long.
    TimedOut,
    /// It never began; the reason.
    Failed(String),
}

/// One process and all that belongs to it.
pub struct Monitor {
    pub(crate) settings: Settings,
    pub(crate) poll: Poll,
    pub(crate) signals: SignalFd,
    pub(crate) children: Children,
    pub(crate) logs: Logs,
    pub(crate) attach: Option<Attach>,
    pub(crate) control: Option<Control>,
    pub(crate) notify: Option<Notify>,
    console: Option<Console>,
    stdin: Stdin,
    pub(crate) sources: Vec<Source>,
    pub(crate) oom: Option<OomWatch>,
    pub(crate) exit_files: Vec<ExitFile>,
    pub(crate) inherited: BTreeMap<RawFd, OwnedFd>,
    pub(crate) oom_score: Option<String>,
    /// The terminal's size, which may be told before the terminal comes.
    size: Option<(u16, u16)>,
    phase: Phase,
    deadline: Option<Instant>,
    timed_out: bool,
}

impl Monitor {
    /// Makes what clients and the manager use, and starts the runtime's call.
    ///
    /// # Errors
    /// Where something can't be made; nothing has been started then.
    pub fn start(settings: Settings, logs: Logs, origin: Origin) -> Result<Self> {
        let poll = Poll::new()?;
        sys::signals::keep_children();
        let wanted = [Signal::CHLD, Signal::USR1, Signal::TERM, Signal::INT, Signal::QUIT];
        let signals = SignalFd::block(&wanted).context(|| "take signals".into())?;
        poll.watch(&signals, Token::Signals, Flags::IN)?;
        let bundle = settings.mode.bundle();
        let notify = match (&settings.notify, bundle) {
            (Some(host), Some(bundle)) => Some(Notify::make(bundle, host, &poll)?),
            _ => None,
        };
        let console = if settings.terminal { Some(Console::make(&poll)?) } else { None };
        let pipes = if settings.logs.passthrough { Pipes::default() } else { Pipes::make(&settings)? };
        let (mut attach, mut control) = (None, None);
        if let Some(bundle) = bundle.filter(|_| !settings.logs.passthrough) {
            let ends_stdin = settings.stdin && !settings.leave_stdin_open;
            attach = Some(Attach::make(&settings.sockets, settings.uuid.as_deref(), bundle, ends_stdin, &poll)?);
            control = Some(Control::make(bundle, &poll)?);
        }
        if settings.mode.waits_for_client() {
            SyncPipe::new(origin.attach, settings.api, true).send(0, None);
        }
        let mut exit_files = Vec::new();
        exit_files.extend(settings.persist_dir.as_deref().map(|d| ExitFile::reserve(d, "exit")));
        exit_files.extend(settings.exit_dir.as_deref().map(|d| ExitFile::reserve(d, &settings.id)));
        let children = Children::new();
        forget_pid_file(&settings.pid_file);
        let call = children.begin_call();
        let given = Given {
            streams: (!settings.logs.passthrough).then_some(pipes.theirs),
            console: console.as_ref().map(|c| c.path().to_path_buf()),
            start: origin.start,
            oom_score: origin.oom_score.clone(),
        };
        let down = hand_down(&settings).then_some(&origin.inherited);
        let runtime = launch(&settings, given, down.into_iter().flat_map(|all| all.values()))?;
        poll.watch(&runtime, Token::Runtime, Flags::IN)?;
        let claim = children.claim(runtime.pid());
        let stdin = match pipes.stdin {
            Some(fd) => Stdin::open(fd),
            None if settings.terminal => Stdin::Awaited,
            None => Stdin::None,
        };
        Ok(Self {
            // Its own time counts from when it runs (behaviours.md section 1).
            deadline: settings.timeout.filter(|_| settings.mode.is_exec()).map(|t| Instant::now() + STARTS + t),
            settings,
            poll,
            signals,
            children,
            logs,
            attach,
            control,
            notify,
            console,
            stdin,
            sources: pipes.sources,
            oom: None,
            exit_files,
            inherited: origin.inherited,
            oom_score: origin.oom_score,
            size: None,
            phase: Phase::Calling { runtime, claim, call },
            timed_out: false,
        })
    }

    /// Stays until the process has ended and all that follows is done; returns the
    /// code to exit with.
    pub fn serve(mut self, mut caller: SyncPipe) -> i32 {
        sys::malloc::trim();
        let outcome = loop {
            match &self.phase {
                Phase::Ended(_) if self.timed_out => break Outcome::TimedOut,
                Phase::Ended(status) => break Outcome::Ended(*status),
                Phase::Failed(reason) => break Outcome::Failed(reason.clone()),
                Phase::Calling { .. } | Phase::Running { .. } => {}
            }
            if let Err(e) = self.turn(&mut caller) {
                // Without an epoll there is nothing left that could be done well.
                say::error(format_args!("{e}"));
                break Outcome::Failed(e.to_string());
            }
        };
        self.finish(&outcome, &mut caller)
    }

    fn turn(&mut self, caller: &mut SyncPipe) -> Result<()> {
        for (token, flags) in self.poll.wait(self.wake_at())? {
            self.event(token, flags, caller);
        }
        if !self.stalled()
            && let Some(i) = self.sources.iter().position(|s| s.ready)
        {
            self.pump(i);
        }
        self.feed();
        let now = Instant::now();
        if self.oom.as_ref().and_then(OomWatch::due).is_some_and(|due| due <= now)
            && let Some(oom) = &mut self.oom
        {
            oom.look();
        }
        // One that has ended just in time is not late because we are.
        let goes_on = matches!(self.phase, Phase::Calling { .. } | Phase::Running { .. });
        if goes_on && self.deadline.is_some_and(|d| d <= now) {
            self.time_out();
        }
        self.balance();
        Ok(())
    }

    /// When to go on if nothing happens.
    fn wake_at(&self) -> Option<Instant> {
        let busy = !self.stalled() && self.sources.iter().any(|s| s.ready);
        if busy || self.attach.as_ref().is_some_and(|a| a.again) {
            return Some(Instant::now());
        }
        let (oom, door) = (self.oom.as_ref().and_then(OomWatch::due), self.attach.as_ref().and_then(Attach::due));
        [self.deadline, oom, door].into_iter().flatten().min()
    }

    fn event(&mut self, token: Token, flags: Flags, caller: &mut SyncPipe) {
        match token {
            Token::Signals => self.take_signals(),
            Token::Runtime => self.look_at_runtime(caller),
            Token::Process => self.look_at_process(),
            Token::Stdout => self.readable(Stream::Stdout),
            Token::Stderr => self.readable(Stream::Stderr),
            Token::Listener => {
                if let Some(attach) = &mut self.attach {
                    attach.accept(&self.poll);
                }
            }
            Token::Control => {
                let orders = self.control.as_mut().map(Control::read_ctl).unwrap_or_default();
                self.obey(orders);
            }
            Token::Winsz => {
                let orders = self.control.as_mut().map(Control::read_winsz).unwrap_or_default();
                self.obey(orders);
            }
            Token::Console => self.take_terminal(),
            Token::Notify => {
                if let Some(notify) = &mut self.notify {
                    notify.receive(&self.poll);
                }
            }
            Token::NotifyOut => {
                if let Some(notify) = &mut self.notify {
                    notify.go_on(&self.poll);
                }
            }
            Token::Oom => {
                if self.oom.as_mut().is_some_and(|oom| !oom.spoken()) {
                    self.oom = None;
                }
            }
            Token::LogFile | Token::Journal => self.logs.go_on(),
            Token::Client(id) => {
                if let Some(attach) = &mut self.attach {
                    attach.event(id, flags);
                }
            }
            // Input that waited is fed in any turn.
            Token::Stdin => {}
        }
    }

    fn take_signals(&mut self) {
        while let Some(signal) = self.signals.next() {
            // The original takes SIGUSR1 for a call to look after its children.
            if signal == Signal::CHLD || signal == Signal::USR1 {
                if let Err(e) = self.children.sweep() {
                    say::warn(format_args!("{e}"));
                }
                continue;
            }
            // Whoever ends us wants to end the process; we report how it took it.
            let target = match &self.phase {
                Phase::Calling { runtime, .. } => runtime,
                Phase::Running { process, .. } => process,
                Phase::Ended(_) | Phase::Failed(_) => continue,
            };
            if let Err(e) = target.signal(signal) {
                say::warn(format_args!("pass {signal} on to process {}: {e}", target.pid()));
            }
        }
    }

    fn look_at_runtime(&mut self, caller: &mut SyncPipe) {
        let Phase::Calling { runtime, .. } = &self.phase else { return };
        let status = match runtime.try_wait() {
            Ok(Waited::Running) => return,
            Ok(Waited::Ended(status)) => status,
            Ok(Waited::NotOurs) | Err(_) => ExitStatus::Unknown(255),
        };
        self.poll.forget(runtime);
        // A terminal that came with the last breath is in the socket.
        self.take_terminal();
        let placeholder = Phase::Failed(String::new());
        let Phase::Calling { claim, call, .. } = std::mem::replace(&mut self.phase, placeholder) else { return };
        drop(claim);
        self.phase = match self.adopt(status) {
            Ok((process, claim)) => {
                self.begin(&process, caller);
                Phase::Running { process, _claim: claim }
            }
            // It was killed by us: the process has not begun, or is killed too.
            Err(_) if self.timed_out => Phase::Ended(ExitStatus::Signal(9)),
            Err(reason) => Phase::Failed(reason),
        };
        // Only now may anything be reaped that nobody knows.
        drop(call);
        if let Err(e) = self.children.sweep() {
            say::warn(format_args!("{e}"));
        }
    }

    /// Takes over the process that the runtime has left, or says why there is none.
    fn adopt(&mut self, status: ExitStatus) -> std::result::Result<(PidFd, Claim), String> {
        let verb = if self.settings.mode.is_exec() { "exec" } else { "create" };
        let found = read_pid_file(&self.settings.pid_file).and_then(|pid| {
            let process = PidFd::open(pid).context(|| format!("open process {pid}"))?;
            Ok((process, self.children.claim(pid)))
        });
        let ours = |p: &PidFd| !matches!(p.peek(), Ok(Waited::NotOurs) | Err(_));
        let reason = match found {
            // Some runtimes exit with the exec's own status.
            Ok((process, claim))
                if status == ExitStatus::Code(0) || (self.settings.mode.is_exec() && ours(&process)) =>
            {
                if !self.settings.terminal || self.sources.iter().any(Source::is_terminal) {
                    return Ok((process, claim));
                }
                let _ = process.signal(Signal::KILL);
                "Runtime did not set up terminal".to_string()
            }
            Ok((process, _)) => {
                if ours(&process) {
                    let _ = process.signal(Signal::KILL);
                }
                format!("runtime {verb} failed: {}", told(status))
            }
            Err(_) if status != ExitStatus::Code(0) => format!("runtime {verb} failed: {}", told(status)),
            Err(e) => e.to_string(),
        };
        let words = self.runtime_s_words();
        Err(if words.is_empty() { reason } else { words })
    }

    /// What it has written to standard error.
    fn runtime_s_words(&self) -> String {
        let mut bytes = vec![0u8; WORDS];
        let mut length = 0;
        if let Some(stderr) = self.sources.iter().find(|s| s.stream == Stream::Stderr) {
            while let Got::Bytes(n) = stderr.read(&mut bytes[length..]) {
                length += n;
                if length == WORDS {
                    break;
                }
            }
        }
        String::from_utf8_lossy(&bytes[..length]).trim_end().to_string()
    }

    /// The process is there: everybody is told, and its streams are carried.
    fn begin(&mut self, process: &PidFd, caller: &mut SyncPipe) {
        let exec = self.settings.mode.is_exec();
        if let Err(e) = self.poll.watch(process, Token::Process, Flags::IN) {
            say::error(format_args!("process {}: {e}", process.pid()));
        }
        if !exec || self.settings.api == Api::Current {
            caller.send(process.pid(), None);
        }
        let directories: Vec<_> =
            [self.settings.persist_dir.as_deref(), self.settings.mode.bundle()].into_iter().flatten().collect();
        let directories = directories.into_iter().map(Into::into).collect();
        self.oom = OomWatch::begin(process.pid(), !exec, directories, &self.poll);
        if self.timed_out {
            kill(process);
        } else {
            self.deadline = self.settings.timeout.map(|t| Instant::now() + t);
        }
    }

    fn look_at_process(&mut self) {
        let Phase::Running { process, .. } = &self.phase else { return };
        match process.try_wait() {
            Ok(Waited::Running) => {}
            Ok(Waited::Ended(status)) => self.phase = Phase::Ended(status),
            // Some other has it as a child; that it has ended is all that is known.
            Ok(Waited::NotOurs) | Err(_) => self.phase = Phase::Ended(ExitStatus::Unknown(255)),
        }
    }

    fn time_out(&mut self) {
        if self.timed_out {
            say::warn(format_args!("what was killed has not ended within {DEATH:?}"));
            self.phase = Phase::Ended(ExitStatus::Signal(9));
            self.deadline = None;
            return;
        }
        say::info(format_args!("timed out"));
        self.timed_out = true;
        self.deadline = Some(Instant::now() + DEATH);
        match &self.phase {
            Phase::Calling { runtime, .. } => drop(runtime.signal(Signal::KILL)),
            Phase::Running { process, .. } => kill(process),
            Phase::Ended(_) | Phase::Failed(_) => {}
        }
    }

    fn take_terminal(&mut self) {
        let Some(console) = &mut self.console else { return };
        let master = match console.receive(&self.poll) {
            Ok(Some(master)) => master,
            Ok(None) => return,
            Err(e) => {
                say::warn(format_args!("{e}"));
                self.console = None;
                return;
            }
        };
        self.console = None;
        let ready = never_block(&master).and_then(|()| master.try_clone().context(|| "share the terminal".into()));
        match ready {
            Ok(input) => {
                self.stdin = Stdin::open(input);
                self.sources.push(Source::new(Stream::Stdout, master, true));
                self.resize();
            }
            Err(e) => say::error(format_args!("the terminal can't be used: {e}")),
        }
    }

    fn obey(&mut self, orders: Vec<Order>) {
        for order in orders {
            match order {
                Order::Reopen => self.logs.reopen(),
                Order::Resize { height, width } => {
                    self.size = Some((height, width));
                    self.resize();
                }
            }
        }
    }

    fn resize(&self) {
        let terminal = self.sources.iter().find(|s| s.is_terminal());
        if let (Some((height, width)), Some(terminal)) = (self.size, terminal)
            && let Err(e) = sys::pty::resize(terminal.fd(), width, height)
        {
            say::warn(format_args!("Failed to set process pty terminal size: {e}"));
        }
    }

    fn readable(&mut self, stream: Stream) {
        let Some(i) = self.sources.iter().position(|s| s.stream == stream) else { return };
        if self.sources[i].is_terminal() {
            self.sources[i].ready = true;
        } else if !self.stalled() {
            self.pump(i);
        }
    }

    /// Reads once from a source and passes it on.
    pub(crate) fn pump(&mut self, i: usize) -> Got {
        let mut buffer = [0u8; CHUNK];
        let source = &mut self.sources[i];
        let stream = source.stream;
        let got = source.read(&mut buffer);
        match got {
            Got::Bytes(n) => {
                self.logs.write(stream, &buffer[..n]);
                if let Some(attach) = &mut self.attach {
                    attach.send(stream, &buffer[..n]);
                }
            }
            Got::Nothing => source.ready = false,
            Got::End => drop(self.sources.remove(i)),
        }
        got
    }

    fn feed(&mut self) {
        if let Some(attach) = &mut self.attach {
            attach.feed(&mut self.stdin, &self.poll);
        }
    }

    fn stalled(&self) -> bool {
        self.logs.stalled() || self.attach.as_ref().is_some_and(Attach::stalled)
    }

    /// Listens to the process only while what it says can be passed on.
    fn balance(&mut self) {
        let on = matches!(self.phase, Phase::Running { .. }) && !self.stalled();
        for source in &mut self.sources {
            source.listen(&self.poll, on);
        }
        self.logs.watch(&self.poll);
    }
}

/// Descriptors go on to the runtime only where somebody has asked for that: none of
/// ours, and none left open by mistake, reaches the container (CVE-2024-21626).
fn hand_down(s: &Settings) -> bool {
    let preserves = |o: &std::ffi::OsString| o.to_string_lossy().starts_with("--preserve-fds");
    std::env::var_os("LISTEN_FDS").is_some() || s.runtime_opts.iter().any(preserves)
}

fn told(status: ExitStatus) -> String {
    match status {
        ExitStatus::Signal(n) => format!("it was killed by signal {n}"),
        other => format!("exit status {}", other.code()),
    }
}

/// Kills the process with its group, but never ours, nor everybody's.
fn kill(process: &PidFd) {
    use rustix::process::{Pid, getpgid, getpgrp, kill_process_group};
    // It is not reaped, so its number is its own, and its group's is.
    let group = Pid::from_raw(process.pid()).and_then(|pid| getpgid(Some(pid)).ok());
    if let Some(group) = group.filter(|g| g.as_raw_nonzero().get() > 1 && *g != getpgrp())
        && let Err(e) = kill_process_group(group, rustix::process::Signal::KILL)
    {
        say::warn(format_args!("kill the process group {}: {e}", group.as_raw_nonzero()));
    }
    if let Err(e) = process.signal(Signal::KILL)
        && e.raw_os_error() != Some(rustix::io::Errno::SRCH.raw_os_error())
    {
        say::warn(format_args!("kill process {}: {e}", process.pid()));
    }
}
