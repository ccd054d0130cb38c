//! `start` and `-info` as callers of each generation use them.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::{BINARY, CALL, connect};
use prost::Message;
use proto::containerd::runtime::bootstrap::v1::{BootstrapParams, BootstrapResult};
use proto::containerd::task::v3 as task;
use proto::containerd::types::RuntimeInfo;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Runs the binary with `input` on standard input.
fn call(dir: &Path, args: &[&str], input: &[u8], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(BINARY);
    command.args(args).current_dir(dir).env_remove("GRPC_ADDRESS").env_remove("TTRPC_ADDRESS");
    command.envs(env.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // It may refuse before it has read everything.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// Bundles beside each other, whose shims are killed when dropped.
struct Bundles(tempfile::TempDir);

impl Bundles {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("lsg").tempdir().unwrap())
    }

    fn bundle(&self, name: &str, annotations: &serde_json::Value) -> PathBuf {
        let dir = self.0.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let config = serde_json::json!({"ociVersion": "1.0.2", "annotations": annotations});
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        dir
    }

    /// The sockets are ours alone: the caller's address is part of their names.
    fn start(&self, name: &str, input: &[u8], env: &[(&str, &str)]) -> Output {
        let address = self.0.path().join("c.sock").display().to_string();
        let args = ["-namespace", "test", "-id", name, "-address", &address, "-publish-binary", "", "start"];
        let out = call(&self.0.path().join(name), &args, input, env);
        assert!(out.stderr.is_empty(), "{out:?}");
        out
    }

    fn pid(&self, name: &str) -> i32 {
        std::fs::read_to_string(self.0.path().join(name).join("shim.pid")).unwrap().parse().unwrap()
    }
}

impl Drop for Bundles {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.0.path()).unwrap().flatten() {
            let pid = std::fs::read_to_string(entry.path().join("shim.pid")).ok().and_then(|p| p.parse().ok());
            if let Some(p) = pid.and_then(|p| sys::pidfd::PidFd::open(p).ok()) {
                let _ = p.signal(types::Signal::KILL);
            }
            if let Ok(address) = std::fs::read_to_string(entry.path().join("address")) {
                let _ = std::fs::remove_file(address.trim_start_matches("unix://"));
            }
        }
    }
}

async fn shutdown(address: &str) {
    let client = connect(Path::new(address.trim_start_matches("unix://"))).await;
    let client = task::TaskClient::new(client, proto::TASK_SERVICES[1]);
    client.shutdown(CALL, task::ShutdownRequest::default()).await.unwrap();
}

async fn gone(pid: i32) {
    let alive = || Path::new(&format!("/proc/{pid}/fd/0")).symlink_metadata().is_ok();
    for _ in 0..120_000 {
        if !alive() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_micros(500));
    }
    panic!("shim {pid} does not end");
}

