//! Real logging binaries: shell scripts that behave well, badly, or die.
#![allow(clippy::unwrap_used)]

use longshore_stdio::logger::{Binary, Bounds, Handshake, Host, Logger};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use types::{ErrorKind, Result};

/// Copies both streams into files of the directory $0 and says that it is ready.
const GOOD: &str = "cat <&3 >>$0/out & cat <&4 >>$0/err & printf x >&5; exec 3<&- 4<&- 5>&-; wait";

struct Bench {
    dir: tempfile::TempDir,
    reports: Arc<Mutex<Vec<String>>>,
    bounds: Bounds,
}

impl Bench {
    fn new() -> Self {
        let ms = Duration::from_millis;
        // A loaded machine takes its time where something is expected to happen.
        let bounds = Bounds { ready: ms(10_000), end: ms(2000), terminate: ms(12_000), kill: ms(5000) };
        Self { dir: tempfile::tempdir().unwrap(), reports: Arc::default(), bounds }
    }

    fn shell(&self, script: &str, handshake: Handshake) -> Binary {
        let args = vec!["-c".into(), script.into(), self.dir.path().into()];
        Binary { path: "/bin/sh".into(), args, handshake }
    }

    async fn start(&self, binary: &Binary) -> Result<(Logger, File, File)> {
        let reports = self.reports.clone();
        let host = Host {
            id: "box",
            namespace: "space",
            claim: &|_| Ok(Box::new(())),
            report: Arc::new(move |e| reports.lock().unwrap().push(e.to_string())),
            bounds: self.bounds,
        };
        let (logger, out, err) = Logger::start(binary, &host).await?;
        Ok((logger, File::from(out), File::from(err)))
    }

    async fn run(&self, script: &str) -> (Logger, File, File) {
        self.start(&self.shell(script, Handshake::Byte)).await.unwrap()
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }

    fn reports(&self) -> Vec<String> {
        self.reports.lock().unwrap().clone()
    }

    async fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        for _ in 0..1000 {
            if done(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}: {:?}", self.reports());
    }

    /// The logger writes its pid there with `echo $$`.
    fn pid(&self) -> i32 {
        self.text("pid").trim().parse().unwrap()
    }
}

