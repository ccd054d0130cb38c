//! The command line against a real daemon, shim and runtime: what `run` passes on,
//! how it ends, and that nothing is left of it.

use longshore_tests::{Daemon, IMAGE, Leftovers, bin_dir, busybox, wait_for};
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const BOUND: Duration = Duration::from_secs(30);

/// A daemon with an image, and a cgroup of the test's own for its pods.
async fn daemon() -> (Daemon, String) {
    let daemon = Daemon::start().await;
    daemon.import(&busybox(), IMAGE);
    (daemon, format!("/longshore-e2e-{}", std::process::id()))
}

/// `longshore run` with its streams in our hands.
fn start(daemon: &Daemon, cgroup: &str, args: &[&str]) -> Child {
    Command::new(bin_dir().join("longshore"))
        .arg("--socket")
        .arg(daemon.socket())
        .args(["run", "--cgroup-parent", cgroup])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("longshore starts")
}

/// Reads the first line, so that the container is known to run.
fn first_line(child: &mut Child) -> String {
    let out = child.stdout.as_mut().expect("stdout is piped");
    let mut line = Vec::new();
    let mut byte = [0];
    while out.read(&mut byte).expect("stdout is read") == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    String::from_utf8_lossy(&line).into_owned()
}

fn interrupt(child: &Child) {
    let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("the signal is sent");
}

fn ended(child: Child) -> (i32, String, String) {
    let out = child.wait_with_output().expect("longshore ends");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (out.status.code().unwrap_or(-1), text(&out.stdout), text(&out.stderr))
}

/// That no pod, container, log, mount or process of the daemon's pods is there.
fn nothing_left(daemon: &Daemon, before: &Leftovers, cgroup: &str) {
    for list in [["pods", "-q"].as_slice(), &["ps", "-aq"]] {
        assert_eq!(daemon.cli(list), (0, String::new(), String::new()), "{list:?}");
    }
    assert_eq!(std::fs::read_dir(daemon.dir().join("root/logs")).map_or(0, Iterator::count), 0);
    let cgroup = cgroup.trim_start_matches('/');
    // Mounts and processes go with the call; what the kernel frees later is waited for.
    let left = || {
        let now = Leftovers::of(daemon.dir(), cgroup);
        now.mounts == before.mounts && now.processes.len() <= before.processes.len()
    };
    wait_for("nothing is left of the pods", BOUND, left);
}

