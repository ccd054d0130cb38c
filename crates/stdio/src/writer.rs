//! The one thread that writes to files.
//!
//! ```text
//! process --pipe--> [epoll, one buffer for all] --write--> log file
//! ```
//!
//! Writing to a file can block (throttled disks, NFS), so it is done here and
//! holds up no call. The thread reads the pipes itself: what it has not read
//! waits in the kernel, so its memory is one buffer, whatever the number of
//! streams. A disk that refuses bytes loses them, the container goes on; a disk
//! that hangs makes the pipe fill up, as it would without us.
//!
//! The thread starts with its first stream and ends with the `Writer`. While a file
//! hangs in it, nobody waits for it without a bound, and what is to go into other
//! files can be given to another `Writer`.

use crate::cri_log::{Lines, Stream};
use rustix::event::epoll;
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, SystemTime};
use tokio::sync::{oneshot, watch};
use types::{Error, Result, ResultExt};

/// How the bytes stand in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// As lines of the CRI log, split beyond so many bytes.
    Cri(usize),
    /// As they come.
    Raw,
}

const BUFFER: usize = 32 << 10;
/// The thread formats and writes; it needs little.
const STACK: usize = 128 << 10;
/// The wake-up's place among the epoll tokens.
const WAKE: u64 = 0;
/// How long a file may take to be opened.
const OPEN: Duration = Duration::from_secs(10);
/// How long a dropped writer waits for its thread's end.
const FLUSH: Duration = Duration::from_secs(3);

/// The streams of a process and the reading ends of their pipes.
pub type Sources = Vec<(Stream, OwnedFd)>;

enum Order {
    Open {
        log: u64,
        path: PathBuf,
        format: Format,
        sources: Sources,
        ended: watch::Sender<bool>,
        reply: oneshot::Sender<Result<()>>,
    },
    Reopen {
        log: u64,
        reply: oneshot::Sender<Result<()>>,
    },
    Close {
        log: u64,
    },
    Stop,
}

struct Mailbox {
    orders: Mutex<VecDeque<Order>>,
    wake: OwnedFd,
}

impl Mailbox {
    fn orders(&self) -> MutexGuard<'_, VecDeque<Order>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sources of a file that the thread has not come to yet.
    fn take_back(&self, id: u64) -> Option<Sources> {
        let mut orders = self.orders();
        let place = orders.iter().position(|o| matches!(o, Order::Open { log, .. } if *log == id))?;
        match orders.remove(place) {
            Some(Order::Open { sources, .. }) => Some(sources),
            _ => None,
        }
    }

    fn send(&self, order: Order) {
        self.orders().push_back(order);
        // It can only fail when the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// The file-writing thread's handle. Dropped, it makes the thread flush what it
/// has and end, and waits for that at most 3 s, unless somebody else has its [`Ending`].
pub struct Writer {
    mail: Arc<Mailbox>,
    next: std::sync::atomic::AtomicU64,
    ending: Option<Ending>,
}

/// The end of a writer's thread, for whoever may not wait where the writer is dropped.
pub struct Ending {
    mail: Arc<Mailbox>,
    /// Nothing is ever sent: the thread's end closes it.
    thread: Mutex<mpsc::Receiver<()>>,
}

impl Ending {
    /// Whether the thread has flushed all and ended.
    pub fn has_come(&self) -> bool {
        // Locked, it is being waited for.
        self.thread.try_lock().is_ok_and(|t| t.try_recv() == Err(mpsc::TryRecvError::Disconnected))
    }

    /// Asks the thread to flush what it has and to end, whether its writer is dropped
    /// or not.
    pub fn ask(&self) {
        self.mail.send(Order::Stop);
    }

    /// Blocks until the thread has ended, at most for `bound`.
    pub fn wait(&self, bound: Duration) {
        let _ = self.thread.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(bound);
    }
}

/// Why a file was not opened.
pub enum NotOpened {
    /// The thread hangs in some other file; here is what it was given.
    Busy(Sources),
    /// This very file can't be opened.
    Failed(Error),
}

/// One log file with the streams that go into it. Dropped, it is read out once
/// more without waiting and closed.
pub struct Log {
    id: u64,
    mail: Arc<Mailbox>,
    ended: watch::Receiver<bool>,
}

impl Writer {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where threads or descriptors have run out.
    pub fn start() -> Result<Self> {
        let (mut writer, ending) = Self::start_apart()?;
        writer.ending = Some(ending);
        Ok(writer)
    }

    /// Starts the thread, whose end is for somebody else to wait for.
    ///
    /// # Errors
    /// Where threads or descriptors have run out.
    pub fn start_apart() -> Result<(Self, Ending)> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let wake = rustix::event::eventfd(0, flags).context(|| "make the log writer's eventfd".into())?;
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC).context(|| "make the log writer's epoll".into())?;
        epoll::add(&poll, &wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)
            .context(|| "watch the log writer's eventfd".into())?;
        let mail = Arc::new(Mailbox { orders: Mutex::default(), wake });
        let worker = Worker { poll, mail: mail.clone(), logs: HashMap::new(), sources: HashMap::new(), next: WAKE + 1 };
        let (ended, thread) = mpsc::channel();
        std::thread::Builder::new()
            .name("log-writer".into())
            .stack_size(STACK)
            .spawn(move || {
                worker.run();
                drop(ended);
            })
            .context(|| "start the log writer's thread".into())?;
        let ending = Ending { mail: mail.clone(), thread: Mutex::new(thread) };
        Ok((Self { mail, next: std::sync::atomic::AtomicU64::new(1), ending: None }, ending))
    }

