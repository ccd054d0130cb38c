//! What the death of the daemon, of a shim, of both, and of the node leaves, against
//! a real shim and runtime (behaviours.md sections 5 and 6).
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{
    Cri, Daemon, Handler, IMAGE, children, command_line, container, handler, in_pid_namespace, namespace, signal,
    wait_for,
};
use proto::cri::*;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::task::JoinSet;

const BOUND: Duration = Duration::from_secs(30);

/// A container that takes the network that its pod has.
fn container_of(pod: &PodSandboxConfig, name: &str, command: &[&str]) -> ContainerConfig {
    let mut c = container(name, IMAGE, command);
    let options = pod.linux.as_ref().unwrap().security_context.as_ref().unwrap().namespace_options.clone();
    c.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options = options;
    c
}

fn shared_pid(pod: &mut PodSandboxConfig, containers: &mut [&mut ContainerConfig]) {
    let mode = NamespaceMode::Pod.into();
    let linux = pod.linux.as_mut().unwrap();
    linux.security_context.as_mut().unwrap().namespace_options.as_mut().unwrap().pid = mode;
    for c in containers {
        let security = c.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        security.namespace_options.as_mut().unwrap().pid = mode;
    }
}

async fn pod_state(cri: &Cri, id: &str) -> PodSandboxState {
    cri.pod_status(id).await.unwrap().status.unwrap().state()
}

