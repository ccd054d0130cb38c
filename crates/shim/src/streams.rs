//! The standard streams of one process, from its URIs to open descriptors.
//!
//! ```text
//! FIFO            the process gets the FIFO itself; no byte passes through us
//! FIFO, labelled  process -> pipe -> splice -> FIFO
//! cri://, file:// process -> pipe -> writer thread -> file
//! another file    the same
//! binary://       process -> pipe -> logging binary
//! terminal        master <-> FIFO, writer thread or logging binary
//! ```
//!
//! A named FIFO is a file with a path and a label, an anonymous pipe is not: a
//! process under an AppArmor profile or SELinux label might be denied the one
//! where it never was the other, so there bytes take the second way.

use crate::log;
use oci::{Children, Stdio};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use stdio::logger::{Binary, Bounds, Host, Logger};
use stdio::pump::Pump;
use stdio::{Ending, Format, Log, NotOpened, Sources, Stream, Uri, Writer, fifo};
use tokio::io::Interest;
use tokio::net::UnixListener;
use tokio::task::{JoinHandle, JoinSet};
use types::{Error, Result, ResultExt};

/// The URIs of a process's streams, as the request has them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Empty, or a FIFO. Unused where the output goes to `file://` or
    /// `binary://` without a terminal: those have no input.
    pub stdin: String,
    /// Anything that [`Uri`] knows; `file://` and `binary://` decide for both.
    pub stdout: String,
    /// Anything that [`Uri`] knows but `binary://`; unused with a terminal.
    pub stderr: String,
    /// The process has a terminal.
    pub terminal: bool,
}

/// What else decides how streams are made.
#[derive(Debug, Clone, Copy, Default)]
pub struct Habits {
    /// A security module has a label or profile for the process.
    pub labelled: bool,
    /// Who is to own pipes and FIFOs (IoUid, IoGid); 0 leaves them ours.
    pub owner: (u32, u32),
}

/// Whose streams they are, and what serves them.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// What a logging binary is told as CONTAINER_ID: the container's id, for an
    /// exec the exec's, as containerd's shim does it.
    pub id: &'a str,
    /// CONTAINER_NAMESPACE.
    pub namespace: &'a str,
    /// The book in which logging binaries are entered.
    pub children: &'a Children,
    /// The file-writing thread.
    pub writer: &'a SharedWriter,
    /// A short directory closed to others.
    pub sockets: &'a Path,
}

impl Place<'_> {
    async fn start(&self, binary: &Binary) -> Result<(Logger, OwnedFd, OwnedFd)> {
        let host = Host {
            id: self.id,
            namespace: self.namespace,
            claim: &|pid| Ok(Box::new(self.children.claim(pid))),
            report: Arc::new(log::warn),
            bounds: Bounds::default(),
        };
        Logger::start(binary, &host).await
    }
}

/// How long a log file waits for the writing thread before it gets another one.
const TURN: Duration = Duration::from_secs(2);
/// How many threads it tries.
const THREADS: usize = 3;

/// The one file-writing thread, started by the first stream that needs it and
/// ended with the last. One that hangs in a file is passed over.
#[derive(Default)]
pub struct SharedWriter {
    current: Mutex<Weak<Writer>>,
    /// Of every thread that may still be flushing: whoever drops the last log has no
    /// time to wait for it.
    endings: Mutex<Vec<Ending>>,
}

impl SharedWriter {
    fn get(&self) -> Result<Arc<Writer>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(w) = current.upgrade() {
            return Ok(w);
        }
        let (writer, ending) = Writer::start_apart()?;
        let w = Arc::new(writer);
        *current = Arc::downgrade(&w);
        let mut endings = self.endings.lock().unwrap_or_else(PoisonError::into_inner);
        endings.retain(|e| !e.has_come());
        endings.push(ending);
        Ok(w)
    }

    async fn open(&self, path: PathBuf, format: Format, mut sources: Sources) -> Result<OpenLog> {
        for _ in 0..THREADS {
            let writer = self.get()?;
            match writer.open_or_give_back(path.clone(), format, sources, TURN).await {
                Ok(log) => return Ok(OpenLog { log, _writer: writer }),
                Err(NotOpened::Failed(e)) => return Err(e),
                Err(NotOpened::Busy(back)) => sources = back,
            }
            let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            if current.as_ptr() == Arc::as_ptr(&writer) {
                *current = Weak::new();
            }
        }
        Err(Error::deadline(format!("open log {}: the disks of other logs hang", path.display())))
    }

    /// Has every thread write what it has, and blocks until all have ended, at most
    /// for `bound`.
    pub fn flush(&self, bound: Duration) {
        let endings = std::mem::take(&mut *self.endings.lock().unwrap_or_else(PoisonError::into_inner));
        let deadline = Instant::now() + bound;
        endings.iter().for_each(Ending::ask);
        for ending in &endings {
            ending.wait(deadline.saturating_duration_since(Instant::now()));
        }
    }
}

