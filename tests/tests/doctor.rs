//! `longshore doctor`, beside a daemon, without one, and on a node that is broken.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::Daemon;
use serde_json::Value;
use std::process::Command;

/// The exit code and the findings.
fn doctor(daemon: &Daemon, state: &std::path::Path) -> (i32, Vec<Value>) {
    let (root, config) = (daemon.dir().join("root"), daemon.dir().join("config.toml"));
    let paths = [("--config", config.as_path()), ("--root", root.as_path()), ("--state", state)];
    let mut args = vec!["doctor", "-o", "json"];
    for (flag, path) in &paths {
        args.extend([flag, path.to_str().unwrap()]);
    }
    let (code, out, err) = daemon.cli(&args);
    let said: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    let findings = said["findings"].as_array().unwrap().clone();
    for f in &findings {
        let well = f["verdict"] == "ok";
        assert_eq!(well, f["remedy"] == "", "what is not well has a remedy: {f}");
    }
    (code, findings)
}

fn verdict<'a>(findings: &'a [Value], check: &str) -> &'a str {
    let found = findings.iter().find(|f| f["check"] == check);
    found.unwrap_or_else(|| panic!("no {check}: {findings:?}"))["verdict"].as_str().unwrap()
}

/// A tmpfs that is mounted read-only while this lives.
struct ReadOnly(std::path::PathBuf);

impl ReadOnly {
    fn on(dir: std::path::PathBuf) -> Self {
        std::fs::create_dir(&dir).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "ro", "none"]).arg(&dir).status().unwrap();
        assert!(mounted.success());
        Self(dir)
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_works_with_and_without_a_daemon_and_names_what_is_broken() {
    let mut daemon = Daemon::start().await;
    let state = daemon.state();
    let (code, findings) = doctor(&daemon, &state);
    assert_eq!(code, 0, "{findings:?}");
    for check in ["kernel", "namespaces", "overlayfs", "cgroups", "runtimes", "operations", "leftovers"] {
        assert_eq!(verdict(&findings, check), "ok", "{findings:?}");
    }
    // A bundle of nobody's, and a bootstrap.json that was set aside.
    let stray = state.join("bundles/stray");
    std::fs::create_dir(&stray).unwrap();
    std::fs::write(stray.join("bootstrap.json.bad"), "{").unwrap();
    let (code, findings) = doctor(&daemon, &state);
    assert_eq!((code, verdict(&findings, "leftovers"), verdict(&findings, "quarantine")), (0, "warning", "warning"));
    std::fs::remove_dir_all(&stray).unwrap();

    daemon.terminate();
    let (code, findings) = doctor(&daemon, &state);
    assert_eq!((code, verdict(&findings, "daemon")), (0, "warning"), "{findings:?}");
    let closed = ReadOnly::on(daemon.dir().join("closed"));
    let (code, findings) = doctor(&daemon, &closed.0);
    assert_eq!((code, verdict(&findings, "state directory")), (1, "broken"), "{findings:?}");
}
