//! ExecSync through a monitor, by both of its ways (behaviours.md sections 1 and 2).

#![allow(clippy::unwrap_used, reason = "a failure has to stop the test")]

mod common;

use common::monitored::{Monitored, names};
use common::{alive, eventually};
use longshore_runtime::{ExecSyncSpec, Operation, Runtime};
use std::time::{Duration, Instant};
use types::{ErrorKind, ExitStatus};

fn both(case: impl Fn(Monitored)) {
    for by_log in [false, true] {
        println!("by log: {by_log}");
        case(Monitored::with(|h| h.exec_by_log = by_log));
    }
}

fn nothing_is_left(node: &Monitored) {
    assert_eq!(names(&node.bundle("p", "c").join("execs")), Vec::<String>::new());
    eventually("the exec's monitor is gone", || node.processes().len() == 2);
}

#[test]
fn output_and_code_come_back() {
    both(|node| {
        node.launch("p", "c", &["sleep", "1000"]);
        let run = |args: &[&str]| node.run(node.m().exec_sync("p", "c", node.exec(args))).unwrap();
        let out = run(&["sh", "-c", "echo out; echo err >&2; printf end; exit 42"]);
        assert_eq!((out.stdout.as_ref(), out.stderr.as_ref()), (&b"out\nend"[..], &b"err\n"[..]));
        assert_eq!(out.status, ExitStatus::Code(42));
        assert_eq!(run(&["sh", "-c", "kill -9 $$"]).status, ExitStatus::Signal(9));
        assert_eq!(run(&["true"]).stdout, "");
        let all = node.run(async {
            let one = |n: usize| {
                let (m, spec) = (node.m().clone(), node.exec(&["echo", &n.to_string()]));
                async move { m.exec_sync("p", "c", spec).await }
            };
            let tasks: Vec<_> = (0..20).map(|n| tokio::spawn(one(n))).collect();
            let mut out = Vec::new();
            for t in tasks {
                out.push(t.await.unwrap().unwrap().stdout);
            }
            out
        });
        for (n, out) in all.iter().enumerate() {
            assert_eq!(out.as_ref(), format!("{n}\n").as_bytes());
        }
        nothing_is_left(&node);
        node.end("p");
    });
}

#[test]
fn a_user_s_command_writes_to_its_own_streams() {
    let node = Monitored::new();
    node.launch("p", "c", &["sleep", "1000"]);
    let mut spec = node.exec(&["sh", "-c", "echo again >/proc/self/fd/1; id -u"]);
    spec.process_json = spec.process_json.replace("\"uid\":0", "\"uid\":4711");
    let out = node.run(node.m().exec_sync("p", "c", spec)).unwrap();
    assert_eq!(out.stdout, "again\n4711\n", "{out:?}");
    node.end("p");
}

#[test]
fn the_first_of_much_output_is_kept_and_the_command_goes_on() {
    let node = Monitored::new();
    node.launch("p", "c", &["sleep", "1000"]);
    let spec = ExecSyncSpec { keep: 1 << 20, ..node.exec(&["sh", "-c", "yes | head -c 64m; echo end >&2"]) };
    let out = node.run(node.m().exec_sync("p", "c", spec)).unwrap();
    assert_eq!((out.stdout.len(), out.stderr.as_ref(), out.status), (1 << 20, &b"end\n"[..], ExitStatus::Code(0)));
    node.end("p");
}