/// A log, which must be dropped before its writer.
struct OpenLog {
    log: Log,
    _writer: Arc<Writer>,
}

/// The shim's side of a process's streams. Dropped, it closes them.
#[derive(Default)]
pub struct Io {
    stdin: Option<OwnedFd>,
    holds: Vec<OwnedFd>,
    pumps: JoinSet<u64>,
    /// Of each that carries output, whether its reader holds it up.
    stalled: Vec<Arc<AtomicBool>>,
    logs: Vec<OpenLog>,
    logger: Option<Logger>,
    master: Option<OwnedFd>,
}

/// How long a process's last bytes wait for a reader that does not take them.
const PATIENCE: Duration = Duration::from_secs(3);

impl Io {
    /// Copies a process's output from one descriptor to another until it ends.
    fn pump_out(&mut self, from: OwnedFd, to: OwnedFd) -> Result<()> {
        let pump = Pump::new(from, to)?;
        self.stalled.push(pump.stalled());
        self.pumps.spawn(pump.run());
        Ok(())
    }

    /// Closes our end of the process's input: once whoever else writes has
    /// closed it too, the process sees its end.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sets the terminal's size in characters; without a terminal it does nothing, as
    /// with containerd's shim.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn resize(&self, width: u32, height: u32) -> Result<()> {
        let Some(master) = &self.master else { return Ok(()) };
        let clamp = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        sys::pty::resize(master, clamp(width), clamp(height)).context(|| "resize the terminal".into())
    }

    /// Opens the log files anew.
    pub fn reopen(&self) -> impl Future<Output = Result<()>> + Send + use<> {
        let all: Vec<_> = self.logs.iter().map(|l| l.log.reopen()).collect();
        async move {
            let mut errors = Vec::new();
            for one in all {
                errors.extend(one.await.err());
            }
            Error::join("reopen the log", errors)
        }
    }

    /// Waits until the log files have all that the process wrote.
    pub fn logged(&self) -> impl Future<Output = ()> + Send + use<> {
        let all: Vec<_> = self.logs.iter().map(|l| l.log.ended()).collect();
        async move {
            for one in all {
                one.await;
            }
        }
    }

    /// Waits at most for `bound` until every copy has ended, and at most 3 s for one
    /// whose reader does not take what there is; then closes all and
    /// sees a logging binary off, which may take its own time (behaviours.md
    /// section 4).
    pub async fn drain(mut self, bound: Duration) {
        self.stdin = None;
        let bound = if self.logger.is_some() { bound.max(Bounds::default().end) } else { bound };
        let logged = self.logged();
        {
            let pumps = &mut self.pumps;
            let mut all = std::pin::pin!(async {
                logged.await;
                while pumps.join_next().await.is_some() {}
            });
            let began = tokio::time::Instant::now();
            while tokio::time::timeout(bound, &mut all).await.is_err() {
                if began.elapsed() > PATIENCE || !self.stalled.iter().any(|s| s.load(Ordering::Relaxed)) {
                    break;
                }
            }
        }
        // What still is in the pipes is read out once more. Where a disk hangs, that
        // comes when it can.
        let closed = self.logged();
        self.logs.clear();
        let _ = tokio::time::timeout(bound, closed).await;
        if let Some(logger) = self.logger.take() {
            // It sees no end of its input while a pump holds the other end.
            self.pumps.shutdown().await;
            drop(self);
            logger.close().await;
        }
    }
}

/// Streams that are open on our side, before the process exists.
pub struct Prepared {
    /// What the process inherits.
    pub stdio: Stdio,
    /// Where the runtime shall send the terminal.
    pub console: Option<Console>,
    io: Io,
    /// What is joined to the terminal once it is there.
    ends: Option<(Option<OwnedFd>, Target)>,
}

/// Where output goes.
enum Target {
    Null,
    /// A FIFO, or the pipe of a logging binary.
    Pipe(OwnedFd),
    File(PathBuf, Format),
}

/// A socket that receives one terminal.
pub struct Console {
    /// Its path, for the runtime.
    pub path: PathBuf,
    task: JoinHandle<Result<OwnedFd>>,
}

