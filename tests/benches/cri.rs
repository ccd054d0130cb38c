//! Side by side with Debian's containerd and runc, in one run: pods in the node's
//! network, the two runtimes in turn, each call timed at a CRI client.
//!
//! `cargo bench -p longshore-tests`, or `make bench`; as root. `LONGSHORE_BENCH_N`
//! sets the number of rounds (default 300), `LONGSHORE_BENCH_ASSERT=0` only prints.
//!
//! The limits are those of the project (CONTRIBUTING.md): RunPodSandbox and memory
//! per pod below the peer's; every other median at most 1.1 of it, with a tolerance
//! of 10 % for the noise of the machine.
#![allow(clippy::unwrap_used, reason = "a bench that lacks its fixtures has to stop")]

use longshore_tests::{Containerd, Cri, Daemon, busybox, children, command_line, container, pod, pss_kib};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use testkit::ImageBuilder;

const IMAGE: &str = "localhost/bench:1";
/// Pods that stand at once where memory is measured.
const PODS: usize = 20;
const STEPS: [&str; 9] = [
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "ExecSync true",
    "StopContainer",
    "RemoveContainer",
    "StopPodSandbox",
    "RemovePodSandbox",
    "stop and remove",
];

/// The peer's sandbox image: a process that sleeps, as small as a C compiler can
/// make it, as Kubernetes' own is.
fn pause(dir: &Path) -> ImageBuilder {
    let source = dir.join("pause.c");
    std::fs::write(&source, "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n").unwrap();
    let binary = dir.join("pause");
    let compiled = Command::new("cc").args(["-Os", "-static", "-s", "-o"]).arg(&binary).arg(&source).status().unwrap();
    assert!(compiled.success());
    ImageBuilder::scratch().file("pause", &std::fs::read(&binary).unwrap(), 0o755).entrypoint(["/pause"])
}

/// One pod's whole life; milliseconds by step.
async fn life(cri: &Cri, n: usize) -> BTreeMap<&'static str, f64> {
    let mut took = BTreeMap::new();
    let config = pod(&format!("bench-{n}"));
    macro_rules! step {
        ($name:literal, $call:expr) => {{
            let began = Instant::now();
            let done = $call.await.unwrap_or_else(|e| panic!("{}: {e}", $name));
            took.insert($name, began.elapsed().as_secs_f64() * 1000.0);
            done
        }};
    }
    let pod_id = step!("RunPodSandbox", cri.run_pod(&config));
    let c = container("main", IMAGE, &["/bin/sleep", "1000"]);
    let id = step!("CreateContainer", cri.create(&pod_id, &c, &config));
    step!("StartContainer", cri.start(&id));
    let out = step!("ExecSync true", cri.exec(&id, &["/bin/true"], 10));
    assert_eq!(out.exit_code, 0);
    step!("StopContainer", cri.stop(&id, 0));
    step!("RemoveContainer", cri.remove(&id));
    step!("StopPodSandbox", cri.stop_pod(&pod_id));
    step!("RemovePodSandbox", cri.remove_pod(&pod_id));
    let ends = ["StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox"];
    took.insert("stop and remove", ends.iter().map(|s| took[s]).sum());
    took
}

fn percentile(sorted: &[f64], p: f64) -> f64 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let at = ((sorted.len() - 1) as f64 * p).round() as usize;
    sorted[at]
}

