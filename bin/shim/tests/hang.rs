//! What hangs, be it a runtime or a log's disk, holds up nobody else, and a Kill ends it.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::common::{Bundle, Shape, sh};
use harness::{Io, Shim, code, pid_in, runtime_but_for};
use proto::containerd::task::v3 as task;
use proto::containerd::types::Mount;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longer than any of this may take, far shorter than the runtime's deadline.
const SOON: Duration = Duration::from_secs(20);

/// A runtime that is runc, but for `create`, which does as `script` says; it notes
/// its pid in `pid`.
fn runtime(dir: &Path, script: &str) -> PathBuf {
    runtime_but_for(dir, "create", script)
}

async fn gone(pid: i32) {
    for _ in 0..12_000 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("process {pid} is left: {}", std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default());
}

fn children(shim: &Shim) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", shim.pid)).unwrap();
    tasks.map(|t| std::fs::read_to_string(t.unwrap().path().join("children")).unwrap_or_default()).collect()
}

/// Nothing of the container is left, neither here nor in the runtime.
async fn nothing_left(shim: &Shim, b: &Bundle) {
    assert_eq!(code(&shim.state(b).await.unwrap_err()), ttrpc::Code::NOT_FOUND);
    for _ in 0..6000 {
        if children(shim).trim().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(children(shim).trim(), "", "no child is left");
    no_trace(b);
}

/// No mount, no cgroup and so no process, no state of the runtime's.
fn no_trace(b: &Bundle) {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(b.path().to_str().unwrap()), "no mount is left");
    let known = std::fs::read_dir(b.runtime_root().join("test")).map_or(0, Iterator::count);
    assert_eq!(known, 0, "the runtime knows nothing of it");
    for controller in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let cgroup = controller.path().join(format!("lsh-test-{0}/{0}", b.id));
        assert!(!cgroup.exists(), "{} is left", cgroup.display());
    }
}

/// A mount that a creation makes and that must go with it.
fn bind(b: &Bundle) -> Mount {
    Mount {
        r#type: "bind".into(),
        source: b.path().join("rootfs").display().to_string(),
        options: vec!["rbind".into(), "rw".into()],
        ..Default::default()
    }
}

/// Gives the container a hook that hangs once it has noted its pid in the file that
/// is returned.
fn hook(b: &Bundle, kind: &str) -> PathBuf {
    let sign = b.path().join("hook");
    let script = format!("echo $$ >{0}.new; mv {0}.new {0}; exec sleep 1000", sign.display());
    let path = b.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["hooks"] = serde_json::json!({kind: [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
    std::fs::write(&path, config.to_string()).unwrap();
    sign
}

/// The hang is under way once `sign` has a pid, which is gone afterwards too.
async fn killed_while_hanging(shim: &Shim, b: &Bundle, binary: &Path, sign: &Path, inside: bool) {
    let killer = async {
        let pid = pid_in(sign).await;
        assert_eq!(code(&shim.kill(b, "", 15).await.unwrap_err()), ttrpc::Code::FAILED_PRECONDITION);
        let began = Instant::now();
        shim.kill(b, "", 9).await.unwrap();
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        // All is undone when Kill answers.
        assert_eq!(code(&shim.state(b).await.unwrap_err()), ttrpc::Code::NOT_FOUND);
        // What runs in the container's own pid namespace is missed by its cgroup.
        (!inside).then_some(pid)
    };
    let (made, pid) = tokio::join!(shim.create_by(b, binary, vec![bind(b)]), killer);
    let e = made.unwrap_err();
    assert_eq!(code(&e), ttrpc::Code::CANCELLED, "{e}");
    if let Some(pid) = pid {
        gone(pid).await;
    }
    nothing_left(shim, b).await;
    std::fs::remove_file(sign).unwrap();
}

#[tokio::test]
async fn a_runtime_that_hangs_in_create_is_ended_by_kill() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    let binary = runtime(b.path(), "sleep 1000 & wait");
    for _ in 0..3 {
        killed_while_hanging(&shim, &b, &binary, &b.path().join("pid"), false).await;
    }
    // And the name is free.
    b.configure(&Shape { args: sh("exit 6"), ..Shape::default() });
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 6);
    shim.delete(&b, "").await.unwrap();
    let seen = shim.events_until(&b, "/tasks/delete").await;
    assert_eq!(seen.iter().filter(|s| s.0 == "/tasks/create").count(), 1, "none for what was never made");
}

#[tokio::test]
async fn a_runtime_that_hangs_in_exec_is_ended_by_kill() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    let (binary, sign) = (runtime_but_for(b.path(), "exec", "sleep 1000 & wait"), b.path().join("pid"));
    let command = sh("exit 0");
    shim.create_by(&b, &binary, Vec::new()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    for _ in 0..2 {
        let killer = async {
            let pid = pid_in(&sign).await;
            assert_eq!(code(&shim.kill(&b, "e", 15).await.unwrap_err()), ttrpc::Code::FAILED_PRECONDITION);
            assert_eq!(code(&shim.delete(&b, "e").await.unwrap_err()), ttrpc::Code::FAILED_PRECONDITION);
            let began = Instant::now();
            shim.kill(&b, "e", 9).await.unwrap();
            assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
            assert_eq!(shim.delete(&b, "e").await.unwrap(), 255, "it never ran");
            gone(pid).await;
        };
        let (started, ()) = tokio::join!(shim.exec(&b, "e", &command, Io::default()), killer);
        assert_eq!(code(&started.unwrap_err()), ttrpc::Code::CANCELLED);
        std::fs::remove_file(&sign).unwrap();
    }
    shim.kill(&b, "", 9).await.unwrap();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 137);
    shim.delete(&b, "").await.unwrap();
    nothing_left(&shim, &b).await;
}

