//! ExecSync against a real daemon, shim and runtime (behaviours.md section 1): what
//! it answers, how long it takes, and that nothing of it stays in the shim.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{
    Cri, Daemon, Handler, IMAGE, busybox, children, container, handler, in_pid_namespace, open_fds, own_memory_kib,
    wait_for,
};
use proto::cri::{ContainerConfig, Int64Value, KeyValue};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tonic::Code;

const BOUND: Duration = Duration::from_secs(20);
/// Seconds; short, so that the tests are.
const DRAIN: u64 = 2;
const KEPT: usize = 16 << 20;

/// A daemon with one pod and one container that sleeps.
struct World {
    cri: Cri,
    container: String,
    init: u32,
    shim: u32,
    idle: Idle,
    daemon: Daemon,
}

/// What a shim is when no exec runs.
#[derive(Debug, PartialEq, Eq)]
struct Idle {
    fds: Option<usize>,
    children: Vec<u32>,
    execs: Vec<String>,
}

impl Idle {
    fn is(&self, idle: &Self) -> bool {
        // Go's own runtime opens and closes a few as it likes.
        let slack = if handler() == Handler::GoShim { 2 } else { 0 };
        let fds = self.fds.zip(idle.fds).is_some_and(|(a, b)| a.abs_diff(b) <= slack);
        fds && self.children == idle.children && self.execs == idle.execs
    }
}

fn sleeper(name: &str) -> ContainerConfig {
    container(name, IMAGE, &["sleep", "100000"])
}

async fn world(config: ContainerConfig) -> World {
    let daemon = Daemon::with(&format!("[runtime]\ndrain_exec_sync_io_timeout = {DRAIN}\n")).await;
    daemon.import(&busybox(), IMAGE);
    let cri = daemon.cri().await;
    let pod_config = daemon.pod("exec");
    let pod = cri.run_pod(&pod_config).await.unwrap();
    let container = cri.run(&pod, &config, &pod_config).await.unwrap();
    let info = cri.info(&container).await.unwrap();
    let number = |key: &str| u32::try_from(info[key].as_u64().unwrap()).unwrap();
    // The container's monitor, where its pod has no shim.
    let shim = if handler().monitored() { daemon.shims()[0] } else { number("shimPid") };
    let init = number("pid");
    // The first one makes what stays: threads, buffers.
    let first = cri.exec(&container, &["true"], 10).await.unwrap();
    assert_eq!((first.exit_code, first.stdout.len(), first.stderr.len()), (0, 0, 0));
    let mut world =
        World { cri, container, init, shim, idle: Idle { fds: None, children: vec![], execs: vec![] }, daemon };
    world.idle = world.now();
    assert_eq!(world.idle.execs, Vec::<String>::new());
    world
}

impl World {
    fn now(&self) -> Idle {
        let pods = std::fs::read_dir(self.daemon.bundles()).unwrap().flatten();
        let execs = pods
            .filter_map(|p| std::fs::read_dir(p.path().join("tasks").join(&self.container).join("execs")).ok())
            .flat_map(|d| d.flatten().map(|e| e.file_name().to_string_lossy().into_owned()))
            .collect();
        let mut children = children(self.shim);
        children.sort_unstable();
        Idle { fds: open_fds(self.shim), children, execs }
    }