fn is_there(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Writes 4 MiB, far more than a pipe holds.
async fn flood(mut to: File) {
    let all = move || (0..64).for_each(|_| to.write_all(&[b'y'; 65536]).unwrap());
    tokio::task::spawn_blocking(all).await.unwrap();
}

#[tokio::test]
async fn both_streams_arrive_and_nothing_is_reported() {
    for handshake in [Handshake::Byte, Handshake::ByteOrEnd] {
        let b = Bench::new();
        let (logger, mut out, mut err) = b.start(&b.shell(GOOD, handshake)).await.unwrap();
        out.write_all(b"to stdout").unwrap();
        err.write_all(b"to stderr").unwrap();
        drop((out, err));
        logger.close().await;
        assert_eq!((b.text("out").as_str(), b.text("err").as_str()), ("to stdout", "to stderr"));
        assert!(b.reports().is_empty(), "{:?}", b.reports());
    }
}

#[tokio::test]
async fn it_inherits_six_descriptors_two_variables_and_its_arguments_in_order() {
    let b = Bench::new();
    // A static program: no loader opens anything once it is what it is.
    let script = "echo \"$@\" >$0/args; echo $$ >$0/pid; printf x >&5; exec /bin/busybox sleep 600";
    let mut binary = b.shell(script, Handshake::Byte);
    binary.args.extend(["b", "2", "a", ""].map(Into::into));
    let (logger, out, err) = b.start(&binary).await.unwrap();
    let sleeps = b"/bin/busybox\0sleep\x00600\0";
    b.until("sleeps", |b| std::fs::read(format!("/proc/{}/cmdline", b.pid())).unwrap() == sleeps).await;
    let environ = std::fs::read_to_string(format!("/proc/{}/environ", b.pid())).unwrap();
    let mut fds: Vec<_> = std::fs::read_dir(format!("/proc/{}/fd", b.pid()))
        .unwrap()
        .map(|e| (e.as_ref().unwrap().file_name(), std::fs::read_link(e.unwrap().path()).unwrap()))
        .collect();
    fds.sort();
    drop((out, err));
    sys::pidfd::PidFd::open(b.pid()).unwrap().signal(types::Signal::KILL).unwrap();
    logger.close().await;
    // What the shell adds of its own is not ours.
    let ours: Vec<&str> = environ.split('\0').filter(|v| v.starts_with("CONTAINER")).collect();
    assert_eq!(ours, ["CONTAINER_ID=box", "CONTAINER_NAMESPACE=space"]);
    assert!(!environ.contains("CARGO"), "{environ}");
    assert_eq!(b.text("args"), "b 2 a \n");
    assert_eq!(fds.len(), 6, "{fds:?}");
    assert!(fds[..3].iter().all(|f| f.1 == Path::new("/dev/null")), "{fds:?}");
    assert!(fds[3..].iter().all(|f| f.1.to_string_lossy().starts_with("pipe:")), "{fds:?}");
}

#[tokio::test]
async fn the_end_of_the_ready_pipe_counts_in_the_first_version_only() {
    let script = "exec 5>&-; cat <&3 >$0/out; exit 3";
    let b = Bench::new();
    let (logger, mut out, err) = b.start(&b.shell(script, Handshake::ByteOrEnd)).await.unwrap();
    out.write_all(b"x").unwrap();
    drop((out, err));
    logger.close().await;
    assert_eq!(b.text("out"), "x");
    let e = b.start(&b.shell("echo $$ >$0/pid; exit 3", Handshake::Byte)).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
    let text = e.to_string();
    assert!(
        text.contains("/bin/sh of box") && text.contains("descriptor 5") && text.contains("exited with 3"),
        "{text}"
    );
    assert!(!is_there(b.pid()), "it is reaped");
}

#[tokio::test]
async fn one_that_is_never_ready_is_killed_and_named() {
    let mut b = Bench::new();
    b.bounds.ready = Duration::from_secs(5);
    let script = "echo $$ >$0/pid; exec sleep 600";
    let e = b.start(&b.shell(script, Handshake::ByteOrEnd)).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::DeadlineExceeded);
    assert!(e.to_string().contains("within 5 s"), "{e}");
    assert!(!is_there(b.pid()), "killed and reaped");
}

#[tokio::test]
async fn a_start_that_is_given_up_kills_it() {
    let b = Bench::new();
    let binary = b.shell("echo $$ >$0/pid; exec sleep 600", Handshake::Byte);
    {
        let start = b.start(&binary);
        tokio::select! {
            _ = start => panic!("it is never ready"),
            () = b.until("it runs", |b| b.text("pid").ends_with('\n')) => {}
        }
    }
    // There is no reaper of all children here: a zombie is what is left.
    let stat = || std::fs::read_to_string(format!("/proc/{}/stat", b.pid())).unwrap_or_default();
    b.until("killed", |_| stat().contains(") Z ") || stat().is_empty()).await;
}

#[tokio::test]
async fn one_that_is_not_there_is_named() {
    let b = Bench::new();
    let binary = Binary { path: "/nowhere/logger".into(), args: vec![], handshake: Handshake::Byte };
    let e = b.start(&binary).await.unwrap_err();
    assert!(e.is_not_found() && e.to_string().contains("/nowhere/logger"), "{e}");
}

#[tokio::test]
async fn after_its_death_writers_go_on_and_are_discarded() {
    let mut b = Bench::new();
    b.bounds.end = Duration::from_secs(60);
    let (logger, out, err) = b.run("echo $$ >$0/pid; printf x >&5; exec sleep 600").await;
    let begun = Instant::now();
    tokio::join!(flood(out.try_clone().unwrap()), flood(err.try_clone().unwrap()), async {
        // Both are stuck in full pipes by now.
        tokio::time::sleep(Duration::from_millis(200)).await;
        sys::pidfd::PidFd::open(b.pid()).unwrap().signal(types::Signal::KILL).unwrap();
    });
    assert!(begun.elapsed() >= Duration::from_millis(200), "it had to wait for the death");
    flood(out.try_clone().unwrap()).await;
    assert_eq!(b.reports().len(), 1, "{:?}", b.reports());
    assert!(b.reports()[0].contains("signal 9; what is written from now on is discarded"), "{:?}", b.reports());
    assert!(!is_there(b.pid()), "reaped at once");
    let begun = Instant::now();
    logger.close().await;
    assert!(begun.elapsed() < Duration::from_secs(20), "one that is gone is not waited for");
    assert_eq!(b.reports().len(), 1, "told once");
    // A fork of another test may have them a moment longer.
    b.until("our reading ends are closed", |_| (&out).write_all(b"x").is_err()).await;
}

