//! ExecSync as behaviours.md section 1 has it, with our shim and with containerd's.

#![allow(clippy::unwrap_used, reason = "a failure has to stop the test")]

mod common;

use common::{Kind, Node, eventually};
use longshore_runtime::{ExecSyncSpec, Runtime};
use std::time::{Duration, Instant};
use types::{ErrorKind, ExitStatus};

fn node_with_container(kind: Kind) -> Node {
    let node = Node::new(kind);
    node.launch("pod1", "c1", &["/bin/sleep", "1000"]);
    node
}

fn only_init_is_left(node: &Node) {
    let execs = node.bundle("pod1").join("tasks/c1/execs");
    eventually("no exec is left", || std::fs::read_dir(&execs).unwrap().next().is_none());
    eventually("its process is gone", || node.run(node.m().pids("pod1", "c1")).unwrap().len() == 1);
}

fn it_answers(kind: Kind) {
    let node = node_with_container(kind);
    let m = node.m();
    let run = |args: &[&str]| node.run(m.exec_sync("pod1", "c1", node.exec(args)));
    let said = run(&["/bin/sh", "-c", "echo out; echo err >&2; exit 3"]).unwrap();
    assert_eq!((&said.stdout[..], &said.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(said.status, ExitStatus::Code(3), "a code is an answer, no error");
    let e = run(&["/bin/no-such-command"]).unwrap_err();
    assert!(e.to_string().contains("no-such-command"), "{e}");
    let e = node.run(m.exec_sync("pod1", "nobody", node.exec(&["/bin/true"]))).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound, "{e}");
    let e = node.run(m.exec_sync("nowhere", "c1", node.exec(&["/bin/true"]))).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound, "{e}");
    only_init_is_left(&node);
}

/// Resident memory of this process and of the pod's shim, in KiB.
fn resident(node: &Node) -> u64 {
    let of = |pid: u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = text.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    of(std::process::id()) + of(node.m().shim_pid("pod1").unwrap())
}

fn output_is_capped(kind: Kind) {
    let node = node_with_container(kind);
    node.run(node.m().exec_sync("pod1", "c1", node.exec(&["/bin/true"]))).unwrap();
    let before = resident(&node);
    for _ in 0..3 {
        let spec = node.exec(&["/bin/sh", "-c", "yes | head -c 268435456; echo end >&2"]);
        let said = node.run(node.m().exec_sync("pod1", "c1", spec)).unwrap();
        assert_eq!(said.stdout.len(), 16 << 20);
        assert_eq!((&said.stderr[..], said.status), (&b"end\n"[..], ExitStatus::Code(0)));
        // Only what is kept costs memory. Other tests run in this process, too.
        let now = resident(&node);
        println!("{kind:?}: {before} KiB before, {now} KiB with the answer");
        assert!(now < before + (64 << 10), "{before} KiB before, {now} KiB with the answer");
    }
    println!("{kind:?}: {} KiB after", resident(&node));
    only_init_is_left(&node);
}

fn a_timeout_kills(kind: Kind) {
    let node = node_with_container(kind);
    for script in ["sleep 60", "sleep 1000 & sleep 60"] {
        let spec = ExecSyncSpec {
            timeout: Some(Duration::from_secs(1)),
            drain_timeout: Some(Duration::from_secs(60)),
            ..node.exec(&["/bin/sh", "-c", script])
        };
        let began = Instant::now();
        let e = node.run(node.m().exec_sync("pod1", "c1", spec)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::DeadlineExceeded);
        assert!(e.to_string().contains("timeout 1s exceeded"), "{e}");
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    }
    let execs = node.bundle("pod1").join("tasks/c1/execs");
    assert!(std::fs::read_dir(&execs).unwrap().next().is_none());
}