    /// Opens the file (append, missing directories are made; created 0640 for
    /// the CRI's format, 0644 for raw bytes) and copies the sources into it until each has ended.
    ///
    /// # Errors
    /// Where the file can't be opened, `DeadlineExceeded` after 10 s; the sources are
    /// closed then.
    pub async fn open(&self, path: PathBuf, format: Format, sources: Sources) -> Result<Log> {
        let name = path.clone();
        self.open_or_give_back(path, format, sources, OPEN).await.map_err(|e| match e {
            NotOpened::Failed(e) => e,
            NotOpened::Busy(_) => hangs(&name, "the disk of another log hangs"),
        })
    }

    /// The same, but the sources come back where the thread has not come to this file
    /// within `turn`.
    ///
    /// # Errors
    /// As with [`Writer::open`].
    pub async fn open_or_give_back(
        &self,
        path: PathBuf,
        format: Format,
        sources: Sources,
        turn: Duration,
    ) -> Result<Log, NotOpened> {
        let log = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = path.clone();
        let (ended_tx, ended) = watch::channel(sources.is_empty());
        let (reply, mut answer) = oneshot::channel();
        self.mail.send(Order::Open { log, path, format, sources, ended: ended_tx, reply });
        let in_time = match tokio::time::timeout(turn, &mut answer).await {
            Ok(opened) => Ok(opened),
            Err(_) => match self.mail.take_back(log) {
                Some(sources) => return Err(NotOpened::Busy(sources)),
                None => tokio::time::timeout(OPEN.saturating_sub(turn), answer).await,
            },
        };
        match in_time {
            Ok(Ok(Ok(()))) => Ok(Log { id: log, mail: self.mail.clone(), ended }),
            Ok(Ok(Err(e))) => Err(NotOpened::Failed(e)),
            Ok(Err(_)) => Err(NotOpened::Failed(thread_is_gone())),
            Err(_) => Err(NotOpened::Failed(hangs(&name, "its disk hangs"))),
        }
    }
}

fn thread_is_gone() -> Error {
    Error::internal("the log writer's thread has ended")
}

fn hangs(path: &std::path::Path, hint: &str) -> Error {
    Error::deadline(format!("open log {}: it took longer than {} s", path.display(), OPEN.as_secs())).hint(hint)
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.mail.send(Order::Stop);
        if let Some(ending) = self.ending.take() {
            ending.wait(FLUSH);
        }
    }
}

impl Log {
    /// Opens the file anew under its name; no byte is lost, and if that fails,
    /// the old file is kept.
    ///
    /// # Errors
    /// Those of opening; `DeadlineExceeded` after 10 s, and it may come true later.
    pub fn reopen(&self) -> impl Future<Output = Result<()>> + Send + use<> {
        let (reply, answer) = oneshot::channel();
        self.mail.send(Order::Reopen { log: self.id, reply });
        async move {
            match tokio::time::timeout(OPEN, answer).await {
                Ok(answer) => answer.map_err(|_| thread_is_gone())?,
                Err(_) => Err(Error::deadline(format!("reopen the log: it took longer than {} s", OPEN.as_secs()))
                    .hint("its disk hangs, or that of another log")),
            }
        }
    }

