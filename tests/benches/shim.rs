//! The shims alone, side by side in one run: ours and containerd's, both with the
//! same runc, driven by ttrpc as containerd drives them.
//!
//! `cargo bench -p longshore-tests --bench shim`, or `make bench`; as root.
//! `LONGSHORE_BENCH_N` sets the number of rounds (default 300),
//! `LONGSHORE_BENCH_ASSERT=0` only prints.
//!
//! The limits (CONTRIBUTING.md): with 20 pods of one container, at most 1 MiB PSS per
//! shim; create and start, exec: the median below the peer's, p90 and p99 at most 1.1
//! of it; with a tolerance of 10 % for the noise of the machine.
#![allow(clippy::unwrap_used, reason = "a bench that lacks its fixtures has to stop")]

use longshore_tests::{bin_dir, pss_kib};
use proto::containerd::runc::v1::Options;
use proto::containerd::services::events::ttrpc::v1::{Events, EventsClient, ForwardRequest, register_events};
use proto::containerd::task::v3 as task;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use testkit::TempRoot;

const CALL: Duration = Duration::from_secs(60);
const PODS: usize = 20;
const CREATE: &str = "create + start";
const EXEC: &str = "exec";
const DELETE: &str = "kill + delete";
const STEPS: [&str; 4] = [CREATE, EXEC, DELETE, "create + start + delete"];

/// Takes the events, as a caller does.
struct Sink;

#[async_trait::async_trait]
impl Events for Sink {
    async fn forward(&self, _: &ttrpc::r#async::TtrpcContext, _: ForwardRequest) -> ttrpc::Result<()> {
        Ok(())
    }
}

/// What all shims share.
struct Bench {
    dir: TempRoot,
    cgroup: String,
}

impl Bench {
    fn new() -> Self {
        let dir = TempRoot::new();
        let bin = dir.path().join("rootfs/bin");
        for d in ["bin", "proc", "dev"] {
            std::fs::create_dir_all(dir.path().join("rootfs").join(d)).unwrap();
        }
        std::fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
        for applet in ["sleep", "true"] {
            std::fs::hard_link(bin.join("busybox"), bin.join(applet)).unwrap();
        }
        Self { dir, cgroup: format!("longshore-bench-{}", std::process::id()) }
    }

    fn events(&self) -> PathBuf {
        self.dir.path().join("events")
    }

    /// A bundle of a container that sleeps.
    fn bundle(&self, side: &str, id: &str) -> PathBuf {
        let bundle = self.dir.path().join(side).join(id);
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let config = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": process(&["/bin/sleep", "100000"]),
            "root": {"path": self.dir.path().join("rootfs"), "readonly": true},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "pid"}],
                "cgroupsPath": format!("/{}/{side}-{id}", self.cgroup),
            },
        });
        std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        bundle
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for controller in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let parent = controller.path().join(&self.cgroup);
            for child in std::fs::read_dir(&parent).into_iter().flatten().flatten() {
                let _ = std::fs::remove_dir(child.path());
            }
            let _ = std::fs::remove_dir(parent);
        }
    }
}

fn process(args: &[&str]) -> serde_json::Value {
    serde_json::json!({
        "user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "cwd": "/", "noNewPrivileges": true,
    })
}

/// One shim, and what it is asked.
struct Shim<'a> {
    bench: &'a Bench,
    side: &'static str,
    task: task::TaskClient,
    pid: u32,
    _log: std::fs::File,
}