/// KiB of PSS per pod of a process of its own: shim and, where there is one, pause.
async fn memory_per_pod(cri: &Cri, shims: impl Fn() -> Vec<u32>) -> (f64, f64) {
    let mut pods = Vec::new();
    for n in 0..PODS {
        let config = pod(&format!("memory-{n}"));
        let id = cri.run_pod(&config).await.unwrap();
        cri.run(&id, &container("main", IMAGE, &["/bin/sleep", "1000"]), &config).await.unwrap();
        pods.push(id);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let shims = shims();
    assert_eq!(shims.len(), PODS, "shims that were found");
    let shim: u64 = shims.iter().map(|p| pss_kib(*p)).sum();
    let pauses = shims.iter().flat_map(|p| children(*p)).filter(|p| command_line(*p) == "/pause");
    let pause: u64 = pauses.map(pss_kib).sum();
    for id in pods {
        cri.stop_pod(&id).await.unwrap();
        cri.remove_pod(&id).await.unwrap();
    }
    #[allow(clippy::cast_precision_loss)]
    let each = |kib: u64| kib as f64 / PODS as f64;
    (each(shim), each(shim + pause))
}

/// Milliseconds that `timeout: 1` on `sleep 60` takes, the longest of three.
async fn exec_timeout(cri: &Cri, id: &str) -> f64 {
    let mut longest: f64 = 0.0;
    for _ in 0..3 {
        let began = Instant::now();
        let e = cri.exec(id, &["/bin/sleep", "60"], 1).await.unwrap_err();
        assert_eq!(e.code(), tonic::Code::DeadlineExceeded, "{e}");
        longest = longest.max(began.elapsed().as_secs_f64() * 1000.0);
    }
    longest
}

/// Milliseconds that ContainerStatus of `bystander` takes, sorted, while 200 execs
/// at once run in `id`, three times, 300 samples at least.
///
/// The bystander has a thread and a connection of its own: what is measured is the
/// daemon, not a client that is busy with 200 calls.
async fn status_beside_execs(cri: &Cri, socket: &Path, id: &str, bystander: &str) -> Vec<f64> {
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, socket, bystander) = (stop.clone(), socket.to_path_buf(), bystander.to_string());
    let sampler = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let cri = Cri::connect(&socket).await.unwrap();
            let mut took = Vec::new();
            while !stopped.load(Ordering::Relaxed) || took.len() < 300 {
                let began = Instant::now();
                cri.status(&bystander).await.unwrap();
                took.push(began.elapsed().as_secs_f64() * 1000.0);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            took
        })
    });
    for _ in 0..3 {
        let execs: Vec<_> = (0..200)
            .map(|_| {
                let (cri, id) = (cri.clone(), id.to_string());
                tokio::spawn(async move { cri.exec(&id, &["/bin/true"], 0).await.map(|answer| answer.exit_code) })
            })
            .collect();
        for exec in execs {
            assert_eq!(exec.await.unwrap().unwrap(), 0);
        }
    }
    stop.store(true, Ordering::Relaxed);
    let mut took = sampler.join().unwrap();
    took.sort_by(f64::total_cmp);
    took
}

/// Limits that are ours alone, in milliseconds.
async fn own_limits(cri: &Cri, socket: &Path, failures: &mut Vec<String>) {
    let (one, other) = (pod("limits-1"), pod("limits-2"));
    let pods = [cri.run_pod(&one).await.unwrap(), cri.run_pod(&other).await.unwrap()];
    let sleeper = container("main", IMAGE, &["/bin/sleep", "1000"]);
    let id = cri.run(&pods[0], &sleeper, &one).await.unwrap();
    let bystander = cri.run(&pods[1], &sleeper, &other).await.unwrap();
    let timeout = exec_timeout(cri, &id).await;
    let status = status_beside_execs(cri, socket, &id, &bystander).await;
    for pod in &pods {
        cri.stop_pod(pod).await.unwrap();
        cri.remove_pod(pod).await.unwrap();
    }
    let longest = percentile(&status, 1.0);
    println!("\nExecSync with a timeout of 1 s: {timeout:.0} ms at most");
    println!(
        "ContainerStatus beside 200 execs at once, n = {}: p50 {:.1}, p99 {:.1}, at most {longest:.1} ms",
        status.len(),
        percentile(&status, 0.5),
        percentile(&status, 0.99)
    );
    for (what, ms, limit) in [("an exec's timeout of 1 s", timeout, 1500.0), ("ContainerStatus", longest, 100.0)] {
        if ms > limit * 1.1 {
            failures.push(format!("{what} takes {ms:.0} ms, at most {limit} are allowed"));
        }
    }
}

