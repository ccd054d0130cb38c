//! Bundles from busybox, cleaned up whatever happens.
#![allow(dead_code, clippy::unwrap_used)]

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A bundle in a temporary directory, with a runtime root of its own. Dropped,
/// it removes the container, its mounts and its cgroup.
pub struct Bundle {
    pub dir: tempfile::TempDir,
    pub id: String,
}

/// What differs between the tests' containers.
pub struct Shape {
    pub args: Vec<String>,
    pub private_pids: bool,
    pub terminal: bool,
    pub memory: Option<i64>,
}

impl Default for Shape {
    fn default() -> Self {
        Self { args: sh("sleep 1000"), private_pids: true, terminal: false, memory: None }
    }
}

pub fn sh(script: &str) -> Vec<String> {
    ["/bin/sh", "-c", script].map(String::from).to_vec()
}

pub fn busybox_root(root: &Path) {
    for d in ["bin", "proc", "dev", "sys", "tmp", "etc"] {
        std::fs::create_dir_all(root.join(d)).unwrap();
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n").unwrap();
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "sleep", "true", "false", "cat", "echo", "head", "tail", "tr", "kill", "ps", "dd", "seq", "stty", "wc",
        "env", "id", "yes", "test", "touch", "ls", "readlink",
    ] {
        std::fs::hard_link(root.join("bin/busybox"), root.join("bin").join(applet)).unwrap();
    }
}

impl Bundle {
    pub fn new(shape: &Shape) -> Self {
        let dir = tempfile::Builder::new().prefix("lsh").tempdir().unwrap();
        let id = format!("t{}", &types::new_id().unwrap()[..12]);
        let b = Self { dir, id };
        busybox_root(&b.path().join("rootfs"));
        b.configure(shape);
        b
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn runtime_root(&self) -> PathBuf {
        self.path().join("runc")
    }

    pub fn configure(&self, shape: &Shape) {
        let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "ipc"}), json!({"type": "uts"})];
        if shape.private_pids {
            namespaces.push(json!({"type": "pid"}));
        }
        let mut resources = json!({});
        if let Some(m) = shape.memory {
            resources["memory"] = json!({"limit": m, "swap": m});
        }
        let config = json!({
            "ociVersion": "1.0.2",
            "process": process(&shape.args, shape.terminal),
            "root": {"path": "rootfs", "readonly": false},
            "hostname": "t",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
            ],
            "linux": {"namespaces": namespaces, "resources": resources, "cgroupsPath": format!("/lsh-test-{0}/{0}", self.id)},
        });
        std::fs::write(self.path().join("config.json"), config.to_string()).unwrap();
    }
}

pub fn process(args: &[String], terminal: bool) -> Value {
    json!({
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
        "noNewPrivileges": true,
    })
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = Command::new("runc")
            .arg("--root")
            .arg(self.runtime_root())
            .args(["delete", "--force", &self.id])
            .stderr(std::process::Stdio::null())
            .status();
        let _ = rustix::mount::unmount(self.path().join("rootfs"), rustix::mount::UnmountFlags::DETACH);
        for controller in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let parent = controller.path().join(format!("lsh-test-{}", self.id));
            let _ = std::fs::remove_dir(parent.join(&self.id));
            let _ = std::fs::remove_dir(parent);
        }
    }
}
