//! A real peer: Debian's containerd with our shim, and `ctr`.
#![allow(dead_code, clippy::unwrap_used)]

#[path = "../../../../crates/shim/tests/common/mod.rs"]
mod common;

use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many there are. What they share goes with the last one: runc makes the
/// directories above its own one after the other, and fails where one of them goes
/// meanwhile.
static LIVE: Mutex<usize> = Mutex::new(0);

fn live() -> MutexGuard<'static, usize> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A containerd with everything of its own in one directory.
pub struct Containerd {
    pub dir: tempfile::TempDir,
    /// Its tasks' namespace: runtime and cgroups of all tests are the node's.
    pub namespace: String,
    daemon: Child,
}

pub fn installed(binary: &str) -> bool {
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
    pub fn start() -> Self {
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
        *live() += 1;
        let unique = dir.path().file_name().unwrap().to_str().unwrap();
        let namespace = unique.chars().filter(char::is_ascii_alphanumeric).collect();
        let c = Self { dir, namespace, daemon };
        assert!(c.ctr(&["image", "import", archive.to_str().unwrap()]).status.success());
        c
    }

    pub fn ctr(&self, args: &[&str]) -> Output {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.dir.path().join("c.sock")).args(["-n", &self.namespace]);
        command.args(args).stdin(Stdio::null()).output().unwrap()
    }

    /// The same with a pipe for its input, which ends after `input`; a minute at most.
    pub fn ctr_fed(&self, input: &str, args: &[&str]) -> Output {
        let mut command = Command::new("timeout");
        command.args(["60", "ctr", "-a"]).arg(self.dir.path().join("c.sock")).args(["-n", &self.namespace]);
        let pipes = command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = pipes.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    pub fn ok(&self, args: &[&str]) -> String {
        let out = self.ctr(args);
        assert!(out.status.success(), "ctr {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    pub fn run(&self, more: &[&str], name: &str, script: &str) -> Output {
        let mut args = vec!["run", "--runtime", "io.containerd.longshore.v2"];
        args.extend(more);
        args.extend(["local/busybox:1", name, "/bin/sh", "-c", script]);
        self.ctr(&args)
    }

    pub fn kill_9_and_restart(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        self.daemon = daemon(self.dir.path());
    }

    /// It ends in order and comes back, as with an update of its package.
    pub fn restart(&mut self) {
        let pid = i32::try_from(self.daemon.id()).unwrap();
        sys::pidfd::PidFd::open(pid).unwrap().signal(types::Signal::TERM).unwrap();
        let _ = self.daemon.wait();
        self.daemon = daemon(self.dir.path());
    }

    /// `ctr` on a terminal of its own; what it shows, and its exit code.
    pub fn on_terminal(&self, args: &[&str]) -> Output {
        let quoted = |t: &str| format!("'{}'", t.replace('\'', "'\\''"));
        let socket = self.dir.path().join("c.sock");
        let mut line = format!("ctr -a {} -n {}", socket.display(), self.namespace);
        for arg in args {
            line.push(' ');
            line.push_str(&quoted(arg));
        }
        let mut command = Command::new("script");
        command.args(["-qec", &line, "/dev/null"]).stdin(Stdio::null()).output().unwrap()
    }

    /// `ctr events`, into a file.
    pub fn events(&self) -> Events {
        let path = self.dir.path().join("events");
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.dir.path().join("c.sock")).arg("events").stdin(Stdio::null());
        let recorder = command.stdout(std::fs::File::create(&path).unwrap()).spawn().unwrap();
        Events { recorder, path }
    }

    /// Where the bundles of its tasks are.
    pub fn bundles(&self) -> PathBuf {
        self.dir.path().join("state/io.containerd.runtime.v2.task").join(&self.namespace)
    }

    pub fn shims(&self) -> usize {
        std::fs::read_dir(self.bundles()).into_iter().flatten().count()
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
        // The runtime's state directory and the cgroup of the namespace outlive their
        // containers, empty.
        let _ = std::fs::remove_dir(Path::new("/run/longshore/runc").join(&self.namespace));
        for controller in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(controller.path().join(&self.namespace));
        }
        let mut live = live();
        *live -= 1;
        if *live == 0 {
            for dir in ["/run/longshore/runc", "/run/longshore"] {
                let _ = std::fs::remove_dir(dir);
            }
        }
    }
}

/// A recording of events.
pub struct Events {
    recorder: Child,
    path: PathBuf,
}

impl Events {
    /// Topic and event of those about tasks, in their order.
    pub fn tasks(&self) -> Vec<(String, serde_json::Value)> {
        let text = std::fs::read_to_string(&self.path).unwrap();
        // The last line may not be complete yet.
        let whole = text.rsplit_once('\n').map_or("", |t| t.0);
        whole
            .lines()
            .filter_map(|line| {
                let topic = line.split(' ').find(|w| w.starts_with("/tasks/"))?;
                Some((topic.to_string(), serde_json::from_str(&line[line.find('{')?..]).unwrap()))
            })
            .collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.recorder.kill();
        let _ = self.recorder.wait();
    }
}
