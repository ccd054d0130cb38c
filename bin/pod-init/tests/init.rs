//! The init of a pid namespace of its own.
#![allow(clippy::unwrap_used)]

use std::process::{Child, Command};
use std::time::Duration;

struct Namespace(Child);

impl Drop for Namespace {
    fn drop(&mut self) {
        // --kill-child takes the init with it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|p| p.parse().unwrap()).collect()
}

fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if check() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{what}");
}

#[test]
fn it_reaps_orphans_and_ends_on_sigterm() {
    let mut ns = Namespace(
        Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child"])
            .arg(env!("CARGO_BIN_EXE_longshore-pod-init"))
            .spawn()
            .unwrap(),
    );
    eventually("the init starts", || !children(ns.0.id()).is_empty());
    let init = children(ns.0.id())[0];
    let kill = |args: &[&str]| assert!(Command::new("kill").args(args).status().unwrap().success());
    let orphan = Command::new("nsenter")
        .args(["-t", &init.to_string(), "--pid", "sh", "-c", "(sleep 1000 &)"])
        .status()
        .unwrap();
    assert!(orphan.success());
    eventually("the orphan comes to the init", || children(init).len() == 1);
    kill(&["-9", &children(init)[0].to_string()]);
    eventually("it is reaped", || children(init).is_empty());
    // Whoever reaps takes signals already.
    kill(&[&init.to_string()]);
    let mut code = None;
    eventually("it ends on SIGTERM", || {
        code = ns.0.try_wait().unwrap();
        code.is_some()
    });
    assert_eq!(code.unwrap().code(), Some(0));
}