/// As runc in exec, for a moment, has its own binary mounted beside its state.
#[tokio::test]
async fn an_exec_that_is_killed_leaves_no_mount_of_the_runtime_s() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    let state = b.runtime_root().join("test").join(&b.id);
    let (of, there) = (b.path().join("binary"), b.path().join("there"));
    std::fs::write(&of, "").unwrap();
    let script = format!(
        "own={}/runc.$$; : >$own; mount --bind {} $own; echo >>{}; sleep 1000 & wait",
        state.display(),
        of.display(),
        there.display()
    );
    let binary = runtime_but_for(b.path(), "exec", &script);
    shim.create_by(&b, &binary, Vec::new()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let left = || {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let files = std::fs::read_dir(&state).unwrap().flatten();
        let files = files.filter(|f| f.file_name().as_encoded_bytes().starts_with(b"runc.")).count();
        (mounts.matches(state.to_str().unwrap()).count(), files)
    };
    let command = sh("exit 0");
    let killer = async {
        while std::fs::read(&there).map_or(0, |b| b.len()) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        shim.kill(&b, "a", 9).await.unwrap();
        let while_another_starts = left();
        shim.kill(&b, "b", 9).await.unwrap();
        (while_another_starts, left())
    };
    let (first, second, seen) =
        tokio::join!(shim.exec(&b, "a", &command, Io::default()), shim.exec(&b, "b", &command, Io::default()), killer);
    for started in [first, second] {
        assert_eq!(code(&started.unwrap_err()), ttrpc::Code::CANCELLED);
    }
    assert_eq!(seen, ((2, 2), (0, 0)), "while another exec starts, either could be its own");
    for exec in ["a", "b"] {
        shim.delete(&b, exec).await.unwrap();
    }
    shim.kill(&b, "", 9).await.unwrap();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 137);
    shim.delete(&b, "").await.unwrap();
    nothing_left(&shim, &b).await;
}

