//! The network part of RunPodSandbox: the built-in network against Debian's CNI plugins
//! bridge, host-local and portmap, through the same daemon and in turn; then 50 pods at
//! once with each. All of it in a network namespace of its own, with IPv4 alone: plugins
//! wait a second or two for duplicates of IPv6 addresses.
//!
//! `LONGSHORE_BENCH_N` sets the number of rounds (default 300), and
//! `LONGSHORE_BENCH_ASSERT=0` only prints. The limit is ours alone: the built-in network's
//! median is below 5 ms.
#![allow(clippy::unwrap_used, reason = "a bench that lacks its fixtures has to stop")]

use longshore_tests::{Cri, Daemon, NodeNet};
use proto::cri::{NamespaceMode, PodSandboxConfig, PortMapping, StatusRequest};
use serde_json::Value;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use testkit::TempRoot;

/// Pods that are made at once.
const AT_ONCE: usize = 50;
/// The limit of the built-in network's median, in milliseconds.
const LIMIT: f64 = 5.0;

struct Rig {
    daemon: Daemon,
    cri: Cri,
    conf: PathBuf,
    text: String,
    _net: NodeNet,
}

impl Rig {
    async fn start() -> Self {
        let root = TempRoot::new();
        let (conf, ipam) = (root.join("net.d"), root.join("ipam"));
        let config = format!(
            "[network]\nmode = \"auto\"\n[network.cni]\nconf_dir = {conf:?}\nbin_dirs = [\"/usr/lib/cni\"]\n\
             [network.builtin]\nranges = [\"10.85.0.0/16\"]\n"
        );
        let text = format!(
            r#"{{"cniVersion":"1.0.0","name":"bench","plugins":[
            {{"type":"bridge","bridge":"cni0","isGateway":true,"ipMasq":true,"hairpinMode":true,"ipam":{{"type":"host-local",
            "dataDir":{ipam:?},"ranges":[[{{"subnet":"10.86.0.0/16"}}]],"routes":[{{"dst":"0.0.0.0/0"}}]}}}},
            {{"type":"portmap","capabilities":{{"portMappings":true}}}}]}}"#
        );
        let net = NodeNet::new();
        let daemon = Daemon::in_netns(root, &config, net.path()).await;
        let cri = daemon.cri().await;
        Self { daemon, cri, conf, text, _net: net }
    }

    /// Lets the next pods be attached by plugins, or by the daemon.
    async fn by_plugins(&self, plugins: bool) {
        let file = self.conf.join("10-bench.conflist");
        if plugins {
            let new = self.daemon.dir().join("new");
            std::fs::write(&new, &self.text).unwrap();
            std::fs::rename(new, file).unwrap();
        } else {
            let _ = std::fs::remove_file(file);
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let status = self.cri.runtime.clone().status(StatusRequest { verbose: true }).await.unwrap().into_inner();
            let info: Value = serde_json::from_str(&status.info["info"]).unwrap();
            if info["network"]["cni"].is_null() != plugins {
                return;
            }
            assert!(Instant::now() < deadline, "the configuration is not seen: {info}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn config(&self, n: usize) -> PodSandboxConfig {
        let mut config = self.daemon.pod(&format!("net-{n}"));
        let options = config.linux.as_mut().and_then(|l| l.security_context.as_mut()).unwrap();
        options.namespace_options.as_mut().unwrap().network = NamespaceMode::Pod.into();
        let host_port = i32::try_from(20_000 + n).unwrap();
        config.port_mappings = vec![PortMapping { container_port: 80, host_port, ..Default::default() }];
        config
    }

    /// Milliseconds of the span "network" of a pod's start.
    fn span(&self, pod: &str) -> f64 {
        let (code, out, err) = self.daemon.cli(&["timeline", "-o", "json", pod]);
        assert_eq!(code, 0, "{err}");
        let timeline: Value = serde_json::from_str(&out).unwrap();
        let span = timeline["spans"].as_array().unwrap().iter().find(|s| s["step"] == "network").unwrap();
        let duration = &span["duration"];
        let ns = duration.as_str().and_then(|d| d.parse().ok()).or_else(|| duration.as_f64());
        ns.unwrap_or_else(|| panic!("{span}")) / 1e6
    }

    async fn remove(&self, pod: &str) {
        self.cri.stop_pod(pod).await.unwrap();
        self.cri.remove_pod(pod).await.unwrap();
    }

    /// Network part, RunPodSandbox and StopPodSandbox of one pod, in milliseconds.
    async fn one(&self, n: usize) -> [f64; 3] {
        let config = self.config(n);
        let began = Instant::now();
        let pod = self.cri.run_pod(&config).await.unwrap();
        let whole = began.elapsed().as_secs_f64() * 1000.0;
        let network = self.span(&pod);
        let began = Instant::now();
        self.cri.stop_pod(&pod).await.unwrap();
        let stop = began.elapsed().as_secs_f64() * 1000.0;
        self.remove(&pod).await;
        [network, whole, stop]
    }

    /// All at once: seconds until the last one stands, and their network parts.
    async fn many(&self, from: usize) -> (f64, Vec<f64>) {
        let began = Instant::now();
        let calls: Vec<_> = (from..from + AT_ONCE)
            .map(|n| {
                let (cri, config) = (self.cri.clone(), self.config(n));
                tokio::spawn(async move { cri.run_pod(&config).await.unwrap() })
            })
            .collect();
        let mut pods = Vec::new();
        for call in calls {
            pods.push(call.await.unwrap());
        }
        let took = began.elapsed().as_secs_f64();
        let mut spans: Vec<f64> = pods.iter().map(|p| self.span(p)).collect();
        for pod in &pods {
            self.remove(pod).await;
        }
        spans.sort_by(f64::total_cmp);
        (took, spans)
    }
}

fn percentile(sorted: &[f64], p: f64) -> f64 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let at = ((sorted.len() - 1) as f64 * p).round() as usize;
    sorted[at]
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
    let rig = Rig::start().await;
    let mut times = [[const { Vec::new() }; 3], [const { Vec::new() }; 3]];
    for n in 0..rounds + 3 {
        for plugins in [n % 2 == 0, n % 2 != 0] {
            rig.by_plugins(plugins).await;
            let took = rig.one(n).await;
            // The first rounds warm both up.
            if n >= 3 {
                for (all, ms) in times[usize::from(plugins)].iter_mut().zip(took) {
                    all.push(ms);
                }
            }
        }
    }
    println!("\nbuilt-in / CNI bridge + host-local + portmap, {rounds} rounds each, in turn; ms (ratio)\n");
    println!("{:<18} {:>24} {:>24} {:>24}", "", "p50", "p90", "p99");
    times.iter_mut().flatten().for_each(|all| all.sort_by(f64::total_cmp));
    for (at, what) in ["network part", "RunPodSandbox", "StopPodSandbox"].iter().enumerate() {
        let cell = |p| {
            let (x, y) = (percentile(&times[0][at], p), percentile(&times[1][at], p));
            format!("{x:.2} / {y:.2} ({:.2})", x / y)
        };
        println!("{what:<18} {:>24} {:>24} {:>24}", cell(0.5), cell(0.9), cell(0.99));
    }
    println!();
    for (plugins, name) in [(false, "built-in"), (true, "plugins")] {
        rig.by_plugins(plugins).await;
        let (took, spans) = rig.many(1000 * (1 + usize::from(plugins))).await;
        println!(
            "{AT_ONCE} pods at once, {name}: all stand after {took:.2} s; network part p50 {:.1}, at most {:.1} ms",
            percentile(&spans, 0.5),
            percentile(&spans, 1.0)
        );
    }
    let median = percentile(&times[0][0], 0.5);
    let asserting = std::env::var("LONGSHORE_BENCH_ASSERT").as_deref() != Ok("0");
    if median > LIMIT * 1.1 {
        println!("LIMIT the built-in network takes {median:.2} ms, at most {LIMIT} are allowed");
        if asserting {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