    /// Waits until every source has ended and is in the file. The future stands
    /// on its own.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut ended = self.ended.clone();
        async move {
            // The sender's end means that the log is closed.
            let _ = ended.wait_for(|e| *e).await;
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.mail.send(Order::Close { log: self.id });
    }
}

struct OpenLog {
    path: PathBuf,
    file: File,
    format: Format,
    sources: usize,
    ended: watch::Sender<bool>,
    /// The last write broke off inside a line.
    torn: bool,
}

struct Source {
    fd: OwnedFd,
    log: u64,
    lines: Option<Lines>,
}

struct Worker {
    poll: OwnedFd,
    mail: Arc<Mailbox>,
    logs: HashMap<u64, OpenLog>,
    sources: HashMap<u64, Source>,
    next: u64,
}

fn open_file(path: &std::path::Path, format: Format) -> Result<File> {
    // The kubelet's readers are root's; who asks for a file wants to read it.
    let mode = match format {
        Format::Cri(_) => 0o640,
        Format::Raw => 0o644,
    };
    let attempt = || OpenOptions::new().append(true).create(true).mode(mode).open(path);
    attempt()
        .or_else(|e| match (e.kind(), path.parent()) {
            (std::io::ErrorKind::NotFound, Some(dir)) => std::fs::create_dir_all(dir).and_then(|()| attempt()),
            _ => Err(e),
        })
        .context(|| format!("open log {}", path.display()))
}

impl Worker {
    fn run(mut self) {
        let mut buffer = vec![0u8; BUFFER];
        let mut out = Vec::new();
        let mut events = Vec::with_capacity(16);
        loop {
            events.clear();
            if let Err(e) = epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), None)
                && e != Errno::INTR
            {
                return;
            }
            let tokens: Vec<u64> = events.iter().map(|e: &epoll::Event| e.data.u64()).collect();
            let woken = tokens.contains(&WAKE);
            for token in tokens.into_iter().filter(|t| *t != WAKE) {
                self.read_once(token, &mut buffer, &mut out);
            }
            if woken && !self.obey(&mut buffer, &mut out) {
                return;
            }
        }
    }

    /// Carries out what has been ordered; false means the end.
    fn obey(&mut self, buffer: &mut [u8], out: &mut Vec<u8>) -> bool {
        let _ = rustix::io::read(&self.mail.wake, &mut [0u8; 8]);
        loop {
            // One by one: what is still in the box can be taken back.
            let Some(order) = self.mail.orders().pop_front() else { return true };
            match order {
                Order::Open { log, path, format, sources, ended, reply } => {
                    let opened = self.open(log, path, format, sources, ended);
                    let failed = opened.is_err();
                    // Nobody waits for it any more, or it is half open.
                    if reply.send(opened).is_err() || failed {
                        self.forget(log);
                    }
                }
                Order::Reopen { log, reply } => {
                    let _ = reply.send(self.reopen(log));
                }
                Order::Close { log } => self.close(log, buffer, out),
                Order::Stop => {
                    for log in self.logs.keys().copied().collect::<Vec<_>>() {
                        self.close(log, buffer, out);
                    }
                    return false;
                }
            }
        }
    }

    /// Closes a log as it is.
    fn forget(&mut self, log: u64) {
        self.sources.retain(|_, s| s.log != log);
        self.logs.remove(&log);
    }

    fn open(
        &mut self,
        log: u64,
        path: PathBuf,
        format: Format,
        sources: Sources,
        ended: watch::Sender<bool>,
    ) -> Result<()> {
        let file = open_file(&path, format)?;
        let count = sources.len();
        for (stream, fd) in sources {
            let token = self.next;
            self.next += 1;
            crate::watch::set_nonblocking(&fd).context(|| format!("watch a source of log {}", path.display()))?;
            epoll::add(&self.poll, &fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)
                .context(|| format!("watch a source of log {}", path.display()))?;
            let lines = match format {
                Format::Cri(limit) => Some(Lines::new(stream, limit)),
                Format::Raw => None,
            };
            self.sources.insert(token, Source { fd, log, lines });
        }
        self.logs.insert(log, OpenLog { path, file, format, sources: count, ended, torn: false });
        Ok(())
    }

    fn reopen(&mut self, log: u64) -> Result<()> {
        // A log whose streams have ended is closed, but its file may be rotated.
        let Some(l) = self.logs.get_mut(&log) else { return Ok(()) };
        l.file = open_file(&l.path, l.format)?;
        l.torn = false;
        Ok(())
    }

    fn close(&mut self, log: u64, buffer: &mut [u8], out: &mut Vec<u8>) {
        let tokens: Vec<u64> = self.sources.iter().filter(|(_, s)| s.log == log).map(|(t, _)| *t).collect();
        for token in tokens {
            // At most what a pipe holds: whoever still writes must not keep us.
            for _ in 0..(64 << 10) / BUFFER + 1 {
                if !self.read_once(token, buffer, out) {
                    break;
                }
            }
            self.end_source(token, out);
        }
        self.logs.remove(&log);
    }

    /// One read of one source; false when there was nothing more.
    fn read_once(&mut self, token: u64, buffer: &mut [u8], out: &mut Vec<u8>) -> bool {
        let Some(source) = self.sources.get_mut(&token) else { return false };
        let n = match rustix::io::read(&source.fd, &mut *buffer) {
            Ok(n) if n > 0 => n,
            Err(Errno::AGAIN) => return false,
            Err(Errno::INTR) => return true,
            // EIO is how a terminal says that its other side is gone.
            Ok(_) | Err(_) => {
                self.end_source(token, out);
                return false;
            }
        };
        let bytes = &buffer[..n];
        out.clear();
        match &mut source.lines {
            Some(lines) => {
                lines.feed(SystemTime::now(), bytes, out);
                append(self.logs.get_mut(&source.log), out);
                // One-byte lines grow forty-fold; that buffer is not kept.
                out.shrink_to(2 * BUFFER);
            }
            None => append(self.logs.get_mut(&source.log), bytes),
        }
        true
    }

    fn end_source(&mut self, token: u64, out: &mut Vec<u8>) {
        let Some(mut source) = self.sources.remove(&token) else { return };
        let _ = epoll::delete(&self.poll, &source.fd);
        let Some(log) = self.logs.get_mut(&source.log) else { return };
        if let Some(lines) = &mut source.lines {
            out.clear();
            lines.finish(SystemTime::now(), out);
            append(Some(log), out);
        }
        log.sources -= 1;
        if log.sources == 0 {
            log.ended.send_replace(true);
        }
    }
}

