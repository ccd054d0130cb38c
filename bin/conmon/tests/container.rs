//! Containers from create to exit, with real runc.

#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

mod harness;

use harness::{Monitor, Node, alive, attach, receive, wait_for};
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use std::path::Path;
use std::process::Command;

fn sh(script: &str) -> [&str; 3] {
    ["/bin/sh", "-c", script]
}

#[test]
fn a_container_s_life_is_reported() {
    let n = Node::new(&sh("echo out; echo err >&2; printf partial; exit 7"));
    let mut m = n.create(&[]);
    let pid = m.created();
    assert_eq!(std::fs::read_to_string(n.path("pid")).unwrap().trim(), pid.to_string());
    let link = n.path("sockets").join(&n.id);
    assert_eq!(std::fs::read_link(&link).unwrap(), n.path("bundle"));
    for name in ["attach", "ctl", "winsz"] {
        assert!(link.join(name).exists(), "{name}");
    }
    n.start();
    assert_eq!(n.exit(), "7");
    assert_eq!(m.line(), None, "nothing but the pid is told of a container");
    m.gone();
    assert_eq!(std::fs::read_to_string(n.path("persist/exit")).unwrap(), "7");
    let mut lines = n.lines(&n.log());
    lines.sort();
    assert_eq!(lines, ["F err", "F out", "P partial"]);
    assert!(!n.path("bundle/attach").exists() && link.symlink_metadata().is_err());
    assert_eq!(std::fs::read_dir(n.path("exits")).unwrap().count(), 1);
    assert!(!n.path("bundle/oom").exists());
}

#[test]
fn a_signal_is_128_and_its_number_and_sigterm_is_passed_on() {
    let n = Node::new(&sh("trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.1; done"));
    let mut m = n.create(&["--api-version", "1"]);
    let pid = m.created();
    n.start();
    wait_for("the trap", || n.lines(&n.log()) == ["F ready"]);
    sys::pidfd::PidFd::open(m.pid).unwrap().signal(types::Signal::TERM).unwrap();
    assert_eq!(n.exit(), "5", "its own answer to SIGTERM");
    let n2 = Node::new(&sh("kill -9 $$; sleep 60"));
    let mut m2 = n2.create(&[]);
    m2.created();
    n2.start();
    let out = n2.runc(&["kill", &n2.id, "KILL"]);
    assert_eq!(n2.exit(), "137", "{out:?}");
    m.gone();
    assert!(!alive(pid));
}

#[test]
fn a_container_that_can_t_be_made_is_told_with_the_runtime_s_words() {
    let n = Node::new(&["/no/such/program"]);
    let marker = n.path("marker");
    let script = format!("echo run > {}", marker.display());
    let mut m = n.create(&["--exit-command", "/bin/sh", "--exit-command-arg", "-c", "--exit-command-arg", &script]);
    let line = m.line().unwrap();
    assert_eq!(line["pid"], -1);
    assert!(line["message"].as_str().unwrap().contains("/no/such/program"), "{line}");
    m.gone();
    assert!(marker.exists(), "the exit command runs also then");
    assert!(!n.path("exits").join(&n.id).exists(), "what has not begun has no status");
}

#[test]
fn the_exit_command_comes_last_and_late() {
    let n = Node::new(&["/bin/sh", "-c", "exit 3"]);
    let script = format!("cat {} > {}", n.path("exits").join(&n.id).display(), n.path("seen").display());
    let args = ["--exit-delay", "2", "--exit-command", "/bin/sh", "--exit-command-arg", "-c", "--exit-command-arg"];
    let mut m = n.create(&[&args[..], &[&script]].concat());
    m.created();
    n.start();
    n.exit();
    m.gone();
    let written = |path: std::path::PathBuf| path.metadata().unwrap().modified().unwrap();
    let delay = written(n.path("seen")).duration_since(written(n.path("exits").join(&n.id))).unwrap();
    assert!(delay.as_millis() > 1000, "the delay: {delay:?}");
    assert_eq!(std::fs::read_to_string(n.path("seen")).unwrap(), "3");
}