#[tokio::test]
async fn a_pod_s_containers_share_a_shim() {
    let b = Bundles::new();
    b.bundle(
        "pod",
        &serde_json::json!({"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "pod"}),
    );
    b.bundle(
        "c1",
        &serde_json::json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"}),
    );
    b.bundle("other", &serde_json::json!({"io.kubernetes.cri.sandbox-id": "other"}));
    b.bundle("alone", &serde_json::json!({}));
    b.bundle("named", &serde_json::json!({"io.containerd.runc.v2.group": "pod"}));
    let mut addresses = Vec::new();
    for name in ["pod", "c1", "other", "alone", "named"] {
        // As containerd 1.6: no GRPC_ADDRESS, a bare address.
        let out = b.start(name, &[], &[]);
        let address = String::from_utf8(out.stdout).unwrap();
        assert!(address.starts_with("unix:///"), "{address}");
        assert_eq!(std::fs::read_to_string(b.0.path().join(name).join("address")).unwrap(), address);
        addresses.push(address);
    }
    assert!(addresses[0] == addresses[1] && addresses[0] == addresses[4]);
    assert!(addresses[0] != addresses[2] && addresses[0] != addresses[3] && addresses[2] != addresses[3]);
    assert_eq!((b.pid("c1"), b.pid("named")), (b.pid("pod"), b.pid("pod")));
    assert_ne!(b.pid("other"), b.pid("pod"));

    // The group's shim ends; the next member's start makes another, at the same place,
    // even while the first is ending.
    let first = b.pid("pod");
    shutdown(&addresses[0]).await;
    let again = String::from_utf8(b.start("c1", &[], &[]).stdout).unwrap();
    assert_eq!(again, addresses[0]);
    assert_ne!(b.pid("c1"), first);
    gone(first).await;
    shutdown(&again).await;
    gone(b.pid("c1")).await;
}

#[tokio::test]
async fn members_that_start_at_once_get_one_shim() {
    let b = Bundles::new();
    let names: Vec<String> = (0..8).map(|n| format!("c{n}")).collect();
    for name in &names {
        b.bundle(name, &serde_json::json!({"io.kubernetes.cri.sandbox-id": "together"}));
    }
    let answers: Vec<Vec<u8>> = std::thread::scope(|s| {
        let all: Vec<_> = names.iter().map(|n| s.spawn(|| b.start(n, &[], &[]).stdout)).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(answers.iter().all(|a| !a.is_empty() && *a == answers[0]));
    let pid = b.pid("c0");
    assert!(names.iter().all(|n| b.pid(n) == pid));
}

#[tokio::test]
async fn each_dialect_is_answered_in_kind() {
    let b = Bundles::new();
    let sockets = b.0.path().join("sockets");
    for name in ["json", "three", "proto", "stranger"] {
        b.bundle(name, &serde_json::json!({}));
    }
    let json = |out: Output| serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap();
    assert_eq!(json(b.start("json", &[], &[("GRPC_ADDRESS", "x")]))["version"], 2);
    assert_eq!(json(b.start("three", &[], &[("GRPC_ADDRESS", "x"), ("LONGSHORE_SHIM_VERSION", "3")]))["version"], 3);
    let params = BootstrapParams {
        instance_id: "proto".into(),
        namespace: "test".into(),
        socket_dir: Some(sockets.display().to_string()),
        ..Default::default()
    };
    let input = params.encode_to_vec();
    let out = b.start("proto", &input, &[("GRPC_ADDRESS", "x")]);
    let answer = BootstrapResult::decode(out.stdout.as_slice()).unwrap();
    assert_eq!((answer.version, answer.protocol.as_str()), (3, "ttrpc"));
    assert!(answer.address.starts_with(&format!("unix://{}/", sockets.display())), "{}", answer.address);
    // Parameters that name somebody else are no parameters.
    assert_eq!(json(b.start("stranger", &input, &[("GRPC_ADDRESS", "x")]))["version"], 2);
    shutdown(&answer.address).await;
    gone(b.pid("proto")).await;
    assert!(!Path::new(answer.address.trim_start_matches("unix://")).exists());
}

#[tokio::test]
async fn shutdown_is_answered_each_time_and_the_shim_ends_at_once() {
    let b = Bundles::new();
    let mut took = Vec::new();
    for n in 0..30 {
        let name = format!("s{n}");
        b.bundle(&name, &serde_json::json!({}));
        let address = String::from_utf8(b.start(&name, &[], &[]).stdout).unwrap();
        let began = std::time::Instant::now();
        shutdown(&address).await;
        gone(b.pid(&name)).await;
        took.push(began.elapsed());
        assert!(!Path::new(address.trim_start_matches("unix://")).exists());
    }
    took.sort();
    eprintln!("from Shutdown to gone: p50 {:?}, longest {:?}", took[15], took[29]);
    assert!(took[15] < std::time::Duration::from_secs(1), "{took:?}");
}

#[test]
fn too_much_input_is_refused_and_leaves_nothing() {
    let b = Bundles::new();
    let dir = b.bundle("big", &serde_json::json!({}));
    let args = ["-namespace", "test", "-id", "big", "-address", "x", "start"];
    let out = call(&dir, &args, &vec![0; (10 << 20) + 1], &[]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("10 MiB"), "{out:?}");
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
}

#[test]
fn a_shim_that_no_caller_hears_of_is_ended() {
    let all = Bundles::new();
    let dir = all.bundle("a", &serde_json::json!({}));
    let socket = dir.join("s/shim.sock");
    // Its answer can't be written.
    let writer = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(BINARY);
    command.args(["-namespace", "test", "-id", "a", "-address", "", "-publish-binary", "", "-socket"]);
    command.arg(&socket).arg("start").current_dir(&dir).stdin(Stdio::null()).stdout(writer);
    let out = command.stderr(Stdio::piped()).output().unwrap();
    assert!(!out.status.success(), "{out:?}");
    for name in ["address", "shim.pid", "s/shim.sock"] {
        assert!(!dir.join(name).exists(), "{name} is left");
    }
    let lives_there = |p: &std::fs::DirEntry| std::fs::read_link(p.path().join("cwd")).is_ok_and(|cwd| cwd == dir);
    assert!(!std::fs::read_dir("/proc").unwrap().flatten().any(|p| lives_there(&p)), "a shim is left");
}

#[test]
fn a_cgroup_that_is_not_there_stops_the_start() {
    let b = Bundles::new();
    let dir = b.bundle("cg", &serde_json::json!({}));
    let o = proto::containerd::runc::v1::Options { shim_cgroup: "/no/such/cgroup".into(), ..Default::default() };
    let input = proto::pack("containerd.runc.v1.Options", &o).encode_to_vec();
    let out = call(&dir, &["-namespace", "test", "-id", "cg", "-address", "x", "start"], &input, &[]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("/no/such/cgroup"), "{out:?}");
    assert!(!dir.join("address").exists() && !dir.join("shim.pid").exists());
}

#[test]
fn info_tells_name_version_and_features() {
    let out = call(Path::new("/"), &["-info"], &[], &[]);
    let info = RuntimeInfo::decode(out.stdout.as_slice()).unwrap();
    assert_eq!(info.name, "io.containerd.longshore.v2");
    assert_eq!(info.version.unwrap().version, env!("CARGO_PKG_VERSION"));
    let features: serde_json::Value = serde_json::from_slice(&info.features.unwrap().value).unwrap();
    assert!(features["linux"]["namespaces"].is_array(), "{features}");
}

#[tokio::test]
async fn the_shim_goes_before_its_caller_where_memory_runs_out() {
    let all = Bundles::new();
    all.bundle("one", &serde_json::json!({}));
    all.start("one", b"", &[]);
    let score = |pid: &str| -> i32 {
        std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().parse().unwrap()
    };
    assert_eq!(score(&all.pid("one").to_string()), (score("self") + 1).min(1000));
}

#[tokio::test]
async fn with_core_scheduling_each_shim_has_a_cookie_of_its_own() {
    use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};
    let cookie =
        |pid: i32| core_scheduling_cookie(rustix::process::Pid::from_raw(pid).unwrap(), CoreSchedulingScope::Thread);
    let b = Bundles::new();
    for name in ["a", "b", "plain"] {
        b.bundle(name, &serde_json::json!({}));
    }
    b.start("plain", &[], &[]);
    match cookie(b.pid("plain")) {
        Ok(cookie) => assert_eq!(cookie, 0),
        // No SMT: there is nothing to keep apart, and it is no failure.
        Err(rustix::io::Errno::NODEV) => {
            b.start("a", &[], &[("SCHED_CORE", "1")]);
            assert!(Path::new(&format!("/proc/{}", b.pid("a"))).exists());
            return;
        }
        Err(e) => {
            eprintln!("skipped: the kernel has no core scheduling ({e})");
            return;
        }
    }
    b.start("a", &[], &[("SCHED_CORE", "1")]);
    b.start("b", &[], &[("SCHED_CORE", "1")]);
    let (a, b) = (cookie(b.pid("a")).unwrap(), cookie(b.pid("b")).unwrap());
    assert!(a != 0 && b != 0 && a != b);
}

#[test]
fn a_command_without_a_namespace_is_refused() {
    let b = Bundles::new();
    let dir = b.bundle("x", &serde_json::json!({}));
    for command in ["start", "delete"] {
        let out = call(&dir, &["-id", "x", command], &[], &[]);
        assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("namespace"), "{out:?}");
    }
}
