//! Sandboxes with real namespaces and mounts; they need root.

use super::*;
use proto::cri::{
    IdMapping, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, UserNamespace,
};
use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use sys::namespace::{Kind, inside};
use types::ErrorKind;

const POD: i32 = NamespaceMode::Pod as i32;
const CONTAINER: i32 = NamespaceMode::Container as i32;
const NODE: i32 = NamespaceMode::Node as i32;
/// Where the tests' user namespaces lie on the node.
const FIRST_ID: u32 = 2_000_000;

/// A private node: nothing of it survives the test.
struct World {
    root: tempfile::TempDir,
    sandboxes: Sandboxes,
}

/// This test binary, told to run one "test" that is another program.
fn re_executed(test: &str, word: &str) -> Vec<OsString> {
    // A second filter that matches nothing carries the word.
    [&format!("sandbox::tests::{test}"), word, "--exact", "--test-threads=1", "--nocapture"].map(OsString::from).into()
}

fn word_of_re_execution() -> Option<String> {
    std::env::args().find(|a| a.starts_with("re-executed="))
}

/// The example of this package, which `cargo test` builds beside the tests.
fn helper() -> HelperCommand {
    let program = std::env::current_exe().unwrap().parent().and_then(Path::parent).unwrap().join("examples/ns-helper");
    assert!(program.exists(), "{} is missing: run cargo test without --lib", program.display());
    HelperCommand { program, args: vec![] }
}

/// No test: makes and ends sandboxes until somebody kills it.
#[test]
fn the_maker() {
    let Some(word) = word_of_re_execution() else { return };
    let root = PathBuf::from(word.trim_start_matches("re-executed="));
    let sandboxes = Sandboxes::prepare_with(dirs(&root), helper()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        for n in 0.. {
            let (config, id) = (if n % 3 == 0 { userns_pod() } else { pod(POD, POD, POD) }, types::new_id().unwrap());
            let plan = plan(&config, |_| Err(Error::internal("no target"))).unwrap();
            sandboxes.setup(SandboxRequest { pod_id: &id, config: &config, plan: &plan }).await.unwrap();
            if n % 2 == 0 {
                sandboxes.teardown(&id).await.unwrap();
            }
        }
    });
}

fn dirs(root: &Path) -> SandboxDirs {
    SandboxDirs { state: root.join("state"), netns: root.join("netns") }
}

impl World {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let sandboxes = Sandboxes::prepare_with(dirs(root.path()), helper()).unwrap();
        Self { root, sandboxes }
    }

    async fn try_pod(&self, id: &str, config: &PodSandboxConfig) -> Result<SandboxState> {
        let plan = plan(config, |_| Err(Error::internal("no target")))?;
        self.sandboxes.setup(SandboxRequest { pod_id: id, config, plan: &plan }).await
    }

    async fn pod(&self, config: &PodSandboxConfig) -> (String, SandboxState) {
        let id = types::new_id().unwrap();
        let state = self.try_pod(&id, config).await.unwrap();
        state.check().unwrap();
        (id, state)
    }

    /// What is on the node beyond what `prepare` made.
    fn leavings(&self) -> Vec<PathBuf> {
        let mut found: Vec<PathBuf> = sys::mount::mounts_below(self.root.path())
            .unwrap()
            .into_iter()
            .filter(|m| !m.ends_with("state/ns") && !m.ends_with("netns"))
            .collect();
        for dir in ["state/ns", "state/pods", "netns"] {
            let entries = std::fs::read_dir(self.root.path().join(dir)).into_iter().flatten();
            found.extend(entries.map(|e| e.unwrap().path()));
        }
        found
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for mount in sys::mount::mounts_below(self.root.path()).unwrap_or_default() {
            let _ = sys::mount::detach(&mount);
        }
    }
}

