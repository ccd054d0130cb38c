//! Binaries that are replaced, or move, beside pods that run, and records of other
//! releases: old pods go on and can be ended, new ones get the new binaries
//! (behaviours.md section 3).
//!
//! Each case runs with our shim, Go's (Debian's package containerd) and our monitor,
//! whichever handler the suite runs with.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{
    Cri, Daemon, Footprint, IMAGE, bin_dir, busybox, command_line, container, in_pid_namespace, signal, wait_for,
};
use proto::cri::*;
use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testkit::TempRoot;

const BOUND: Duration = Duration::from_secs(30);
const GO_SHIM: &str = "containerd-shim-runc-v2";
const POD_INIT: &str = "longshore-pod-init";

/// A handler, and the binary that runs its containers.
type Kind = (&'static str, &'static str);
const OURS: Kind = ("ours", "containerd-shim-longshore-v2");
const GO: Kind = ("go", GO_SHIM);
const MONITORS: Kind = ("monitors", "longshore-conmon");

fn config(bin: &Path) -> String {
    let shim = bin.join(GO_SHIM);
    format!("[runtimes.ours]\n[runtimes.go]\nshim = {shim:?}\n[runtimes.monitors]\nmonitor = \"longshore-conmon\"\n")
}

/// Which file it is, whatever its name is now.
fn identity(path: &Path) -> (u64, u64) {
    let found = std::fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (found.dev(), found.ino())
}

fn runs(pid: u32) -> (u64, u64) {
    identity(Path::new(&format!("/proc/{pid}/exe")))
}

/// A release: its files by name.
type Release = BTreeMap<&'static str, (u64, u64)>;

const FILES: [&str; 5] = ["longshore", OURS.1, GO.1, MONITORS.1, POD_INIT];

fn release(bin: &Path) -> Release {
    FILES.iter().map(|name| (*name, identity(&bin.join(name)))).collect()
}

fn source(name: &str) -> PathBuf {
    if name != GO_SHIM {
        return bin_dir().join(name);
    }
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).map(|d| d.join(name)).find(|p| p.is_file());
    found.expect("Debian's containerd is installed")
}

fn install(bin: &Path) -> Release {
    std::fs::create_dir(bin).unwrap();
    for name in FILES {
        let (from, to) = (source(name), bin.join(name));
        if std::fs::hard_link(&from, &to).is_err() {
            std::fs::copy(&from, &to).unwrap();
        }
    }
    release(bin)
}

/// New files in the place of the old ones, as a package manager does it; their bytes
/// differ, what they do is the same.
fn upgrade(bin: &Path) -> Release {
    for name in FILES {
        let next = bin.join(format!("{name}.next"));
        std::fs::copy(source(name), &next).unwrap();
        std::fs::OpenOptions::new().append(true).open(&next).unwrap().write_all(b"newer").unwrap();
        std::fs::rename(&next, bin.join(name)).unwrap();
    }
    release(bin)
}

async fn pod_number(cri: &Cri, pod: &str, key: &str) -> u32 {
    let info: serde_json::Value = serde_json::from_str(&cri.pod_status(pod).await.unwrap().info["info"]).unwrap();
    u32::try_from(info[key].as_u64().unwrap()).unwrap()
}

fn numbers(log: &Path) -> Vec<usize> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().filter_map(|l| l.splitn(4, ' ').nth(3)).map(|n| n.parse().unwrap()).collect()
}

/// A daemon of binaries of its own.
struct Node {
    daemon: Daemon,
    kind: Kind,
    bin: PathBuf,
    before: Footprint,
    /// What containers see as /go.
    go: PathBuf,
}

/// A pod with a container that counts into its log, one that ends when it is told to,
/// and one that was not started.
struct Pod {
    id: String,
    config: PodSandboxConfig,
    main: String,
    pid: u32,
    brief: String,
    created: String,
    /// The shim's pid, or that of the counting container's monitor.
    runner: u32,
    /// The pod's init, or 0.
    init: u32,
    log: PathBuf,
}

impl Node {
    async fn new(kind: Kind) -> (Self, Release) {
        let root = TempRoot::new();
        let (bin, go) = (root.join("bin"), root.join("go"));
        std::fs::create_dir(&go).unwrap();
        let old = install(&bin);
        let daemon = Daemon::of_binaries(root, &config(&bin), &bin).await;
        daemon.import(&busybox(), IMAGE);
        let before = daemon.footprint();
        (Self { daemon, kind, bin, before, go }, old)
    }

