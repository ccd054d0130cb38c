//! The reaper and IO alone, on the current-thread runtime: what
//! docs/decisions/0003-reaper.md was learnt from.
//!
//! 300 execs through the real runtime into one container: some end before their
//! pid file is read, some leave a grandchild on the pipe, of some the parent is
//! killed with -9 in the middle. No exit is lost, no byte, and nothing spins.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Bundle, Shape, process, sh};
use oci::{Children, Command, Config, Launch, Runtime, Stdio};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stdio::Capped;

const EXECS: usize = 300;
const PARALLEL: usize = 16;

/// User and system time of this process so far.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

fn zombies() -> Vec<String> {
    let mut found = Vec::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for pid in children.split_whitespace() {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.contains(") Z ") {
                found.push(stat);
            }
        }
    }
    found
}

/// One kind of exec: script, exit code, output; whether it is killed once it
/// sleeps.
fn kind(n: usize) -> (&'static str, i32, Vec<u8>, bool) {
    match n % 5 {
        0 => ("echo a; exit 3", 3, b"a\n".to_vec(), false),
        1 => ("head -c 200000 /dev/zero | tr '\\0' x; exit 4", 4, vec![b'x'; 200_000], false),
        2 => ("{ sleep 0.3; echo late; } & echo g; exit 5", 5, b"g\nlate\n".to_vec(), false),
        3 => ("echo k; exec sleep 100", 137, b"k\n".to_vec(), true),
        _ => ("{ sleep 0.3; echo late; } & echo e; while :; do sleep 100; done", 137, b"e\nlate\n".to_vec(), true),
    }
}

/// Waits until a process, or a child of it, has become the long sleep that its script
/// ends with.
async fn sleeps(pid: i32) {
    for _ in 0..2000 {
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let is_it =
            |p: &str| std::fs::read(format!("/proc/{p}/cmdline")).is_ok_and(|c| c.ends_with(b"sleep\x00100\x00"));
        if is_it(&pid.to_string()) || children.split_whitespace().any(is_it) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("process {pid} never came to its sleep");
}

async fn one(n: usize, runtime: Arc<Command>, bundle: Arc<Bundle>) {
    let (script, code, want, kill) = kind(n);
    let document = bundle.path().join(format!("e{n}.json"));
    std::fs::write(&document, process(&sh(script), false).to_string()).unwrap();
    let (read, write): (OwnedFd, OwnedFd) = stdio::fifo::pipe().unwrap();
    let launch = Launch {
        stdio: Stdio { stdin: None, stdout: Some(write), stderr: None },
        console_socket: None,
        pid_file: bundle.path().join(format!("e{n}.pid")),
    };
    let child = runtime.exec(&bundle.id, &document, launch).await.unwrap();
    // A sleep that outlives its shell (kind 4) holds the pipe for 100 s: its end is not
    // waited for, only its bytes.
    let (has_end, expected) = (n % 5 != 4, want.len());
    let reading = tokio::spawn(async move {
        let mut sink = Capped::new(1 << 20);
        let began = Instant::now();
        let step = Duration::from_millis(if has_end { 60_000 } else { 100 });
        let mut ended = false;
        while !ended && began.elapsed() < Duration::from_secs(60) && (has_end || sink.kept().len() < expected) {
            ended = tokio::time::timeout(step, stdio::collect(read.try_clone().unwrap(), &mut sink)).await.is_ok();
        }
        assert_eq!(ended, has_end, "exec {n}: the end of its stream");
        sink.into_kept()
    });
    if kill {
        sleeps(child.pid()).await;
        child.signal(types::Signal::KILL).unwrap();
    }
    let ended = tokio::time::timeout(Duration::from_secs(60), child.wait()).await.expect("the exit is seen");
    assert_eq!(ended.status.code(), code, "exec {n}: {script}");
    let got = reading.await.unwrap();
    assert_eq!(got.len(), want.len(), "exec {n}: {script}");
    assert_eq!(got, want, "exec {n}: {script}");
}

async fn run(private_pids: bool) {
    let shape = Shape { private_pids, args: sh("while :; do sleep 1; done"), ..Shape::default() };
    let bundle = Arc::new(Bundle::new(&shape));
    let children = Children::new();
    let sweeper = children.clone();
    let sweeping = tokio::spawn(async move { sweeper.run().await });
    let mut config = Config::new("/usr/sbin/runc", bundle.path());
    config.root = Some(bundle.runtime_root());
    let runtime = Arc::new(Command::new(config, children.clone()));

    let launch = Launch { stdio: Stdio::default(), console_socket: None, pid_file: bundle.path().join("init.pid") };
    let init = runtime.create(&bundle.id, bundle.path(), launch).await.unwrap();
    runtime.start(&bundle.id).await.unwrap();

    let (began, cpu) = (Instant::now(), cpu_time());
    let permits = Arc::new(tokio::sync::Semaphore::new(PARALLEL));
    let mut all = tokio::task::JoinSet::new();
    for n in 0..EXECS {
        let (runtime, bundle, permits) = (runtime.clone(), bundle.clone(), permits.clone());
        all.spawn(async move {
            let _permit = permits.acquire_owned().await.unwrap();
            one(n, runtime, bundle).await;
        });
    }
    while let Some(done) = all.join_next().await {
        done.unwrap();
    }
    let used = cpu_time() - cpu;
    eprintln!("{EXECS} execs, private pids {private_pids}: {:?}, own CPU {used:?}", began.elapsed());
    assert!(used < Duration::from_millis(10) * EXECS as u32, "{used:?} of CPU time for {EXECS} execs");

    init.signal(types::Signal::KILL).unwrap();
    assert_eq!(init.wait().await.status.code(), 137);
    if !private_pids {
        // What is left in a container without a pid namespace of its own.
        for path in ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"] {
            let procs = format!("{path}/lsh-test-{0}/{0}/cgroup.procs", bundle.id);
            for pid in std::fs::read_to_string(procs).unwrap_or_default().lines() {
                if let Ok(p) = sys::pidfd::PidFd::open(pid.parse().unwrap()) {
                    let _ = p.signal(types::Signal::KILL);
                }
            }
        }
    }
    runtime.delete(&bundle.id, true).await.unwrap();
    for _ in 0..600 {
        if zombies().is_empty() && children.held_back() == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(zombies(), Vec::<String>::new(), "everything is reaped");
    assert_eq!(children.held_back(), 0);
    let idle = cpu_time();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(cpu_time() - idle <= Duration::from_millis(20), "it spins when idle");
    sweeping.abort();
}

/// Both in one test: a subreaper's zombies are its whole process's.
#[test]
fn three_hundred_execs_lose_nothing() {
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1)).unwrap();
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    rt.block_on(run(true));
    rt.block_on(run(false));
}