fn who_holds_the_output_is_named(kind: Kind) {
    let node = node_with_container(kind);
    let spec = ExecSyncSpec {
        drain_timeout: Some(Duration::from_secs(1)),
        ..node.exec(&["/bin/sh", "-c", "sleep 4321 & echo started"])
    };
    let began = Instant::now();
    let e = node.run(node.m().exec_sync("pod1", "c1", spec)).unwrap_err();
    let text = e.to_string();
    assert_eq!(e.kind(), ErrorKind::Internal);
    assert!(text.contains("still held by other processes") && text.contains("sleep 4321"), "{text}");
    assert!(began.elapsed() >= Duration::from_secs(1) && began.elapsed() < Duration::from_secs(30));
    let execs = node.bundle("pod1").join("tasks/c1/execs");
    assert!(std::fs::read_dir(&execs).unwrap().next().is_none());
    // Whoever writes to no pipe of ours holds nothing up.
    let spec = node.exec(&["/bin/sh", "-c", "sleep 4322 >/dev/null 2>&1 & echo started"]);
    assert_eq!(node.run(node.m().exec_sync("pod1", "c1", spec)).unwrap().stdout, "started\n");
}

fn a_caller_that_goes_takes_its_command_along(kind: Kind) {
    let node = node_with_container(kind);
    for after in [0, 5, 20, 50, 200] {
        let call = node.m().exec_sync("pod1", "c1", node.exec(&["/bin/sleep", "1000"]));
        let gone = node.run(async { tokio::time::timeout(Duration::from_millis(after), call).await });
        assert!(gone.is_err());
    }
    only_init_is_left(&node);
    eventually("nothing goes on", || node.m().operations().is_empty());
}

/// Also while the OCI runtime hangs that starts the command.
#[test]
fn a_caller_that_goes_ends_a_start_that_hangs() {
    let mut node = Node::new(Kind::Ours);
    let (script, begun) = (node.root.join("runtime"), node.root.join("begun"));
    let hang = format!("case \" $* \" in *\" exec \"*) touch {}; exec sleep 1000 ;; esac", begun.display());
    testkit::script(&script, format!("#!/bin/sh\n{hang}\nexec /usr/sbin/runc \"$@\"\n"));
    let mut config = node.config();
    config.handlers[0].runtime_binary = script;
    node.restart_with(config);
    node.launch("pod1", "c1", &["/bin/sleep", "1000"]);
    let (m, spec) = (node.m().clone(), node.exec(&["/bin/true"]));
    let call = node.spawn(async move { m.exec_sync("pod1", "c1", spec).await });
    eventually("the runtime is asked", || begun.exists());
    call.abort();
    let gone = Instant::now();
    eventually("nothing goes on", || node.m().operations().is_empty());
    only_init_is_left(&node);
    assert!(gone.elapsed() < node.timeouts.create / 2, "not by the start's own bound: {:?}", gone.elapsed());
}

fn many_at_once(kind: Kind) {
    let mut node = Node::new(kind);
    // They queue, and the last one's turn may come late.
    node.timeouts.create = Duration::from_secs(300);
    node.start();
    node.launch("pod1", "c1", &["/bin/sleep", "1000"]);
    let all: Vec<_> = (0..200)
        .map(|i| {
            let (m, spec) = (node.m().clone(), node.exec(&["/bin/echo", &i.to_string()]));
            node.spawn(async move { (i, m.exec_sync("pod1", "c1", spec).await) })
        })
        .collect();
    for call in all {
        let (i, said) = node.run(call).unwrap();
        assert_eq!(said.unwrap().stdout, format!("{i}\n"));
    }
    only_init_is_left(&node);
}

/// A slow exec holds up no other, and a dead shim ends all of them.
fn execs_are_independent(kind: Kind) {
    let mut node = node_with_container(kind);
    let (m, spec) = (node.m().clone(), node.exec(&["/bin/sleep", "1000"]));
    let slow = node.spawn(async move { m.exec_sync("pod1", "c1", spec).await });
    eventually("it runs", || node.run(node.m().pids("pod1", "c1")).unwrap().len() == 2);
    node.run(node.m().exec_sync("pod1", "c1", node.exec(&["/bin/true"]))).unwrap();
    common::kill_9(node.m().shim_pid("pod1").unwrap());
    let e = node.run(slow).unwrap().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
    assert_eq!(node.exit_of("c1").status.code(), 137);
}

macro_rules! both {
    ($($case:ident),*) => {
        mod ours { use super::*; $(#[test] fn $case() { super::$case(Kind::Ours) })* }
        mod go { use super::*; $(#[test] fn $case() { super::$case(Kind::Go) })* }
    };
}

both!(
    it_answers,
    output_is_capped,
    a_timeout_kills,
    who_holds_the_output_is_named,
    a_caller_that_goes_takes_its_command_along,
    many_at_once,
    execs_are_independent
);