#[test]
fn clients_attach_and_their_end_is_stdin_s() {
    let n = Node::new(&sh("cat; echo over"));
    let mut m = n.create(&["-i"]);
    m.created();
    let client = attach(&n.path("sockets").join(&n.id).join("attach"));
    n.start();
    send(&client, b"hello\n", SendFlags::empty()).unwrap();
    assert_eq!(receive(&client, |all| all.contains("hello")), "hello\n");
    shutdown(&client, Shutdown::Write).unwrap();
    assert_eq!(receive(&client, |_| false), "over\n", "up to the end");
    assert_eq!(n.exit(), "0");
    assert_eq!(n.lines(&n.log()), ["F hello", "F over"]);
    m.gone();
}

#[test]
fn stdin_left_open_takes_the_next_client() {
    let n = Node::new(&sh("cat"));
    let mut m = n.create(&["-i", "--leave-stdin-open", "--full-attach"]);
    m.created();
    n.start();
    for text in ["one\n", "two\n"] {
        let client = attach(&n.path("bundle/attach"));
        send(&client, text.as_bytes(), SendFlags::empty()).unwrap();
        receive(&client, |all| all.contains(text));
    }
    assert_eq!(n.lines(&n.log()), ["F one", "F two"]);
    assert!(n.path("sockets").join(&n.id).symlink_metadata().is_err(), "no link with --full-attach");
}

#[test]
fn a_terminal_has_the_size_that_ctl_says() {
    let n = Node::with(&sh("read x; stty size; echo end"), |c| c["process"]["terminal"] = true.into());
    let mut m = n.create(&["-t"]);
    m.created();
    let client = attach(&n.path("sockets").join(&n.id).join("attach"));
    n.start();
    std::fs::write(n.path("bundle/ctl"), "1 24 80\n").unwrap();
    // Both FIFOs are read in order of their events: the size is there when the line is.
    std::thread::sleep(std::time::Duration::from_millis(300));
    send(&client, b"go\n", SendFlags::empty()).unwrap();
    let all = receive(&client, |_| false);
    assert!(all.contains("24 80\r\nend\r\n"), "{all:?}");
    assert_eq!(n.exit(), "0");
    assert!(std::fs::read_to_string(n.log()).unwrap().contains(" F 24 80\r\n"));
    m.gone();
}

#[test]
fn a_terminal_that_nobody_has_open_costs_no_cpu_and_comes_back() {
    // The shell has let go of the terminal; a later writer opens it anew.
    let script = "exec 3>/dev/tty; exec 0<&- 1>&- 2>&- 3>&-; : > /tmp/shut
        while [ ! -e /tmp/go ]; do sleep 0.1; done; echo back > /dev/console; exit 0";
    let n = Node::with(&sh(script), |c| c["process"]["terminal"] = true.into());
    let mut m = n.create(&["-t"]);
    m.created();
    n.start();
    wait_for("a terminal let go", || n.path("bundle/rootfs/tmp/shut").exists());
    std::thread::sleep(std::time::Duration::from_secs(1));
    let ticks = m.ticks();
    std::fs::write(n.path("bundle/rootfs/tmp/go"), "").unwrap();
    assert_eq!(n.exit(), "0");
    assert!(ticks < 10, "{ticks} ticks while nobody had the terminal open");
    let lines = n.lines(&n.log());
    assert!(lines.iter().any(|l| l.contains("back")), "{lines:?}");
}

#[test]
fn the_oom_killer_s_strike_leaves_files() {
    let n = Node::with(&sh("x=a; while :; do x=$x$x; done"), |c| {
        c["linux"]["resources"]["memory"] = serde_json::json!({"limit": 16 << 20, "swap": 16 << 20});
    });
    let mut m = n.create(&[]);
    m.created();
    n.start();
    assert_eq!(n.exit(), "137");
    m.gone();
    assert!(n.path("bundle/oom").exists() && n.path("persist/oom").exists());
    assert_eq!(std::fs::read(n.path("persist/oom")).unwrap(), b"");
}

/// CVE-2019-14891: without the privilege to lower the score nothing may change; with
/// it the monitor is spared and the container is not.
#[test]
fn cve_2019_14891_the_monitor_is_not_the_oom_killers_choice() {
    let n = Node::with(&["/bin/sleep", "60"], |c| c["process"]["oomScoreAdj"] = serde_json::Value::Null);
    let mut m = n.create(&[]);
    let pid = m.created();
    n.start();
    let score = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_string();
    let ours = score(i32::try_from(std::process::id()).unwrap());
    let lowered = score(m.pid) == "-1000";
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap();
    // CAP_SYS_RESOURCE is 24.
    let may = u64::from_str_radix(line.trim(), 16).unwrap() & (1 << 24) != 0;
    assert_eq!(lowered, may || ours == "-1000");
    assert_eq!(score(pid), ours, "the container has its caller's");
    let _ = n.runc(&["kill", &n.id, "KILL"]);
    n.exit();
    m.gone();
}