fn kill(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

fn lines(path: &std::path::Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|l| l.splitn(4, ' ').nth(3)).map(str::to_string).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_finds_all_again() {
    let (mut daemon, cri) = Daemon::stocked().await;
    for shared in [false, true] {
        let name = if shared { "shared" } else { "private" };
        let mut config = daemon.pod(name);
        config.log_directory = daemon.dir().join(format!("log-{name}")).to_string_lossy().into_owned();
        let talk = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.05; done";
        let mut talker = container("talker", IMAGE, &["sh", "-c", talk]);
        talker.log_path = "talker.log".into();
        let mut brief = container("brief", IMAGE, &["sh", "-c", "while [ ! -e /go/now ]; do sleep 0.05; done; exit 7"]);
        let go = daemon.dir().join(format!("go-{name}"));
        std::fs::create_dir(&go).unwrap();
        let host_path = go.to_string_lossy().into_owned();
        brief.mounts = vec![Mount { container_path: "/go".into(), host_path, ..Default::default() }];
        let mut created = container("created", IMAGE, &["sh", "-c", "exit 3"]);
        let mut old = container("old", IMAGE, &["sh", "-c", "exit 4"]);
        if shared {
            shared_pid(&mut config, &mut [&mut talker, &mut brief, &mut created, &mut old]);
        }
        let cri = daemon.cri().await;
        let pod = cri.run_pod(&config).await.unwrap();
        let talker = cri.run(&pod, &talker, &config).await.unwrap();
        let brief = cri.run(&pod, &brief, &config).await.unwrap();
        let created = cri.create(&pod, &created, &config).await.unwrap();
        let old = cri.run(&pod, &old, &config).await.unwrap();
        let old_status = cri.exited(&old, BOUND).await;
        let (pid, brief_pid) = (cri.pid_of(&talker).await.unwrap(), cri.pid_of(&brief).await.unwrap());
        let shims = daemon.shims();
        let pending = tokio::spawn({
            let (cri, id) = (cri.clone(), talker.clone());
            async move { cri.exec(&id, &["sleep", "8765"], 0).await }
        });
        let execs = || in_pid_namespace(pid).iter().filter(|(_, line)| line == "sleep 8765").count();
        wait_for("the exec runs", BOUND, || execs() == 1);
        // A monitor that can't tell anybody the pid any more leaves its command alone, and Go's
        // shim one whose Start was not answered.
        let knows = format!("exec in container {talker}, which waits for");
        let awaits = if handler().monitored() { "the command's end" } else { "the shim's Wait" };
        wait_for("the daemon knows of it", BOUND, || {
            let (_, findings) = daemon.doctor(&daemon.state(), &[]);
            let all: Vec<_> = findings.iter().map(|f| f["found"].as_str().unwrap()).collect();
            all.iter().any(|f| f.contains(&knows) && f.contains(awaits) && !f.contains("the shim's Start"))
        });

        daemon.kill();
        assert!(pending.await.unwrap().is_err());
        std::fs::write(go.join("now"), "").unwrap();
        wait_for("a container ends while there is no daemon", BOUND, || command_line(brief_pid).is_empty());
        let log = daemon.dir().join(format!("log-{name}/talker.log"));
        // A foreign shim's output waits in its FIFO for the daemon that logs it.
        if handler() != Handler::GoShim {
            let written = lines(&log).len();
            wait_for("the log goes on without a daemon", BOUND, || lines(&log).len() > written + 5);
        }
        // Reaped, it has its time of death.
        wait_for("it is reaped", BOUND, || !std::path::Path::new(&format!("/proc/{brief_pid}")).exists());
        tokio::time::sleep(Duration::from_millis(300)).await;
        let ended = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        daemon.begin().await;

        let cri = daemon.cri().await;
        assert_eq!(pod_state(&cri, &pod).await, PodSandboxState::SandboxReady);
        assert_eq!(cri.pid_of(&talker).await.unwrap(), pid, "{name}");
        // A monitor ends with its container.
        if !handler().monitored() {
            // What a shim has just forked bears its name for a moment.
            wait_for("its shims are the old ones", BOUND, || daemon.shims() == shims);
        }
        let status = cri.exited(&brief, BOUND).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"), "{name}: {status:?}");
        assert!(u128::try_from(status.finished_at).unwrap() <= ended, "it is known when it ended");
        let again = cri.status(&old).await.unwrap();
        assert_eq!((again.exit_code, again.finished_at), (4, old_status.finished_at));
        wait_for("the exec that nobody waits for is killed", BOUND, || execs() == 0);
        assert_eq!(cri.exec(&talker, &["echo", "still"], 10).await.unwrap().stdout, "still\n");
        let written = lines(&log).len();
        wait_for("the log goes on", BOUND, || lines(&log).len() > written + 5);
        // What was created can be started, and ends are told as before.
        cri.start(&created).await.unwrap();
        assert_eq!(cri.exited(&created, BOUND).await.exit_code, 3);
        cri.runtime
            .clone()
            .reopen_container_log(ReopenContainerLogRequest { container_id: talker.clone() })
            .await
            .unwrap();
        cri.stop(&talker, 0).await.unwrap();
        let code = cri.status(&talker).await.unwrap().exit_code;
        assert!(code == 137 || (shared && code == 143), "{code}");
        let numbers: Vec<usize> = lines(&log).iter().map(|l| l.parse().unwrap()).collect();
        assert!(numbers.iter().copied().eq(1..=numbers.len()), "no line is lost: {numbers:?}");
        cri.stop_pod(&pod).await.unwrap();
        cri.remove_pod(&pod).await.unwrap();
    }
    drop(cri);
}

/// The record of an end comes before the task that knows of it goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_that_dies_loses_no_end_that_it_found() {
    let (mut daemon, cri) = Daemon::stocked().await;
    let before = daemon.footprint();
    let config = daemon.pod("found");
    let pod = cri.run_pod(&config).await.unwrap();
    let go = daemon.dir().join("go");
    std::fs::create_dir(&go).unwrap();
    let host_path = go.to_string_lossy().into_owned();
    let mut ended = Vec::new();
    // A monitor has no task that outlives its container.
    let all = ["recover.record", "record.container-state", "task.delete", "task.unbundle"];
    for step in &all[..if handler().monitored() { 2 } else { 4 }] {
        for moment in ["before", "after"] {
            let point = format!("{step}.{moment}");
            let script = format!("while [ ! -e /go/{point} ]; do sleep 0.05; done; exit 9");
            let mut c = container(&point, IMAGE, &["sh", "-c", &script]);
            c.mounts = vec![Mount { container_path: "/go".into(), host_path: host_path.clone(), ..Default::default() }];
            let cri = daemon.cri().await;
            let id = cri.run(&pod, &c, &config).await.unwrap();
            let pid = cri.pid_of(&id).await.unwrap();
            daemon.kill();
            std::fs::write(go.join(&point), "").unwrap();
            wait_for("a container ends while there is no daemon", BOUND, || command_line(pid).is_empty());
            if daemon.begin_doomed(&point).await {
                wait_for(&format!("the daemon dies at {point}"), BOUND, || daemon.has_died());
            }
            daemon.begin().await;
            let status = daemon.cri().await.exited(&id, BOUND).await;
            assert_eq!(status.exit_code, 9, "{point}: {status:?}");
            ended.push((id, status.finished_at));
        }
    }
    let cri = daemon.cri().await;
    for (id, finished_at) in ended {
        let status = cri.status(&id).await.unwrap();
        assert_eq!((status.exit_code, status.finished_at), (9, finished_at));
    }
    cri.stop_pod(&pod).await.unwrap();
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn daemon_and_shim_die_together() {
    let (mut daemon, cri) = Daemon::stocked().await;
    let before = daemon.footprint();
    let config = daemon.pod("both");
    let pod = cri.run_pod(&config).await.unwrap();
    let id = cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    let go = daemon.dir().join("go");
    std::fs::create_dir(&go).unwrap();
    let mut brief = container("brief", IMAGE, &["sh", "-c", "while [ ! -e /go/now ]; do sleep 0.05; done; exit 9"]);
    let host_path = go.to_string_lossy().into_owned();
    brief.mounts = vec![Mount { container_path: "/go".into(), host_path, ..Default::default() }];
    let brief = cri.run(&pod, &brief, &config).await.unwrap();
    let (pid, brief_pid) = (cri.pid_of(&id).await.unwrap(), cri.pid_of(&brief).await.unwrap());
    let shims = daemon.shims();
    daemon.kill();
    // The shim writes the exit down before it could tell anybody.
    std::fs::write(go.join("now"), "").unwrap();
    wait_for("a container ends while there is no daemon", BOUND, || command_line(brief_pid).is_empty());
    let told = if handler().monitored() {
        daemon.state().join("conmon/exits").join(&brief)
    } else {
        daemon.bundles().join(&pod).join("tasks").join(&brief).join("exit.json")
    };
    if handler() == Handler::GoShim {
        wait_for("it is reaped", BOUND, || !std::path::Path::new(&format!("/proc/{brief_pid}")).exists());
    } else {
        wait_for("its end is written down", BOUND, || told.exists());
    }
    shims.iter().copied().for_each(kill);
    wait_for("the shim is dead", BOUND, || shims.iter().all(|s| command_line(*s).is_empty()));
    daemon.begin().await;
    let cri = daemon.cri().await;
    // Death certificates are our own shim's, and exit files a monitor's; nobody knows
    // more of a foreign shim's.
    let known = if handler() == Handler::GoShim { 137 } else { 9 };
    assert_eq!(cri.status(&brief).await.unwrap().exit_code, known, "its certificate outlives both");
    let status = cri.exited(&id, BOUND).await;
    assert_eq!(status.exit_code, 137, "{status:?}");
    wait_for("the orphaned process is dead", BOUND, || command_line(pid).is_empty());
    assert_eq!(pod_state(&cri, &pod).await, PodSandboxState::SandboxReady);
    let mut again = container("main", IMAGE, &["sleep", "100000"]);
    again.metadata.as_mut().unwrap().attempt = 1;
    let id = cri.run(&pod, &again, &config).await.unwrap();
    assert_eq!(cri.exec(&id, &["echo", "new"], 10).await.unwrap().stdout, "new\n");
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);

    // A pod whose init died with its shim is NOTREADY.
    let mut config = daemon.pod("both-init");
    let mut c = container("main", IMAGE, &["sleep", "100000"]);
    shared_pid(&mut config, &mut [&mut c]);
    let pod = cri.run_pod(&config).await.unwrap();
    let id = cri.run(&pod, &c, &config).await.unwrap();
    let shims = daemon.shims();
    daemon.kill();
    shims.iter().copied().for_each(kill);
    wait_for("the shims are dead", BOUND, || shims.iter().all(|s| command_line(*s).is_empty()));
    daemon.begin().await;
    let cri = daemon.cri().await;
    assert_eq!(cri.exited(&id, BOUND).await.exit_code, 137);
    assert_eq!(pod_state(&cri, &pod).await, PodSandboxState::SandboxNotready);
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);
}