    fn bundle(&self, pod: &str) -> PathBuf {
        self.daemon.state().join(if self.kind == MONITORS { "conmon/bundles" } else { "bundles" }).join(pod)
    }

    async fn runner(&self, cri: &Cri, pod: &str, container: &str) -> u32 {
        if self.kind != MONITORS {
            return pod_number(cri, pod, "shimPid").await;
        }
        let file = self.bundle(pod).join("tasks").join(container).join("conmon.pid");
        std::fs::read_to_string(file).unwrap().trim().parse().unwrap()
    }

    fn container(&self, config: &PodSandboxConfig, name: &str, command: &[&str]) -> ContainerConfig {
        let mut c = container(name, IMAGE, command);
        let options = config.linux.as_ref().unwrap().security_context.as_ref().unwrap().namespace_options.clone();
        c.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options = options;
        c.mounts = vec![Mount {
            container_path: "/go".into(),
            host_path: self.go.to_string_lossy().into_owned(),
            ..Default::default()
        }];
        c
    }

    async fn pod(&self, name: &str, shared: bool) -> Pod {
        let cri = self.daemon.cri().await;
        let mut config = self.daemon.pod(name);
        config.log_directory = self.daemon.dir().join(format!("log-{name}")).to_string_lossy().into_owned();
        if shared {
            let security = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
            security.namespace_options.as_mut().unwrap().pid = NamespaceMode::Pod.into();
        }
        let id = cri.run_pod_by(self.kind.0, &config).await.unwrap();
        let count = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.05; done";
        let mut main = self.container(&config, "main", &["sh", "-c", count]);
        main.log_path = "main.log".into();
        let main = cri.run(&id, &main, &config).await.unwrap();
        let brief =
            self.container(&config, "brief", &["sh", "-c", "while [ ! -e /go/now ]; do sleep 0.05; done; exit 7"]);
        let brief = cri.run(&id, &brief, &config).await.unwrap();
        let created = self.container(&config, "created", &["sh", "-c", "exit 3"]);
        let created = cri.create(&id, &created, &config).await.unwrap();
        let (pid, runner) = (cri.pid_of(&main).await.unwrap(), self.runner(&cri, &id, &main).await);
        let init = pod_number(&cri, &id, "pid").await;
        assert_eq!(init != 0, shared);
        let log = PathBuf::from(&config.log_directory).join("main.log");
        Pod { id, config, main, pid, brief, created, runner, init, log }
    }

    /// It runs on, with all that it had before the daemon was another.
    async fn goes_on(&self, cri: &Cri, pod: &Pod) {
        let status = cri.pod_status(&pod.id).await.unwrap().status.unwrap();
        assert_eq!(status.state(), PodSandboxState::SandboxReady, "{}", self.kind.0);
        assert_eq!(cri.pid_of(&pod.main).await.unwrap(), pod.pid);
        assert_eq!(self.runner(cri, &pod.id, &pod.main).await, pod.runner);
        assert_eq!(pod_number(cri, &pod.id, "pid").await, pod.init);
        assert_eq!(cri.exec(&pod.main, &["echo", "on"], 10).await.unwrap().stdout, "on\n");
        let written = numbers(&pod.log).len();
        wait_for("the log goes on", BOUND, || numbers(&pod.log).len() > written + 3);
    }

    /// A container started anew in it.
    async fn next(&self, cri: &Cri, pod: &Pod) -> String {
        let mut next = self.container(&pod.config, "main", &["sleep", "100000"]);
        next.metadata.as_mut().unwrap().attempt = 1;
        let id = cri.run(&pod.id, &next, &pod.config).await.unwrap();
        assert_eq!(cri.exec(&id, &["echo", "next"], 10).await.unwrap().stdout, "next\n");
        id
    }

    /// Its shim or monitor is killed: what it left is cleaned up.
    async fn loses_its_runner(&self, cri: &Cri, pod: &Pod) {
        signal(pod.runner, rustix::process::Signal::KILL);
        let status = cri.exited(&pod.main, BOUND).await;
        assert!([137, 255].contains(&status.exit_code), "{status:?}");
        wait_for("its process is dead", BOUND, || command_line(pod.pid).is_empty());
    }