#[test]
fn logs_are_limited_rotated_and_opened_anew() {
    let n = Node::new(&sh("for i in $(seq 1 50); do echo line $i; done"));
    let mut m = n.create(&["--log-size-max", "600", "--log-rotate", "--log-max-files", "2"]);
    m.created();
    n.start();
    n.exit();
    m.gone();
    assert_eq!(n.lines(&n.log()).last().unwrap(), "F line 50");
    for suffix in ["", ".1", ".2"] {
        let size = n.path(&format!("log{suffix}")).metadata().unwrap().len();
        assert!(size > 0 && size <= 600, "log{suffix}: {size}");
    }
    assert!(!n.path("log.3").exists());

    let n = Node::new(&sh("echo one; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo two"));
    let mut m = n.create(&[]);
    m.created();
    n.start();
    wait_for("the first line", || n.lines(&n.log()) == ["F one"]);
    std::fs::rename(n.log(), n.path("old")).unwrap();
    std::fs::write(n.path("bundle/ctl"), "2 0 0\n").unwrap();
    wait_for("the new file", || n.log().exists());
    // runc spec's /tmp is the root file system's.
    std::fs::write(n.path("bundle/rootfs/tmp/go"), "").unwrap();
    n.exit();
    assert_eq!((n.lines(&n.path("old")), n.lines(&n.log())), (vec!["F one".into()], vec!["F two".into()]));
}

#[test]
fn no_descriptor_but_the_streams_reaches_the_container() {
    let n = Node::new(&sh("ls /proc/self/fd; echo end"));
    let mut m = n.create(&[]);
    m.created();
    n.start();
    n.exit();
    m.gone();
    // 3 is the listing's own.
    assert_eq!(n.lines(&n.log()), ["F 0", "F 1", "F 2", "F 3", "F end"]);
}

/// What the container says goes to the monitor's own streams.
#[test]
fn passthrough_hands_over_our_streams() {
    let n = Node::new(&sh("echo through; exit 4"));
    let mut args = n.create_args();
    args.extend(["-l".into(), "passthrough".into(), "--sync".into()]);
    let child = Command::new(harness::CONMON).args(&args).stdout(std::process::Stdio::piped()).spawn().unwrap();
    wait_for("the container", || n.path("pid").exists());
    wait_for("create's end", || n.runc(&["state", &n.id]).stdout.windows(9).any(|w| w == b"\"created\""));
    n.start();
    let out = child.wait_with_output().unwrap();
    assert_eq!((String::from_utf8(out.stdout).unwrap().as_str(), out.status.code()), ("through\n", Some(4)));
    assert!(!n.path("bundle/attach").exists());
}

#[test]
fn notifications_go_on_to_the_host() {
    let n = Node::new(&["/bin/sleep", "60"]);
    std::fs::create_dir(n.path("bundle/notify")).unwrap();
    let host = std::os::unix::net::UnixDatagram::bind(n.path("host")).unwrap();
    host.set_read_timeout(Some(harness::SOON)).unwrap();
    let mut m = n.create(&["--sdnotify-socket", n.path("host").to_str().unwrap()]);
    m.created();
    let inside = std::os::unix::net::UnixDatagram::unbound().unwrap();
    inside.send_to(b"MAINPID=1\nREADY=1\n", n.path("bundle/notify/notify.sock")).unwrap();
    let mut bytes = [0u8; 100];
    let length = host.recv(&mut bytes).unwrap();
    assert_eq!(&bytes[..length], b"READY=1");
    drop(n.runc(&["delete", "--force", &n.id]));
    m.gone();
}