impl Drop for Console {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Console {
    /// Listens in `dir`, whose path has to be short: socket addresses are.
    fn listen(dir: &Path) -> Result<Self> {
        let path = dir.join(format!("pty-{}", &types::new_id()?[..12]));
        let listener = UnixListener::bind(&path).context(|| format!("listen on {}", path.display()))?;
        let task = tokio::spawn(async move {
            let what = || "receive the terminal".to_string();
            let (stream, _) = listener.accept().await.context(what)?;
            loop {
                stream.readable().await.context(what)?;
                match stream.try_io(Interest::READABLE, || sys::pty::receive_master(&stream)) {
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                    other => return other.context(what),
                }
            }
        });
        Ok(Self { path, task })
    }

    async fn master(mut self) -> Result<OwnedFd> {
        // The runtime has sent it before it ended.
        match tokio::time::timeout(Duration::from_secs(5), &mut self.task).await {
            Ok(Ok(master)) => master,
            Ok(Err(e)) => Err(Error::internal("receive the terminal").because(e)),
            Err(_) => Err(Error::deadline("the runtime has sent no terminal")),
        }
    }
}

fn own(fd: impl AsFd, habits: Habits) -> Result<()> {
    let id = |n: u32| (n != 0).then_some(n);
    let (uid, gid) = (id(habits.owner.0), id(habits.owner.1));
    if uid.is_none() && gid.is_none() {
        return Ok(());
    }
    rustix::fs::fchown(fd, uid.map(rustix::fs::Uid::from_raw), gid.map(rustix::fs::Gid::from_raw))
        .context(|| format!("give a stream to {}:{}", habits.owner.0, habits.owner.1))
}

/// Opens everything that a process's streams need.
///
/// # Errors
/// Naming the stream that can't be had. What was opened is closed then.
pub async fn prepare(wanted: &Wanted, habits: Habits, place: &Place<'_>) -> Result<Prepared> {
    let mut p = Prepared { stdio: Stdio::default(), console: None, io: Io::default(), ends: None };
    let out = Uri::parse(&wanted.stdout)?;
    let stdin = match Uri::parse(&wanted.stdin)? {
        _ if !wanted.terminal && matches!(out, Uri::File(_) | Uri::Binary(_)) => None,
        Uri::Null => None,
        Uri::Fifo(path) => Some(fifo::open_in(&path)?),
        Uri::Cri { .. } | Uri::File(_) | Uri::Binary(_) => {
            return Err(Error::invalid(format!("{:?} can't be a process's input: use a FIFO", wanted.stdin)));
        }
    };
    if wanted.terminal {
        let out = match &out {
            Uri::Binary(binary) => {
                let (logger, stdout, _) = place.start(binary).await?;
                p.io.logger = Some(logger);
                Target::Pipe(stdout)
            }
            _ => target(out, habits, &mut p.io)?,
        };
        let input = stdin.map(|s| {
            p.io.stdin = Some(s.hold);
            s.read
        });
        p.ends = Some((input, out));
        p.console = Some(Console::listen(place.sockets)?);
        return Ok(p);
    }
    if let Some(s) = stdin {
        own(&s.read, habits)?;
        p.io.stdin = Some(s.hold);
        p.stdio.stdin = Some(if habits.labelled {
            let (read, write) = fifo::pipe()?;
            own(&read, habits)?;
            p.io.pumps.spawn(Pump::new(s.read, write)?.run());
            read
        } else {
            s.read
        });
    }
    if let Uri::Binary(binary) = &out {
        let (logger, stdout, stderr) = place.start(binary).await?;
        p.io.logger = Some(logger);
        own(&stdout, habits)?;
        own(&stderr, habits)?;
        p.stdio.stdout = Some(stdout);
        p.stdio.stderr = Some(stderr);
        return Ok(p);
    }
    let err = if matches!(out, Uri::File(_)) { out.clone() } else { Uri::parse(&wanted.stderr)? };
    if matches!(err, Uri::Binary(_)) {
        let text = format!("{:?} can't take standard error alone: one binary takes both streams", wanted.stderr);
        return Err(Error::invalid(text).hint("give it as standard output"));
    }
    outputs(out, err, habits, place.writer, &mut p).await?;
    Ok(p)
}

/// Standard output and error of a process without a terminal.
async fn outputs(out: Uri, err: Uri, habits: Habits, writer: &SharedWriter, p: &mut Prepared) -> Result<()> {
    struct ToFile {
        path: PathBuf,
        format: Format,
        sources: Vec<(Stream, OwnedFd)>,
    }
    let mut files: Vec<ToFile> = Vec::new();
    for (uri, stream) in [(out, Stream::Stdout), (err, Stream::Stderr)] {
        let end = match target(uri, habits, &mut p.io)? {
            Target::Null => None,
            Target::Pipe(write) if habits.labelled => {
                let (read, ours) = fifo::pipe()?;
                own(&ours, habits)?;
                p.io.pump_out(read, write)?;
                Some(ours)
            }
            Target::Pipe(write) => Some(write),
            Target::File(path, format) => {
                let (read, write) = fifo::pipe()?;
                own(&write, habits)?;
                match files.iter_mut().find(|f| f.path == path) {
                    // Both streams in one file: their lines must not mingle.
                    Some(f) => f.sources.push((stream, read)),
                    None => files.push(ToFile { path, format, sources: vec![(stream, read)] }),
                }
                Some(write)
            }
        };
        match stream {
            Stream::Stdout => p.stdio.stdout = end,
            Stream::Stderr => p.stdio.stderr = end,
        }
    }
    for ToFile { path, format, sources } in files {
        p.io.logs.push(writer.open(path, format, sources).await?);
    }
    Ok(())
}

/// Whether a path that should be a FIFO's is that of a file or a device, /dev/null say:
/// that is appended to, as containerd's shim does it.
fn is_file(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|m| m.is_file() || m.file_type().is_char_device())
}