#[tokio::test]
async fn a_log_that_hangs_holds_up_no_other_container() {
    let shim = Shim::start().await;
    let a = Bundle::new(&Shape { args: sh("head -c 300000 /dev/zero; exec sleep 1000"), ..Shape::default() });
    // A file that takes no more, and does not say so, until its reader goes.
    let full = a.path().join("full");
    stdio::fifo::make(&full).unwrap();
    let reader = stdio::fifo::open_reader(&full).unwrap();
    shim.create(&a, Io { stdout: &format!("file://{}", full.display()), ..Io::default() }).await.unwrap();
    shim.start_task(&a).await.unwrap();
    for _ in 0..12_000 {
        if rustix::io::ioctl_fionread(&reader).unwrap() >= 65536 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let b = Bundle::new(&Shape { args: sh("echo through; exec sleep 1000"), ..Shape::default() });
    let (log, exec_log) = (b.path().join("log"), b.path().join("exec.log"));
    shim.create(&b, Io { stdout: &format!("file://{}", log.display()), ..Io::default() }).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let io = format!("file://{}", exec_log.display());
    shim.exec(&b, "e", &sh("echo exec"), Io { stdout: &io, ..Io::default() }).await.unwrap();
    assert_eq!(shim.wait(&b, "e").await.unwrap(), 0);
    shim.delete(&b, "e").await.unwrap();
    assert_eq!(std::fs::read_to_string(&exec_log).unwrap(), "exec\n");
    for bundle in [&a, &b] {
        shim.kill(bundle, "", 9).await.unwrap();
        assert_eq!(shim.wait(bundle, "").await.unwrap(), 137);
        shim.delete(bundle, "").await.unwrap();
    }
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "through\n");
    nothing_left(&shim, &b).await;
    // And the shim's own end is not kept by it for ever.
    shim.task.shutdown(harness::CALL, task::ShutdownRequest::default()).await.unwrap();
    gone(shim.pid).await;
    drop(reader);
}

/// A runtime that knows no cgroups: its containers stay in the shim's own.
fn runtime_without_cgroups(dir: &Path) -> PathBuf {
    let path = dir.join("simple");
    let text = "#!/bin/sh\nfor a in \"$@\"; do\n  [ \"$last\" = --pid-file ] && file=$a\n  last=$a\ndone\n\
                [ -z \"$file\" ] || { sleep 1000 & echo $! >\"$file\"; }\n";
    testkit::script(&path, text);
    path
}

#[tokio::test]
async fn kill_all_reaches_an_init_without_a_cgroup_of_its_own() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    shim.create_by(&b, &runtime_without_cgroups(b.path()), Vec::new()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let kill = || {
        let req = task::KillRequest { id: b.id.clone(), exec_id: String::new(), signal: 9, all: true };
        shim.task.kill(harness::CALL, req)
    };
    kill().await.unwrap();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 137);
    assert_eq!(code(&kill().await.unwrap_err()), ttrpc::Code::NOT_FOUND);
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn a_hook_that_hangs_is_ended_by_kill() {
    let shim = Shim::start().await;
    // Before the container's root is entered, and inside it.
    for kind in ["createRuntime", "createContainer"] {
        let b = Bundle::new(&Shape::default());
        let sign = hook(&b, kind);
        killed_while_hanging(&shim, &b, Path::new("runc"), &sign, kind == "createContainer").await;
    }
}

#[tokio::test]
async fn a_creation_that_outlives_its_shim_is_ended_by_delete() {
    for kind in ["the runtime", "createRuntime", "createContainer"] {
        let shim = Shim::start().await;
        let b = Bundle::new(&Shape::default());
        let (sign, binary) = if kind == "the runtime" {
            (b.path().join("pid"), runtime(b.path(), "sleep 1000 & wait"))
        } else {
            (hook(&b, kind), PathBuf::from("runc"))
        };
        let made = shim.create_by(&b, &binary, vec![bind(&b)]);
        let killer = async {
            let pid = pid_in(&sign).await;
            sys::pidfd::PidFd::open(shim.pid).unwrap().signal(types::Signal::KILL).unwrap();
            let out = std::process::Command::new(harness::BINARY)
                .args(["-namespace", "test", "-id", &b.id, "-bundle"])
                .arg(b.path())
                .arg("delete")
                .output()
                .unwrap();
            assert!(out.status.success(), "{kind}: {out:?}");
            assert_eq!(shim::decode_delete(&out.stdout).unwrap().exit_status, 137);
            pid
        };
        let (made, pid) = tokio::join!(made, killer);
        made.unwrap_err();
        if kind != "createContainer" {
            gone(pid).await;
        }
        no_trace(&b);
    }
}