/// A directory to mount over, taken back if it was made for that.
struct MountPoint(Option<&'static Path>);

impl MountPoint {
    fn make(path: &'static str) -> Self {
        Self(std::fs::create_dir(path).ok().map(|()| Path::new(path)))
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        if let Some(path) = self.0 {
            let _ = std::fs::remove_dir(path);
        }
    }
}

/// A journal of our own, in a mount namespace of its own.
#[test]
fn lines_go_to_the_journal() {
    let n = Node::new(&sh("echo '<4>warned'; echo err >&2"));
    let mut args = n.create_args();
    args.extend(["-l".into(), "journald".into(), "--sync".into(), "-n".into(), "name".into()]);
    let run = n.path("run");
    std::fs::create_dir_all(run.join("journal")).unwrap();
    let journal = std::os::unix::net::UnixDatagram::bind(run.join("journal/socket")).unwrap();
    journal.set_read_timeout(Some(harness::SOON)).unwrap();
    let script = "mount --bind \"$0\" /run/systemd && exec \"$@\"";
    let _point = MountPoint::make("/run/systemd");
    let mut child = Command::new("unshare")
        .args(["--mount", "/bin/sh", "-c", script])
        .arg(&run)
        .arg(harness::CONMON)
        .args(&args)
        .spawn()
        .unwrap();
    wait_for("create's end", || n.runc(&["state", &n.id]).stdout.windows(9).any(|w| w == b"\"created\""));
    n.start();
    let mut entries = Vec::new();
    for _ in 0..2 {
        let mut bytes = [0u8; 4096];
        let length = journal.recv(&mut bytes).unwrap();
        entries.push(String::from_utf8_lossy(&bytes[..length]).into_owned());
    }
    entries.sort();
    assert!(entries[0].starts_with("MESSAGE=err\nPRIORITY=3\n"), "{entries:?}");
    assert!(entries[1].starts_with("MESSAGE=warned\nPRIORITY=4\n"), "{entries:?}");
    assert!(
        entries[1].contains(&format!("CONTAINER_ID_FULL={}\n", n.id)) && entries[1].contains("CONTAINER_NAME=name\n")
    );
    assert!(child.wait().unwrap().success());
}

fn fake_runtime(n: &Node, script: &str) -> std::path::PathBuf {
    let path = n.path("fake-runtime");
    testkit::script(&path, format!("#!/bin/sh\n{script}\n"));
    path
}

/// Restore needs criu, which few test machines allow: a script stands for the runtime
/// and records how it is called.
#[test]
fn restore_calls_the_runtime_s_restore() {
    let n = Node::new(&["/bin/true"]);
    let script = format!("echo \"$@\" > {0}/called; sleep 1 & echo $! > {0}/pid", n.dir.path().display());
    let fake = fake_runtime(&n, &script);
    let mut m: Monitor =
        n.create(&["-r", fake.to_str().unwrap(), "--restore", "/image", "--runtime-opt", "--tcp-established"]);
    m.created();
    assert_eq!(n.exit(), "0");
    let called = std::fs::read_to_string(n.path("called")).unwrap();
    let want = format!(
        "restore --bundle {} --pid-file {} --detach --image-path /image --work-path {} --tcp-established {}\n",
        n.path("bundle").display(),
        n.path("pid").display(),
        n.path("bundle").display(),
        n.id
    );
    assert!(called.ends_with(&want), "{called}");
}

/// Descriptors that the caller leaves open go on only where somebody asks for them.
#[test]
fn sockets_of_the_caller_are_handed_down_on_request() {
    for asked in [false, true] {
        let n = Node::new(&["/bin/true"]);
        let dir = n.dir.path().display();
        let script = format!(
            "test -e /proc/self/fd/5 && echo yes > {dir}/five; echo $LISTEN_PID $$ > {dir}/listen; sleep 1 & echo $! > {dir}/pid"
        );
        let fake = fake_runtime(&n, &script);
        let mut args = n.create_args();
        args.extend(["-r".into(), fake.into(), "-l".into(), "none".into(), "--replace-listen-pid".into()]);
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut env = vec![("_OCI_SYNCPIPE", "3"), ("PATH", "/usr/sbin:/usr/bin:/bin"), ("LISTEN_PID", "1")];
        if asked {
            env.push(("LISTEN_FDS", "3"));
        }
        use std::os::fd::AsFd;
        let fds = [theirs.as_fd(), null.as_fd(), null.as_fd()];
        harness::reap(sys::spawn::spawn(Path::new(harness::CONMON), &args, &env, &fds).unwrap());
        drop(theirs);
        n.exit();
        assert_eq!(n.path("five").exists(), asked);
        let listen = std::fs::read_to_string(n.path("listen")).unwrap();
        let pids: Vec<&str> = listen.split_whitespace().collect();
        assert_eq!(pids[0], pids[1], "LISTEN_PID is the runtime's");
        drop(ours);
    }
}
