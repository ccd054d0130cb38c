//! The faults that the original is known for (behaviours.md section 2), and others of
//! their kind.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

mod harness;

use harness::{Node, attach, receive, wait_for};
use std::process::Command;
use std::time::Duration;

/// Nearly none: 100 ms in two seconds is what a loaded machine may add.
const IDLE: u64 = 10;

/// Waits until the monitor can pass on nothing more, having passed on enough.
fn output_stands_still(n: &Node) {
    let mut last = 0;
    wait_for("output that stands still", || {
        std::thread::sleep(Duration::from_millis(300));
        let now = n.log().metadata().map_or(0, |l| l.len());
        now > 100_000 && std::mem::replace(&mut last, now) == now
    });
}

/// [conmon#545]: exits of short containers, while the machine has enough to do.
#[test]
fn no_exit_is_missed_under_load() {
    let mut burners: Vec<_> =
        (0..4).map(|_| Command::new("/bin/sh").args(["-c", "while :; do :; done"]).spawn().unwrap()).collect();
    std::thread::scope(|s| {
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                s.spawn(move || {
                    for round in 0..6 {
                        let code = (worker * 10 + round).to_string();
                        let n = Node::new(&["/bin/sh", "-c", &format!("echo {code}; exit {code}")]);
                        let mut m = n.create(&[]);
                        m.created();
                        n.start();
                        assert_eq!(n.exit(), code);
                        assert_eq!(n.lines(&n.log()), [format!("F {code}")]);
                        // An exec whose process ends before its runtime does.
                        m.gone();
                    }
                })
            })
            .collect();
        let results: Vec<_> = workers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        for b in &mut burners {
            let _ = b.kill();
            let _ = b.wait();
        }
        assert!(results.iter().all(Result::is_ok));
    });
}

