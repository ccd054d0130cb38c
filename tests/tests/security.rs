//! Attacks that must fail (the project's security cases), on the real thing: what
//! only a running container can show. The parts' own tests have the others.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{Cri, Daemon, Handler, busybox, container, handler, pod};
use proto::cri::*;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tonic::Code;

const IMAGE: &str = "localhost/security:1";
const SOON: Duration = Duration::from_secs(30);

async fn daemon() -> (Daemon, Cri) {
    let daemon = Daemon::start().await;
    daemon.import(&busybox(), IMAGE);
    let cri = daemon.cri().await;
    (daemon, cri)
}

/// Runs `script` as a container's init and gives its exit code and its log.
async fn run_script(daemon: &Daemon, cri: &Cri, name: &str, image: &str, script: &str) -> (i32, String) {
    let mut config = pod(name);
    config.log_directory = daemon.dir().join("logs").join(name).to_string_lossy().into_owned();
    let pod_id = cri.run_pod(&config).await.unwrap();
    let mut c = container("main", image, &["sh", "-c", script]);
    c.log_path = "main.log".into();
    let id = cri.run(&pod_id, &c, &config).await.unwrap();
    let status = cri.exited(&id, SOON).await;
    cri.stop_pod(&pod_id).await.unwrap();
    cri.remove_pod(&pod_id).await.unwrap();
    // Complete only now: an exit is not held back for long by a log.
    let log = std::fs::read_to_string(daemon.dir().join("logs").join(name).join("main.log")).unwrap_or_default();
    (status.exit_code, log)
}

async fn sleeper(cri: &Cri, name: &str) -> (String, PodSandboxConfig, String) {
    let config = pod(name);
    let pod_id = cri.run_pod(&config).await.unwrap();
    let id = cri.run(&pod_id, &container("main", IMAGE, &["sleep", "1000"]), &config).await.unwrap();
    (pod_id, config, id)
}

