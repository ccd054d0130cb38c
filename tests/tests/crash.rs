//! kill -9 of the daemon at every step of pod and container life, and of daemon and
//! shims at random instants under load. After each: no running container has died,
//! each exit is recorded once with its code, every call can be retried to success,
//! nothing leaks.
//!
//! `LONGSHORE_CRASH_INSTANTS` sets how often the daemon (and, in the other test, a
//! shim) is killed at random instants; 25 by default.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{
    Cri, Daemon, Footprint, IMAGE, NodeNet, bin_dir, busybox, children, command_line, container, signal, wait_for,
};
use proto::cri::*;
use std::collections::{BTreeMap, VecDeque};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use testkit::TempRoot;
use tokio::task::JoinSet;
use tonic::Status;

const BOUND: Duration = Duration::from_secs(60);
/// So many daemons walk the points side by side.
const WALKERS: usize = 4;

fn instants() -> usize {
    std::env::var("LONGSHORE_CRASH_INSTANTS").ok().map_or(25, |n| n.parse().unwrap())
}

/// A number that each call changes; the first seed is printed.
struct Dice(u32);

impl Dice {
    fn new() -> Self {
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos() | 1;
        println!("seed {seed}");
        Self(seed)
    }

    fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) % n
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// In the node's network; every container has a pid namespace of its own.
    Plain,
    /// Network and pid namespaces are the pod's; it has an init.
    Shared,
    /// As the first, and its shim is killed once.
    LosesItsShim,
}

/// One pod's life as a kubelet leads it: each step looks at what is there first, so
/// that it can be taken again after a crash.
struct Life {
    kind: Kind,
    config: PodSandboxConfig,
    next: usize,
    pod: String,
    ids: BTreeMap<&'static str, String>,
    /// Code and time of each exit that was seen.
    exits: BTreeMap<String, (i32, i64)>,
    /// A container that nothing may end now, with its pid.
    lives: Option<(String, u32)>,
}

fn options(kind: Kind) -> NamespaceOption {
    let (network, pid) = match kind {
        Kind::Shared => (NamespaceMode::Pod, NamespaceMode::Pod),
        _ => (NamespaceMode::Node, NamespaceMode::Container),
    };
    NamespaceOption { network: network.into(), pid: pid.into(), ..Default::default() }
}

impl Life {
    fn new(daemon: &Daemon, kind: Kind, name: &str) -> Self {
        let mut config = daemon.pod(name);
        let linux = config.linux.as_mut().unwrap();
        linux.security_context.as_mut().unwrap().namespace_options = Some(options(kind));
        if kind == Kind::Shared {
            config.port_mappings = vec![PortMapping { container_port: 80, host_port: HOST_PORT, ..Default::default() }];
        }
        config.log_directory = daemon.dir().join(format!("log-{name}")).to_string_lossy().into_owned();
        Self { kind, config, next: 0, pod: String::new(), ids: BTreeMap::new(), exits: BTreeMap::new(), lives: None }
    }

    /// The same pod once more, under the next attempt number.
    fn again(&mut self) {
        self.config.metadata.as_mut().unwrap().attempt += 1;
        (self.next, self.ids) = (0, BTreeMap::new());
        self.exits = BTreeMap::new();
    }

    fn container(&self, name: &str, command: &[&str]) -> ContainerConfig {
        let mut c = container(name, IMAGE, command);
        c.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options = Some(options(self.kind));
        c.log_path = format!("{name}.log");
        c.stdin = name == "main";
        c
    }