    /// Its containers end with their codes, and it goes.
    async fn ends(&self, cri: &Cri, pod: &Pod) {
        assert_eq!(cri.exited(&pod.brief, BOUND).await.exit_code, 7);
        cri.start(&pod.created).await.unwrap();
        assert_eq!(cri.exited(&pod.created, BOUND).await.exit_code, 3);
        cri.stop(&pod.main, 0).await.unwrap();
        let code = cri.status(&pod.main).await.unwrap().exit_code;
        assert!(code == 137 || (pod.init != 0 && code == 143), "{code}");
        let counted = numbers(&pod.log);
        assert!(counted.iter().copied().eq(1..=counted.len()), "no line is lost: {counted:?}");
        cri.remove(&pod.main).await.unwrap();
        self.removes(cri, pod).await;
    }

    async fn removes(&self, cri: &Cri, pod: &Pod) {
        cri.stop_pod(&pod.id).await.unwrap();
        cri.remove_pod(&pod.id).await.unwrap();
    }

    fn told_to_end(&self) {
        std::fs::write(self.go.join("now"), "").unwrap();
    }
}

async fn is_upgraded(kind: Kind) {
    let (mut node, old) = Node::new(kind).await;
    let goes_on = node.pod("goes-on", false).await;
    let shared = node.pod("shared", true).await;
    let loses = node.pod("loses", false).await;
    let removed = node.pod("removed", false).await;
    let all = [&goes_on, &shared, &loses, &removed];
    for pod in all {
        assert_eq!(runs(pod.runner), old[kind.1]);
    }
    assert_eq!(runs(shared.init), old[POD_INIT]);

    // Files come before the restart: what the old daemon starts in between is new.
    let new = upgrade(&node.bin);
    assert!(FILES.iter().all(|name| new[name] != old[name]));
    let cri = node.daemon.cri().await;
    for pod in all {
        node.goes_on(&cri, pod).await;
    }
    let between = node.pod("between", true).await;
    assert_eq!((runs(between.runner), runs(between.init)), (new[kind.1], new[POD_INIT]));
    assert_eq!(runs(node.daemon.pid()), old["longshore"]);

    assert!(node.daemon.terminate().success());
    node.told_to_end();
    node.daemon.begin().await;
    assert_eq!(runs(node.daemon.pid()), new["longshore"]);
    let cri = node.daemon.cri().await;
    for pod in all.into_iter().chain([&between]) {
        node.goes_on(&cri, pod).await;
        assert_eq!(cri.exited(&pod.brief, BOUND).await.exit_code, 7);
    }
    for pod in all {
        assert_eq!(runs(pod.runner), old[kind.1], "an old one goes on");
    }
    assert_eq!(runs(shared.init), old[POD_INIT]);
    let next = cri.pid_of(&node.next(&cri, &shared).await).await.unwrap();
    assert!(in_pid_namespace(shared.init).iter().any(|(pid, _)| *pid == next), "it is in the old init's namespace");

    let fresh = node.pod("fresh", true).await;
    assert_eq!((runs(fresh.runner), runs(fresh.init)), (new[kind.1], new[POD_INIT]));
    node.loses_its_runner(&cri, &loses).await;
    let next = node.next(&cri, &loses).await;
    assert_eq!(runs(node.runner(&cri, &loses.id, &next).await), new[kind.1]);
    node.removes(&cri, &loses).await;
    node.removes(&cri, &removed).await;
    for pod in [&goes_on, &shared, &between, &fresh] {
        node.ends(&cri, pod).await;
    }
    node.daemon.leaves_nothing_but(&node.before);
}

