//! ExecSync and memory with our shim, the original conmon and ours, in one run: one
//! daemon, a handler and a pod each, the calls in turn.
//!
//! `cargo bench -p longshore-tests --bench monitors`, or `make bench`; as root.
//! `LONGSHORE_BENCH_N` sets the number of calls (default 300). It asserts nothing.
#![allow(clippy::unwrap_used, reason = "a bench that lacks its fixtures has to stop")]

use longshore_tests::{Cri, Daemon, busybox, container, pss_kib};
use proto::cri::RunPodSandboxRequest;
use std::time::Instant;

const IMAGE: &str = "localhost/bench:1";
const HANDLERS: [&str; 3] = ["shim", "conmon", "longshore-conmon"];
/// Containers of a handler at once where memory is measured.
const CONTAINERS: usize = 20;

const CONFIG: &str = "[runtime]\nhandler = \"shim\"\n[runtimes.conmon]\nmonitor = \"/usr/bin/conmon\"\n\
                      [runtimes.longshore-conmon]\nmonitor = \"longshore-conmon\"\n";

async fn pod(daemon: &Daemon, cri: &Cri, handler: &str, n: usize) -> (String, String) {
    let config = daemon.pod(&format!("{handler}-{n}"));
    let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
    let pod = cri.runtime.clone().run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
    let id = cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    (pod, id)
}

/// PSS of the processes that stand behind the containers of a handler, in KiB.
fn memory(daemon: &Daemon, handler: &str) -> Vec<u64> {
    let wanted = match handler {
        "shim" => "containerd-shim-longshore-v2",
        "conmon" => "/usr/bin/conmon",
        other => other,
    };
    daemon.runs(wanted).into_iter().map(pss_kib).collect()
}

fn main() {
    // `cargo test --benches` runs this too, with a flag that asks for no measuring.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(run());
}

async fn run() {
    let calls: usize = std::env::var("LONGSHORE_BENCH_N").ok().and_then(|n| n.parse().ok()).unwrap_or(300);
    let daemon = Daemon::with(CONFIG).await;
    daemon.import(&busybox(), IMAGE);
    let cri = daemon.cri().await;
    let mut containers = Vec::new();
    for handler in HANDLERS {
        containers.push(pod(&daemon, &cri, handler, 0).await.1);
    }
    let mut times = vec![Vec::new(); HANDLERS.len()];
    for n in 0..calls + 5 {
        for turn in 0..HANDLERS.len() {
            let at = (n + turn) % HANDLERS.len();
            let begun = Instant::now();
            let answer = cri.exec(&containers[at], &["/bin/true"], 10).await.unwrap();
            assert_eq!(answer.exit_code, 0);
            // The first ones warm all up.
            if n >= 5 {
                times[at].push(begun.elapsed().as_secs_f64() * 1000.0);
            }
        }
    }
    for handler in HANDLERS {
        for n in 1..CONTAINERS {
            pod(&daemon, &cri, handler, n).await;
        }
    }
    println!("\nExecSync true, {calls} calls each, in turn; ms. Memory: PSS of what stands behind a container, KiB\n");
    println!("{:<18} {:>8} {:>8} {:>8} {:>10}", "", "p50", "p90", "p99", "PSS");
    for (handler, mut ms) in HANDLERS.into_iter().zip(times) {
        ms.sort_by(f64::total_cmp);
        let at = |p: usize| ms[(ms.len() - 1) * p / 100];
        let kib = memory(&daemon, handler);
        let mean = kib.iter().sum::<u64>() / u64::try_from(kib.len().max(1)).unwrap();
        println!("{handler:<18} {:>8.2} {:>8.2} {:>8.2} {:>10} (of {})", at(50), at(90), at(99), mean, kib.len());
    }
}