    /// Leads it to its end, from where it is.
    async fn go(&mut self, cri: &Cri) -> Result<(), Status> {
        loop {
            match self.next {
                0 => self.pod = self.ensure_pod(cri).await?,
                1 => self.create(cri, "main", &["sleep", "100000"]).await?,
                2 => self.start_main(cri, "main").await?,
                3 => self.create(cri, "brief", &["sh", "-c", "exit 7"]).await?,
                4 => self.start_brief(cri).await?,
                5 => drop(cri.exec(&self.ids["main"], &["true"], 20).await?),
                6 if self.kind == Kind::LosesItsShim => self.kill_shim(cri).await?,
                7 if self.kind == Kind::LosesItsShim => self.create(cri, "second", &["sleep", "100000"]).await?,
                8 if self.kind == Kind::LosesItsShim => self.start_main(cri, "second").await?,
                9 => self.stop_main(cri).await?,
                10 => {
                    let brief = self.ids["brief"].clone();
                    self.exits.remove(&brief);
                    cri.remove(&brief).await?;
                }
                11 => {
                    self.exits.clear();
                    cri.stop_pod(&self.pod).await?;
                }
                12 => cri.remove_pod(&self.pod).await?,
                13 => {
                    let left = cri.pods().await?;
                    assert!(!left.contains(&self.pod), "{} was removed", self.pod);
                    return Ok(());
                }
                _ => {}
            }
            self.next += 1;
        }
    }

    async fn ensure_pod(&self, cri: &Cri) -> Result<String, Status> {
        let all = cri.runtime.clone().list_pod_sandbox(ListPodSandboxRequest::default()).await?.into_inner().items;
        let found: Vec<_> = all.into_iter().filter(|p| p.metadata == self.config.metadata).collect();
        assert!(found.len() < 2, "{found:?}");
        match found.into_iter().next() {
            Some(pod) => {
                assert_eq!(pod.state(), PodSandboxState::SandboxReady, "{pod:?}");
                Ok(pod.id)
            }
            None => cri.run_pod(&self.config).await,
        }
    }

    async fn create(&mut self, cri: &Cri, name: &'static str, command: &[&str]) -> Result<(), Status> {
        let filter = ContainerFilter { pod_sandbox_id: self.pod.clone(), ..Default::default() };
        let request = ListContainersRequest { filter: Some(filter) };
        let all = cri.runtime.clone().list_containers(request).await?.into_inner().containers;
        let found: Vec<_> = all.into_iter().filter(|c| c.metadata.as_ref().unwrap().name == name).collect();
        assert!(found.len() < 2, "{found:?}");
        let id = match found.into_iter().next() {
            Some(c) => c.id,
            None => cri.create(&self.pod, &self.container(name, command), &self.config).await?,
        };
        self.ids.insert(name, id);
        Ok(())
    }

    async fn start_main(&mut self, cri: &Cri, name: &str) -> Result<(), Status> {
        let id = self.ids[name].clone();
        let status = cri.status(&id).await?;
        match status.state() {
            ContainerState::ContainerCreated => start(cri, &id).await?,
            ContainerState::ContainerRunning => {}
            _ => panic!("it ended though nobody wanted that: {status:?}"),
        }
        cri.is_command(&id).await?;
        self.lives = Some((id.clone(), cri.pid_of(&id).await?));
        Ok(())
    }

    async fn start_brief(&mut self, cri: &Cri) -> Result<(), Status> {
        let id = self.ids["brief"].clone();
        if cri.status(&id).await?.state() == ContainerState::ContainerCreated {
            start(cri, &id).await?;
        }
        let status = ended(cri, &id).await?;
        assert_eq!(status.exit_code, 7, "{status:?}");
        self.exits.insert(id, (status.exit_code, status.finished_at));
        Ok(())
    }

    async fn kill_shim(&mut self, cri: &Cri) -> Result<(), Status> {
        self.lives = None;
        let id = self.ids["main"].clone();
        if cri.status(&id).await?.state() == ContainerState::ContainerRunning {
            let info = cri.pod_status(&self.pod).await?.info;
            let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
            let shim = u32::try_from(info["shimPid"].as_u64().unwrap_or(0)).unwrap();
            if shim != 0 && command_line(shim).contains("containerd-shim-") {
                kill(shim);
            }
        }
        let status = ended(cri, &id).await?;
        assert!([137, 255].contains(&status.exit_code), "{status:?}");
        self.exits.insert(id, (status.exit_code, status.finished_at));
        Ok(())
    }