impl<'a> Shim<'a> {
    async fn start(bench: &'a Bench, side: &'static str, binary: &Path, id: &str) -> Self {
        let bundle = bench.bundle(side, id);
        // The peer's shim ends where its caller reads no log.
        let log = bundle.join("log");
        assert!(Command::new("mkfifo").arg(&log).status().unwrap().success());
        let log = std::fs::OpenOptions::new().read(true).write(true).open(log).unwrap();
        let out = Command::new(binary)
            .args(["-namespace", "bench", "-id", id, "-publish-binary", "/bin/true", "-address"])
            .arg(bench.dir.path().join("c.sock"))
            .arg("start")
            .current_dir(&bundle)
            .env("TTRPC_ADDRESS", bench.events())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(out.status.success(), "{out:?}");
        let text = String::from_utf8(out.stdout).unwrap();
        let address = match serde_json::from_str::<serde_json::Value>(&text) {
            Ok(answer) => answer["address"].as_str().unwrap().to_string(),
            Err(_) => text.trim().to_string(),
        };
        let socket = address.trim_start_matches("unix://").to_string();
        let stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
        let client = ttrpc::r#async::Client::new(stream.into());
        // The version that both speak.
        let task = task::TaskClient::new(client, proto::TASK_SERVICES[1]);
        let pid = task.connect(CALL, task::ConnectRequest { id: id.into() }).await.unwrap().shim_pid;
        Self { bench, side, task, pid, _log: log }
    }

    async fn create(&self, id: &str) {
        let bundle = self.bench.bundle(self.side, id);
        let root = self.bench.dir.path().join(self.side).join("runc").display().to_string();
        let options = Options { root, ..Default::default() };
        let request = task::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            options: Some(proto::pack("containerd.runc.v1.Options", &options)),
            ..Default::default()
        };
        self.task.create(CALL, request).await.unwrap();
        self.run(id, "").await;
    }

    async fn run(&self, id: &str, exec: &str) {
        self.task.start(CALL, task::StartRequest { id: id.into(), exec_id: exec.into() }).await.unwrap();
    }

    async fn end(&self, id: &str, exec: &str) {
        self.task.wait(CALL, task::WaitRequest { id: id.into(), exec_id: exec.into() }).await.unwrap();
        self.task.delete(CALL, task::DeleteRequest { id: id.into(), exec_id: exec.into() }).await.unwrap();
    }

    async fn exec(&self, id: &str) {
        let value = process(&["/bin/true"]).to_string().into_bytes();
        let type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process".into();
        let request = task::ExecProcessRequest {
            id: id.into(),
            exec_id: "e".into(),
            spec: Some(prost_types::Any { type_url, value }),
            ..Default::default()
        };
        self.task.exec(CALL, request).await.unwrap();
        self.run(id, "e").await;
        self.end(id, "e").await;
    }

    async fn delete(&self, id: &str) {
        let request = task::KillRequest { id: id.into(), signal: 9, ..Default::default() };
        self.task.kill(CALL, request).await.unwrap();
        self.end(id, "").await;
    }

    async fn shutdown(self, id: &str) {
        let _ = self.task.shutdown(CALL, task::ShutdownRequest { id: id.into(), now: false }).await;
    }
}

