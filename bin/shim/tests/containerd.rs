//! A real peer: Debian's containerd drives the shim through `ctr`.
#![allow(clippy::unwrap_used)]

#[path = "../../../crates/shim/tests/common/mod.rs"]
mod common;

use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// A containerd with everything of its own in one directory.
struct Containerd {
    dir: tempfile::TempDir,
    daemon: Child,
}

fn installed(binary: &str) -> bool {
    ["/usr/bin", "/usr/local/bin", "/usr/sbin"].iter().any(|d| Path::new(d).join(binary).exists())
}

/// Writes an OCI archive with one busybox layer; returns its path.
fn image(dir: &Path) -> PathBuf {
    let root = dir.join("image-root");
    common::busybox_root(&root);
    let layout = dir.join("layout");
    let blobs = layout.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let layer = dir.join("layer.tar");
    run(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&layer).arg("."));
    let blob = |bytes: &[u8]| {
        let digest: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        std::fs::write(blobs.join(&digest), bytes).unwrap();
        (format!("sha256:{digest}"), bytes.len())
    };
    let (layer, layer_size) = blob(&std::fs::read(layer).unwrap());
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = serde_json::json!({
        "architecture": arch, "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": [layer]},
    });
    let (config, config_size) = blob(config.to_string().as_bytes());
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer, "size": layer_size}],
    });
    let (manifest, manifest_size) = blob(manifest.to_string().as_bytes());
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": manifest_size,
            "annotations": {"io.containerd.image.name": "local/busybox:1"},
        }],
    });
    std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
    std::fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
    let archive = dir.join("image.tar");
    run(Command::new("tar").arg("-C").arg(&layout).arg("-cf").arg(&archive).arg("."));
    archive
}

fn run(command: &mut Command) -> Output {
    let out = command.stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    out
}

fn daemon(dir: &Path) -> Child {
    let path = format!("{}:{}", dir.join("bin").display(), std::env::var("PATH").unwrap());
    let mut child = Command::new("containerd")
        .arg("--root")
        .arg(dir.join("root"))
        .arg("--state")
        .arg(dir.join("state"))
        .arg("--address")
        .arg(dir.join("c.sock"))
        .args(["--log-level", "warn"])
        .env("PATH", path)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(dir.join("log")).unwrap())
        .spawn()
        .unwrap();
    for _ in 0..300 {
        let up = Command::new("ctr").arg("-a").arg(dir.join("c.sock")).arg("version").output().unwrap();
        if up.status.success() {
            return child;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    let _ = child.wait();
    panic!("containerd does not come up: {}", std::fs::read_to_string(dir.join("log")).unwrap());
}

impl Containerd {
    fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("lsc").tempdir().unwrap();
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        let name = "containerd-shim-longshore-v2";
        std::os::unix::fs::symlink(
            env!("CARGO_BIN_EXE_containerd-shim-longshore-v2"),
            dir.path().join("bin").join(name),
        )
        .unwrap();
        let archive = image(dir.path());
        let daemon = daemon(dir.path());
        let c = Self { dir, daemon };
        assert!(c.ctr(&["image", "import", archive.to_str().unwrap()]).status.success());
        c
    }

    fn ctr(&self, args: &[&str]) -> Output {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.dir.path().join("c.sock")).args(args).stdin(Stdio::null());
        command.output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let out = self.ctr(args);
        assert!(out.status.success(), "ctr {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    fn run(&self, more: &[&str], name: &str, script: &str) -> Output {
        let mut args = vec!["run", "--runtime", "io.containerd.longshore.v2"];
        args.extend(more);
        args.extend(["local/busybox:1", name, "/bin/sh", "-c", script]);
        self.ctr(&args)
    }

    fn kill_9_and_restart(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        self.daemon = daemon(self.dir.path());
    }

    fn shims(&self) -> usize {
        let state = self.dir.path().join("state/io.containerd.runtime.v2.task/default");
        std::fs::read_dir(state).into_iter().flatten().count()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        for task in self.ctr(&["task", "ls", "-q"]).stdout.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
            let name = String::from_utf8_lossy(task).into_owned();
            let _ = self.ctr(&["task", "rm", "-f", &name]);
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        // The runtime's state directory and the cgroup of ctr's namespace outlive
        // their containers, empty.
        for dir in ["/run/longshore/runc/default", "/run/longshore/runc", "/run/longshore"] {
            let _ = std::fs::remove_dir(dir);
        }
        for controller in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(controller.path().join("default"));
        }
    }
}

