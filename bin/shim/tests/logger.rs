//! Files and logging binaries as the targets of real containers' streams.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::common::{Bundle, Shape, sh};
use harness::{Io, Shim};
use std::path::Path;
use std::time::{Duration, Instant};

/// The shell script `script` as a logging binary; `$0` is the directory.
fn uri(scheme: &str, dir: &Path, script: &str) -> String {
    let encode = |t: &str| -> String {
        let plain = |b: u8| b.is_ascii_alphanumeric();
        t.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
    };
    // A pair of arguments each: -c SCRIPT, then $0 and $1.
    format!("{scheme}:///bin/sh?-c={}&{}=", encode(script), encode(dir.to_str().unwrap()))
}

/// Copies what comes and ends with it.
const GOOD: &str = "echo $$ >$0/pid; echo $CONTAINER_NAMESPACE $CONTAINER_ID >$0/who;
    cat <&3 >>$0/out & cat <&4 >>$0/err & printf x >&5; exec 3<&- 4<&- 5>&-; wait";

fn text(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).unwrap_or_default()
}

fn is_there(dir: &Path) -> bool {
    Path::new("/proc").join(text(dir, "pid").trim()).exists()
}

/// The shim's children: none is left where all is well.
fn children(shim: &Shim) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", shim.pid)).unwrap();
    tasks.map(|t| std::fs::read_to_string(t.unwrap().path().join("children")).unwrap_or_default()).collect()
}

fn fds(shim: &Shim) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", shim.pid)).unwrap().count()
}

async fn end(shim: &Shim, b: &Bundle) {
    shim.kill(b, "", 9).await.unwrap();
    shim.wait(b, "").await.unwrap();
    shim.delete(b, "").await.unwrap();
}

#[tokio::test]
async fn a_logging_binary_takes_both_streams_of_a_container() {
    let shim = Shim::start().await;
    let mut open = Vec::new();
    for scheme in ["binary", "binary-v2", "binary"] {
        shim.events.seen.lock().unwrap().clear();
        let b = Bundle::new(&Shape { args: sh("echo out; echo err >&2; exit 7"), ..Shape::default() });
        let target = uri(scheme, b.path(), GOOD);
        shim.create(&b, Io { stdout: &target, stderr: &target, ..Io::default() }).await.unwrap();
        assert!(is_there(b.path()), "it was ready before the container was");
        shim.start_task(&b).await.unwrap();
        assert_eq!(shim.wait(&b, "").await.unwrap(), 7);
        assert_eq!(shim.state(&b).await.unwrap().stdout, target);
        assert_eq!(shim.delete(&b, "").await.unwrap(), 7);
        assert_eq!((text(b.path(), "out").as_str(), text(b.path(), "err").as_str()), ("out\n", "err\n"));
        assert_eq!(text(b.path(), "who"), format!("test {}\n", b.id));
        assert!(!is_there(b.path()) && children(&shim).is_empty(), "{:?}", children(&shim));
        let seen = shim.events_until(&b, "/tasks/delete").await;
        let exits: Vec<u32> = seen.iter().filter(|s| s.0 == "/tasks/exit").map(|s| s.3).collect();
        assert_eq!(exits, [7], "the binary's exit is nobody's");
        open.push(fds(&shim));
    }
    // The last call's own may be closed a moment later.
    harness::until("a shim that keeps nothing of it", || fds(&shim) <= open[0]).await;
}

#[tokio::test]
async fn execs_and_terminals_have_binaries_of_their_own() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    for (id, terminal, want) in [("plain", false, "0\n"), ("tty", true, "0\r\nto stderr\r\n")] {
        let dir = b.path().join(id);
        std::fs::create_dir(&dir).unwrap();
        let target = uri("binary-v2", &dir, GOOD);
        let io = Io { stdout: &target, stderr: if terminal { "" } else { &target }, terminal, ..Io::default() };
        // Without a terminal there is no input either.
        let script = if terminal { "stty -echo; echo 0" } else { "wc -c" };
        shim.exec(&b, id, &sh(&format!("{script}; echo to stderr >&2; exit 4")), io).await.unwrap();
        assert_eq!(shim.wait(&b, id).await.unwrap(), 4);
        shim.delete(&b, id).await.unwrap();
        assert_eq!(text(&dir, "out"), want);
        assert_eq!(text(&dir, "err"), if terminal { "" } else { "to stderr\n" });
        assert_eq!(text(&dir, "who"), format!("test {id}\n"), "as containerd's shim has it");
        assert!(!is_there(&dir));
    }
    end(&shim, &b).await;
}