/// One container's life; milliseconds by step.
async fn life(shim: &Shim<'_>, n: usize) -> BTreeMap<&'static str, f64> {
    let id = format!("c{n}");
    let mut took = BTreeMap::new();
    let mut began = Instant::now();
    let mut lap = |step| {
        took.insert(step, began.elapsed().as_secs_f64() * 1000.0);
        began = Instant::now();
    };
    shim.create(&id).await;
    lap(CREATE);
    shim.exec(&id).await;
    lap(EXEC);
    shim.delete(&id).await;
    lap(DELETE);
    took.insert(STEPS[3], took[CREATE] + took[DELETE]);
    took
}

/// KiB of PSS: a shim with one container beside nineteen others, a shim with ten
/// containers.
async fn memory(bench: &Bench, side: &'static str, binary: &Path) -> (f64, f64) {
    let mut shims = Vec::new();
    for n in 0..PODS {
        let id = format!("p{n}");
        let shim = Shim::start(bench, side, binary, &id).await;
        shim.create(&id).await;
        shims.push((shim, id));
    }
    let mean = |all: &[(Shim, String)]| {
        let sum: u64 = all.iter().map(|s| pss_kib(s.0.pid)).sum();
        #[allow(clippy::cast_precision_loss)]
        let mean = sum as f64 / all.len() as f64;
        mean
    };
    let one = mean(&shims);
    for n in 1..10 {
        shims[0].0.create(&format!("m{n}")).await;
    }
    let ten = mean(&shims[..1]);
    for n in 1..10 {
        shims[0].0.delete(&format!("m{n}")).await;
    }
    for (shim, id) in shims {
        shim.delete(&id).await;
        shim.shutdown(&id).await;
    }
    (one, ten)
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

/// Both shims' times by step, the rounds in turn.
async fn times(
    bench: &Bench,
    ours: &Path,
    theirs: &Path,
    rounds: usize,
) -> BTreeMap<&'static str, (Vec<f64>, Vec<f64>)> {
    let a = Shim::start(bench, "ours", ours, "shim").await;
    let b = Shim::start(bench, "theirs", theirs, "shim").await;
    let mut times: BTreeMap<&str, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for n in 0..rounds + 5 {
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
    println!("KiB PSS of a shim after {} lives: {} / {}", rounds + 5, pss_kib(a.pid), pss_kib(b.pid));
    a.shutdown("shim").await;
    b.shutdown("shim").await;
    for both in times.values_mut() {
        both.0.sort_by(f64::total_cmp);
        both.1.sort_by(f64::total_cmp);
    }
    times
}

async fn run() -> ExitCode {
    let rounds: usize = std::env::var("LONGSHORE_BENCH_N").ok().and_then(|n| n.parse().ok()).unwrap_or(300);
    let bench = Bench::new();
    let service = register_events(Arc::new(Sink), EventsClient::SERVICE);
    let address = format!("unix://{}", bench.events().display());
    let mut server = ttrpc::r#async::Server::new().bind(&address).unwrap().register_service(service);
    server.start().await.unwrap();
    let ours = bin_dir().join("containerd-shim-longshore-v2");
    let theirs = PathBuf::from("/usr/bin/containerd-shim-runc-v2");

    println!("containerd-shim-longshore-v2 against containerd-shim-runc-v2, {rounds} rounds each, interleaved\n");
    let times = times(&bench, &ours, &theirs, rounds).await;
    let (one, ten) = memory(&bench, "ours", &ours).await;
    let (their_one, their_ten) = memory(&bench, "theirs", &theirs).await;

    println!("\nms (ratio)\n{:<24} {:>24} {:>24} {:>24}", "", "p50", "p90", "p99");
    let mut failures = Vec::new();
    for step in STEPS {
        let (x, y) = &times[step];
        let mut line = format!("{step:<24}");
        for (name, p, limit) in [("p50", 0.5, 1.0), ("p90", 0.9, 1.1), ("p99", 0.99, 1.1)] {
            let (u, v) = (percentile(x, p), percentile(y, p));
            let cell = format!("{u:.2} / {v:.2} ({:.2})", u / v);
            line.push_str(&format!(" {cell:>24}"));
            if (step == CREATE || step == EXEC) && u / v > limit * 1.1 {
                failures.push(format!("{step}: {name} is {:.2} of the peer's, at most {limit} is allowed", u / v));
            }
        }
        println!("{line}");
    }
    println!("\nKiB PSS per shim with {PODS} pods of one container: {one:.0} / {their_one:.0}");
    println!("KiB PSS of a shim with ten containers: {ten:.0} / {their_ten:.0}");
    if one > 1024.0 * 1.1 {
        failures.push(format!("a shim has {one:.0} KiB, at most 1024 are allowed"));
    }
    for failure in &failures {
        println!("LIMIT {failure}");
    }
    let asserting = std::env::var("LONGSHORE_BENCH_ASSERT").as_deref() != Ok("0");
    if failures.is_empty() || !asserting { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