fn main() -> ExitCode {
    // `cargo test --benches` runs this too, with a flag that asks for no measuring.
    if !std::env::args().any(|a| a == "--bench") {
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(run())
}

async fn run() -> ExitCode {
    let rounds: usize = std::env::var("LONGSHORE_BENCH_N").ok().and_then(|n| n.parse().ok()).unwrap_or(300);
    let ours = Daemon::start().await;
    ours.import(&busybox(), IMAGE);
    let peer = Containerd::start("io.containerd.runc.v2", &pause(ours.dir())).await;
    peer.import(&busybox(), IMAGE);
    let (a, b) = (ours.cri().await, Cri::connect(&peer.socket()).await.unwrap());
    let idle = (pss_kib(ours.pid()), pss_kib(peer.pid()));

    let mut times: BTreeMap<&str, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for n in 0..rounds + 5 {
        // In turn, and in turn who is first.
        let (x, y) = if n % 2 == 0 {
            let x = life(&a, n).await;
            (x, life(&b, n).await)
        } else {
            let y = life(&b, n).await;
            (life(&a, n).await, y)
        };
        // The first rounds warm both up.
        if n >= 5 {
            for step in STEPS {
                let both = times.entry(step).or_default();
                both.0.push(x[step]);
                both.1.push(y[step]);
            }
        }
    }
    let (shim, own) = memory_per_pod(&a, || ours.shims()).await;
    let (their_shim, theirs) = memory_per_pod(&b, || peer.shims()).await;
    let after = pss_kib(ours.pid());
    drop(peer);

    let mut failures = Vec::new();
    own_limits(&a, &ours.socket(), &mut failures).await;
    println!("\nlongshore against containerd 1.6 + runc, {rounds} rounds each, interleaved; ms (ratio)\n");
    println!("{:<18} {:>24} {:>24} {:>24}", "", "p50", "p90", "p99");
    for step in STEPS {
        let (mut x, mut y) = times.remove(step).unwrap();
        x.sort_by(f64::total_cmp);
        y.sort_by(f64::total_cmp);
        let cell = |p| {
            let (u, v) = (percentile(&x, p), percentile(&y, p));
            format!("{u:.2} / {v:.2} ({:.2})", u / v)
        };
        println!("{step:<18} {:>24} {:>24} {:>24}", cell(0.5), cell(0.9), cell(0.99));
        // The end of a pod is judged as a whole: who deletes the task, Stop or
        // Remove, is each runtime's own choice.
        if step.starts_with("Stop") || step.starts_with("Remove") {
            continue;
        }
        let ratio = percentile(&x, 0.5) / percentile(&y, 0.5);
        let limit = if step == "RunPodSandbox" { 1.0 } else { 1.1 };
        if ratio > limit * 1.1 {
            failures.push(format!("{step}: the median is {ratio:.2} of the peer's, at most {limit} is allowed"));
        }
    }
    println!(
        "\nmemory, KiB PSS with {PODS} pods of one container: {own:.0} / {theirs:.0} per pod ({:.2})",
        own / theirs
    );
    println!(
        "  of it shims: {shim:.0} / {their_shim:.0}; daemons idle: {} / {}; ours after all: {after}",
        idle.0, idle.1
    );
    for (what, kib, limit) in
        [("the shim", shim, 3072.0), ("the idle daemon", f64::from(u32::try_from(idle.0).unwrap()), 25600.0)]
    {
        if kib > limit {
            failures.push(format!("{what} has {kib:.0} KiB, at most {limit} are allowed"));
        }
    }
    if own >= theirs {
        failures.push(format!("memory per pod: {own:.0} KiB, the peer has {theirs:.0}"));
    }
    for failure in &failures {
        println!("LIMIT {failure}");
    }
    let asserting = std::env::var("LONGSHORE_BENCH_ASSERT").as_deref() != Ok("0");
    if failures.is_empty() || !asserting { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
