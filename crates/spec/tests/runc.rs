//! Specs as a real runtime takes them: needs root, runc and a static busybox, and
//! is passed over where one of them is missing.

#![allow(clippy::unwrap_used)] // the lint spares only functions marked as tests

mod common;

use common::Inputs;
use longshore_spec::*;
use proto::cri;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A bundle with a busybox rootfs, a runtime state and a cgroup of its own; all of
/// it goes with it.
struct Bundle {
    dir: tempfile::TempDir,
    cgroup: String,
}

impl Bundle {
    /// `None` where this machine can't run it.
    fn new(name: &str) -> Option<Self> {
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|p| Path::new(p).exists())?;
        let runs = Command::new("runc").arg("--version").output().is_ok_and(|o| o.status.success());
        if !rustix::process::geteuid().is_root() || !runs {
            eprintln!("skipped: needs root, runc and busybox");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("rootfs/bin");
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::create_dir(dir.path().join("rootfs/etc")).unwrap();
        std::fs::copy(busybox, bin.join("busybox")).unwrap();
        for applet in ["sh", "id", "cat", "grep", "touch", "ls", "echo", "hostname", "mount", "unshare"] {
            std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
        }
        for file in ["hostname", "hosts", "resolv.conf"] {
            std::fs::write(dir.path().join(file), format!("{file} of the pod\n")).unwrap();
        }
        Some(Self { dir, cgroup: format!("/longshore-test-{}-{name}", std::process::id()) })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn runc(&self, args: &[&str]) -> Output {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.path("state")).args(args).stdin(Stdio::null());
        command.output().unwrap()
    }

    fn write(&self, spec: &Spec) {
        std::fs::write(self.path("config.json"), serde_json::to_vec_pretty(spec).unwrap()).unwrap();
    }

    fn run(&self, spec: &Spec) -> (i32, String, String) {
        self.write(spec);
        let out = self.runc(&["run", "--bundle", self.dir.path().to_str().unwrap(), "id"]);
        let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
        (out.status.code().unwrap_or(-1), text(out.stdout), text(out.stderr))
    }

    /// Inputs for this node and bundle, in the namespaces of this process.
    fn inputs(&self, script: &str) -> Inputs {
        let mut inputs = Inputs::new();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let mask = status.lines().find_map(|l| l.strip_prefix("CapBnd:")).unwrap().trim();
        inputs.node.bounding = capabilities_from_mask(u64::from_str_radix(mask, 16).unwrap());
        if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            inputs.node.cgroup_mode = CgroupMode::Legacy;
        }
        let own = |kind: &str| Some(PathBuf::from(format!("/proc/{}/ns/{kind}", std::process::id())));
        inputs.namespaces = PodNamespaces { net: own("net"), ipc: own("ipc"), uts: own("uts"), ..Default::default() };
        inputs.files = PodFiles {
            hostname: "pod".into(),
            hostname_path: Some(self.path("hostname")),
            hosts_path: Some(self.path("hosts")),
            resolv_conf_path: Some(self.path("resolv.conf")),
            shm_path: Some("/dev/shm".into()),
        };
        inputs.pod.linux.get_or_insert_default().cgroup_parent.clone_from(&self.cgroup);
        inputs.config.command = vec!["/bin/sh".into(), "-c".into(), script.into()];
        inputs
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        self.runc(&["delete", "--force", "id"]);
        let hierarchies = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|e| e.path());
        for root in std::iter::once(PathBuf::from("/sys/fs/cgroup")).chain(hierarchies) {
            let _ = std::fs::remove_dir(root.join(self.cgroup.trim_start_matches('/')));
        }
    }
}

fn line<'a>(output: &'a str, key: &str) -> &'a str {
    output.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_else(|| panic!("no {key} in:\n{output}")).trim()
}

