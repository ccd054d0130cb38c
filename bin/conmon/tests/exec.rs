//! Execs of both kinds of call, with real runc.

mod harness;

use harness::{Monitor, Node, alive, attach, receive, wait_for};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;

fn running() -> (Node, Monitor) {
    let n = Node::new(&["/bin/sleep", "1000"]);
    let mut m = n.create(&[]);
    m.created();
    n.start();
    (n, m)
}

#[test]
fn each_api_has_its_lines() {
    let (n, _m) = running();
    let process = n.process(&["/bin/sh", "-c", "echo out; echo err >&2; exit 3"], false);
    let mut legacy = n.exec(&process, &[]);
    assert_eq!(legacy.line().unwrap(), serde_json::json!({"exit_code": 3}));
    assert_eq!(legacy.line(), None);
    legacy.gone();
    let mut lines = n.lines(&n.path("exec.log"));
    lines.sort();
    assert_eq!(lines, ["F err", "F out"]);
    let mut current = n.exec(&process, &["--api-version", "1", "-u", "u"]);
    let pid = current.line().unwrap()["data"].as_i64().unwrap();
    assert!(pid > 1);
    assert_eq!(current.line().unwrap(), serde_json::json!({"data": 3}));
    let killed = n.process(&["/bin/sh", "-c", "kill -9 $$"], false);
    assert_eq!(n.exec(&killed, &[]).line().unwrap()["exit_code"], 137);
}

/// The original has reported success here: it took the number in an old pid file for
/// the process's.
#[test]
fn an_exec_that_never_began_is_a_failure_and_no_stranger_is_touched() {
    let (n, _m) = running();
    let stranger = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap().id();
    let stranger = i32::try_from(stranger).unwrap();
    for api in [&[][..], &["--api-version", "-u", "u"]] {
        std::fs::write(n.path("exec.pid"), stranger.to_string()).unwrap();
        let mut m = n.exec(&n.process(&["/no/such/program"], false), &[&["-T", "60"], api].concat());
        let line = m.line().unwrap();
        let code = line["exit_code"].as_i64().or(line["data"].as_i64());
        assert_eq!(code, Some(-1), "{line}");
        assert!(line["message"].as_str().unwrap().contains("/no/such/program"), "{line}");
        assert_eq!(m.line(), None);
        m.gone();
    }
    assert!(alive(stranger));
    sys::pidfd::PidFd::open(stranger).unwrap().signal(types::Signal::KILL).unwrap();
    harness::reap(stranger);
}

#[test]
fn one_that_runs_too_long_is_killed_with_its_group() {
    let (n, _m) = running();
    let process = n.process(&["/bin/sh", "-c", "echo begun; sleep 1111 & sleep 1111"], false);
    let mut m = n.exec(&process, &["-T", "10"]);
    let line = m.line().unwrap();
    assert_eq!((line["exit_code"].as_i64(), line["message"].as_str()), (Some(-1), Some("command timed out")));
    m.gone();
    assert_eq!(n.lines(&n.path("exec.log")), ["F begun"]);
    wait_for("the end of its group", || {
        let ps = n.runc(&["ps", &n.id]);
        ps.status.success() && !String::from_utf8_lossy(&ps.stdout).contains("1111")
    });
}

/// What the process leaves behind may hold the pipes, and even write without end.
#[test]
fn the_end_is_told_while_others_hold_the_pipes() {
    let (n, _m) = running();
    let process = n.process(&["/bin/sh", "-c", "yes & echo $!; exit 6"], false);
    let mut m = n.exec(&process, &[]);
    assert_eq!(m.line().unwrap()["exit_code"], 6);
    m.gone();
}

/// The timeout is the command's: a busy node's runtime takes none of it.
#[test]
fn a_slow_start_is_no_timeout() {
    let (n, _m) = running();
    let slow = n.path("slow");
    testkit::script(&slow, "#!/bin/sh\nsleep 3\nexec runc \"$@\"\n");
    let mut m = n.exec(&n.process(&["/bin/sh", "-c", "exit 5"], false), &["-T", "2", "-r", slow.to_str().unwrap()]);
    assert_eq!(m.line().unwrap(), serde_json::json!({"exit_code": 5}));
    m.gone();
}

/// With --exec-attach the process begins only once its client is there.
#[test]
fn an_attached_exec_waits_for_its_client() {
    let (n, _m) = running();
    let bundle = n.path("exec-bundle");
    std::fs::create_dir(&bundle).unwrap();
    let process = n.process(&["/bin/sh", "-c", "read x; echo got $x; stty size"], true);
    let mut args = n.common();
    for (flag, value) in
        [("-b", &bundle), ("-p", &n.path("exec.pid")), ("-l", &n.path("exec.log")), ("--exec-process-spec", &process)]
    {
        args.extend([flag.into(), value.into()]);
    }
    args.extend(["-e", "--exec-attach", "--api-version", "1", "-u", "exec-uuid", "-t", "-i"].map(Into::into));
    let (sync, sync_theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let (start_theirs, start) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let (attached, attached_theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let env = [
        ("_OCI_SYNCPIPE", "3"),
        ("_OCI_STARTPIPE", "4"),
        ("_OCI_ATTACHPIPE", "5"),
        ("PATH", "/usr/sbin:/usr/bin:/bin"),
    ];
    let fds = [sync_theirs.as_fd(), start_theirs.as_fd(), attached_theirs.as_fd()];
    let first = sys::spawn::spawn(std::path::Path::new(harness::CONMON), &args, &env, &fds).unwrap();
    drop((sync_theirs, start_theirs, attached_theirs));
    let mut start = std::fs::File::from(start);
    start.write_all(b"x").unwrap();
    assert_eq!(harness::reap(first), types::ExitStatus::Code(0));
    let mut line = String::new();
    BufReader::new(attached).read_line(&mut line).unwrap();
    assert_eq!(line.trim(), "{\"data\": 0}");
    assert!(!n.path("exec.pid").exists(), "it has not begun");
    let client = attach(&n.path("sockets/exec-uuid/attach"));
    std::fs::write(bundle.join("ctl"), "1 11 22\n").unwrap();
    start.write_all(b"x").unwrap();
    let mut sync = BufReader::new(sync);
    let mut answer = || {
        let mut text = String::new();
        sync.read_line(&mut text).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["data"].as_i64().unwrap()
    };
    assert!(answer() > 1);
    rustix::net::send(&client, b"it\n", rustix::net::SendFlags::empty()).unwrap();
    let all = receive(&client, |_| false);
    assert!(all.contains("got it\r\n11 22\r\n"), "{all:?}");
    assert_eq!(answer(), 0);
}