/// Everything that a kubelet does with one pod, over and over, whatever fails.
async fn churn(cri: Cri, config: PodSandboxConfig) {
    for attempt in 0.. {
        let Ok(pod) = cri.run_pod(&config).await else { return };
        let mut c = container_of(&config, "main", &["sh", "-c", "sleep 0.05; exit 1"]);
        c.metadata.as_mut().unwrap().attempt = attempt;
        let Ok(a) = cri.run(&pod, &c, &config).await else { return };
        c.metadata.as_mut().unwrap().name = "second".into();
        c.command = vec!["sleep".into(), "100000".into()];
        let Ok(b) = cri.run(&pod, &c, &config).await else { return };
        let _ = cri.exec(&b, &["true"], 5).await;
        let _ = (cri.stop(&b, 0).await, cri.remove(&a).await);
        if cri.stop_pod(&pod).await.is_err() || cri.remove_pod(&pod).await.is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_at_any_moment_leaves_nothing_that_cannot_be_removed() {
    let (mut daemon, first) = Daemon::stocked().await;
    drop(first);
    let before = daemon.footprint();
    // Chosen by the clock: each run tries other moments; the seed is printed.
    let mut seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos() | 1;
    println!("seed {seed}");
    for round in 0..15 {
        let mut work = JoinSet::new();
        for n in 0..3 {
            let mut config = daemon.pod(&format!("churn-{n}"));
            config.metadata.as_mut().unwrap().attempt = round;
            let options = config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options.as_mut();
            options.unwrap().network = if n == 0 { NamespaceMode::Node } else { NamespaceMode::Pod }.into();
            let mut none: [&mut ContainerConfig; 0] = [];
            if n == 2 {
                shared_pid(&mut config, &mut none);
            }
            work.spawn(churn(daemon.cri().await, config));
        }
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        tokio::time::sleep(Duration::from_millis(u64::from(seed >> 8) % 600)).await;
        daemon.kill();
        work.join_all().await;
        daemon.begin().await;
        let cri = daemon.cri().await;
        for pod in cri.pods().await.unwrap() {
            let status = cri.pod_status(&pod).await.unwrap();
            for c in &status.containers_statuses {
                if c.state() == ContainerState::ContainerRunning {
                    let pid = cri.pid_of(&c.id).await.unwrap();
                    assert!(pid == 0 || !namespace(pid, "pid").is_empty() || ended_since(&cri, &c.id).await, "{c:?}");
                }
            }
        }
        let failures = cri.remove_all().await;
        assert!(failures.is_empty(), "round {round}: {failures:?}");
        daemon.leaves_nothing_but(&before);
    }
}

/// A container that was told to run may have ended since.
async fn ended_since(cri: &Cri, id: &str) -> bool {
    tokio::time::timeout(BOUND, cri.exited(id, BOUND)).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_of_the_node_pods_are_not_ready_and_images_stay() {
    for emptied in [false, true] {
        let (mut daemon, cri) = Daemon::stocked().await;
        let before = daemon.footprint();
        let mut config = daemon.pod("boot");
        let options = config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options.as_mut();
        options.unwrap().network = NamespaceMode::Pod.into();
        let pod = cri.run_pod(&config).await.unwrap();
        let running = cri.run(&pod, &container_of(&config, "running", &["sleep", "100000"]), &config).await.unwrap();
        let exited = cri.run(&pod, &container_of(&config, "exited", &["sh", "-c", "exit 6"]), &config).await.unwrap();
        cri.exited(&exited, BOUND).await;
        let created = cri.create(&pod, &container_of(&config, "created", &["true"]), &config).await.unwrap();
        let pid = cri.pid_of(&running).await.unwrap();
        daemon.kill();
        if emptied {
            // As the end of a node would: processes, cgroups, mounts, the tmpfs.
            for shim in daemon.shims() {
                let containers = children(shim);
                kill(shim);
                containers.into_iter().for_each(kill);
            }
            wait_for("all processes are dead", BOUND, || command_line(pid).is_empty() && daemon.shims().is_empty());
            daemon.remove_cgroups();
            remove_sockets(&daemon.state());
            unmount_below(&daemon.state());
            std::fs::remove_dir_all(daemon.state()).unwrap();
            daemon.sql("UPDATE meta SET value = 'another' WHERE key = 'boot_id'");
        } else {
            std::fs::remove_file(daemon.state().join("up")).unwrap();
        }
        daemon.begin().await;
        let cri = daemon.cri().await;
        assert_eq!(pod_state(&cri, &pod).await, PodSandboxState::SandboxNotready);
        for (id, code) in [(&running, 255), (&exited, 6), (&created, 255)] {
            let status = cri.status(id).await.unwrap();
            assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, code), "{status:?}");
        }
        wait_for("no process goes on", BOUND, || command_line(pid).is_empty() && daemon.shims().is_empty());
        wait_for("its network is released", BOUND, || !longshore_tests::netns(&pod).exists());
        let image = ImageSpec { image: IMAGE.into(), ..Default::default() };
        let request = ImageStatusRequest { image: Some(image), verbose: false };
        assert!(cri.images.clone().image_status(request).await.unwrap().into_inner().image.is_some());
        // A kubelet makes the pod anew, beside the old one.
        let mut next = config.clone();
        next.metadata.as_mut().unwrap().attempt = 1;
        let new = cri.run_pod(&next).await.unwrap();
        cri.run(&new, &container_of(&next, "running", &["sleep", "100000"]), &next).await.unwrap();
        for id in [&pod, &new] {
            cri.stop_pod(id).await.unwrap();
            cri.remove_pod(id).await.unwrap();
        }
        daemon.leaves_nothing_but(&before);
    }
}

/// The shims' sockets, which lie outside the state directory but end with the node.
fn remove_sockets(state: &std::path::Path) {
    for bundle in std::fs::read_dir(state.join("bundles")).unwrap().flatten() {
        let text = std::fs::read_to_string(bundle.path().join("bootstrap.json")).unwrap();
        let address = serde_json::from_str::<serde_json::Value>(&text).unwrap()["address"].clone();
        std::fs::remove_file(address.as_str().unwrap().trim_start_matches("unix://")).unwrap();
    }
}

fn unmount_below(dir: &std::path::Path) {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut all: Vec<&str> = table.lines().filter_map(|l| l.split(' ').nth(4)).collect();
    all.retain(|m| std::path::Path::new(m).starts_with(dir));
    for mount in all.into_iter().rev() {
        rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_hangs_holds_up_neither_the_start_nor_other_pods() {
    if handler().monitored() {
        return;
    }
    let (mut daemon, cri) = Daemon::stocked().await;
    let mut pods = Vec::new();
    for name in ["hangs", "other"] {
        let config = daemon.pod(name);
        let pod = cri.run_pod(&config).await.unwrap();
        let id = cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
        pods.push((pod, id, daemon.shims()));
    }
    let shim = pods[0].2[0];
    let pid = cri.pid_of(&pods[0].1).await.unwrap();
    daemon.kill();
    signal(shim, rustix::process::Signal::STOP);
    daemon.begin().await;
    let cri = daemon.cri().await;
    assert_eq!(cri.exec(&pods[1].1, &["echo", "on"], 10).await.unwrap().stdout, "on\n");
    let (hangs, id) = (&pods[0].0, &pods[0].1);
    assert_eq!(pod_state(&cri, hangs).await, PodSandboxState::SandboxReady);
    assert_eq!(cri.status(id).await.unwrap().state(), ContainerState::ContainerRunning);
    assert!(cri.exec(id, &["true"], 2).await.is_err());
    signal(shim, rustix::process::Signal::CONT);
    // Without any call its end is heard of.
    kill(pid);
    assert_eq!(cri.exited(id, BOUND).await.exit_code, 137);
    let mut next = container("main", IMAGE, &["sleep", "100000"]);
    next.metadata.as_mut().unwrap().attempt = 1;
    let next = cri.run(hangs, &next, &daemon.pod("hangs")).await.unwrap();
    assert_eq!(cri.exec(&next, &["echo", "healed"], 20).await.unwrap().stdout, "healed\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_daemon_leaves_containers_running_and_its_root_to_one_other() {
    let (mut daemon, cri) = Daemon::stocked().await;
    let config = daemon.pod("stop");
    let pod = cri.run_pod(&config).await.unwrap();
    let id = cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    let pid = cri.pid_of(&id).await.unwrap();

    let second = daemon.serve().stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && said.contains("another longshore serves from"), "{said}");
    assert_eq!(cri.status(&id).await.unwrap().state(), ContainerState::ContainerRunning, "the first goes on");

    let begun = Instant::now();
    let status = daemon.terminate();
    assert!(status.success(), "{status}\n{}", daemon.log());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(!daemon.socket().exists(), "its socket goes with it");
    assert_eq!(command_line(pid), "sleep 100000");
    daemon.begin().await;
    let cri = daemon.cri().await;
    assert_eq!(cri.pid_of(&id).await.unwrap(), pid);
    assert_eq!(cri.exec(&id, &["echo", "on"], 10).await.unwrap().stdout, "on\n");
}