    async fn stop_main(&mut self, cri: &Cri) -> Result<(), Status> {
        self.lives = None;
        let id = self.ids.get("second").unwrap_or(&self.ids["main"]).clone();
        cri.stop(&id, 0).await?;
        let status = cri.status(&id).await?;
        assert_eq!(status.state(), ContainerState::ContainerExited, "{status:?}");
        // 2: SIGTERM came before runc's init, a Go program, had become the command.
        assert!([2, 137, 143].contains(&status.exit_code), "{status:?}");
        self.exits.insert(id, (status.exit_code, status.finished_at));
        Ok(())
    }

    /// What must hold of it after a crash.
    async fn check(&self, cri: &Cri, when: &str) {
        for (id, seen) in &self.exits {
            let status = cri.status(id).await.unwrap();
            assert_eq!((status.exit_code, status.finished_at), *seen, "{when}: an exit has changed: {status:?}");
        }
        if let Some((id, pid)) = &self.lives {
            assert_eq!(cri.status(id).await.unwrap().state(), ContainerState::ContainerRunning, "{when}");
            assert_eq!(cri.pid_of(id).await.unwrap(), *pid, "{when}");
            assert_eq!(command_line(*pid), "sleep 100000", "{when}: a running container has died");
        }
    }
}

/// StartContainer, again while the daemon still cleans up after its restart.
async fn start(cri: &Cri, id: &str) -> Result<(), Status> {
    for _ in 0..200 {
        match cri.start(id).await {
            Err(e) if e.message().contains("cleaned up after a restart") => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            other => return other,
        }
    }
    cri.start(id).await
}