fn target(uri: Uri, habits: Habits, io: &mut Io) -> Result<Target> {
    Ok(match uri {
        Uri::Null => Target::Null,
        Uri::Fifo(path) if is_file(&path) => Target::File(path, Format::Raw),
        Uri::Fifo(path) => {
            let out = fifo::open_out(&path)?;
            own(&out.write, habits)?;
            io.holds.push(out.hold);
            Target::Pipe(out.write)
        }
        Uri::Cri { path, limit } => Target::File(path, Format::Cri(limit)),
        Uri::File(path) => Target::File(path, Format::Raw),
        Uri::Binary(b) => return Err(Error::internal(format!("{} was not started", b.path.display()))),
    })
}

impl Prepared {
    /// The process has been launched: joins its terminal, if it has one, and
    /// hands over our side.
    ///
    /// # Errors
    /// Where the terminal did not come, or its log can't be opened.
    pub async fn attach(mut self, writer: &SharedWriter) -> Result<Io> {
        let (Some(console), Some((input, output))) = (self.console.take(), self.ends.take()) else {
            return Ok(self.io);
        };
        let master = console.master().await?;
        let share = || master.try_clone().context(|| "share the terminal".into());
        if let Some(input) = input {
            self.io.pumps.spawn(Pump::new(input, share()?)?.run());
        }
        match output {
            Target::Pipe(write) => {
                self.io.pump_out(share()?, write)?;
            }
            Target::File(path, format) => self.log_terminal(writer, path, format, share()?).await?,
            // A terminal that nobody reads would stop its process.
            Target::Null => self.log_terminal(writer, "/dev/null".into(), Format::Raw, share()?).await?,
        }
        self.io.master = Some(master);
        Ok(self.io)
    }

    async fn log_terminal(&mut self, writer: &SharedWriter, path: PathBuf, format: Format, fd: OwnedFd) -> Result<()> {
        self.io.logs.push(writer.open(path, format, vec![(Stream::Stdout, fd)]).await?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;

    fn place<'a>(children: &'a Children, writer: &'a SharedWriter, sockets: &'a Path) -> Place<'a> {
        Place { id: "box", namespace: "space", children, writer, sockets }
    }

    async fn text(path: &Path) -> Vec<u8> {
        let mut sink = stdio::Capped::new(1 << 20);
        stdio::collect(fifo::open_reader(path).unwrap(), &mut sink).await.unwrap();
        sink.into_kept()
    }