/// [conmon#657]: SIGABRT, when signals came while it waited.
#[test]
fn a_storm_of_signals_ends_nothing() {
    let script = "trap '' TERM INT QUIT; echo ready; while [ ! -e /tmp/go ]; do sleep 0.05; done; exit 11";
    let n = Node::new(&["/bin/sh", "-c", script]);
    let mut m = n.create(&[]);
    m.created();
    n.start();
    wait_for("its trap", || std::fs::read_to_string(n.log()).is_ok_and(|l| l.contains(" F ready")));
    let monitor = sys::pidfd::PidFd::open(m.pid).unwrap();
    for round in 0..500 {
        use types::Signal;
        for signal in [Signal::TERM, Signal::INT, Signal::QUIT, Signal::CHLD, Signal::USR1] {
            monitor.signal(signal).unwrap();
        }
        if round % 50 == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    std::fs::write(n.path("bundle/rootfs/tmp/go"), "").unwrap();
    assert_eq!(n.exit(), "11");
    m.gone();
}

/// Execs that end at once, many at a time: each is told, none as another's.
#[test]
fn no_exec_s_end_is_missed() {
    let n = Node::new(&["/bin/sleep", "1000"]);
    n.create(&[]).created();
    n.start();
    for code in 0..20 {
        let process = n.process(&["/bin/sh", "-c", &format!("exit {code}")], false);
        assert_eq!(n.exec(&process, &[]).line().unwrap()["exit_code"], code);
    }
}

/// Descriptors run out while nobody is attached: who comes then is let in later.
#[test]
fn a_shortage_of_descriptors_locks_no_client_out() {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    let n = Node::new(&["/bin/sh", "-c", "while :; do echo here; sleep 0.5; done"]);
    let mut m = n.create(&[]);
    m.created();
    n.start();
    let (monitor, usual) = (Pid::from_raw(m.pid), getrlimit(Resource::Nofile));
    prlimit(monitor, Resource::Nofile, Rlimit { current: Some(1), ..usual }).unwrap();
    let client = attach(&n.path("sockets").join(&n.id).join("attach"));
    // Time enough for it to be refused; on a machine that is too slow nothing is tried.
    std::thread::sleep(Duration::from_millis(500));
    let before = m.ticks();
    std::thread::sleep(Duration::from_millis(2500));
    assert!(m.ticks() - before <= IDLE, "it does not spin");
    prlimit(monitor, Resource::Nofile, usual).unwrap();
    assert!(receive(&client, |text| text.contains("here")).contains("here"));
}

/// Spin on EAGAIN: a client that does not read stalls the container, costs nothing,
/// and delays neither the exit nor, later, a single byte.
#[test]
fn a_client_that_does_not_read_costs_nothing() {
    let n = Node::new(&["/bin/sh", "-c", "yes 0123456789 | head -c 2000000; exit 9"]);
    let mut m = n.create(&[]);
    m.created();
    let client = attach(&n.path("sockets").join(&n.id).join("attach"));
    n.start();
    output_stands_still(&n);
    let before = m.ticks();
    std::thread::sleep(Duration::from_secs(2));
    let spent = m.ticks() - before;
    assert!(spent <= IDLE, "{spent} ticks");
    let all = receive(&client, |_| false);
    assert_eq!(all.len(), 2_000_000);
    assert_eq!(n.exit(), "9");
    m.gone();
}

/// The same with one that never reads again: its end is known all the same.
#[test]
fn an_exit_is_told_although_a_client_does_not_read() {
    let n = Node::new(&["/bin/sh", "-c", "yes & sleep 1000"]);
    let mut m = n.create(&[]);
    m.created();
    let client = attach(&n.path("sockets").join(&n.id).join("attach"));
    n.start();
    output_stands_still(&n);
    n.runc(&["kill", &n.id, "KILL"]);
    assert_eq!(n.exit(), "137");
    let before = m.ticks();
    std::thread::sleep(Duration::from_secs(1));
    let spent = m.ticks() - before;
    assert!(spent <= IDLE, "{spent} ticks while it waits for the client");
    drop(client);
    m.gone();
}

/// A log whose reader has stopped: a FIFO here, the journal for others.
#[test]
fn a_log_reader_that_stops_costs_nothing() {
    let n = Node::new(&["/bin/yes"]);
    let fifo = n.path("fifo");
    stdio::fifo::make(&fifo).unwrap();
    let reader = stdio::fifo::open_reader(&fifo).unwrap();
    let mut m = n.create(&["-l", fifo.to_str().unwrap()]);
    m.created();
    n.start();
    wait_for("a full FIFO", || rustix::io::ioctl_fionread(&reader).unwrap() > 10_000);
    let before = m.ticks();
    std::thread::sleep(Duration::from_secs(2));
    let spent = m.ticks() - before;
    assert!(spent <= IDLE, "{spent} ticks");
    n.runc(&["kill", &n.id, "KILL"]);
    assert_eq!(n.exit(), "137");
    drop(reader);
    m.gone();
}

/// A mounted tmpfs of a few pages, taken down also when the test fails.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: std::path::PathBuf) -> Self {
        std::fs::create_dir_all(&at).unwrap();
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "small"]).arg(&at).status().unwrap();
        assert!(done.success());
        Self(at)
    }

    fn fill(&self) {
        let _ = std::fs::write(self.0.join("filler"), vec![0u8; 1 << 20]);
        assert!(std::fs::write(self.0.join("more"), "x").is_err(), "it is full");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// [cri-o#9274]: the disk of exit files and log is full when the container ends.
#[test]
fn a_full_disk_leaves_no_container_running() {
    let n = Node::new(&["/bin/sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.05; done; echo unheard; exit 4"]);
    let disk = SmallDisk::mount(n.path("small"));
    for d in ["exits", "persist"] {
        std::fs::create_dir(disk.0.join(d)).unwrap();
    }
    let (exits, persist, log) = (disk.0.join("exits"), disk.0.join("persist"), disk.0.join("log"));
    let marker = n.path("marker");
    let script = format!("echo run > {}", marker.display());
    let mut m = n.create(&[
        "--exit-dir",
        exits.to_str().unwrap(),
        "--persist-dir",
        persist.to_str().unwrap(),
        "-l",
        log.to_str().unwrap(),
        "--exit-command",
        "/bin/sh",
        "--exit-command-arg",
        "-c",
        "--exit-command-arg",
        &script,
    ]);
    m.created();
    n.start();
    disk.fill();
    std::fs::write(n.path("bundle/rootfs/tmp/go"), "").unwrap();
    m.gone();
    assert_eq!(std::fs::read_to_string(exits.join(&n.id)).unwrap(), "4");
    assert_eq!(std::fs::read_to_string(persist.join("exit")).unwrap(), "4");
    assert!(marker.exists(), "the exit command has run");
    drop(disk);
}

/// What is killed with a monitor is its runtime's call: no late create brings a
/// container that nobody watches.
#[test]
fn a_call_ends_with_its_monitor() {
    let n = Node::new(&["/bin/true"]);
    let slow = n.path("slow");
    let script = format!("#!/bin/sh\necho $$ > {0}/call\nexec sleep 1000\n", n.dir.path().display());
    testkit::script(&slow, script);
    let m = n.create(&["-r", slow.to_str().unwrap()]);
    let call = || std::fs::read_to_string(n.path("call")).ok()?.trim().parse::<i32>().ok();
    wait_for("the call", || call().is_some());
    sys::pidfd::PidFd::open(m.pid).unwrap().signal(types::Signal::KILL).unwrap();
    wait_for("the call's end", || !harness::alive(call().unwrap()));
}

/// Whoever ends the monitor while the runtime still creates ends that call, and is told.
#[test]
fn sigterm_while_creating_ends_the_call() {
    let n = Node::new(&["/bin/true"]);
    let slow = n.path("slow");
    let script = format!("#!/bin/sh\necho $$ > {0}/call\nexec sleep 1000\n", n.dir.path().display());
    testkit::script(&slow, script);
    let mut m = n.create(&["-r", slow.to_str().unwrap()]);
    wait_for("the call", || std::fs::read_to_string(n.path("call")).is_ok_and(|t| t.ends_with('\n')));
    sys::pidfd::PidFd::open(m.pid).unwrap().signal(types::Signal::TERM).unwrap();
    let line = m.line().unwrap();
    assert_eq!(line["pid"], -1);
    assert!(line["message"].as_str().unwrap().contains("signal 15"), "{line}");
    m.gone();
    let call: i32 = std::fs::read_to_string(n.path("call")).unwrap().trim().parse().unwrap();
    assert!(!harness::alive(call));
    assert!(!n.path("bundle/attach").exists() && n.path("sockets").join(&n.id).symlink_metadata().is_err());
}

/// A caller that ignores SIGCHLD hands that on; the kernel would reap our children.
#[test]
fn a_caller_s_ignored_sigchld_hides_no_exit() {
    let n = Node::new(&["/bin/sh", "-c", "exit 12"]);
    let mut args = n.create_args();
    args.extend(["--sync".into(), "-l".into(), n.log().into()]);
    let mut child = Command::new("env").args(["--ignore-signal=CHLD", harness::CONMON]).args(&args).spawn().unwrap();
    wait_for("create's end", || n.runc(&["state", &n.id]).stdout.windows(9).any(|w| w == b"\"created\""));
    n.start();
    assert_eq!(n.exit(), "12");
    assert_eq!(child.wait().unwrap().code(), Some(12));
}

/// What waits for the exit command's time keeps nothing of ours open: a client that was
/// behind when the container ended sees the end of the output then, and not after it.
#[test]
fn the_exit_delay_holds_up_no_client() {
    let n = Node::new(&["/bin/sh", "-c", "yes & sleep 1000"]);
    let mut m = n.create(&["--exit-command", "/bin/true", "--exit-delay", "120"]);
    m.created();
    let client = attach(&n.path("sockets").join(&n.id).join("attach"));
    n.start();
    output_stands_still(&n);
    n.runc(&["kill", &n.id, "KILL"]);
    assert_eq!(n.exit(), "137");
    let children = || std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", m.pid)).unwrap_or_default();
    wait_for("the exit command's process", || !children().trim().is_empty());
    // Up to its end: `receive` gives up before the delay is over.
    assert!(receive(&client, |_| false).starts_with("y\ny\n"));
    for pid in children().split_whitespace() {
        let waits = sys::pidfd::PidFd::open(pid.parse().unwrap()).unwrap();
        waits.signal(types::Signal::KILL).unwrap();
    }
    m.gone();
}