#[tokio::test(flavor = "multi_thread")]
async fn old_pods_go_on_with_their_shim_and_new_ones_get_the_new_binaries() {
    is_upgraded(OURS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_with_gos_shim() {
    is_upgraded(GO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_with_monitors() {
    is_upgraded(MONITORS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn binaries_that_have_moved_serve_what_the_old_place_began() {
    for kind in [OURS, GO, MONITORS] {
        let (mut node, _) = Node::new(kind).await;
        let goes_on = node.pod("goes-on", true).await;
        let loses = node.pod("loses", false).await;
        assert!(node.daemon.terminate().success());
        let place = node.daemon.dir().join("elsewhere");
        std::fs::rename(&node.bin, &place).unwrap();
        node.bin = place;
        let files = release(&node.bin);
        std::fs::write(node.daemon.dir().join("config.toml"), config(&node.bin)).unwrap();
        node.daemon.move_to(&node.bin);
        node.told_to_end();
        node.daemon.begin().await;
        let cri = node.daemon.cri().await;
        for pod in [&goes_on, &loses] {
            node.goes_on(&cri, pod).await;
        }
        node.next(&cri, &goes_on).await;
        node.loses_its_runner(&cri, &loses).await;
        let next = node.next(&cri, &loses).await;
        assert_eq!(runs(node.runner(&cri, &loses.id, &next).await), files[kind.1]);
        node.removes(&cri, &loses).await;
        node.ends(&cri, &goes_on).await;
        node.daemon.leaves_nothing_but(&node.before);
    }
}

/// Takes `keys` out of a JSON file, dots between those of nested objects, and adds one
/// that only a later release could know. A file that is not there is none of this kind.
fn rewrite(path: &Path, keys: &[&str]) {
    let Ok(text) = std::fs::read(path) else { return };
    let mut json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    for key in keys {
        let (parent, name) = key.rsplit_once('.').map_or((String::new(), *key), |(p, n)| (format!("/{p}"), n));
        let parent = json.pointer_mut(&parent.replace('.', "/")).unwrap().as_object_mut().unwrap();
        parent.remove(name);
        parent.insert("of_a_later_release".into(), serde_json::json!({ "deep": [1] }));
    }
    std::fs::write(path, serde_json::to_vec(&json).unwrap()).unwrap();
}

/// As the first release would have written them, had it not known what came to them
/// since; with what a later one may add.
fn as_others_wrote(node: &Node, pods: &[&Pod]) {
    for (n, pod) in pods.iter().enumerate() {
        let bundle = node.bundle(&pod.id);
        rewrite(&bundle.join("handler.json"), &["sandbox"]);
        rewrite(&bundle.join("bootstrap.json"), &["version", "protocol"]);
        // containerd 1.6 wrote none.
        if n % 2 == 1 && node.kind != MONITORS {
            assert!(bundle.join("address").exists());
            std::fs::remove_file(bundle.join("bootstrap.json")).unwrap();
        }
        for id in [&pod.main, &pod.brief] {
            let task = bundle.join("tasks").join(id);
            rewrite(&task.join("longshore-task.json"), &["systemd_cgroup"]);
            rewrite(&task.join("exit.json"), &["oom_killed", "peak_memory"]);
            let since = ["handler.no_pivot_root", "handler.no_new_keyring", "handler.exec_by_log"];
            rewrite(&task.join("monitored.json"), &since);
        }
    }
    node.daemon.sql(
        "UPDATE pods SET state_json = json_set(json_remove(state_json, '$.runtime', '$.network', '$.torn_down'),
             '$.of_a_later_release', 1);
         UPDATE containers SET state_json = json_set(json_remove(state_json, '$.image_name', '$.warnings'),
             '$.of_a_later_release', 1);",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_older_and_newer_releases_are_read() {
    for kind in [OURS, GO, MONITORS] {
        let (mut node, _) = Node::new(kind).await;
        let first = node.pod("first", true).await;
        let second = node.pod("second", false).await;
        let loses = node.pod("loses", false).await;
        assert!(node.daemon.terminate().success());
        node.told_to_end();
        // Our shim leaves a certificate where there is no daemon.
        let brief = |pod: &Pod| node.bundle(&pod.id).join("tasks").join(&pod.brief).join("exit.json");
        if kind == OURS {
            wait_for("its end is written down", BOUND, || brief(&first).exists() && brief(&second).exists());
        }
        as_others_wrote(&node, &[&first, &second, &loses]);
        node.daemon.begin().await;
        let cri = node.daemon.cri().await;
        for pod in [&first, &second, &loses] {
            node.goes_on(&cri, pod).await;
        }
        let (_, findings) = node.daemon.doctor(&node.daemon.state(), &[]);
        assert!(findings.iter().any(|f| f["check"] == "quarantine" && f["verdict"] == "ok"), "{findings:?}");
        node.loses_its_runner(&cri, &loses).await;
        node.next(&cri, &loses).await;
        node.removes(&cri, &loses).await;
        for pod in [&first, &second] {
            node.ends(&cri, pod).await;
        }
        node.daemon.leaves_nothing_but(&node.before);
    }
}
