//! kill -9 of a daemon with 100 pods, and its restart to the first ListContainers that
//! has all of them running; then the daemon's memory.
//!
//! `cargo bench -p longshore-tests --bench restart`, or `make bench`; as root.
//! `LONGSHORE_BENCH_PODS` sets the number of pods, `LONGSHORE_BENCH_ASSERT=0` only prints.
#![allow(clippy::unwrap_used, reason = "a bench that lacks its fixtures has to stop")]

use longshore_tests::{Daemon, busybox, container, pss_kib};
use proto::cri::{ContainerState, ListContainersRequest};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

const IMAGE: &str = "localhost/bench:1";
/// So many restarts.
const ROUNDS: usize = 10;
/// What each may take.
const LIMIT: Duration = Duration::from_secs(1);

fn main() {
    // `cargo test --benches` runs this too, with a flag that asks for no measuring.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(run());
}

async fn running(daemon: &Daemon) -> usize {
    let listed = daemon.cri().await.runtime.clone().list_containers(ListContainersRequest::default()).await.unwrap();
    let all = listed.into_inner().containers;
    all.iter().filter(|c| c.state() == ContainerState::ContainerRunning).count()
}

async fn run() {
    let number = |name: &str, usual| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(usual);
    let pods: usize = number("LONGSHORE_BENCH_PODS", 100);
    let mut daemon = Daemon::start().await;
    daemon.import(&busybox(), IMAGE);
    let idle = pss_kib(daemon.pid());
    let mut made = JoinSet::new();
    for n in 0..pods {
        let (cri, config) = (daemon.cri().await, daemon.pod(&format!("restart-{n}")));
        made.spawn(async move {
            let pod = cri.run_pod(&config).await.unwrap();
            cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
        });
        // As many at a time as a kubelet has under way.
        if made.len() == 8 {
            made.join_next().await.unwrap().unwrap();
        }
    }
    while let Some(done) = made.join_next().await {
        done.unwrap();
    }
    assert_eq!(running(&daemon).await, pods);
    let before = pss_kib(daemon.pid());
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        daemon.kill();
        let begun = Instant::now();
        daemon.begin().await;
        assert_eq!(running(&daemon).await, pods, "the first list has all");
        times.push(begun.elapsed());
    }
    let after = pss_kib(daemon.pid());
    times.sort();
    println!("\nRestart after kill -9 to the first complete ListContainers, {pods} pods of one container\n");
    println!("median {:.0?}, longest {:.0?}, of {ROUNDS}", times[ROUNDS / 2], times[ROUNDS - 1]);
    println!("the daemon's PSS: {idle} KiB without pods, {before} KiB before, {after} KiB after the last restart");
    if std::env::var("LONGSHORE_BENCH_ASSERT").as_deref() != Ok("0") {
        assert!(times[ROUNDS - 1] < LIMIT, "a restart takes longer than {LIMIT:?}");
    }
}
