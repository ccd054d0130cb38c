//! Bad records and bundles, and leftovers: put aside, named, removed; and what is not
//! ours stays (with a real shim and runtime).
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{Daemon, IMAGE, busybox, command_line, container, handler, wait_for};
use proto::cri::*;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::task::JoinSet;
use tonic::Code;

const BOUND: Duration = Duration::from_secs(30);

/// The findings of one check.
fn doctor(daemon: &Daemon, check: &str, more: &[&str]) -> Vec<Value> {
    let (_, findings) = daemon.doctor(&daemon.state(), more);
    findings.into_iter().filter(|f| f["check"] == check).collect()
}

fn says(findings: &[Value], part: &str) -> bool {
    findings
        .iter()
        .any(|f| f["verdict"] == "warning" && f["found"].as_str().unwrap().contains(part) && f["remedy"] != "")
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_records_are_put_aside_and_everything_else_goes_on() {
    let (mut daemon, cri) = Daemon::stocked().await;
    let before = daemon.footprint();
    let (bad, odd, well) = (daemon.pod("bad"), daemon.pod("odd"), daemon.pod("well"));
    let sleep = || container("main", IMAGE, &["sleep", "100000"]);
    let bad_id = cri.run_pod(&bad).await.unwrap();
    let bad_main = cri.run(&bad_id, &sleep(), &bad).await.unwrap();
    let odd_id = cri.run_pod(&odd).await.unwrap();
    let odd_main = cri.run(&odd_id, &sleep(), &odd).await.unwrap();
    let well_id = cri.run_pod(&well).await.unwrap();
    let well_main = cri.run(&well_id, &sleep(), &well).await.unwrap();
    let second = cri.run(&well_id, &container("second", IMAGE, &["sleep", "100000"]), &well).await.unwrap();
    let mut pids = Vec::new();
    for id in [&bad_main, &odd_main, &well_main, &second] {
        pids.push(cri.pid_of(id).await.unwrap());
    }
    daemon.kill();
    daemon.sql(&format!(
        "UPDATE pods SET state_json = '{{\"phase\": \"ready\"}}' WHERE id = '{bad_id}';
             UPDATE pods SET config_json = x'00ff', created_at_ns = 'x' WHERE id = '{odd_id}';
             UPDATE containers SET state_json = 'no JSON' WHERE id = '{second}';"
    ));
    daemon.begin().await;
    let cri = daemon.cri().await;
    assert_eq!(cri.pods().await.unwrap(), vec![well_id.clone()], "the others are not listed");
    assert!(pids.iter().all(|pid| command_line(*pid) == "sleep 100000"), "all go on");
    // The pod with a bad container takes all calls, and the container none but an end.
    assert_eq!(cri.exec(&well_main, &["echo", "on"], 10).await.unwrap().stdout, "on\n");
    assert_eq!(cri.status(&second).await.unwrap_err().code(), Code::NotFound);
    cri.run(&well_id, &container("third", IMAGE, &["sleep", "100000"]), &well).await.unwrap();
    let findings = doctor(&daemon, "quarantine", &["--fix"]);
    for id in [&bad_id, &odd_id, &second] {
        assert!(says(&findings, id), "{id}: {findings:?}");
    }
    assert!(pids.iter().all(|pid| command_line(*pid) == "sleep 100000"), "what is held is no leftover");
    let verbose = cri.runtime.clone().status(StatusRequest { verbose: true }).await.unwrap().into_inner();
    assert!(verbose.info.values().any(|v| v.contains(&bad_id)), "{verbose:?}");
    // Its name stays taken, and whoever wants it is told by whom.
    let e = cri.run_pod(&bad).await.unwrap_err();
    assert!(e.code() == Code::AlreadyExists && e.message().contains(&bad_id[..12]), "{e}");

    cri.stop(&second, 0).await.unwrap();
    wait_for("it is dead", BOUND, || command_line(pids[3]).is_empty());
    cri.remove(&second).await.unwrap();
    cri.stop_pod(&bad_id[..20]).await.unwrap();
    wait_for("it is dead", BOUND, || command_line(pids[0]).is_empty());
    assert!(cri.run_pod(&bad).await.is_err());
    for id in [&bad_id, &odd_id, &well_id] {
        cri.remove_pod(id).await.unwrap();
        cri.remove_pod(id).await.unwrap();
    }
    daemon.leaves_nothing_but(&before);
    assert!(!says(&doctor(&daemon, "quarantine", &[]), ""));
    let again = cri.run_pod(&bad).await.unwrap();
    cri.remove_pod(&again).await.unwrap();
    // Neither the next start finds anything of them.
    daemon.terminate();
    daemon.begin().await;
    assert!(!says(&doctor(&daemon, "quarantine", &[]), ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_loss_of_database_and_copy_what_runs_goes_on_and_can_be_removed() {
    let (mut daemon, cri) = Daemon::stocked().await;
    let before = daemon.footprint();
    let config = daemon.pod("lost");
    let pod = cri.run_pod(&config).await.unwrap();
    let main = cri
        .run(&pod, &container("main", IMAGE, &["sh", "-c", "echo kept > /kept; sleep 100000"]), &config)
        .await
        .unwrap();
    let pid = cri.pid_of(&main).await.unwrap();
    daemon.kill();
    for dir in [daemon.dir().join("root/db"), daemon.state().join("db")] {
        for file in std::fs::read_dir(dir).unwrap().flatten() {
            std::fs::write(file.path(), [9; 5000]).unwrap();
        }
    }
    daemon.begin().await;
    let cri = daemon.cri().await;
    assert!(!command_line(pid).is_empty(), "it runs on");
    let kept = std::fs::read_to_string(format!("/proc/{pid}/root/kept")).unwrap();
    assert_eq!(kept, "kept\n", "its files stay");
    assert!(says(&doctor(&daemon, "database", &[]), "damaged"));
    assert!(says(&doctor(&daemon, "quarantine", &[]), &pod));
    // The node goes on: new snapshots take no old one's place.
    daemon.import(&busybox(), IMAGE);
    let next = daemon.pod("next");
    let new = cri.run_pod(&next).await.unwrap();
    let second = cri.run(&new, &container("main", IMAGE, &["sleep", "100000"]), &next).await.unwrap();
    assert_eq!(cri.exec(&second, &["cat", "/kept"], 10).await.unwrap().exit_code, 1);
    assert_eq!(std::fs::read_to_string(format!("/proc/{pid}/root/kept")).unwrap(), "kept\n");
    cri.stop_pod(&pod).await.unwrap();
    wait_for("it is dead", BOUND, || command_line(pid).is_empty());
    cri.remove_pod(&pod).await.unwrap();
    cri.remove_pod(&new).await.unwrap();
    doctor(&daemon, "leftovers", &["--fix"]);
    wait_for("nothing is left", BOUND, || {
        let more = daemon.footprint().beyond(&before);
        // The layers have other numbers now; nothing else is there.
        let others = more.files.iter().filter(|f| !f.contains("/snapshots/")).count();
        more.mounts.is_empty() && more.processes.is_empty() && others == 0
    });
}

/// What belongs to others, taken away when this goes.
struct Foreign {
    netns: &'static str,
    cgroups: Vec<PathBuf>,
    mount: PathBuf,
    shim: Child,
    files: Vec<PathBuf>,
}

impl Foreign {
    fn make(daemon: &Daemon) -> Self {
        let netns = "longshore-fedcba9876543210";
        assert!(Command::new("ip").args(["netns", "add", netns]).status().unwrap().success());
        let id = "f".repeat(64);
        let cgroups: Vec<PathBuf> = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .iter()
            .filter(|h| Path::new(h).join("cgroup.procs").exists())
            .map(|h| Path::new(h).join(daemon.cgroup()).join(&id))
            .filter(|c| std::fs::create_dir_all(c).is_ok())
            .collect();
        assert!(!cgroups.is_empty());
        let mount = daemon.state().join("theirs");
        std::fs::create_dir(&mount).unwrap();
        assert!(Command::new("mount").args(["-t", "tmpfs", "theirs"]).arg(&mount).status().unwrap().success());
        // As containerd's: the same namespace, another bundle.
        let bundle = daemon.dir().join("containerd/k8s.io").join(&id);
        std::fs::create_dir_all(&bundle).unwrap();
        let shim = Command::new("sh")
            .args(["-c", "read end", "containerd-shim-runc-v2", "-namespace", "k8s.io", "-id", &id])
            .current_dir(&bundle)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        // What lies among ours and is none.
        let odd = daemon.bundles().join("odd");
        std::fs::create_dir_all(odd.join("precious")).unwrap();
        let file = daemon.dir().join("root/snapshots/not-a-number");
        std::fs::write(&file, "").unwrap();
        Self { netns, cgroups, mount, shim, files: vec![odd, file] }
    }

    fn is_whole(&mut self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        Path::new("/run/netns").join(self.netns).exists()
            && self.cgroups.iter().all(|c| c.is_dir())
            && mounts.contains(&format!(" {} ", self.mount.display()))
            && self.shim.try_wait().unwrap().is_none()
            && self.files.iter().all(|f| f.exists())
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", self.netns]).status();
        let _ = Command::new("umount").arg(&self.mount).status();
        let _ = (self.shim.kill(), self.shim.wait());
        for cgroup in &self.cgroups {
            let _ = std::fs::remove_dir(cgroup);
        }
        for file in &self.files {
            let _ = std::fs::remove_dir_all(file).or_else(|_| std::fs::remove_file(file));
        }
    }
}

/// Makes a mess: what a pod of nobody's would have on the node.
fn litter(daemon: &Daemon, image_dir: &Path) -> Vec<PathBuf> {
    let id = "0123456789abcdef".repeat(4);
    let (state, root) = (daemon.state(), daemon.dir().join("root"));
    let bundle = daemon.bundles().join(&id).join("tasks").join(&id);
    let shm = state.join("pods").join(&id).join("shm");
    let pins = state.join("ns").join(&id);
    let container = root.join("containers").join(&id);
    let snapshot = root.join("snapshots/987654");
    for dir in [&bundle.join("rootfs"), &shm, &pins, &container, &snapshot.join("fs"), &state.join("stdin")] {
        std::fs::create_dir_all(dir).unwrap();
    }
    std::fs::write(bundle.join("config.json"), "{}").unwrap();
    std::fs::write(snapshot.join("fs/file"), "x").unwrap();
    let stdin = state.join("stdin").join(&id);
    std::fs::write(&stdin, "").unwrap();
    let cgroup = format!("/{}/{id}", daemon.cgroup());
    std::fs::write(container.join("config.json"), format!("{{\"linux\":{{\"cgroupsPath\":\"{cgroup}\"}}}}")).unwrap();
    std::fs::write(pins.join("uts"), "").unwrap();
    let mounts = [("/proc/self/ns/uts", pins.join("uts")), (image_dir.to_str().unwrap(), bundle.join("rootfs"))];
    for (from, to) in mounts {
        assert!(Command::new("mount").args(["--bind", from]).arg(to).status().unwrap().success());
    }
    assert!(Command::new("mount").args(["-t", "tmpfs", "shm"]).arg(&shm).status().unwrap().success());
    let netns = format!("longshore-{}", &id[..16]);
    assert!(Command::new("ip").args(["netns", "add", &netns]).status().unwrap().success());
    vec![
        daemon.bundles().join(&id),
        state.join("pods").join(&id),
        pins,
        container,
        snapshot,
        stdin,
        Path::new("/run/netns").join(netns),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn leftovers_are_removed_while_pods_come_and_go_and_what_is_not_ours_stays() {
    let (mut daemon, cri) = Daemon::stocked().await;
    let config = daemon.pod("stays");
    let pod = cri.run_pod(&config).await.unwrap();
    let main = cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    let pid = cri.pid_of(&main).await.unwrap();
    // Until then the footprint would know it as runc's init.
    wait_for("it is the command", BOUND, || command_line(pid) == "sleep 100000");
    let before = daemon.footprint();
    let mut foreign = Foreign::make(&daemon);
    let precious = daemon.dir().join("precious");
    std::fs::create_dir(&precious).unwrap();
    std::fs::write(precious.join("file"), "x").unwrap();
    let mut left = litter(&daemon, &precious);
    // A task that its container's removal has left in a pod that lives.
    let task = daemon.bundles().join(&pod).join("tasks").join("a".repeat(64));
    std::fs::create_dir_all(task.join("rootfs")).unwrap();
    std::fs::write(task.join("config.json"), "{}").unwrap();
    left.push(task);
    // Rounds without end, and beside them pods that are made and removed.
    let socket = daemon.socket();
    let rounds = tokio::spawn(async move {
        loop {
            let mut admin = proto::admin::admin_client::AdminClient::new(channel(&socket).await);
            admin.health(proto::admin::HealthRequest { reconcile: true }).await.unwrap();
        }
    });
    let mut churn = JoinSet::new();
    for n in 0..3 {
        let (cri, config) = (daemon.cri().await, daemon.pod(&format!("churn-{n}")));
        churn.spawn(async move {
            for attempt in 0..4 {
                let mut config = config.clone();
                config.metadata.as_mut().unwrap().attempt = attempt;
                let pod = cri.run_pod(&config).await.unwrap();
                let id = cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
                assert_eq!(cri.exec(&id, &["echo", "on"], 20).await.unwrap().stdout, "on\n");
                cri.stop_pod(&pod).await.unwrap();
                cri.remove_pod(&pod).await.unwrap();
            }
        });
    }
    while let Some(done) = churn.join_next().await {
        done.unwrap();
    }
    rounds.abort();
    doctor(&daemon, "leftovers", &["--fix"]);
    let stays: Vec<_> = left.iter().filter(|p| p.symlink_metadata().is_ok()).collect();
    assert!(stays.is_empty(), "{stays:?}\n{}", daemon.log());
    assert!(precious.join("file").exists(), "nothing is removed through a mount");
    assert!(foreign.is_whole());
    assert_eq!(cri.exec(&main, &["echo", "on"], 10).await.unwrap().stdout, "on\n");
    let findings = doctor(&daemon, "leftovers", &[]);
    let removed =
        findings.iter().any(|f| f["verdict"] == "ok" && f["found"].as_str().unwrap().contains("0123456789ab"));
    assert!(removed, "{findings:?}");
    assert!(says(&doctor(&daemon, "quarantine", &[]), "odd"));
    // Nothing of the pods that came and went was taken for a leftover.
    let said = daemon.log();
    let others: Vec<&str> = said
        .lines()
        .filter(|l| l.contains("removed a leftover"))
        .filter(|l| !["0123456789ab", "aaaaaaaaaaaa", "987654"].iter().any(|ours| l.contains(ours)))
        .collect();
    assert!(others.is_empty(), "{others:?}");
    // The same at a start.
    daemon.terminate();
    let left = litter(&daemon, &precious);
    daemon.begin().await;
    let stays: Vec<_> = left.iter().filter(|p| p.symlink_metadata().is_ok()).collect();
    assert!(stays.is_empty(), "{stays:?}");
    assert!(foreign.is_whole() && precious.join("file").exists());
    drop(foreign);
    daemon.leaves_nothing_but(&before);
    let cri = daemon.cri().await;
    cri.remove_pod(&pod).await.unwrap();
}

async fn channel(socket: &Path) -> tonic::transport::Channel {
    let path = socket.to_path_buf();
    tonic::transport::Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
        }))
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_whose_bundle_is_gone_is_ended_with_what_it_runs() {
    if handler().monitored() {
        return;
    }
    let (mut daemon, cri) = Daemon::stocked().await;
    let before = daemon.footprint();
    let config = daemon.pod("gone");
    let pod = cri.run_pod(&config).await.unwrap();
    let main = cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    let (pid, shims) = (cri.pid_of(&main).await.unwrap(), daemon.shims());
    daemon.kill();
    daemon.sql("DELETE FROM containers; DELETE FROM pods;");
    let rootfs = daemon.bundles().join(&pod).join("tasks").join(&main).join("rootfs");
    assert!(Command::new("umount").arg(&rootfs).status().unwrap().success());
    std::fs::remove_dir_all(daemon.bundles().join(&pod)).unwrap();
    daemon.begin().await;
    wait_for("shim and container are dead", BOUND, || {
        command_line(pid).is_empty() && shims.iter().all(|s| command_line(*s).is_empty())
    });
    daemon.leaves_nothing_but(&before);
}