fn output(answer: &ExecSyncResponse) -> String {
    String::from_utf8_lossy(&answer.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2024_21626_no_descriptor_and_no_working_directory_of_ours_reaches_a_container() {
    let (daemon, cri) = daemon().await;
    let script = "ls /proc/self/fd; ls -l /proc/1/fd";
    let (_, log) = run_script(&daemon, &cri, "fds", IMAGE, script).await;
    let numbers = log.lines().filter_map(|l| l.split(' ').nth(3)?.parse::<u32>().ok());
    // 3 is the directory that ls itself has open.
    assert!(matches!(numbers.max(), Some(..=3)), "{log}");
    let (_, config, id) = sleeper(&cri, "fds-exec").await;
    let answer = cri.exec(&id, &["ls", "/proc/self/fd"], 10).await.unwrap();
    assert_eq!(output(&answer), "0\n1\n2\n3\n");
    let pod_id = cri.info(&id).await.unwrap()["sandboxID"].clone();
    for dir in ["/proc/self/fd/7", "/proc/self/../self/fd/7/..//9", "/proc/1/fd/8"] {
        let mut c = container("evil", IMAGE, &["sh"]);
        c.working_dir = dir.into();
        let e = cri.create(pod_id.as_str().unwrap(), &c, &config).await.unwrap_err();
        assert_eq!(e.code(), Code::InvalidArgument, "{dir}: {e}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2019_5736_the_runtimes_binaries_cant_be_written_from_inside() {
    let (daemon, cri) = daemon().await;
    let digest = |p: &Path| testkit::sha256(&std::fs::read(p).unwrap());
    let shim = longshore_tests::bin_dir().join("containerd-shim-longshore-v2");
    let runc = ["/usr/sbin/runc", "/usr/bin/runc"].map(Path::new).into_iter().find(|p| p.exists()).unwrap();
    let before = (digest(&shim), digest(runc));
    // What enters the container is opened as it passes, and written to once it has gone:
    // while it runs nobody could. Before its execve nobody may look into it; afterwards it
    // is what it executed, and this loop, in which nothing forks, meets it.
    let script = "while :; do for p in /proc/[0-9]*; do
        [ $p = /proc/1 ] && continue
        command exec 3<$p/exe || continue
        case $(readlink /proc/self/fd/3) in ''|/bin/*|/lib*|/proc/*) continue;; esac
        while readlink $p/exe >/dev/null; do :; done
        echo held $(readlink /proc/self/fd/3); echo pwned >/proc/self/fd/3 && echo written; exit 0
    done; done 2>/dev/null";
    // With the loader of a runc that isn't static, it gets as far as to miss its libraries.
    let loader = Path::new("/lib64/ld-linux-x86-64.so.2");
    let image = match std::fs::read(loader) {
        Ok(bytes) => busybox().file("lib64/ld-linux-x86-64.so.2", &bytes, 0o755),
        Err(_) => busybox(),
    };
    daemon.import(&image, "localhost/loader:1");
    let mut config = pod("self-exe");
    config.log_directory = daemon.dir().join("logs").to_string_lossy().into_owned();
    let pod_id = cri.run_pod(&config).await.unwrap();
    let mut c = container("main", "localhost/loader:1", &["sh", "-c", script]);
    c.log_path = "main.log".into();
    let id = cri.run(&pod_id, &c, &config).await.unwrap();
    // An exec of /proc/self/exe runs whatever binary enters the container.
    for n in 0.. {
        let Ok(answer) = cri.exec(&id, &["/proc/self/exe"], 10).await else { break };
        assert!(n < 1000, "it was never met: {answer:?}");
    }
    assert_eq!(cri.exited(&id, SOON).await.exit_code, 0);
    cri.stop_pod(&pod_id).await.unwrap();
    let log = std::fs::read_to_string(daemon.dir().join("logs/main.log")).unwrap();
    assert!(log.contains("held ") && !log.contains("written"), "{log}");
    let (_, _) = run_script(&daemon, &cri, "init-exe", IMAGE, "echo pwned > /proc/self/exe").await;
    assert_eq!((digest(&shim), digest(runc)), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2022_24769_inheritable_capabilities_are_empty_in_run_and_exec() {
    let (daemon, cri) = daemon().await;
    let (_, log) = run_script(&daemon, &cri, "caps", IMAGE, "grep CapInh /proc/self/status").await;
    assert!(log.contains("CapInh:\t0000000000000000"), "{log}");
    let (_, _, id) = sleeper(&cri, "caps-exec").await;
    let answer = cri.exec(&id, &["grep", "CapInh", "/proc/self/status"], 10).await.unwrap();
    assert_eq!(output(&answer), "CapInh:\t0000000000000000\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2020_15257_a_container_in_the_nodes_network_cant_reach_the_shim() {
    let (daemon, cri) = daemon().await;
    let (_, _, id) = sleeper(&cri, "sockets").await;
    let answer = cri.exec(&id, &["cat", "/proc/net/unix"], 10).await.unwrap();
    let abstract_ones: Vec<&str> = std::str::from_utf8(&answer.stdout)
        .unwrap()
        .lines()
        .filter(|l| l.contains(" @") && l.contains("longshore"))
        .collect();
    assert!(abstract_ones.is_empty(), "{abstract_ones:?}");
    for pid in daemon.shims() {
        let bundle = PathBuf::from(format!("/proc/{pid}/cwd"));
        let socket = if handler().monitored() {
            bundle.join("attach")
        } else {
            let address = std::fs::read_to_string(bundle.join("address")).unwrap();
            PathBuf::from(address.trim().strip_prefix("unix://").unwrap())
        };
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
        let dir = mode(socket.parent().unwrap());
        assert_eq!((mode(&socket) & 0o077, dir & 0o077), (0, 0), "{}", socket.display());
        // Go's shim makes its directory with the mode of a socket.
        assert!(dir == 0o700 || handler() == Handler::GoShim, "{dir:o}");
    }
    let socket = std::fs::metadata(daemon.socket()).unwrap().permissions().mode() & 0o777;
    assert_eq!(socket, 0o660);
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2024_25621_directories_are_closed_to_other_users() {
    let (daemon, cri) = daemon().await;
    let (_, _, _) = sleeper(&cri, "modes").await;
    let mode = |dir: &str| std::fs::metadata(daemon.dir().join(dir)).unwrap().permissions().mode() & 0o777;
    for dir in ["root", "root/db", "root/containers", "root/images", "root/snapshots"] {
        assert_eq!(mode(dir) & 0o077, 0, "{dir}: {:o}", mode(dir));
    }
    // Passable, for the mapped root of a pod, whose own directories are closed.
    for dir in ["state", "state/bundles"] {
        assert_eq!(mode(dir) & 0o066, 0, "{dir}: {:o}", mode(dir));
    }
    for bundle in std::fs::read_dir(daemon.bundles()).unwrap().flatten() {
        assert_eq!(bundle.metadata().unwrap().permissions().mode() & 0o777, 0o700, "{:?}", bundle.path());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2022_23648_a_volume_that_climbs_copies_nothing_from_the_host() {
    let (daemon, cri) = daemon().await;
    let secret = daemon.dir().join("secret");
    std::fs::write(&secret, "of the host").unwrap();
    let image = busybox().volume("/../../../../../../etc").volume(&format!("/..{}", daemon.dir().display()));
    daemon.import(&image, "localhost/volume:1");
    let script = format!("cat {0} /etc/shadow; ls -a /etc", secret.display());
    let (_, log) = run_script(&daemon, &cri, "volume", "localhost/volume:1", &script).await;
    assert!(log.contains("hostname"), "the volume is listed: {log}");
    assert!(!log.contains("of the host") && !log.contains("root:"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2019_16884_a_volume_on_proc_takes_no_mask_away() {
    let (daemon, cri) = daemon().await;
    daemon.import(&busybox().volume("/proc"), "localhost/proc:1");
    let config = pod("proc");
    let pod_id = cri.run_pod(&config).await.unwrap();
    let mut c = container("main", "localhost/proc:1", &["sleep", "1000"]);
    let sc = c.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    sc.masked_paths = vec!["/proc/version".into()];
    sc.readonly_paths = vec!["/proc/sys".into()];
    let id = cri.run(&pod_id, &c, &config).await.unwrap();
    let script = "cat /proc/version | wc -c; echo x > /proc/sys/kernel/hostname || echo refused";
    let answer = cri.exec(&id, &["sh", "-c", script], 10).await.unwrap();
    assert_eq!(output(&answer), "0\nrefused\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2021_21334_concurrent_creates_share_no_environment() {
    let (_daemon, cri) = daemon().await;
    let config = pod("env");
    let pod_id = cri.run_pod(&config).await.unwrap();
    let each = (0..12).map(|n| {
        let (cri, pod_id, config) = (cri.clone(), pod_id.clone(), config.clone());
        tokio::spawn(async move {
            let mut c = container(&format!("c{n}"), IMAGE, &["sleep", "1000"]);
            c.envs = vec![KeyValue { key: format!("SECRET_{n}"), value: format!("{n}").into_bytes() }];
            let id = cri.run(&pod_id, &c, &config).await.unwrap();
            let answer = cri.exec(&id, &["env"], 20).await.unwrap();
            let secrets: Vec<String> =
                output(&answer).lines().filter(|l| l.starts_with("SECRET_")).map(str::to_string).collect();
            assert_eq!(secrets, [format!("SECRET_{n}={n}")]);
        })
    });
    for task in each.collect::<Vec<_>>() {
        task.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2025_0750_2022_4318_2023_2431_2022_0811_bad_input_is_refused() {
    let (_daemon, cri) = daemon().await;
    let mut config = pod("bad");
    config.log_directory = "/tmp/longshore-never-made".into();
    let pod_id = cri.run_pod(&config).await.unwrap();
    let refused = async |c: ContainerConfig| {
        let e = cri.create(&pod_id, &c, &config).await.unwrap_err();
        assert_eq!(e.code(), Code::InvalidArgument, "{e}");
    };
    for path in ["../../etc/cron.d/x", "/etc/x", "a/../../x"] {
        refused(ContainerConfig { log_path: path.into(), ..container("log", IMAGE, &["sh"]) }).await;
    }
    let home = KeyValue { key: "HOME".into(), value: b"/root\nevil:x:0:0::/:/bin/sh".to_vec() };
    refused(ContainerConfig { envs: vec![home], ..container("home", IMAGE, &["sh"]) }).await;
    let mut empty_profile = container("seccomp", IMAGE, &["sh"]);
    let sc = empty_profile.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    sc.seccomp = Some(SecurityProfile {
        profile_type: security_profile::ProfileType::Localhost.into(),
        localhost_ref: String::new(),
    });
    refused(empty_profile).await;
    for (key, value) in [("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/x"), ("kernel.core_pattern", "x")] {
        let mut bad = pod("bad-sysctl");
        bad.linux.as_mut().unwrap().sysctls.insert(key.into(), value.into());
        let e = cri.run_pod(&bad).await.unwrap_err();
        assert_eq!(e.code(), Code::InvalidArgument, "{e}");
    }
    assert!(!Path::new("/tmp/longshore-never-made").exists());
}

/// A directory of the host's that must stay as it is.
struct Victim(PathBuf);

impl Victim {
    fn new(daemon: &Daemon) -> Self {
        let dir = daemon.dir().join("victim");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("file"), "of the host").unwrap();
        Self(dir)
    }

    fn assert_untouched(&self, when: &str) {
        let names: Vec<_> = std::fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["file"], "{when}");
        assert_eq!(std::fs::read_to_string(self.0.join("file")).unwrap(), "of the host", "{when}");
        assert_eq!(std::fs::metadata(&self.0).unwrap().permissions().mode() & 0o777, 0o755, "{when}");
    }
}

/// Runs `sleep` from this image with these mounts; `None` where the runtime refuses it.
async fn tried(cri: &Cri, name: &str, image: &str, mounts: Vec<Mount>) -> Option<String> {
    let config = pod(name);
    let pod_id = cri.run_pod(&config).await.unwrap();
    let mut c = container("main", image, &["sleep", "1000"]);
    c.mounts = mounts;
    let sc = c.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    sc.masked_paths = vec!["/proc/version".into()];
    let id = cri.create(&pod_id, &c, &config).await.ok()?;
    cri.start(&id).await.ok().map(|()| id)
}

fn mount(host_path: &Path, container_path: impl Into<String>) -> Mount {
    let host_path = host_path.to_string_lossy().into_owned();
    Mount { host_path, container_path: container_path.into(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2021_30465_2024_45310_mount_targets_are_made_inside_the_root_alone() {
    let (daemon, cri) = daemon().await;
    let victim = Victim::new(&daemon);
    let climbing = format!("/../../../../../../../..{}", victim.0.display());
    let image =
        busybox().layer(testkit::Layer::new().symlink("data", &climbing).symlink("abs", victim.0.to_str().unwrap()));
    daemon.import(&image, "localhost/links:1");
    let (source, volume) = (daemon.dir().join("source"), daemon.dir().join("volume"));
    for dir in [&source, &volume] {
        std::fs::create_dir(dir).unwrap();
    }
    std::fs::write(source.join("secret"), "1").unwrap();
    std::os::unix::fs::symlink(&victim.0, volume.join("link")).unwrap();
    std::os::unix::fs::symlink(&climbing, volume.join("climbs")).unwrap();
    for (n, target) in
        ["/data", "/data/new", "/abs/new/deep", "/vol/link/new", "/vol/climbs/new", "/vol/link"].into_iter().enumerate()
    {
        let mounts = vec![mount(&volume, "/vol"), mount(&source, target)];
        let id = tried(&cri, &format!("target-{n}"), "localhost/links:1", mounts).await;
        victim.assert_untouched(target);
        if let Some(id) = id {
            let answer = cri.exec(&id, &["cat", &format!("{target}/secret")], 10).await.unwrap();
            assert_eq!(output(&answer), "1", "{target}: it is where the container sees it");
        }
        let file = vec![mount(&volume, "/vol"), mount(&source.join("secret"), format!("{target}/file-{n}"))];
        tried(&cri, &format!("file-{n}"), "localhost/links:1", file).await;
        victim.assert_untouched(target);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2023_28642_2019_19921_2023_27561_2025_31133_proc_and_dev_of_an_image_are_no_way_out() {
    let (daemon, cri) = daemon().await;
    let victim = Victim::new(&daemon);
    let out = victim.0.to_str().unwrap();
    let layers = [
        ("proc-out", testkit::Layer::new().symlink("proc", out)),
        ("proc-in", testkit::Layer::new().symlink("proc", "/tmp/proc").dir("tmp/proc", 0o755)),
        ("dev-out", testkit::Layer::new().symlink("dev", out)),
        ("dev-in", testkit::Layer::new().symlink("dev", "/tmp/dev").dir("tmp/dev", 0o755)),
        ("null", testkit::Layer::new().symlink("dev/null", &format!("{out}/file")).symlink("dev/pts", out)),
        ("console", testkit::Layer::new().symlink("dev/console", &format!("{out}/file")).symlink("dev/ptmx", out)),
    ];
    let mut ran = 0;
    for (name, layer) in layers {
        let image = format!("localhost/{name}:1");
        daemon.import(&busybox().layer(layer), &image);
        if let Some(id) = tried(&cri, name, &image, Vec::new()).await {
            ran += 1;
            let script = "wc -c </proc/version; echo x >/dev/null; grep -c ' /proc ' /proc/self/mountinfo";
            let answer = cri.exec(&id, &["sh", "-c", script], 10).await.unwrap();
            let lines = output(&answer);
            assert!(lines.starts_with("0\n"), "{name}: masked: {lines:?} {answer:?}");
        }
        victim.assert_untouched(name);
    }
    assert_eq!(ran, 2, "links below /dev are hidden by its tmpfs; others are refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2021_43816_files_of_the_pod_over_symlinks_lead_nowhere_else() {
    let (daemon, cri) = daemon().await;
    let victim = Victim::new(&daemon);
    let file = format!("{}/file", victim.0.display());
    let layer =
        ["etc/hosts", "etc/hostname", "etc/resolv.conf"].iter().fold(testkit::Layer::new(), |l, p| l.symlink(p, &file));
    daemon.import(&busybox().layer(layer), "localhost/etc:1");
    let inode = |p: &Path| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(p).unwrap());
    let before = inode(Path::new(&file));
    let id = tried(&cri, "etc", "localhost/etc:1", Vec::new()).await.unwrap();
    victim.assert_untouched("etc");
    assert_eq!(inode(Path::new(&file)), before);
    let answer = cri.exec(&id, &["cat", "/etc/hosts"], 10).await.unwrap();
    assert!(!output(&answer).contains("of the host") && !output(&answer).is_empty(), "{answer:?}");
}