#[test]
fn a_confined_container_runs_as_it_was_asked_to() {
    let Some(bundle) = Bundle::new("confined") else { return };
    std::fs::create_dir(bundle.path("data")).unwrap();
    std::fs::write(bundle.path("data/file"), "shared\n").unwrap();
    let script = "echo groups: $(id -u) $(id -g) $(id -G); echo cwd: $PWD; echo env: $A $HOSTNAME; \
                  grep -E '^(Cap|Seccomp:|NoNewPrivs|Groups)' /proc/self/status; cat /etc/hosts /mnt/file; \
                  echo masked: $(cat /secret 2>/dev/null); touch /x 2>&1; touch /mnt/x 2>&1; touch /sys/x 2>&1; touch /img/x 2>&1; echo image: $(cat /img/both); \
                  echo unshare: $(unshare -U true 2>&1); \
                  echo oom: $(cat /proc/self/oom_score_adj); echo shm: $(ls -d /dev/shm /dev/mqueue /dev/null); exit 3";
    let mut inputs = bundle.inputs(script);
    std::fs::write(bundle.path("rootfs/secret"), "secret\n").unwrap();
    inputs.image.working_dir = "/no/such/yet".into();
    inputs.image.env = vec!["A=image".into()];
    let m = cri::Mount {
        container_path: "/mnt".into(),
        host_path: bundle.path("data").to_str().unwrap().into(),
        readonly: true,
        ..Default::default()
    };
    let image = cri::Mount {
        container_path: "/img".into(),
        image: Some(cri::ImageSpec { image: "i".into(), ..Default::default() }),
        readonly: true,
        ..Default::default()
    };
    inputs.config.mounts = vec![m, image];
    let layers: Vec<PathBuf> = ["top", "low"].iter().map(|l| bundle.path(l)).collect();
    for layer in &layers {
        std::fs::create_dir(layer).unwrap();
        std::fs::write(layer.join("both"), layer.file_name().unwrap().as_encoded_bytes()).unwrap();
    }
    inputs.image_mounts.insert("/img".into(), layers);
    inputs.config.linux.as_mut().unwrap().resources = Some(cri::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        cpu_shares: 128,
        oom_score_adj: 300,
        ..Default::default()
    });
    let sc = inputs.sc();
    sc.run_as_user = Some(cri::Int64Value { value: 1000 });
    sc.run_as_group = Some(cri::Int64Value { value: 1001 });
    sc.supplemental_groups = vec![5, 7];
    sc.capabilities = Some(cri::Capability {
        drop_capabilities: vec!["ALL".into()],
        add_capabilities: vec!["KILL".into()],
        ..Default::default()
    });
    sc.readonly_rootfs = true;
    sc.no_new_privs = true;
    sc.masked_paths = vec!["/secret".into()];
    sc.seccomp = Some(cri::SecurityProfile::default());
    // The runtime makes mount points and the working directory before the rootfs
    // becomes read-only.
    let made = inputs.make().unwrap();
    let (code, out, err) = bundle.run(&made.spec);
    assert_eq!(code, 3, "{out}\n{err}");
    assert_eq!(line(&out, "groups:"), "1000 1001 1001 5 7", "{out}");
    assert_eq!(line(&out, "cwd:"), "/no/such/yet");
    assert_eq!(line(&out, "env:"), "image pod");
    assert_eq!(line(&out, "CapBnd:"), "0000000000000020");
    assert_eq!(line(&out, "CapInh:"), "0000000000000000");
    assert_eq!(line(&out, "Seccomp:"), "2");
    assert_eq!(line(&out, "NoNewPrivs:"), "1");
    assert_eq!(line(&out, "oom:"), "300");
    assert!(line(&out, "unshare:").contains("not permitted"), "the filter lets a namespace through: {out}");
    assert_eq!(line(&out, "masked:"), "");
    assert!(out.contains("hosts of the pod\nshared\n"), "{out}");
    assert_eq!(line(&out, "image:"), "top");
    for path in ["/x", "/mnt/x", "/img/x"] {
        assert!(out.contains(&format!("touch: {path}: Read-only file system")), "{out}");
    }
    assert!(out.contains("/dev/mqueue"), "{out}");
}

#[test]
fn a_privileged_container_has_every_right_that_there_is() {
    let Some(bundle) = Bundle::new("privileged") else { return };
    let mut inputs = bundle
        .inputs("grep -E '^(CapEff|CapBnd|Seccomp:)' /proc/self/status; mount -t tmpfs x /tmp-mnt; echo mounted: $?");
    std::fs::create_dir(bundle.path("rootfs/tmp-mnt")).unwrap();
    inputs.privileged();
    let null = HostDevice { path: "/dev/null".into(), block: false, major: 1, minor: 3, mode: 0o666, uid: 0, gid: 0 };
    inputs.host.all_devices = vec![null];
    let made = inputs.make().unwrap();
    let (code, out, err) = bundle.run(&made.spec);
    assert_eq!(code, 0, "{out}\n{err}");
    assert_eq!(line(&out, "CapEff:"), line(&out, "CapBnd:"));
    let bounding = u64::from_str_radix(line(&out, "CapBnd:"), 16).unwrap();
    assert_eq!(capabilities_from_mask(bounding), inputs.node.bounding);
    assert_eq!((line(&out, "Seccomp:"), line(&out, "mounted:")), ("0", "0"));
}

#[test]
fn an_exec_gets_the_containers_credentials() {
    let Some(bundle) = Bundle::new("exec") else { return };
    let mut inputs = bundle.inputs("while :; do sleep 1; done");
    let status = "/bin/busybox";
    inputs.config.command = vec![status.into(), "sleep".into(), "60".into()];
    inputs.sc().run_as_user = Some(cri::Int64Value { value: 5 });
    inputs.sc().supplemental_groups = vec![9];
    let made = inputs.make().unwrap();
    bundle.write(&made.spec);
    // A container that is detached keeps the caller's descriptors: they go nowhere.
    let run = |args: &[&str]| {
        let mut command = Command::new("runc");
        command.arg("--root").arg(bundle.path("state")).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
    };
    assert!(run(&["run", "--detach", "--bundle", bundle.dir.path().to_str().unwrap(), "id"]).success());
    let cmd = ["sh", "-c", "id -u; id -G; grep CapInh /proc/self/status"].map(String::from).to_vec();
    let own = serde_json::to_string(made.spec.process()).unwrap();
    std::fs::write(bundle.path("exec.json"), exec_process_json(&own, cmd, false).unwrap()).unwrap();
    let out = bundle.runc(&["exec", "--process", bundle.path("exec.json").to_str().unwrap(), "id"]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(text, "5\n0 9\nCapInh:\t0000000000000000\n", "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn a_pods_init_can_be_created() {
    let Some(bundle) = Bundle::new("init") else { return };
    let inputs = bundle.inputs("");
    let empty = bundle.path("rootfs");
    std::fs::remove_dir_all(&empty).unwrap();
    std::fs::create_dir(&empty).unwrap();
    let binary = PathBuf::from("/bin/busybox");
    let spec =
        sandbox_init_spec("pod", &inputs.pod, &inputs.namespaces, &binary, &inputs.node, &inputs.policy).unwrap();
    bundle.write(&spec);
    let mut command = Command::new("runc");
    command.arg("--root").arg(bundle.path("state")).args([
        "create",
        "--bundle",
        bundle.dir.path().to_str().unwrap(),
        "id",
    ]);
    let log = bundle.path("log");
    let out = std::fs::File::create(&log).unwrap();
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(out).status().unwrap();
    assert!(status.success(), "{}", std::fs::read_to_string(&log).unwrap());
}