#[tokio::test]
async fn kill_9_of_the_binary_harms_no_container() {
    let shim = Shim::start().await;
    // More than any pipe holds, before and after.
    let script = "seq 1 200000; seq 1 200000 >&2; exit 6";
    for terminal in [false, true] {
        let b = Bundle::new(&Shape { args: sh(script), terminal, ..Shape::default() });
        let target = uri("binary", b.path(), "echo $$ >$0/pid; printf x >&5; exec sleep 600");
        let io = Io { stdout: &target, stderr: if terminal { "" } else { &target }, terminal, ..Io::default() };
        shim.create(&b, io).await.unwrap();
        shim.start_task(&b).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(shim.state(&b).await.unwrap().status, 2, "it waits for its reader");
        let pid = text(b.path(), "pid").trim().parse().unwrap();
        sys::pidfd::PidFd::open(pid).unwrap().signal(types::Signal::KILL).unwrap();
        assert_eq!(shim.wait(&b, "").await.unwrap(), 6);
        assert!(!is_there(b.path()), "reaped at once");
        let began = Instant::now();
        assert_eq!(shim.delete(&b, "").await.unwrap(), 6);
        let bound = stdio::logger::Bounds::default().terminate;
        assert!(began.elapsed() < bound, "nobody waits for one that is gone");
    }
    assert!(children(&shim).is_empty());
}

#[tokio::test]
async fn one_that_fails_to_start_fails_the_create_and_leaves_nothing() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape { args: sh("exit 0"), ..Shape::default() });
    for (target, says) in [
        (uri("binary-v2", b.path(), "exit 3"), "exited with 3"),
        ("binary:///nowhere/logger".into(), "/nowhere/logger"),
    ] {
        let e = shim.create(&b, Io { stdout: &target, ..Io::default() }).await.unwrap_err().to_string();
        assert!(e.contains(says) && e.contains(&b.id), "{e}");
    }
    assert!(children(&shim).is_empty());
    let listed = || {
        let all = std::fs::read_dir(format!("/proc/{}/fd", shim.pid)).unwrap();
        // What closes between the two looks is none.
        let target = |e: std::io::Result<std::fs::DirEntry>| std::fs::read_link(e.ok()?.path()).ok();
        all.filter_map(target).map(|t| t.display().to_string()).collect::<Vec<_>>()
    };
    harness::until("a shim without pipes", || !listed().iter().any(|f| f.starts_with("pipe:"))).await;
    // One that is up when the container can't be made is seen off.
    let broken = Bundle::new(&Shape { args: vec!["/none".into()], ..Shape::default() });
    let target = uri("binary", broken.path(), GOOD);
    shim.create(&broken, Io { stdout: &target, ..Io::default() }).await.unwrap_err();
    for _ in 0..6000 {
        if !is_there(broken.path()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!is_there(broken.path()) && children(&shim).is_empty());
    assert!(!listed().iter().any(|f| f.starts_with("pipe:")), "{:?}", listed());
}

#[tokio::test]
async fn one_that_stays_is_terminated_by_delete() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape { args: sh("exit 0"), ..Shape::default() });
    let script =
        "trap 'echo flushed >$0/out; exit 5' TERM; echo $$ >$0/pid; printf x >&5; while :; do sleep 0.05; done";
    let target = uri("binary", b.path(), script);
    shim.create(&b, Io { stdout: &target, ..Io::default() }).await.unwrap();
    shim.start_task(&b).await.unwrap();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 0);
    let began = Instant::now();
    assert_eq!(shim.delete(&b, "").await.unwrap(), 0, "its exit code fails nothing");
    let took = began.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_secs(13)).contains(&took), "{took:?}");
    assert_eq!(text(b.path(), "out"), "flushed\n");
    assert!(!is_there(b.path()));
}

#[tokio::test]
async fn a_file_takes_both_streams_and_terminals_and_is_appended_to() {
    let shim = Shim::start().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("made for it/log");
    let target = format!("file://{}", path.display()).replace(' ', "%20");
    for terminal in [false, true] {
        let b = Bundle::new(&Shape { args: sh("echo out; echo err >&2"), terminal, ..Shape::default() });
        let stderr = if terminal { "" } else { &target };
        shim.create(&b, Io { stdout: &target, stderr, terminal, ..Io::default() }).await.unwrap();
        shim.start_task(&b).await.unwrap();
        assert_eq!(shim.wait(&b, "").await.unwrap(), 0);
        shim.delete(&b, "").await.unwrap();
    }
    let mut lines: Vec<String> = std::fs::read_to_string(&path).unwrap().split('\n').map(String::from).collect();
    lines.sort();
    assert_eq!(lines, ["", "err", "err\r", "out", "out\r"]);
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o644);
}