fn pod(network: i32, pid: i32, ipc: i32) -> PodSandboxConfig {
    let options = NamespaceOption { network, pid, ipc, ..Default::default() };
    let security_context = Some(LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
    let linux = Some(LinuxPodSandboxConfig { security_context, ..Default::default() });
    PodSandboxConfig { hostname: "web-0".into(), linux, ..Default::default() }
}

fn with_sysctls(mut config: PodSandboxConfig, sysctls: &[(&str, &str)]) -> PodSandboxConfig {
    if let Some(linux) = &mut config.linux {
        linux.sysctls = sysctls.iter().map(|(k, v)| ((*k).to_string(), (*v).to_string())).collect::<HashMap<_, _>>();
    }
    config
}

fn userns_pod() -> PodSandboxConfig {
    let mut config = pod(POD, CONTAINER, POD);
    let map = vec![IdMapping { container_id: 0, host_id: FIRST_ID, length: 65_536 }];
    let user = UserNamespace { mode: POD, uids: map.clone(), gids: map };
    let context = config.linux.as_mut().and_then(|l| l.security_context.as_mut());
    if let Some(options) = context.and_then(|c| c.namespace_options.as_mut()) {
        options.userns_options = Some(user);
    }
    config
}

/// Reads a file in the pod's namespaces.
fn read_inside(state: &SandboxState, path: &str) -> String {
    let namespaces = [(Kind::Net, &state.net), (Kind::Ipc, &state.ipc), (Kind::Uts, &state.uts)];
    let entered: Vec<(Kind, &Path)> = namespaces.iter().filter_map(|(k, p)| Some((*k, p.as_deref()?))).collect();
    inside(&entered, |_| std::fs::read_to_string(path).context(|| path.to_owned())).unwrap().trim().to_owned()
}

fn lo_is_up(state: &SandboxState) -> bool {
    inside(&[(Kind::Net, state.net.as_deref().unwrap())], |_| {
        // Bound only where 127.0.0.1 is an address and lo is up; /sys shows the daemon's netns.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").context(|| "bind".into())?;
        let address = listener.local_addr().context(|| "address".into())?;
        Ok(std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok())
    })
    .unwrap()
}

fn hostname_inside(state: &SandboxState) -> String {
    inside(&[(Kind::Uts, state.uts.as_deref().unwrap())], |_| Ok(sys::namespace::hostname())).unwrap()
}

#[tokio::test]
async fn a_pod_has_its_namespaces_files_and_shm() {
    let world = World::new();
    let config = with_sysctls(
        pod(POD, CONTAINER, POD),
        &[("net.ipv4.ip_forward", "1"), ("kernel.shm_rmid_forced", "1"), ("fs.mqueue.msg_max", "123")],
    );
    let before = ["net/ipv4/ip_forward", "kernel/shm_rmid_forced", "fs/mqueue/msg_max"]
        .map(|p| std::fs::read_to_string(format!("/proc/sys/{p}")).unwrap());
    let (id, state) = world.pod(&config).await;
    assert_eq!(hostname_inside(&state), "web-0");
    assert!(lo_is_up(&state));
    assert_eq!(read_inside(&state, "/proc/sys/net/ipv4/ip_forward"), "1");
    assert_eq!(read_inside(&state, "/proc/sys/kernel/shm_rmid_forced"), "1");
    assert_eq!(read_inside(&state, "/proc/sys/fs/mqueue/msg_max"), "123");
    let after = ["net/ipv4/ip_forward", "kernel/shm_rmid_forced", "fs/mqueue/msg_max"]
        .map(|p| std::fs::read_to_string(format!("/proc/sys/{p}")).unwrap());
    assert_eq!(before, after, "the node's own are untouched");
    for kind in [Kind::Net, Kind::Ipc, Kind::Uts] {
        let pins = [(Kind::Net, &state.net), (Kind::Ipc, &state.ipc), (Kind::Uts, &state.uts)];
        let pin = pins.iter().find(|(k, _)| *k == kind).unwrap().1.as_deref().unwrap();
        let own = sys::namespace::inode(Path::new(&format!("/proc/self/ns/{}", kind.name()))).unwrap();
        assert_ne!(sys::namespace::inode(pin).unwrap(), own, "{kind:?}");
    }
    assert_eq!(std::fs::read_to_string(&state.hostname_path).unwrap(), "web-0\n");
    assert!(std::fs::read_to_string(&state.hosts_path).unwrap().contains("web-0"));
    let shm = std::fs::metadata(&state.shm_path).unwrap();
    assert_eq!(shm.mode() & 0o7777, 0o1777);
    let mount = sys::mount::mount_of(&state.shm_path.canonicalize().unwrap()).unwrap();
    assert_eq!((mount.fs_type.as_str(), mount.target.ends_with("shm")), ("tmpfs", true));
    assert_eq!(std::fs::metadata(&state.hosts_path).unwrap().mode() & 0o777, 0o644);
    let text = serde_json::to_string(&state).unwrap();
    let read: SandboxState = serde_json::from_str(&text).unwrap();
    assert_eq!(SandboxState { steps: state.steps.clone(), ..read }, state);

    assert_eq!(world.try_pod(&id, &config).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
    world.sandboxes.release().unwrap();
    world.sandboxes.teardown(&id).await.unwrap();
    world.sandboxes.teardown(&id).await.unwrap();
    assert_eq!(world.leavings(), Vec::<PathBuf>::new());
    assert!(state.check().is_err());
    world.sandboxes.release().unwrap();
    world.sandboxes.release().unwrap_err();
    assert_eq!(sys::mount::mounts_below(world.root.path()).unwrap(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn ipc_of_two_pods_is_apart() {
    let world = World::new();
    let config = pod(POD, POD, POD);
    let ((_, a), (_, b)) = tokio::join!(world.pod(&config), world.pod(&config));
    let make = |state: &SandboxState| {
        let mut command = Command::new("nsenter");
        command.arg(format!("--ipc={}", state.ipc.as_deref().unwrap().display()));
        command
    };
    let made = make(&a).args(["ipcmk", "-Q"]).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let queues = |state| String::from_utf8(make(state).args(["ipcs", "-q"]).output().unwrap().stdout).unwrap();
    assert!(queues(&a).contains("0x"), "{}", queues(&a));
    assert!(!queues(&b).contains("0x"), "{}", queues(&b));
}

#[tokio::test]
async fn a_pod_of_the_node_has_the_nodes() {
    let world = World::new();
    let (id, state) = world.pod(&pod(NODE, NODE, NODE)).await;
    assert_eq!((state.net.clone(), state.ipc.clone(), state.uts.clone()), (None, None, None));
    assert_eq!(state.shm_path, Path::new("/dev/shm"));
    assert_eq!(state.hostname, sys::namespace::hostname(), "a pod in the node's network has its name");
    let copied = std::fs::read(&state.resolv_conf_path).unwrap();
    assert_eq!(copied, std::fs::read("/etc/resolv.conf").unwrap_or_default());
    world.sandboxes.teardown(&id).await.unwrap();
    let (id, state) = world.pod(&pod(NODE, CONTAINER, POD)).await;
    assert!(state.net.is_none() && state.uts.is_none() && state.ipc.is_some());
    world.sandboxes.teardown(&id).await.unwrap();
    assert_eq!(world.leavings(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_user_namespace_owns_the_others() {
    let world = World::new();
    let sysctls = [("kernel.msgmax", "4321"), ("net.ipv4.ip_unprivileged_port_start", "80")];
    let (id, state) = world.pod(&with_sysctls(userns_pod(), &sysctls)).await;
    assert_eq!(hostname_inside(&state), "web-0");
    assert!(lo_is_up(&state));
    assert_eq!(read_inside(&state, "/proc/sys/kernel/msgmax"), "4321");
    assert_eq!(read_inside(&state, "/proc/sys/net/ipv4/ip_unprivileged_port_start"), "80");
    let user = state.user.as_deref().unwrap();
    let inside = |map| {
        let ns = format!("--user={}", user.display());
        let read = Command::new("nsenter").args([&ns, "cat", map]).output().unwrap();
        String::from_utf8(read.stdout).unwrap().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(inside("/proc/self/uid_map"), ["0", "2000000", "65536"]);
    assert_eq!(inside("/proc/self/gid_map"), ["0", "2000000", "65536"]);
    for path in [&state.shm_path, &state.hosts_path, &state.hostname_path, &state.resolv_conf_path] {
        let m = std::fs::metadata(path).unwrap();
        assert_eq!((m.uid(), m.gid()), (FIRST_ID, FIRST_ID), "{}", path.display());
    }
    // CVE-2024-25621: passable for the pod's root, closed to all others.
    let dir = std::fs::metadata(state.hosts_path.parent().unwrap()).unwrap();
    assert_eq!((dir.uid(), dir.gid(), dir.mode() & 0o777), (0, FIRST_ID, 0o710));
    assert_eq!(state.bundle_gid(), Some(FIRST_ID));
    // The net namespace belongs to the user namespace: its root may configure it.
    let (u, n) = (format!("--user={}", user.display()), format!("--net={}", state.net.as_deref().unwrap().display()));
    let ip = Command::new("nsenter").args([&u, &n, "ip", "link", "set", "lo", "mtu", "1400"]).output().unwrap();
    assert!(ip.status.success(), "{ip:?}");
    world.sandboxes.teardown(&id).await.unwrap();
    assert_eq!(world.leavings(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn sysctls_of_interfaces_are_set_when_these_are_there_and_others_hold() {
    let world = World::new();
    for base in [pod(POD, POD, POD), userns_pod()] {
        let sysctls = [("net.ipv4.conf.eth0.rp_filter", "2"), ("net.ipv4.ip_default_ttl", "61")];
        let config = with_sysctls(base, &sysctls);
        let (id, state) = world.pod(&config).await;
        let netns = state.net.as_deref().unwrap();
        let e = world.sandboxes.set_network_sysctls(netns, &config).await.unwrap_err();
        assert!(e.kind() == ErrorKind::InvalidArgument && e.to_string().contains("eth0.rp_filter"), "{e}");
        // What its network might do.
        let script = "ip link add eth0 type veth peer name other0; echo 62 >/proc/sys/net/ipv4/ip_default_ttl";
        let net = format!("--net={}", netns.display());
        let done = Command::new("nsenter").args([&net, "sh", "-c", script]).output().unwrap();
        assert!(done.status.success(), "{done:?}");
        world.sandboxes.set_network_sysctls(netns, &config).await.unwrap();
        assert_eq!(read_inside(&state, "/proc/sys/net/ipv4/conf/eth0/rp_filter"), "2");
        assert_eq!(read_inside(&state, "/proc/sys/net/ipv4/ip_default_ttl"), "61");
        world.sandboxes.teardown(&id).await.unwrap();
    }
    assert_eq!(world.leavings(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_failed_step_is_named_and_leaves_nothing() {
    let world = World::new();
    let id = types::new_id().unwrap();
    for base in [pod(POD, POD, POD), userns_pod()] {
        for (key, value) in [("net.no.such.thing", "1"), ("kernel.msgmax", "no number")] {
            let e = world.try_pod(&id, &with_sysctls(base.clone(), &[(key, value)])).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidArgument, "{e}");
            assert!(e.to_string().contains(key) && e.to_string().contains(value), "{e}");
            assert_eq!(world.leavings(), Vec::<PathBuf>::new());
        }
    }
    let host = with_sysctls(pod(NODE, POD, NODE), &[("kernel.msgmax", "1")]);
    assert_eq!(world.try_pod(&id, &host).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    let core = with_sysctls(pod(POD, POD, POD), &[("kernel.core_pattern", "|/evil")]);
    assert_eq!(world.try_pod(&id, &core).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    // A foreign directory where a file should be: the files' step fails, all before it is undone.
    let bad_helper = HelperCommand { program: "/nonexistent/helper".into(), args: vec![] };
    let broken = Sandboxes { helper: bad_helper, ..world.sandboxes.clone() };
    let config = userns_pod();
    let plan = plan(&config, |_| Ok(1)).unwrap();
    let e = broken.setup(SandboxRequest { pod_id: &id, config: &config, plan: &plan }).await.unwrap_err();
    assert!(e.to_string().contains("/nonexistent/helper"), "{e}");
    assert_eq!(world.leavings(), Vec::<PathBuf>::new());
    world.try_pod(&id, &pod(POD, POD, POD)).await.unwrap();
}

#[tokio::test]
async fn an_abandoned_setup_leaves_nothing() {
    let world = World::new();
    for wait in [0, 1, 2, 5] {
        let id = types::new_id().unwrap();
        let config = userns_pod();
        let _ = tokio::time::timeout(Duration::from_millis(wait), world.try_pod(&id, &config)).await;
        world.sandboxes.teardown(&id).await.unwrap();
        assert_eq!(world.leavings(), Vec::<PathBuf>::new());
    }
    let id = types::new_id().unwrap();
    let _ = tokio::time::timeout(Duration::ZERO, world.try_pod(&id, &userns_pod())).await;
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while !world.leavings().is_empty() && std::time::Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(world.leavings(), Vec::<PathBuf>::new(), "also without a teardown");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_at_once() {
    let world = Arc::new(World::new());
    let tasks: Vec<_> = (0..20)
        .map(|n| {
            let world = world.clone();
            tokio::spawn(async move { world.pod(&if n % 4 == 0 { userns_pod() } else { pod(POD, POD, POD) }).await })
        })
        .collect();
    let mut pods = Vec::new();
    for task in tasks {
        pods.push(task.await.unwrap());
    }
    let nets: BTreeSet<u64> =
        pods.iter().map(|(_, s)| sys::namespace::inode(s.net.as_deref().unwrap()).unwrap()).collect();
    assert_eq!(nets.len(), 20);
    let ends = pods.into_iter().map(|(id, _)| {
        let world = world.clone();
        tokio::spawn(async move { world.sandboxes.teardown(&id).await })
    });
    for end in ends.collect::<Vec<_>>() {
        end.await.unwrap().unwrap();
    }
    assert_eq!(world.leavings(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn what_a_killed_daemon_left_is_swept_and_nothing_else() {
    let world = World::new();
    let (kept, state) = world.pod(&pod(POD, POD, POD)).await;
    let foreign = world.root.path().join("netns/longshore-of-another");
    std::fs::write(&foreign, "").unwrap();
    for delay in [0, 15, 40, 60, 80, 100] {
        let word = format!("re-executed={}", world.root.path().display());
        let mut maker = KillOnDrop(
            Command::new("/proc/self/exe")
                .args(re_executed("the_maker", &word))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        );
        std::thread::sleep(Duration::from_millis(60 + delay));
        maker.0.kill().unwrap();
        maker.0.wait().unwrap();
        let mut found = world.sandboxes.found().await.unwrap();
        assert!(found.remove(&kept));
        for id in found {
            world.sandboxes.clear(&id).await.unwrap();
        }
        state.check().unwrap();
    }
    assert!(foreign.exists());
    std::fs::remove_file(&foreign).unwrap();
    world.sandboxes.teardown(&kept).await.unwrap();
    assert_eq!(world.leavings(), Vec::<PathBuf>::new());
}

struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_target_must_run_and_its_pin_outlives_it() {
    let world = World::new();
    let (id, _) = world.pod(&pod(POD, CONTAINER, POD)).await;
    let mut sleep =
        KillOnDrop(Command::new("unshare").args(["--pid", "--fork", "--kill-child", "sleep", "60"]).spawn().unwrap());
    let child = || std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", sleep.0.id())).unwrap();
    while child().trim().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let target: u32 = child().trim().parse().unwrap();
    let pin = world.sandboxes.pin_target(&id, "c1", target).await.unwrap();
    let own = sys::namespace::inode(Path::new("/proc/self/ns/pid")).unwrap();
    assert_ne!(sys::namespace::inode(&pin).unwrap(), own);
    sleep.0.kill().unwrap();
    sleep.0.wait().unwrap();
    assert!(sys::namespace::inode(&pin).is_ok());
    for gone in [0, i32::MAX as u32, u32::MAX, sleep.0.id()] {
        let e = world.sandboxes.pin_target(&id, "c2", gone).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::FailedPrecondition, "{gone}: {e}");
    }
    world.sandboxes.unpin_target(&id, "c1").await.unwrap();
    world.sandboxes.unpin_target(&id, "c1").await.unwrap();
    world.sandboxes.pin_target(&id, "c3", std::process::id()).await.unwrap();
    world.sandboxes.teardown(&id).await.unwrap();
    assert_eq!(world.leavings(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn the_inits_rootfs_is_there_only_where_pids_are_shared() {
    let world = World::new();
    let (shared, _) = world.pod(&pod(POD, POD, POD)).await;
    let rootfs = world.sandboxes.init_rootfs(&shared).await.unwrap();
    std::fs::create_dir_all(Path::new(&rootfs.source).join("proc")).unwrap();
    let (private, _) = world.pod(&pod(POD, CONTAINER, POD)).await;
    assert!(world.sandboxes.init_rootfs(&private).await.unwrap_err().is_not_found());
    world.sandboxes.teardown(&shared).await.unwrap();
    world.sandboxes.teardown(&private).await.unwrap();
    assert_eq!(world.leavings(), Vec::<PathBuf>::new());
}

/// Runs a shell line in a container of the pod, with the real runc.
fn in_container(world: &World, state: &SandboxState, line: &str) -> String {
    use std::os::unix::fs::{PermissionsExt, chown};
    let name = format!("longshore-test-{:.20}", types::new_id().unwrap());
    let bundle = world.root.path().join(&name);
    for dir in ["rootfs/bin", "rootfs/proc", "rootfs/dev", "rootfs/etc"] {
        std::fs::create_dir_all(bundle.join(dir)).unwrap();
    }
    std::fs::copy("/bin/busybox", bundle.join("rootfs/bin/busybox")).unwrap();
    let (uid, gid) = (state.plan.mapped_root_uid().unwrap_or(0), state.bundle_gid().unwrap_or(0));
    for path in ["rootfs", "rootfs/bin", "rootfs/bin/busybox", "rootfs/proc", "rootfs/dev", "rootfs/etc"] {
        chown(bundle.join(path), Some(uid), Some(gid)).unwrap();
    }
    chown(&bundle, None, Some(gid)).unwrap();
    std::fs::set_permissions(&bundle, std::fs::Permissions::from_mode(0o710)).unwrap();
    // The temporary directory itself is closed to all but root.
    std::fs::set_permissions(world.root.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    std::fs::write(bundle.join("config.json"), runc_config(state, &name, line).to_string()).unwrap();
    let mut run = Command::new("timeout");
    run.args(["30", "runc", "--root"]).arg(world.root.path().join("runc"));
    let output = run.arg("run").arg("--bundle").arg(&bundle).arg(&name).stdin(Stdio::null()).output().unwrap();
    let _ =
        Command::new("runc").arg("--root").arg(world.root.path().join("runc")).args(["delete", "-f", &name]).output();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn runc_config(state: &SandboxState, name: &str, line: &str) -> serde_json::Value {
    use serde_json::json;
    let bind = |to: &str, from: &Path| json!({"destination": to, "type": "bind", "source": from, "options": ["bind"]});
    let mut namespaces = vec![json!({"type": "pid"}), json!({"type": "mount"})];
    for (kind, pin) in [("network", &state.net), ("ipc", &state.ipc), ("uts", &state.uts), ("user", &state.user)] {
        namespaces.extend(pin.as_ref().map(|path| json!({"type": kind, "path": path})));
    }
    let map = |id: &str| match &state.plan.user {
        Some(maps) => {
            let ranges = if id == "uid" { &maps.uids } else { &maps.gids };
            ranges.iter().map(|m| json!({"containerID": m.container, "hostID": m.host, "size": m.length})).collect()
        }
        None => Vec::new(),
    };
    json!({
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/busybox", "sh", "-ec", line], "cwd": "/",
            "env": ["PATH=/bin"], "noNewPrivileges": true},
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            bind("/dev/shm", &state.shm_path), bind("/etc/hostname", &state.hostname_path),
            bind("/etc/hosts", &state.hosts_path), bind("/etc/resolv.conf", &state.resolv_conf_path),
        ],
        "linux": {"namespaces": namespaces, "uidMappings": map("uid"), "gidMappings": map("gid"),
            "cgroupsPath": format!("/{name}")},
    })
}

#[tokio::test]
async fn containers_of_a_real_runtime_join_the_pod() {
    for config in [pod(POD, CONTAINER, POD), userns_pod()] {
        let world = World::new();
        let (id, state) = world.pod(&config).await;
        let b = "/bin/busybox";
        let show = format!("{b} hostname; {b} cat /etc/hostname; {b} ip link show lo; {b} id -u; {b} ls -l /etc/hosts");
        let text = in_container(&world, &state, &show);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..2], ["web-0", "web-0"], "{text}");
        assert!(lines[2].contains("LOOPBACK,UP"), "{text}");
        assert!(lines.contains(&"0") && text.ends_with("/etc/hosts"), "{text}");
        for (kind, pin) in [("net", &state.net), ("ipc", &state.ipc), ("uts", &state.uts)] {
            let pinned = sys::namespace::inode(pin.as_deref().unwrap()).unwrap();
            let seen = in_container(&world, &state, &format!("{b} readlink /proc/self/ns/{kind}"));
            assert_eq!(seen, format!("{kind}:[{pinned}]"));
        }
        if let Some(user) = &state.user {
            let seen = in_container(&world, &state, &format!("{b} readlink /proc/self/ns/user"));
            assert_eq!(seen, format!("user:[{}]", sys::namespace::inode(user).unwrap()));
        }
        in_container(&world, &state, &format!("echo shared > /dev/shm/x; {b} chmod 600 /dev/shm/x"));
        assert_eq!(in_container(&world, &state, &format!("{b} cat /dev/shm/x")), "shared");
        world.sandboxes.teardown(&id).await.unwrap();
        assert_eq!(world.leavings(), Vec::<PathBuf>::new());
    }
}