/// Writes all of it or loses the rest: the container is never held up by a full
/// disk. What comes after a torn line begins on a new one.
fn append(log: Option<&mut OpenLog>, bytes: &[u8]) {
    let Some(log) = log else { return };
    if bytes.is_empty() {
        return;
    }
    if log.torn && matches!(log.format, Format::Cri(_)) {
        if log.file.write_all(b"\n").is_err() {
            return;
        }
        log.torn = false;
    }
    let mut rest = bytes;
    while !rest.is_empty() {
        match log.file.write(rest) {
            Ok(0) => break,
            Ok(n) => rest = &rest[n..],
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let written = bytes.len() - rest.len();
    if written > 0 && bytes[written - 1] != b'\n' {
        log.torn = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fifo::pipe;
    use std::time::Duration;

    fn texts(log: &str) -> Vec<String> {
        log.lines().map(|l| l.split_once(' ').unwrap().1.to_string()).collect()
    }

    #[tokio::test]
    async fn two_streams_meet_in_one_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/0.log");
        let writer = Writer::start().unwrap();
        let ((r1, w1), (r2, w2)) = (pipe().unwrap(), pipe().unwrap());
        let sources = vec![(Stream::Stdout, r1), (Stream::Stderr, r2)];
        let log = writer.open(path.clone(), Format::Cri(4), sources).await.unwrap();
        File::from(w1).write_all(b"abcdef\n").unwrap();
        File::from(w2).write_all(b"no").unwrap();
        log.ended().await;
        let mut lines = texts(&std::fs::read_to_string(&path).unwrap());
        lines.sort();
        assert_eq!(lines, ["stderr F no", "stdout F ef", "stdout P abcd"]);
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o640);
    }

    #[tokio::test]
    async fn reopening_loses_no_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let writer = Writer::start().unwrap();
        let (r, w) = pipe().unwrap();
        let log = writer.open(path.clone(), Format::Cri(100), vec![(Stream::Stdout, r)]).await.unwrap();
        let thread = std::thread::spawn(move || {
            let mut w = File::from(w);
            for i in 0..20_000 {
                writeln!(w, "{i}").unwrap();
            }
        });
        let mut parts = Vec::new();
        for i in 0..5 {
            let rotated = dir.path().join(format!("{i}.log.old"));
            std::fs::rename(&path, &rotated).unwrap();
            log.reopen().await.unwrap();
            parts.push(rotated);
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        parts.push(path);
        thread.join().unwrap();
        log.ended().await;
        let all: String = parts.iter().map(|p| std::fs::read_to_string(p).unwrap()).collect();
        let want: Vec<String> = (0..20_000).map(|i| format!("stdout F {i}")).collect();
        assert_eq!(texts(&all), want);
    }

    #[tokio::test]
    async fn a_disk_that_refuses_bytes_holds_nobody_up() {
        let writer = Writer::start().unwrap();
        let (r, w) = pipe().unwrap();
        let log = writer.open("/dev/full".into(), Format::Cri(100), vec![(Stream::Stdout, r)]).await.unwrap();
        let thread = std::thread::spawn(move || File::from(w).write_all(&vec![b'\n'; 1 << 20]).unwrap());
        log.ended().await;
        thread.join().unwrap();
    }

    #[tokio::test]
    async fn a_closed_log_keeps_what_was_in_the_pipe() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raw");
        let writer = Writer::start().unwrap();
        let (r, w) = pipe().unwrap();
        let log = writer.open(path.clone(), Format::Raw, vec![(Stream::Stdout, r)]).await.unwrap();
        let mut w = File::from(w);
        w.write_all(b"raw bytes").unwrap();
        drop(log);
        drop(writer);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "raw bytes");
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o644);
        assert!(w.write_all(b"x").is_err(), "the reading end is closed");
    }

    /// A log that hangs: a FIFO that nobody empties, and more than it takes.
    async fn hanging(writer: &Writer, dir: &std::path::Path) -> (Log, OwnedFd) {
        let path = dir.join("full");
        crate::fifo::make(&path).unwrap();
        let reader = crate::fifo::open_reader(&path).unwrap();
        let (r, w) = pipe().unwrap();
        let log = writer.open(path, Format::Raw, vec![(Stream::Stdout, r)]).await.unwrap();
        // It is through once the thread has taken more than the FIFO can hold.
        std::thread::spawn(move || File::from(w).write_all(&[b'x'; 160 << 10])).join().unwrap().unwrap();
        (log, reader)
    }

    #[tokio::test]
    async fn a_log_that_hangs_gives_back_what_was_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let (writer, ending) = Writer::start_apart().unwrap();
        let (log, reader) = hanging(&writer, dir.path()).await;
        let (r, w) = pipe().unwrap();
        let (turn, path) = (Duration::from_millis(10), dir.path().join("other"));
        let given = writer.open_or_give_back(path.clone(), Format::Raw, vec![(Stream::Stdout, r)], turn).await;
        let Err(NotOpened::Busy(sources)) = given else { panic!("the thread can't have come to it") };
        let other = Writer::start().unwrap();
        let second = other.open(path.clone(), Format::Raw, sources).await.unwrap();
        File::from(w).write_all(b"through").unwrap();
        second.ended().await;
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "through");
        drop(log);
        drop(writer);
        ending.wait(turn);
        assert!(!ending.has_come(), "nobody has waited for it to end");
        // Its reader's end is the end of the hang.
        drop(reader);
        ending.wait(Duration::from_secs(60));
        assert!(ending.has_come());
    }

    #[tokio::test]
    async fn a_log_that_nobody_waits_for_any_more_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let writer = Writer::start().unwrap();
        let (log, reader) = hanging(&writer, dir.path()).await;
        let (r, w) = pipe().unwrap();
        let opening = writer.open(dir.path().join("late"), Format::Raw, vec![(Stream::Stdout, r)]);
        assert!(tokio::time::timeout(Duration::from_millis(10), opening).await.is_err());
        drop(reader);
        log.ended().await;
        // After the one before it.
        let last = writer.open(dir.path().join("last"), Format::Raw, vec![]).await.unwrap();
        assert!(File::from(w).write_all(b"x").is_err(), "its source is closed");
        drop(last);
    }

    #[tokio::test]
    async fn a_log_that_can_t_be_opened_is_named() {
        let writer = Writer::start().unwrap();
        let e = writer.open("/proc/none/x".into(), Format::Raw, vec![]).await.err().unwrap();
        assert!(e.to_string().contains("/proc/none/x"), "{e}");
    }
}
