//! longshore-conmon side by side with Debian's conmon, in one run: memory with 20 up,
//! and how long an exec takes through each, in turn.
//!
//! `cargo bench -p longshore-tests --bench monitor`, or `make bench`; as root.
//! `LONGSHORE_BENCH_N` sets the number of execs of each (default 300),
//! `LONGSHORE_BENCH_ASSERT=0` only prints. The limits are in CONTRIBUTING.md.
#![allow(clippy::unwrap_used, reason = "a bench that lacks its fixtures has to stop")]

use longshore_tests::{bin_dir, own_memory_kib, pss_kib, wait_for};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use testkit::TempRoot;

/// Containers of each that are up at once.
const UP: usize = 20;
/// KiB of PSS that one of ours may have with so many up.
const PSS: f64 = 410.0;
const SOON: Duration = Duration::from_secs(60);

/// One of the two, with its containers.
struct Side {
    name: &'static str,
    conmon: PathBuf,
    root: TempRoot,
    monitors: Vec<u32>,
}

impl Side {
    fn new(name: &'static str, conmon: PathBuf) -> Self {
        let root = TempRoot::new();
        let bin = root.join("rootfs/bin");
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::create_dir_all(root.join("rootfs/proc")).unwrap();
        for dir in ["exits", "sockets"] {
            std::fs::create_dir(root.join(dir)).unwrap();
        }
        std::fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
        for applet in ["sleep", "true"] {
            std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
        }
        let process = serde_json::json!({"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
        std::fs::write(root.join("process.json"), process.to_string()).unwrap();
        let mut side = Self { name, conmon, root, monitors: Vec::new() };
        side.monitors = (0..UP).map(|n| side.start(n)).collect();
        side
    }

    fn id(&self, n: usize) -> String {
        format!("bench-{}-{}-{n}", self.name, std::process::id())
    }

    fn runc(&self, args: &[&str]) {
        let out = Command::new("runc").arg("--root").arg(self.root.join("runc")).args(args).output().unwrap();
        assert!(out.status.success(), "runc {args:?}: {out:?}");
    }

    fn monitor(&self, n: usize) -> Command {
        let mut c = Command::new(&self.conmon);
        c.args(["-c", &self.id(n), "-u", &self.id(n), "-r", "/usr/sbin/runc", "--runtime-arg"]);
        c.arg(format!("--root={}", self.root.join("runc").display()));
        c.arg("--socket-dir-path").arg(self.root.join("sockets"));
        c.stdin(Stdio::null());
        c
    }

    /// Starts a container; returns its monitor's pid.
    fn start(&self, n: usize) -> u32 {
        let id = self.id(n);
        let bundle = self.root.join(format!("bundle-{n}"));
        std::fs::create_dir(&bundle).unwrap();
        let made = Command::new("runc").args(["spec", "--bundle"]).arg(&bundle).status().unwrap();
        assert!(made.success());
        let config = bundle.join("config.json");
        let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        spec["process"]["args"] = serde_json::json!(["/bin/sleep", "100000"]);
        spec["process"]["terminal"] = false.into();
        spec["process"].as_object_mut().unwrap().remove("rlimits");
        spec["root"]["path"] = self.root.join("rootfs").to_str().unwrap().into();
        spec["linux"]["cgroupsPath"] = format!("/{}/{id}", self.cgroup()).into();
        std::fs::write(&config, spec.to_string()).unwrap();
        let (pid, own) = (bundle.join("pid"), bundle.join("conmon.pid"));
        let mut c = self.monitor(n);
        c.arg("-b").arg(&bundle).arg("-p").arg(&pid).arg("-P").arg(&own);
        c.arg("--exit-dir").arg(self.root.join("exits")).arg("-l").arg(bundle.join("log"));
        assert!(c.status().unwrap().success());
        wait_for("create", SOON, || {
            let out = Command::new("runc").arg("--root").arg(self.root.join("runc")).args(["state", &id]).output();
            String::from_utf8_lossy(&out.unwrap().stdout).contains("\"created\"")
        });
        self.runc(&["start", &id]);
        std::fs::read_to_string(own).unwrap().trim().parse().unwrap()
    }

    fn cgroup(&self) -> String {
        format!("longshore-bench-{}-{}", std::process::id(), self.name)
    }

    /// Milliseconds of `true` in the first container, from the monitor's start to its end.
    fn exec(&self) -> f64 {
        let mut c = self.monitor(0);
        c.args(["--sync", "-e", "--exec-process-spec"]).arg(self.root.join("process.json"));
        c.arg("-p").arg(self.root.join("exec.pid")).arg("-l").arg(self.root.join("exec.log"));
        let began = Instant::now();
        let status = c.status().unwrap();
        assert!(status.success(), "{}: {status}", self.name);
        began.elapsed().as_secs_f64() * 1000.0
    }

    /// KiB of each monitor: PSS, and what is its own alone.
    fn memory(&self) -> (f64, f64) {
        #[allow(clippy::cast_precision_loss)]
        let each = |kib: u64| kib as f64 / UP as f64;
        let all = || self.monitors.iter().copied();
        (each(all().map(pss_kib).sum()), each(all().map(own_memory_kib).sum()))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        for n in 0..UP {
            let root = self.root.join("runc");
            let _ = Command::new("runc").arg("--root").arg(root).args(["delete", "--force", &self.id(n)]).output();
        }
        for pid in &self.monitors {
            wait_for("a monitor's end", SOON, || {
                !Path::new(&format!("/proc/{pid}/smaps_rollup")).exists() || pss_kib(*pid) == 0
            });
        }
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(hierarchy.path().join(self.cgroup()));
        }
        let _ = std::fs::remove_dir(Path::new("/sys/fs/cgroup").join(self.cgroup()));
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
    let rounds: usize = std::env::var("LONGSHORE_BENCH_N").ok().and_then(|n| n.parse().ok()).unwrap_or(300);
    let ours = Side::new("ours", bin_dir().join("longshore-conmon"));
    let theirs = Side::new("theirs", "/usr/bin/conmon".into());
    let (mut x, mut y) = (Vec::new(), Vec::new());
    for n in 0..rounds + 5 {
        // In turn, and in turn who is first.
        let (a, b) = if n % 2 == 0 {
            let a = ours.exec();
            (a, theirs.exec())
        } else {
            let b = theirs.exec();
            (ours.exec(), b)
        };
        // The first rounds warm both up.
        if n >= 5 {
            x.push(a);
            y.push(b);
        }
    }
    let (memory, peers) = (ours.memory(), theirs.memory());
    drop((ours, theirs));
    x.sort_by(f64::total_cmp);
    y.sort_by(f64::total_cmp);
    println!("\nlongshore-conmon against Debian's conmon, {rounds} execs each, interleaved; ms (ratio)\n");
    let mut failures = Vec::new();
    for (name, p) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)] {
        let (u, v) = (percentile(&x, p), percentile(&y, p));
        println!("exec of true, {name}: {u:.2} / {v:.2} ({:.2})", u / v);
        if p == 0.5 && u / v > 1.1 * 1.1 {
            failures.push(format!("an exec's median is {:.2} of the peer's, at most 1.1 is allowed", u / v));
        }
    }
    println!(
        "memory of one with {UP} up, KiB PSS: {:.0} / {:.0} ({:.2}); of it its own: {:.0} / {:.0}",
        memory.0,
        peers.0,
        memory.0 / peers.0,
        memory.1,
        peers.1
    );
    if memory.0 > PSS || memory.0 > peers.0 {
        failures.push(format!(
            "a monitor has {:.0} KiB, at most {PSS} and the peer's {:.0} are allowed",
            memory.0, peers.0
        ));
    }
    for failure in &failures {
        println!("LIMIT {failure}");
    }
    let asserting = std::env::var("LONGSHORE_BENCH_ASSERT").as_deref() != Ok("0");
    if failures.is_empty() || !asserting { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