async fn ended(cri: &Cri, id: &str) -> Result<ContainerStatus, Status> {
    let deadline = tokio::time::Instant::now() + BOUND;
    loop {
        let status = cri.status(id).await?;
        if status.state() == ContainerState::ContainerExited {
            return Ok(status);
        }
        assert!(tokio::time::Instant::now() < deadline, "it has not exited: {status:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn kill(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

/// All points, as the binary names them; of some also later passes.
fn points() -> VecDeque<String> {
    let out = Command::new(bin_dir().join("longshore")).arg("fault-points").output().unwrap();
    assert!(out.status.success());
    let mut all: VecDeque<String> = String::from_utf8(out.stdout).unwrap().lines().map(str::to_string).collect();
    assert!(all.len() > 50, "{all:?}");
    // A shim that replaces one, of a pod whose record stands.
    all.extend(["shim.start.before:2", "shim.start.after:2", "shim.bootstrap.before:2"].map(String::from));
    for nth in [2, 3, 5, 8, 12] {
        all.extend([format!("store.commit.before:{nth}"), format!("store.commit.after:{nth}")]);
    }
    all
}

/// The port of the node that leads to a pod with a network of its own.
const HOST_PORT: i32 = 8080;

struct Walker {
    daemon: Daemon,
    bystander: Life,
    before: Footprint,
    /// The node's network, in which the daemon itself attaches pods.
    net: NodeNet,
}

impl Walker {
    async fn new() -> Self {
        let net = NodeNet::new();
        let mut daemon = Daemon::in_netns(TempRoot::new(), "[network]\nmode = \"builtin\"\n", net.path()).await;
        daemon.import(&busybox(), IMAGE);
        let cri = daemon.cri().await;
        let mut bystander = Life::new(&daemon, Kind::Plain, "bystander");
        bystander.pod = bystander.ensure_pod(&cri).await.unwrap();
        bystander.create(&cri, "main", &["sleep", "100000"]).await.unwrap();
        bystander.start_main(&cri, "main").await.unwrap();
        bystander.create(&cri, "brief", &["sh", "-c", "exit 7"]).await.unwrap();
        bystander.start_brief(&cri).await.unwrap();
        drop(cri);
        // What a task's end leaves for a moment belongs to no later life.
        daemon.terminate();
        daemon.begin().await;
        let before = daemon.footprint();
        Self { daemon, bystander, before, net }
    }

    /// Kills the daemon at one point; false where a life of this kind never comes to it.
    async fn walk(&mut self, point: &str, kind: Kind) -> bool {
        let daemon = &mut self.daemon;
        daemon.terminate();
        let mut life = Life::new(daemon, kind, "walked");
        let mut died = !daemon.begin_doomed(point).await;
        if !died {
            let cri = daemon.cri().await;
            let outcome = life.go(&cri).await;
            if let Err(e) = outcome {
                for _ in 0..3000 {
                    died = died || daemon.has_died();
                    tokio::time::sleep(Duration::from_millis(if died { 0 } else { 20 })).await;
                }
                assert!(died, "{point}: step {} failed, and the daemon lives: {e}", life.next);
            } else {
                // What comes after the last answer, and its own end, are still its life.
                tokio::time::sleep(Duration::from_millis(100)).await;
                died = daemon.terminate().signal() == Some(9);
                if !died {
                    daemon.begin().await;
                }
            }
        }
        if died {
            daemon.begin().await;
        }
        let cri = daemon.cri().await;
        self.bystander.check(&cri, point).await;
        life.check(&cri, point).await;
        if let Err(e) = life.go(&cri).await {
            panic!("{point}: step {} can't be retried: {e}", life.next);
        }
        daemon.leaves_nothing_but(&self.before);
        let port = HOST_PORT.to_string();
        wait_for("link and host port are gone", BOUND, || {
            self.net.links().is_empty() && !self.net.must(&["nft", "list", "ruleset"]).contains(&port)
        });
        died
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_the_daemon_loses_nothing_and_leaves_nothing() {
    let queue = Arc::new(Mutex::new(points()));
    let unreached = Arc::new(Mutex::new(Vec::new()));
    let mut walkers = JoinSet::new();
    for _ in 0..WALKERS {
        let (queue, unreached) = (queue.clone(), unreached.clone());
        walkers.spawn(async move {
            let mut walker = Walker::new().await;
            loop {
                let Some(point) = queue.lock().unwrap().pop_front() else { return };
                let begun = std::time::Instant::now();
                let mut reached = false;
                for kind in [Kind::Shared, Kind::LosesItsShim] {
                    reached = walker.walk(&point, kind).await;
                    if reached {
                        break;
                    }
                }
                println!("{point}: {:.1?}", begun.elapsed());
                if !reached {
                    unreached.lock().unwrap().push(point);
                }
            }
        });
    }
    while let Some(walked) = walkers.join_next().await {
        walked.unwrap();
    }
    let unreached = unreached.lock().unwrap();
    assert!(unreached.is_empty(), "no life comes to these points; extend it: {unreached:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random_instants_under_load_the_daemon_loses_nothing() {
    let mut daemon = Daemon::start().await;
    daemon.import(&busybox(), IMAGE);
    let before = daemon.footprint();
    let mut dice = Dice::new();
    let kinds = [Kind::Plain, Kind::Shared, Kind::LosesItsShim, Kind::Plain];
    let mut lives: Vec<Life> =
        (0..20).map(|n| Life::new(&daemon, kinds[n % kinds.len()], &format!("load-{n}"))).collect();
    let whole = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    for round in 0..instants() {
        let killed = Arc::new(AtomicBool::new(false));
        let mut work = JoinSet::new();
        for mut life in lives.drain(..) {
            let (cri, killed, whole) = (daemon.cri().await, killed.clone(), whole.clone());
            let said_of = daemon.said_of();
            work.spawn(async move {
                loop {
                    match life.go(&cri).await {
                        Ok(()) => {
                            whole.fetch_add(1, Ordering::SeqCst);
                            life.again();
                        }
                        Err(e) if !killed.load(Ordering::SeqCst) => {
                            let said: Vec<_> = life.ids.values().flat_map(|id| said_of(&id[..12])).collect();
                            panic!("step {} of {:?} failed, and the daemon lives: {e}\n{said:#?}", life.next, life.kind)
                        }
                        Err(_) => return life,
                    }
                }
            });
        }
        tokio::time::sleep(Duration::from_millis(u64::from(dice.below(1500)))).await;
        killed.store(true, Ordering::SeqCst);
        daemon.kill();
        lives = work.join_all().await;
        daemon.begin().await;
        let cri = daemon.cri().await;
        for life in &lives {
            life.check(&cri, &format!("round {round}")).await;
        }
    }
    let cri = daemon.cri().await;
    for life in &mut lives {
        if let Err(e) = life.go(&cri).await {
            panic!("step {} of {:?} can't be retried: {e}", life.next, life.kind);
        }
    }
    println!("{} whole lives beside {} deaths", whole.load(Ordering::SeqCst), instants());
    daemon.leaves_nothing_but(&before);
}

/// A pod whose shim may die at any time: whatever fails, its removal does not.
async fn endure(cri: Cri, config: PodSandboxConfig, kind: Kind, done: Arc<AtomicBool>) {
    let mut attempt = 0;
    while !done.load(Ordering::SeqCst) {
        let mut config = config.clone();
        config.metadata.as_mut().unwrap().attempt = attempt;
        attempt += 1;
        let Ok(pod) = cri.run_pod(&config).await else { continue };
        for (name, command) in [("main", vec!["sleep", "100000"]), ("brief", vec!["sh", "-c", "exit 7"])] {
            let mut c = container(name, IMAGE, &command);
            c.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options = Some(options(kind));
            let Ok(id) = cri.run(&pod, &c, &config).await else { continue };
            let _ = cri.exec(&id, &["true"], 5).await;
            if name == "brief" {
                let code = ended(&cri, &id).await.unwrap().exit_code;
                assert!([7, 137, 255].contains(&code), "{code}");
            }
        }
        for step in 0..2 {
            let mut tries = 0;
            while let Err(e) = if step == 0 { cri.stop_pod(&pod).await } else { cri.remove_pod(&pod).await } {
                tries += 1;
                assert!(tries < 5, "pod {pod} can't be removed: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_shims_end_their_containers_alone_and_leave_nothing() {
    let daemon = Daemon::start().await;
    daemon.import(&busybox(), IMAGE);
    let before = daemon.footprint();
    let cri = daemon.cri().await;
    // First those that just run: each exit is told, once, and nobody else's.
    let mut exits = BTreeMap::new();
    let mut mains = Vec::new();
    for n in 0..4 {
        let mut life = Life::new(&daemon, if n % 2 == 0 { Kind::Plain } else { Kind::Shared }, &format!("runs-{n}"));
        life.pod = life.ensure_pod(&cri).await.unwrap();
        life.create(&cri, "main", &["sleep", "100000"]).await.unwrap();
        life.start_main(&cri, "main").await.unwrap();
        life.create(&cri, "brief", &["sh", "-c", "exit 7"]).await.unwrap();
        life.start_brief(&cri).await.unwrap();
        mains.push((life.lives.clone().unwrap(), life));
    }
    let shims = daemon.shims();
    let (victims, kept) = shims.split_at(shims.len() / 2);
    let doomed: Vec<u32> = victims.iter().flat_map(|s| children(*s)).collect();
    victims.iter().copied().for_each(kill);
    for ((id, pid), life) in &mains {
        if doomed.contains(pid) {
            let status = ended(&cri, id).await.unwrap();
            assert!([137, 255].contains(&status.exit_code), "{status:?}");
            exits.insert(id.clone(), (status.exit_code, status.finished_at));
            wait_for("its process is dead", BOUND, || command_line(*pid).is_empty());
        } else {
            life.check(&cri, "another shim's death").await;
        }
        for (id, seen) in &life.exits {
            let status = cri.status(id).await.unwrap();
            assert_eq!((status.exit_code, status.finished_at), *seen, "{status:?}");
        }
    }
    assert!(!exits.is_empty() && kept.iter().all(|s| !command_line(*s).is_empty()));
    for (id, seen) in &exits {
        let status = cri.status(id).await.unwrap();
        assert_eq!((status.exit_code, status.finished_at), *seen, "{status:?}");
    }
    assert!(cri.remove_all().await.is_empty());
    daemon.leaves_nothing_but(&before);

    // Then at any instant, also while they create; one that is spared must not notice.
    let mut spared = Life::new(&daemon, Kind::Plain, "spared");
    spared.pod = spared.ensure_pod(&cri).await.unwrap();
    spared.create(&cri, "main", &["sleep", "100000"]).await.unwrap();
    spared.start_main(&cri, "main").await.unwrap();
    let spared_shims = daemon.shims();
    assert_eq!(spared_shims.len(), 1);
    let mut dice = Dice::new();
    let done = Arc::new(AtomicBool::new(false));
    let mut work = JoinSet::new();
    for n in 0..4 {
        let kind = if n % 2 == 0 { Kind::Plain } else { Kind::Shared };
        let mut life = Life::new(&daemon, kind, &format!("churn-{n}"));
        life.config.log_directory = String::new();
        work.spawn(endure(daemon.cri().await, life.config, kind, done.clone()));
    }
    for _ in 0..instants() {
        tokio::time::sleep(Duration::from_millis(u64::from(dice.below(400)))).await;
        let shims: Vec<u32> = daemon.shims().into_iter().filter(|s| !spared_shims.contains(s)).collect();
        if !shims.is_empty() {
            kill(shims[usize::try_from(dice.below(1000)).unwrap() % shims.len()]);
        }
    }
    done.store(true, Ordering::SeqCst);
    while let Some(ended) = work.join_next().await {
        ended.unwrap();
    }
    spared.check(&cri, "beside shims that were killed").await;
    assert_eq!(daemon.shims(), spared_shims);
    assert!(cri.remove_all().await.is_empty());
    daemon.leaves_nothing_but(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_hangs_delays_its_own_pod_alone() {
    let daemon = Daemon::with("[runtime]\nstep_timeout = 30\n").await;
    daemon.import(&busybox(), IMAGE);
    let cri = daemon.cri().await;
    let mut lives = Vec::new();
    for name in ["hangs", "other"] {
        let mut life = Life::new(&daemon, Kind::Plain, name);
        life.pod = life.ensure_pod(&cri).await.unwrap();
        life.create(&cri, "main", &["sleep", "100000"]).await.unwrap();
        life.start_main(&cri, "main").await.unwrap();
        lives.push(life);
        if name == "hangs" {
            daemon.shims().iter().for_each(|s| signal(*s, rustix::process::Signal::STOP));
        }
    }
    let (hangs, other) = (lives[0].ids["main"].clone(), lives[1].ids["main"].clone());
    let stuck = tokio::spawn({
        let (cri, id) = (cri.clone(), hangs.clone());
        async move { cri.exec(&id, &["true"], 60).await }
    });
    let waits = format!("in container {hangs}, which waits for the shim's ");
    wait_for("doctor names what the exec waits for", BOUND, || {
        let (_, findings) = daemon.doctor(&daemon.state(), &[]);
        findings.iter().any(|f| f["found"].as_str().unwrap().contains(&waits))
    });
    // Lists and the other pod go on as if nothing were.
    for _ in 0..5 {
        let begun = std::time::Instant::now();
        assert_eq!(cri.exec(&other, &["echo", "here"], 20).await.unwrap().stdout, "here\n".as_bytes());
        assert_eq!(cri.pods().await.unwrap().len(), 2);
        assert_eq!(cri.status(&hangs).await.unwrap().state(), ContainerState::ContainerRunning);
        assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    }
    let e = stuck.await.unwrap().unwrap_err();
    assert!(e.message().contains("the shim did not answer within"), "{e}");
    let e = cri.stop(&hangs, 0).await.unwrap_err();
    assert!(e.message().contains("the shim did not answer within"), "{e}");
    // The daemon may even be restarted beside it.
    daemon.shims().iter().for_each(|s| signal(*s, rustix::process::Signal::CONT));
    let status = ended(&cri, &hangs).await.unwrap();
    assert!([137, 143].contains(&status.exit_code), "the signals came through: {status:?}");
    let mut second = lives[0].container("second", &["sleep", "100000"]);
    second.stdin = false;
    let second = cri.run(&lives[0].pod, &second, &lives[0].config).await.unwrap();
    assert_eq!(cri.exec(&second, &["echo", "healed"], 20).await.unwrap().stdout, "healed\n".as_bytes());
    lives[1].check(&cri, "beside a shim that hung").await;
}
