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
    assert!(numbers.max() <= Some(3), "{log}");
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
    let (_, config, id) = sleeper(&cri, "self-exe").await;
    // An exec of /proc/self/exe runs whatever binary enters the container.
    for _ in 0..5 {
        let script = "for p in /proc/[0-9]*; do echo pwned > $p/exe; done 2>/dev/null; true";
        let attack = async { cri.exec(&id, &["sh", "-c", script], 10).await };
        let bait = async { cri.exec(&id, &["/proc/self/exe"], 10).await };
        let _ = tokio::join!(attack, bait);
    }
    let (_, _) = run_script(&daemon, &cri, "init-exe", IMAGE, "echo pwned > /proc/self/exe").await;
    assert_eq!((digest(&shim), digest(runc)), before);
    drop(config);
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
    let open_to_others = |dir: &Path| std::fs::metadata(dir).unwrap().permissions().mode() & 0o006;
    for dir in ["root", "state", "root/db", "root/containers", "root/images", "root/snapshots", "state/bundles"] {
        assert_eq!(open_to_others(&daemon.dir().join(dir)), 0, "{dir}");
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
    sc.masked_paths = vec!["/proc/kcore".into()];
    sc.readonly_paths = vec!["/proc/sys".into()];
    let id = cri.run(&pod_id, &c, &config).await.unwrap();
    let script = "cat /proc/kcore | wc -c; echo x > /proc/sys/kernel/hostname || echo refused";
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