#[test]
fn a_log_that_stands_between_takes_no_more_disk_than_is_kept() {
    const KEEP: usize = 1 << 20;
    let node = Monitored::with(|handler| handler.exec_by_log = true);
    node.launch("p", "c", &["sleep", "1000"]);
    let spec = ExecSyncSpec { keep: KEEP, ..node.exec(&["sh", "-c", "yes $(echo 0 | head -c 1) | head -c 32m"]) };
    let call = node.spawn({
        let m = node.m().clone();
        async move { m.exec_sync("p", "c", spec).await }
    });
    let mut most = 0;
    while !call.is_finished() {
        let execs = std::fs::read_dir(node.bundle("p", "c").join("execs")).into_iter().flatten().flatten();
        let sizes = execs.filter_map(|e| std::fs::metadata(e.path().join("log")).ok()).map(|m| m.len());
        most = sizes.chain([most]).max().unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let out = node.run(call).unwrap().unwrap();
    assert_eq!(out.status, ExitStatus::Code(0));
    assert!(out.stdout.len() <= KEEP && !out.stdout.is_empty(), "{}", out.stdout.len());
    // Beside what it keeps, the write that reaches the bound.
    assert!(most <= 2 * KEEP as u64 + (1 << 17), "{most}");
    node.end("p");
}

#[test]
fn a_timeout_kills_the_command_and_its_group() {
    both(|node| {
        node.launch("p", "c", &["sleep", "1000"]);
        let spec = ExecSyncSpec {
            timeout: Some(Duration::from_secs(3)),
            ..node.exec(&["sh", "-c", "sleep 321 & echo out; sleep 322"])
        };
        let begun = Instant::now();
        let e = node.run(node.m().exec_sync("p", "c", spec)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::DeadlineExceeded, "{e}");
        assert!(e.to_string().contains("3s exceeded"), "{e}");
        assert!(begun.elapsed() >= Duration::from_secs(3) && begun.elapsed() < Duration::from_secs(30));
        nothing_is_left(&node);
        node.end("p");
    });
}

#[test]
fn who_holds_the_output_is_named() {
    // By way of a log the original drains without waiting, and nothing is held.
    {
        let node = Monitored::new();
        node.launch("p", "c", &["sleep", "1000"]);
        // Not before the child is what it is to be named as.
        let script = "sleep 323 & until case \"$(cat /proc/$!/cmdline)\" in sleep*) true;; *) false;; esac; do :; done";
        let spec = ExecSyncSpec { drain_timeout: Some(Duration::from_secs(1)), ..node.exec(&["sh", "-c", script]) };
        let begun = Instant::now();
        let e = node.run(node.m().exec_sync("p", "c", spec)).unwrap_err();
        assert!(e.to_string().contains("io is still held by"), "{e}");
        assert!(e.to_string().contains("(sleep 323)"), "{e}");
        assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
        assert_eq!(names(&node.bundle("p", "c").join("execs")), Vec::<String>::new());
        // The container is none the worse for it.
        assert_eq!(node.run(node.m().exec_sync("p", "c", node.exec(&["echo", "x"]))).unwrap().stdout, "x\n");
        node.end("p");
    }
}

#[test]
fn a_caller_that_goes_takes_the_command_along() {
    both(|node| {
        node.launch("p", "c", &["sleep", "1000"]);
        let before = node.processes().len();
        node.run(async {
            let exec = node.m().exec_sync("p", "c", node.exec(&["sleep", "324"]));
            assert!(tokio::time::timeout(Duration::from_secs(1), exec).await.is_err());
        });
        eventually("all of it is gone", || {
            node.processes().len() == before && names(&node.bundle("p", "c").join("execs")).is_empty()
        });
        node.end("p");
    });
}

#[test]
fn a_command_that_is_not_there_is_the_callers_fault() {
    both(|node| {
        node.launch("p", "c", &["sleep", "1000"]);
        let e = node.run(node.m().exec_sync("p", "c", node.exec(&["nope"]))).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArgument, "{e}");
        assert!(e.to_string().contains("nope"), "{e}");
        nothing_is_left(&node);
        let e = node.run(node.m().exec_sync("p", "d", node.exec(&["true"]))).unwrap_err();
        assert!(e.is_not_found(), "{e}");
        node.end("p");
    });
}

#[test]
fn a_command_that_never_started_is_no_success() {
    let mut node = Monitored::stopped();
    let path = node.root.join("runtime");
    testkit::script(&path, "#!/bin/bash\n[[ \" $* \" == *' exec '* ]] && exit 0\nexec /usr/sbin/runc \"$@\"\n");
    node.handler.runtime_binary = path;
    for by_log in [false, true] {
        node.handler.exec_by_log = by_log;
        node.start();
        node.launch("p", "c", &["sleep", "1000"]);
        let e = node.run(node.m().exec_sync("p", "c", node.exec(&["true"]))).unwrap_err();
        assert!(matches!(e.kind(), ErrorKind::Internal | ErrorKind::NotFound), "{e}");
        nothing_is_left(&node);
        node.end("p");
        node.die();
    }
}

/// A command runs before the daemon has been told so: what is killed in between fails
/// its start.
fn until_the_daemon_knows(node: &Monitored) {
    let told = |o: &Operation| o.waits_for.iter().any(|(what, _)| what == "the command's end");
    eventually("the daemon knows that it runs", || node.m().operations().iter().any(told));
}

#[test]
fn an_exec_of_a_daemon_that_died_is_killed_by_the_next() {
    let mut node = Monitored::new();
    node.launch("p", "c", &["sleep", "1000"]);
    let before = node.processes();
    let (m, spec) = (node.m().clone(), node.exec(&["sleep", "325"]));
    let exec = node.spawn(async move { m.exec_sync("p", "c", spec).await });
    eventually("it runs", || node.processes().len() >= before.len() + 2);
    until_the_daemon_knows(&node);
    let new: Vec<u32> = node.processes().into_iter().filter(|p| !before.contains(p)).collect();
    drop(exec);
    node.die();
    node.start();
    node.recover("p", &["c"]);
    eventually("it is gone", || new.iter().all(|p| !alive(*p)));
    assert_eq!(names(&node.bundle("p", "c").join("execs")), Vec::<String>::new());
    node.end("p");
}

#[test]
fn a_monitor_that_dies_is_an_error_with_all_that_is_known() {
    both(|node| {
        node.launch("p", "c", &["sleep", "1000"]);
        let (m, spec) = (node.m().clone(), node.exec(&["sh", "-c", "echo said; sleep 326"]));
        let exec = node.spawn(async move { m.exec_sync("p", "c", spec).await });
        let line = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let find = |part: &str| node.processes().into_iter().find(|p| line(p).contains(part));
        eventually("it runs", || find("sleep\x00326").is_some());
        until_the_daemon_knows(&node);
        let dirs = || std::fs::read_dir(node.bundle("p", "c").join("execs")).unwrap().flatten();
        // Where a log stands between, what the monitor hasn't read yet goes with it.
        let log = dirs().map(|d| d.path().join("log")).find(|log| log.exists());
        if let Some(log) = log {
            eventually("its output is in the log", || std::fs::read_to_string(&log).unwrap().contains("said"));
        }
        common::kill_9(find("--exec-process-spec").unwrap());
        let e = node.run(exec).unwrap().unwrap_err();
        assert!(e.to_string().contains("killed by signal 9") && e.to_string().contains("said"), "{e}");
        eventually("the command is gone", || find("sleep\x00326").is_none());
        nothing_is_left(&node);
        node.end("p");
    });
}