#[tokio::test]
async fn one_that_dies_at_once_harms_nobody() {
    let b = Bench::new();
    let (logger, out, err) = b.start(&b.shell("exit 4", Handshake::ByteOrEnd)).await.unwrap();
    flood(out).await;
    flood(err).await;
    logger.close().await;
    assert!(b.reports()[0].contains("exited with 4"), "{:?}", b.reports());
}

#[tokio::test]
async fn a_slow_one_loses_nothing() {
    let b = Bench::new();
    let begun = Instant::now();
    let (logger, out, err) = b.run("printf x >&5; sleep 0.5; cat <&3 >$0/out").await;
    drop(err);
    flood(out).await;
    assert!(begun.elapsed() >= Duration::from_millis(500));
    logger.close().await;
    assert_eq!(b.text("out").len(), 4 << 20);
    assert!(b.reports().is_empty(), "{:?}", b.reports());
}

#[tokio::test]
async fn a_bad_exit_is_told_once_and_fails_nothing() {
    let b = Bench::new();
    let (logger, out, err) = b.run("printf x >&5; cat <&3 >$0/out; exit 7").await;
    drop((out, err));
    logger.close().await;
    assert_eq!(b.reports(), ["logging binary /bin/sh of box: it exited with 7"]);
}

#[tokio::test]
async fn one_that_ignores_the_end_is_terminated() {
    let mut b = Bench::new();
    b.bounds.end = Duration::from_millis(200);
    let script =
        "echo $$ >$0/pid; trap 'echo flushed >$0/out; exit 0' TERM; printf x >&5; while :; do sleep 0.05; done";
    let (logger, _out, _err) = b.run(script).await;
    let begun = Instant::now();
    logger.close().await;
    assert!(begun.elapsed() >= Duration::from_millis(200));
    assert_eq!(b.text("out"), "flushed\n");
    assert!(b.reports().is_empty() && !is_there(b.pid()), "{:?}", b.reports());
}

#[tokio::test]
async fn one_that_ignores_sigterm_is_killed() {
    let mut b = Bench::new();
    b.bounds.end = Duration::from_millis(100);
    b.bounds.terminate = Duration::from_millis(300);
    let (logger, _out, _err) = b.run("echo $$ >$0/pid; trap '' TERM; printf x >&5; while :; do sleep 0.05; done").await;
    let begun = Instant::now();
    logger.close().await;
    assert!((Duration::from_millis(400)..Duration::from_secs(20)).contains(&begun.elapsed()));
    assert!(b.reports()[0].contains("within 0.3 s of SIGTERM"), "{:?}", b.reports());
    assert!(!is_there(b.pid()), "killed and reaped");
}

#[tokio::test]
async fn one_that_is_dropped_is_closed_in_the_background() {
    let mut b = Bench::new();
    b.bounds.end = Duration::from_millis(50);
    let (logger, out, err) = b.run("echo $$ >$0/pid; printf x >&5; exec sleep 600").await;
    drop((logger, out, err));
    b.until("terminated", |b| !is_there(b.pid())).await;
}

#[tokio::test]
async fn a_hundred_of_them_leave_no_descriptor() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let b = Bench::new();
    let before = count();
    for i in 0..100 {
        let script = ["printf x >&5", "exit 1", "printf x >&5; kill -9 $$", "exec 5>&-"][i % 4];
        if let Ok((logger, out, err)) = b.start(&b.shell(script, Handshake::Byte)).await {
            drop((out, err));
            logger.close().await;
        }
    }
    // The other tests come and go beside this one.
    b.until("closed", |_| count() < before + 60).await;
}