/// As many creations that hang as may call the runtime at a time; `then` comes when they
/// do, and they are killed.
async fn while_all_turns_hang(shim: &Shim, then: impl Future<Output = ()>) {
    let cpus = std::thread::available_parallelism().unwrap().get();
    let hanging: Vec<Bundle> = (0..(2 * cpus).max(4)).map(|_| Bundle::new(&Shape::default())).collect();
    let work = async {
        let all = hanging.iter().map(|b| {
            let binary = runtime(b.path(), "sleep 1000 & wait");
            Box::pin(async move {
                let e = shim.create_by(b, &binary, Vec::new()).await.unwrap_err();
                assert_eq!(code(&e), ttrpc::Code::CANCELLED, "{e}");
            })
        });
        join_all(all.collect()).await;
    };
    let waiting = async {
        for b in &hanging {
            pid_in(&b.path().join("pid")).await;
        }
        then.await;
        for b in &hanging {
            shim.kill(b, "", 9).await.unwrap();
        }
    };
    tokio::join!(work, waiting);
    for b in &hanging {
        nothing_left(shim, b).await;
    }
}

#[tokio::test]
async fn a_kill_overtakes_the_queue_for_the_runtime() {
    let shim = Shim::start().await;
    let last = Bundle::new(&Shape::default());
    let overtaking = async {
        let killer = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let began = Instant::now();
            shim.kill(&last, "", 9).await.unwrap();
            assert!(began.elapsed() < SOON);
        };
        let (made, ()) = tokio::join!(shim.create_by(&last, Path::new("runc"), Vec::new()), killer);
        assert_eq!(code(&made.unwrap_err()), ttrpc::Code::CANCELLED);
    };
    while_all_turns_hang(&shim, overtaking).await;
    nothing_left(&shim, &last).await;
}

#[tokio::test]
async fn a_delete_overtakes_the_queue_for_the_runtime() {
    let shim = Shim::start().await;
    let done = Bundle::new(&Shape { args: sh("exit 4"), ..Shape::default() });
    shim.create(&done, Io::default()).await.unwrap();
    shim.start_task(&done).await.unwrap();
    assert_eq!(shim.wait(&done, "").await.unwrap(), 4);
    while_all_turns_hang(&shim, async {
        let began = Instant::now();
        assert_eq!(shim.delete(&done, "").await.unwrap(), 4);
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    })
    .await;
}

/// All futures, each polled when it asks for it.
async fn join_all<F: Future<Output = ()>>(mut all: Vec<std::pin::Pin<Box<F>>>) {
    std::future::poll_fn(move |cx| {
        all.retain_mut(|f| f.as_mut().poll(cx).is_pending());
        if all.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

#[tokio::test]
async fn a_mount_that_hangs_is_ended_by_kill() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    // Who opens it to read waits for a writer.
    let image = b.path().join("image");
    stdio::fifo::make(&image).unwrap();
    let mount = || Mount {
        r#type: "ext4".into(),
        source: image.display().to_string(),
        options: vec!["loop".into(), "ro".into()],
        ..Default::default()
    };
    let killing = async {
        while code(&shim.state(&b).await.unwrap_err()) == ttrpc::Code::NOT_FOUND {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let began = Instant::now();
        shim.kill(&b, "", 9).await.unwrap();
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    };
    let (made, ()) = tokio::join!(shim.create_by(&b, Path::new("runc"), vec![mount()]), killing);
    let e = made.unwrap_err();
    assert!(code(&e) == ttrpc::Code::CANCELLED && e.to_string().contains("ext4"), "{e}");
    let again = shim.create_by(&b, Path::new("runc"), vec![mount()]).await.unwrap_err();
    assert_eq!(code(&again), ttrpc::Code::UNAVAILABLE, "{again}");
    drop(std::fs::OpenOptions::new().write(true).open(&image).unwrap());
    nothing_left(&shim, &b).await;
}