#[tokio::test(flavor = "multi_thread")]
async fn run_passes_streams_codes_and_stdin_on() {
    let (daemon, cgroup) = daemon().await;
    let before = Leftovers::of(daemon.dir(), cgroup.trim_start_matches('/'));
    let child = start(&daemon, &cgroup, &["--rm", "-e", "A=b c", IMAGE, "sh", "-c", "echo $A; echo err >&2; exit 9"]);
    assert_eq!(ended(child), (9, "b c\n".into(), "err\n".into()));

    let mut child = start(&daemon, &cgroup, &["--rm", "-i", IMAGE, "sh", "-c", "wc -c; echo end"]);
    let input = vec![b'x'; 300_000];
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    assert_eq!(ended(child), (0, "300000\nend\n".into(), String::new()));
    writer.join().expect("the writer ends").expect("all of stdin is taken");

    // Nothing of a long output is lost at the end, nor out of order.
    let child = start(&daemon, &cgroup, &["--rm", IMAGE, "seq", "200000"]);
    let (code, out, err) = ended(child);
    assert_eq!((code, err.as_str()), (0, ""));
    let want: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert!(out == want, "{} bytes instead of {}", out.len(), want.len());

    let child = start(&daemon, &cgroup, &["--rm", IMAGE, "sh", "-c", "kill -9 $$"]);
    assert_eq!(ended(child).0, 0, "the first process of a pid namespace can't kill itself");
    nothing_left(&daemon, &before, &cgroup);
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_stop_and_then_kill() {
    let (daemon, cgroup) = daemon().await;
    let before = Leftovers::of(daemon.dir(), cgroup.trim_start_matches('/'));
    let script = "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.1; done";
    let mut child = start(&daemon, &cgroup, &["--rm", IMAGE, "sh", "-c", script]);
    assert_eq!(first_line(&mut child), "up");
    interrupt(&child);
    assert_eq!(ended(child), (7, "bye\n".into(), String::new()));

    let deaf = "trap 'echo term' TERM; echo up; while :; do sleep 0.1; done";
    let deaf = ["--rm", "--stop-timeout", "600", IMAGE, "sh", "-c", deaf];
    let mut child = start(&daemon, &cgroup, &deaf);
    assert_eq!(first_line(&mut child), "up");
    interrupt(&child);
    assert_eq!(first_line(&mut child), "term");
    assert!(child.try_wait().expect("its state is known").is_none(), "it has ten minutes to end");
    let asked = Instant::now();
    interrupt(&child);
    assert_eq!(ended(child).0, 137);
    assert!(asked.elapsed() < Duration::from_secs(60), "the second signal kills");

    // A reader that goes away ends it as SIGPIPE would.
    let mut child = start(&daemon, &cgroup, &["--rm", "--stop-timeout", "0", IMAGE, "yes"]);
    assert_eq!(first_line(&mut child), "y");
    drop(child.stdout.take());
    assert_eq!(ended(child).0, 137);
    nothing_left(&daemon, &before, &cgroup);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_run_says_why_and_leaves_nothing() {
    let (daemon, cgroup) = daemon().await;
    let before = Leftovers::of(daemon.dir(), cgroup.trim_start_matches('/'));
    let cases: [(&[&str], i32, &str); 5] = [
        (&["--rm", IMAGE, "no-such-command"], 126, "no-such-command"),
        (&["-u", "ghost", IMAGE, "true"], 125, "ghost"),
        (&["--pull", "never", "localhost/no/such:1"], 125, "localhost/no/such:1"),
        (&["-v", "data:/data", IMAGE, "true"], 125, "no named volumes"),
        (&["--pod", "nope", IMAGE, "true"], 125, "\"nope\""),
    ];
    for (args, code, says) in cases {
        let (got, out, err) = ended(start(&daemon, &cgroup, args));
        assert_eq!((got, out.as_str()), (code, ""), "{args:?}: {err}");
        assert!(err.starts_with("longshore: ") && err.contains(says), "{args:?}: {err}");
        assert_eq!(err.trim_end().lines().count(), 1, "{args:?}: {err}");
    }
    let (code, _, err) = daemon.cli(&["exec", "nope", "true"]);
    assert!(code == 125 && err.contains("no container has the name or id \"nope\""), "{code} {err}");
    assert_eq!(daemon.cli(&["run"]).0, 2, "usage");
    nothing_left(&daemon, &before, &cgroup);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_shared_followed_and_explained() {
    let (mut daemon, cgroup) = daemon().await;
    let run = |args: &[&str]| {
        let (code, out, err) = daemon.cli(&[&["run", "--cgroup-parent", &cgroup], args].concat());
        assert_eq!(code, 0, "{args:?}: {out}{err}");
        out.trim().to_string()
    };
    let script = "trap 'echo done; exit 3' TERM; echo one >/dev/shm/note; echo up; while :; do sleep 0.1; done";
    let id = run(&["-d", "--pod", "new:shared", "--name", "a", IMAGE, "sh", "-c", script]);
    wait_for("the first container's note", BOUND, || daemon.cli(&["logs", "a"]).1 == "up\n");
    assert_eq!(run(&["--rm", "--pod", "shared", "--name", "b", IMAGE, "cat", "/dev/shm/note"]), "one");
    let (code, out, _) = daemon.cli(&["exec", &id[..12], "sh", "-c", "echo out; exit 4"]);
    assert_eq!((code, out.as_str()), (4, "out\n"));
    let (_, out, _) = daemon.cli(&["inspect", "a"]);
    let all: serde_json::Value = serde_json::from_str(&out).expect("inspect prints JSON");
    assert_eq!((&all["status"]["id"], &all["status"]["state"]), (&id.as_str().into(), &"CONTAINER_RUNNING".into()));
    let (_, out, _) = daemon.cli(&["timeline", "shared"]);
    for step in ["RunPodSandbox", "  shim", "StartContainer a", "StartContainer b"] {
        assert!(out.lines().any(|l| l.starts_with(step)), "{step} is missing in\n{out}");
    }

    // Whoever follows a log and whoever waits outlive the daemon's restart.
    let mut follower = Command::new(bin_dir().join("longshore"))
        .arg("--socket")
        .arg(daemon.socket())
        .args(["logs", "-f", "a"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("longshore starts");
    assert_eq!(first_line(&mut follower), "up");
    daemon.kill();
    daemon.begin().await;
    assert_eq!(daemon.cli(&["stop", "a"]).0, 0);
    assert_eq!(ended(follower), (0, "done\n".into(), String::new()));

    let (code, _, err) = daemon.cli(&["rm", "a", "nope"]);
    assert!(code == 1 && err.contains("nope"), "{err}");
    assert_eq!(daemon.cli(&["rm", "shared"]).0, 0);
    daemon.terminate();
    let (code, _, err) = daemon.cli(&["ps"]);
    assert!(code == 1 && err.contains("no daemon answers on") && err.contains("longshore serve"), "{err}");
}