    #[tokio::test]
    async fn a_labelled_process_gets_pipes_and_its_bytes_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let (out, input) = (dir.path().join("o"), dir.path().join("i"));
        fifo::make(&out).unwrap();
        fifo::make(&input).unwrap();
        let wanted =
            Wanted { stdin: input.display().to_string(), stdout: out.display().to_string(), ..Wanted::default() };
        let habits = Habits { labelled: true, ..Habits::default() };
        let (children, writer) = (Children::new(), SharedWriter::default());
        let mut p = prepare(&wanted, habits, &place(&children, &writer, dir.path())).await.unwrap();
        let process = std::mem::take(&mut p.stdio);
        let mut io = p.attach(&SharedWriter::default()).await.unwrap();
        let mut stdout = File::from(process.stdout.unwrap());
        assert!(
            std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&stdout)))
                .unwrap()
                .to_string_lossy()
                .starts_with("pipe:")
        );
        stdout.write_all(b"through a pipe").unwrap();
        drop(stdout);
        assert_eq!(text(&out).await, b"through a pipe");
        std::fs::write(&input, "in").unwrap();
        io.close_stdin();
        let mut sink = stdio::Capped::new(10);
        stdio::collect(process.stdin.unwrap(), &mut sink).await.unwrap();
        assert_eq!(sink.into_kept(), b"in");
        io.drain(Duration::from_secs(1)).await;
    }

    #[tokio::test]
    async fn only_a_fifo_can_be_input() {
        let wanted = Wanted { stdin: "file:///x".into(), ..Wanted::default() };
        let (children, writer) = (Children::new(), SharedWriter::default());
        let place = place(&children, &writer, Path::new("/tmp"));
        let e = prepare(&wanted, Habits::default(), &place).await.err().unwrap();
        assert!(e.to_string().contains("file:///x"), "{e}");
        let wanted = Wanted { stderr: "binary:///bin/true".into(), ..Wanted::default() };
        let e = prepare(&wanted, Habits::default(), &place).await.err().unwrap();
        assert!(e.to_string().contains("takes both streams"), "{e}");
    }

    #[tokio::test]
    async fn a_file_takes_both_streams_and_no_input() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/log");
        // No FIFO of that name: the input is not opened.
        let wanted =
            Wanted { stdin: "/none".into(), stdout: format!("file://{}", path.display()), ..Wanted::default() };
        let (children, writer) = (Children::new(), SharedWriter::default());
        let mut p = prepare(&wanted, Habits::default(), &place(&children, &writer, dir.path())).await.unwrap();
        let process = std::mem::take(&mut p.stdio);
        let io = p.attach(&writer).await.unwrap();
        assert!(process.stdin.is_none());
        File::from(process.stdout.unwrap()).write_all(b"out").unwrap();
        File::from(process.stderr.unwrap()).write_all(b"err").unwrap();
        io.drain(Duration::from_secs(5)).await;
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("out") && text.contains("err"), "{text}");
    }

    #[tokio::test]
    async fn a_bare_path_may_be_a_file_or_a_device() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "before\n").unwrap();
        let both = path.display().to_string();
        for (stderr, labelled) in [(both.as_str(), false), ("/dev/null", true)] {
            let wanted = Wanted { stdout: both.clone(), stderr: stderr.into(), ..Wanted::default() };
            let (children, writer) = (Children::new(), SharedWriter::default());
            let habits = Habits { labelled, ..Habits::default() };
            let mut p = prepare(&wanted, habits, &place(&children, &writer, dir.path())).await.unwrap();
            let process = std::mem::take(&mut p.stdio);
            let io = p.attach(&writer).await.unwrap();
            File::from(process.stdout.unwrap()).write_all(b"out\n").unwrap();
            File::from(process.stderr.unwrap()).write_all(b"err\n").unwrap();
            io.drain(Duration::from_secs(5)).await;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["before", "err", "out", "out"]);
        // A folder can't be written to; what isn't there is not made.
        for bad in [dir.path().to_path_buf(), dir.path().join("none")] {
            let wanted = Wanted { stdout: bad.display().to_string(), ..Wanted::default() };
            let (children, writer) = (Children::new(), SharedWriter::default());
            let place = place(&children, &writer, dir.path());
            let e = prepare(&wanted, Habits::default(), &place).await.err().unwrap();
            assert!(e.to_string().contains(bad.to_str().unwrap()), "{e}");
        }
        assert!(!dir.path().join("none").exists());
    }

    #[tokio::test]
    async fn a_logging_binary_takes_both_streams_and_no_sweeper_takes_its_exit() {
        let dir = tempfile::tempdir().unwrap();
        let script = format!("cat <&3 >{0}/o; cat <&4 >{0}/e", dir.path().display()).replace('&', "%26");
        let stdout = format!("binary:///bin/sh?-c=exec 5>%26-; {script}");
        let wanted = Wanted { stdin: "/none".into(), stdout, ..Wanted::default() };
        let (children, writer) = (Children::new(), SharedWriter::default());
        let sweeper = children.clone();
        tokio::spawn(async move { sweeper.run().await });
        let mut p = prepare(&wanted, Habits::default(), &place(&children, &writer, dir.path())).await.unwrap();
        let process = std::mem::take(&mut p.stdio);
        let io = p.attach(&writer).await.unwrap();
        File::from(process.stdout.unwrap()).write_all(b"out").unwrap();
        File::from(process.stderr.unwrap()).write_all(b"err").unwrap();
        io.drain(Duration::from_millis(10)).await;
        let read = |name| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!((read("o").as_str(), read("e").as_str()), ("out", "err"));
    }
}