#[test]
fn ctr_runs_execs_kills_and_removes() {
    if !installed("containerd") || !installed("ctr") {
        eprintln!("skipped: containerd is not installed");
        return;
    }
    let mut c = Containerd::start();
    for code in [0, 1, 7] {
        let out = c.run(&["--rm"], "r", &format!("echo hello; exit {code}"));
        assert_eq!(out.status.code(), Some(code), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(out.stdout, b"hello\n");
    }
    let out = c.run(&["--rm"], "k", "kill -9 $$");
    // PID 1 can't kill itself: it goes on to its end.
    assert_eq!(out.status.code(), Some(0));

    let out = c.run(&["-d"], "d", "trap 'exit 9' TERM; while :; do sleep 0.1; done");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let out = c.ctr(&["task", "exec", "--exec-id", "e1", "d", "/bin/sh", "-c", "echo in; exit 5"]);
    assert_eq!((out.status.code(), out.stdout.as_slice()), (Some(5), &b"in\n"[..]));
    assert!(c.ok(&["task", "ls"]).contains("RUNNING"));
    c.ok(&["task", "pause", "d"]);
    assert!(c.ok(&["task", "ls"]).contains("PAUSED"));
    c.ok(&["task", "resume", "d"]);
    assert!(c.ok(&["task", "metrics", "d"]).contains("memory"));
    assert!(c.ok(&["task", "ps", "d"]).lines().count() >= 2);

    // The daemon dies and comes back: the task is still there.
    c.kill_9_and_restart();
    assert!(c.ok(&["task", "ls"]).contains("RUNNING"));
    let out = c.ctr(&["task", "exec", "--exec-id", "e2", "d", "/bin/sh", "-c", "exit 6"]);
    assert_eq!(out.status.code(), Some(6), "{}", String::from_utf8_lossy(&out.stderr));
    c.ok(&["task", "kill", "d"]);
    for _ in 0..100 {
        if c.ok(&["task", "ls"]).contains("STOPPED") {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let out = c.ctr(&["task", "rm", "d"]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() || said.contains("exited with code 9") || out.status.code() == Some(9), "{out:?}");
    c.ok(&["container", "rm", "d"]);
    assert_eq!(c.shims(), 0, "no bundle is left");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(c.dir.path().to_str().unwrap()), "no mount is left");
}

#[test]
fn a_dead_shim_is_reported_and_cleaned_up() {
    if !installed("containerd") || !installed("ctr") {
        eprintln!("skipped: containerd is not installed");
        return;
    }
    let c = Containerd::start();
    let out = c.run(&["-d"], "dead", "while :; do sleep 1; done");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let bundle = c.dir.path().join("state/io.containerd.runtime.v2.task/default/dead");
    let pid: i32 = std::fs::read_to_string(bundle.join("shim.pid")).unwrap().trim().parse().unwrap();
    sys::pidfd::PidFd::open(pid).unwrap().signal(types::Signal::KILL).unwrap();
    for _ in 0..200 {
        if !c.ok(&["task", "ls"]).contains("dead") || !bundle.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_millis(300));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(bundle.to_str().unwrap()), "no mount is left");
    c.ok(&["container", "rm", "dead"]);
}

/// Where a test's logging binary leaves what it gets, and its URI.
fn logger(dir: &Path, name: &str) -> (PathBuf, String) {
    let script = dir.join("logger.sh");
    let text = "echo $$ >$1/pid; echo $CONTAINER_NAMESPACE $CONTAINER_ID >$1/who
        cat <&3 >>$1/out & cat <&4 >>$1/err & printf x >&5; exec 3<&- 4<&- 5>&-; wait";
    std::fs::write(&script, text.replace("$1", "\"$1\"")).unwrap();
    let into = dir.join(format!("into {name}"));
    std::fs::create_dir(&into).unwrap();
    let uri = format!("binary:///bin/sh?{}={}", script.display(), into.display()).replace(' ', "+");
    (into, uri)
}

#[test]
fn ctr_s_log_uris_are_served() {
    if !installed("containerd") || !installed("ctr") {
        eprintln!("skipped: containerd is not installed");
        return;
    }
    let c = Containerd::start();
    let text = |dir: &Path, name: &str| std::fs::read_to_string(dir.join(name)).unwrap_or_default();
    let there = |dir: &Path| Path::new("/proc").join(text(dir, "pid").trim()).exists();

    let (into, uri) = logger(c.dir.path(), "run");
    let out = c.run(&["--rm", "--log-uri", &uri], "lb", "echo out; echo err >&2; exit 7");
    assert_eq!(out.status.code(), Some(7), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!((text(&into, "out").as_str(), text(&into, "err").as_str()), ("out\n", "err\n"));
    assert_eq!(text(&into, "who"), "default lb\n");
    assert!(!there(&into), "it is gone when ctr is");

    let file = c.dir.path().join("made/log");
    let uri = format!("file://{}", file.display());
    let out = c.run(&["--rm", "--log-uri", &uri], "lf", "echo out; echo err >&2");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(std::fs::read_to_string(&file).unwrap().len(), "out\nerr\n".len());

    // A running container outlives its logging binary, an exec has its own.
    let (into, uri) = logger(c.dir.path(), "d");
    let out = c.run(&["-d", "--log-uri", &uri], "ld", "trap 'exit 9' TERM; while :; do echo x; sleep 0.1; done");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let (exec, uri) = logger(c.dir.path(), "e");
    let out = c.ctr(&["task", "exec", "--exec-id", "e", "--log-uri", &uri, "ld", "/bin/sh", "-c", "echo in; exit 5"]);
    assert_eq!(out.status.code(), Some(5), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!((text(&exec, "out").as_str(), text(&exec, "who").as_str()), ("in\n", "default e\n"));
    let pid = text(&into, "pid").trim().parse().unwrap();
    sys::pidfd::PidFd::open(pid).unwrap().signal(types::Signal::KILL).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(!there(&into) && text(&into, "out").starts_with("x\n"));
    assert!(c.ok(&["task", "ls"]).contains("RUNNING"));
    c.ok(&["task", "kill", "ld"]);
    for _ in 0..100 {
        if c.ok(&["task", "ls"]).contains("STOPPED") {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let out = c.ctr(&["task", "rm", "ld"]);
    assert!(out.status.success() || out.status.code() == Some(9), "{out:?}");
    c.ok(&["container", "rm", "ld"]);
    assert_eq!(c.shims(), 0, "no bundle is left");

    // One that never comes up fails the run and says why.
    let out = c.run(&["--rm", "--log-uri", "binary-v2:///bin/true"], "ln", "exit 0");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("/bin/true") && said.contains("descriptor 5"), "{said}");
    let _ = c.ctr(&["container", "rm", "ln"]);
    assert_eq!(c.shims(), 0, "no bundle is left");
}

#[test]
fn a_group_shares_a_shim_and_outlives_its_daemon() {
    if !installed("containerd") || !installed("ctr") {
        eprintln!("skipped: containerd is not installed");
        return;
    }
    let mut c = Containerd::start();
    let pod = ["-d", "--annotation", "io.kubernetes.cri.sandbox-id=pod"];
    for name in ["pod", "one", "two"] {
        let out = c.run(&pod, name, "trap 'exit 9' TERM; while :; do sleep 0.1; done");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    let state = c.dir.path().join("state/io.containerd.runtime.v2.task/default");
    let pid = |name: &str| std::fs::read_to_string(state.join(name).join("shim.pid")).unwrap();
    assert_eq!((pid("one"), pid("two")), (pid("pod"), pid("pod")));

    c.kill_9_and_restart();
    assert_eq!(c.ok(&["task", "ls"]).matches("RUNNING").count(), 3);
    for (name, code) in [("pod", 3), ("one", 4), ("two", 5)] {
        let out = c.ctr(&["task", "exec", "--exec-id", "e", name, "/bin/sh", "-c", &format!("exit {code}")]);
        assert_eq!(out.status.code(), Some(code), "{}", String::from_utf8_lossy(&out.stderr));
    }
    // The others live on when one of them goes, though the caller then asks the
    // shim to end.
    let end = |name: &str| {
        c.ok(&["task", "kill", name]);
        for _ in 0..100 {
            if c.ok(&["task", "ls"]).lines().any(|l| l.starts_with(name) && l.contains("STOPPED")) {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        c.ctr(&["task", "rm", name]);
        c.ok(&["container", "rm", name]);
    };
    end("pod");
    assert_eq!(c.ok(&["task", "ls"]).matches("RUNNING").count(), 2);
    let out = c.ctr(&["task", "exec", "--exec-id", "f", "one", "/bin/sh", "-c", "exit 6"]);
    assert_eq!(out.status.code(), Some(6), "{}", String::from_utf8_lossy(&out.stderr));
    let shim = pid("one");
    end("one");
    end("two");
    assert_eq!(c.shims(), 0, "no bundle is left");
    for _ in 0..100 {
        if !Path::new("/proc").join(&shim).join("fd/0").exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("the group's shim {shim} outlives its last container");
}