    /// Nothing is in the shim, or in its bundles, that was not there before.
    fn nothing_stays(&self) {
        let deadline = Instant::now() + BOUND;
        while !self.now().is(&self.idle) {
            assert!(Instant::now() < deadline, "before {:?}, now {:?}", self.idle, self.now());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn runs(&self, line: &str) -> Vec<u32> {
        in_pid_namespace(self.init).into_iter().filter(|(_, l)| l == line).map(|(pid, _)| pid).collect()
    }

    async fn exec(&self, cmd: &[&str], timeout: i64) -> Result<proto::cri::ExecSyncResponse, tonic::Status> {
        self.cri.exec(&self.container, cmd, timeout).await
    }

    fn memory(&self) -> u64 {
        own_memory_kib(self.daemon.pid()) + own_memory_kib(self.shim)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gigabyte_is_answered_with_16_mib_and_memory_stays_flat() {
    let w = world(sleeper("main")).await;
    let before = w.memory();
    let (peak, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let sampler = std::thread::spawn({
        let (peak, over, daemon, shim) = (peak.clone(), over.clone(), w.daemon.pid(), w.shim);
        move || {
            while !over.load(Ordering::Relaxed) {
                peak.fetch_max(own_memory_kib(daemon) + own_memory_kib(shim), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    });
    let out = w.exec(&["dd", "if=/dev/zero", "bs=1M", "count=1024"], 0).await.unwrap();
    over.store(true, Ordering::Relaxed);
    sampler.join().unwrap();
    assert_eq!((out.exit_code, out.stdout.len()), (0, KEPT));
    assert!(out.stdout.iter().all(|b| *b == 0));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("1024+0 records out"), "the command went on undisturbed: {said}");
    drop(out);
    let grown = peak.load(Ordering::Relaxed).saturating_sub(before);
    println!("memory: {before} KiB before, {grown} KiB more at the peak");
    assert!(grown < 80 << 10, "grew by {grown} KiB");
    wait_for("memory is given back", BOUND, || w.memory() < before + (5 << 10));
    w.nothing_stays();
}

#[tokio::test(flavor = "multi_thread")]
async fn both_streams_are_kept_up_to_16_mib_each() {
    let w = world(sleeper("main")).await;
    let script = "head -c 20000000 /dev/zero | tr '\\0' o & head -c 20000000 /dev/zero | tr '\\0' e >&2; wait; exit 3";
    let out = w.exec(&["sh", "-c", script], 0).await.unwrap();
    assert_eq!((out.exit_code, out.stdout.len(), out.stderr.len()), (3, KEPT, KEPT));
    assert!(out.stdout.iter().all(|b| *b == b'o') && out.stderr.iter().all(|b| *b == b'e'));
    w.nothing_stays();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_holds_the_pipe_is_named_after_the_drain_timeout() {
    let w = world(sleeper("main")).await;
    let begun = Instant::now();
    let e = w.exec(&["sh", "-c", "sleep 1000 &"], 0).await.unwrap_err();
    let took = begun.elapsed();
    let holder = w.runs("sleep 1000");
    assert_eq!(holder.len(), 1, "what the command left is the container's, not ours to kill");
    assert_eq!(e.code(), Code::Internal, "{e}");
    for part in ["still held by", "sleep 1000", &holder[0].to_string()] {
        assert!(e.message().contains(part), "{part:?} is missing in: {}", e.message());
    }
    assert!((Duration::from_secs(DRAIN)..Duration::from_secs(DRAIN + 4)).contains(&took), "took {took:?}");
    // It is a child of the container's own init, not of the shim.
    w.nothing_stays();
    // A pipe that is held for a moment only is waited for.
    let out = w.exec(&["sh", "-c", "(sleep 0.1; echo late) & echo early"], 0).await.unwrap();
    assert_eq!(out.stdout, "early\nlate\n");
    w.nothing_stays();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_kills_the_command_and_waits_no_longer_than_the_drain() {
    let w = world(sleeper("main")).await;
    for (cmd, at_most) in [(&["sleep", "60"][..], 5), (&["sh", "-c", "sleep 1000 & sleep 60"], 1 + DRAIN + 4)] {
        let begun = Instant::now();
        let e = w.exec(cmd, 1).await.unwrap_err();
        let took = begun.elapsed();
        println!("{cmd:?}: {took:?}");
        assert_eq!(e.code(), Code::DeadlineExceeded, "{cmd:?}: {e}");
        assert!(e.message().contains("timeout") && e.message().contains("exceeded"), "{e}");
        assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(at_most), "{cmd:?} took {took:?}");
        // The shell makes way for its last command.
        assert_eq!(w.runs("sleep 60"), Vec::<u32>::new(), "{cmd:?} is dead");
        w.nothing_stays();
    }
    // What comes in time is no timeout, and a negative one is none.
    assert_eq!(w.exec(&["sh", "-c", "sleep 0.2; exit 4"], 30).await.unwrap().exit_code, 4);
    assert_eq!(w.exec(&["sh", "-c", "sleep 0.2; exit 5"], -1).await.unwrap().exit_code, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_at_once_succeed_and_hold_nobody_up() {
    let w = world(sleeper("main")).await;
    let other_config = w.daemon.pod("other");
    let other_pod = w.cri.run_pod(&other_config).await.unwrap();
    let other = w.cri.run(&other_pod, &sleeper("other"), &other_config).await.unwrap();
    let mut all = JoinSet::new();
    for n in 0..200 {
        let (cri, id) = (w.cri.clone(), w.container.clone());
        all.spawn(async move {
            let script = format!("echo out {n}; echo err {n} >&2; exit {}", n % 100);
            (n, cri.exec(&id, &["sh", "-c", &script], 0).await)
        });
    }
    // A connection of its own, as a kubelet's other client has.
    let (cri, over) = (w.daemon.cri().await, Arc::new(AtomicBool::new(false)));
    let asker = tokio::spawn({
        let over = over.clone();
        async move {
            let (mut longest, mut calls) = (Duration::ZERO, 0);
            while !over.load(Ordering::Relaxed) {
                let begun = Instant::now();
                cri.status(&other).await.unwrap();
                longest = longest.max(begun.elapsed());
                calls += 1;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            (longest, calls)
        }
    });
    let begun = Instant::now();
    while let Some(done) = all.join_next().await {
        let (n, out) = done.unwrap();
        let out = out.unwrap_or_else(|e| panic!("exec {n}: {e}"));
        assert_eq!(out.exit_code, n % 100);
        assert_eq!((out.stdout, out.stderr), (format!("out {n}\n").into(), format!("err {n}\n").into()));
    }
    let burst = begun.elapsed();
    over.store(true, Ordering::Relaxed);
    let (longest, calls) = asker.await.unwrap();
    println!("200 execs in {burst:?}; {calls} ContainerStatus meanwhile, the longest {longest:?}");
    // Far from having queued behind the execs, however slow the machine is.
    assert!(longest < Duration::from_secs(1).max(burst / 6), "ContainerStatus took {longest:?}, the execs {burst:?}");
    w.nothing_stays();
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_are_data_and_refusals_name_their_reason() {
    let w = world(sleeper("main")).await;
    for (cmd, code, stdout, stderr) in [
        (&["true"][..], 0, "", ""),
        (&["sh", "-c", "echo o; echo e >&2; exit 9"], 9, "o\n", "e\n"),
        (&["sh", "-c", "kill -9 $$"], 137, "", ""),
        (&["sh", "-c", "kill -TERM $$"], 143, "", ""),
        (&["sh", "-c", "exit 255"], 255, "", ""),
        (&["printf", "a\\0b\\377"], 0, "a\0b", ""),
    ] {
        let out = w.exec(cmd, 10).await.unwrap();
        assert_eq!(out.exit_code, code, "{cmd:?}");
        assert!(out.stdout.starts_with(stdout.as_bytes()) && out.stderr == stderr, "{cmd:?}: {out:?}");
    }
    let e = w.exec(&["/no/such-command"], 10).await.unwrap_err();
    assert!(e.message().contains("no/such-command"), "{e}");
    assert_eq!(w.exec(&[], 10).await.unwrap_err().code(), Code::InvalidArgument);
    w.nothing_stays();

    let unknown = w.cri.exec("0123456789ab", &["true"], 10).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    let other_config = w.daemon.pod("other");
    let pod = w.cri.run_pod(&other_config).await.unwrap();
    let id = w.cri.create(&pod, &container("brief", IMAGE, &["true"]), &other_config).await.unwrap();
    for state in ["CONTAINER_CREATED", "CONTAINER_EXITED"] {
        let e = w.cri.exec(&id, &["true"], 10).await.unwrap_err();
        assert_eq!(e.code(), Code::FailedPrecondition, "{e}");
        assert!(e.message().contains(&format!("is in {state} state")), "{e}");
        if state == "CONTAINER_CREATED" {
            w.cri.start(&id).await.unwrap();
            w.cri.exited(&id, BOUND).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_takes_its_command_along() {
    let w = world(sleeper("main")).await;
    for cmd in [&["sleep", "777"][..], &["sh", "-c", "sleep 888 & sleep 777"]] {
        let call = tokio::spawn({
            let (cri, id) = (w.daemon.cri().await, w.container.clone());
            let cmd: Vec<String> = cmd.iter().map(ToString::to_string).collect();
            async move { cri.exec(&id, &cmd.iter().map(String::as_str).collect::<Vec<_>>(), 0).await }
        });
        wait_for("the command runs", BOUND, || !w.runs("sleep 777").is_empty());
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        wait_for("the command is dead", BOUND, || w.runs("sleep 777").is_empty());
        w.nothing_stays();
    }
    // And one whose command has ended, while it waits for somebody else's pipe.
    let call = tokio::spawn({
        let (cri, id) = (w.daemon.cri().await, w.container.clone());
        async move { cri.exec(&id, &["sh", "-c", "sleep 999 &"], 0).await }
    });
    wait_for("the grandchild runs", BOUND, || !w.runs("sleep 999").is_empty());
    tokio::time::sleep(Duration::from_millis(300)).await;
    call.abort();
    w.nothing_stays();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_is_what_the_container_is() {
    let mut config = sleeper("main");
    config.envs = vec![KeyValue { key: "COLOUR".into(), value: "deep blue".into() }];
    config.working_dir = "/var/www".into();
    let security = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    security.run_as_user = Some(Int64Value { value: 1000 });
    security.supplemental_groups = vec![4242];
    security.no_new_privs = true;
    let w = world(config).await;
    let script = "echo \"$COLOUR\"; pwd; id -u; id -G; echo TERM=$TERM; cat; for n in 0 1 2; do test -t $n && echo tty; done; \
        readlink /proc/self/fd/0";
    let out = w.exec(&["sh", "-c", script], 10).await.unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert_eq!(
        text,
        "deep blue\n/var/www\n1000\n1000 100 4242\nTERM=\n/dev/null\n",
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let script = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/1/status; echo; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status";
    let out = w.exec(&["sh", "-c", script], 10).await.unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let (init, own) = text.split_once("\n\n").unwrap();
    assert_eq!(init, own.trim_end());
    assert!(init.contains("NoNewPrivs:\t1"), "{init}");
    w.nothing_stays();
}

#[tokio::test(flavor = "multi_thread")]
async fn there_is_no_terminal_even_in_a_container_with_one() {
    let mut config = sleeper("main");
    config.tty = true;
    config.stdin = true;
    let w = world(config).await;
    let script = "for n in 0 1 2; do test -t $n && echo tty $n; done; cat; echo out; echo err >&2";
    let out = w.exec(&["sh", "-c", script], 10).await.unwrap();
    assert_eq!((out.stdout, out.stderr), ("out\n".into(), "err\n".into()));
    w.nothing_stays();
}
