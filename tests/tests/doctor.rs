//! `longshore doctor`, beside a daemon, without one, and on a node that is broken.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::Daemon;
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

/// The exit code and the findings.
fn doctor(daemon: &Daemon, state: &std::path::Path) -> (i32, Vec<Value>) {
    let (code, findings) = daemon.doctor(state, &[]);
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

/// What is said of a check that is not well.
fn complaint<'a>(findings: &'a [Value], check: &str) -> &'a str {
    let found = findings.iter().find(|f| f["check"] == check && f["verdict"] != "ok");
    found.unwrap_or_else(|| panic!("{check} is well: {findings:?}"))["found"].as_str().unwrap()
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
    for check in [
        "kernel",
        "namespaces",
        "overlayfs",
        "cgroups",
        "runtimes",
        "cni",
        "database",
        "sockets",
        "operations",
        "quarantine",
        "leftovers",
    ] {
        assert_eq!(verdict(&findings, check), "ok", "{findings:?}");
    }
    // A bundle of nobody's, and a bootstrap.json that was set aside.
    let stray = state.join("bundles/stray");
    std::fs::create_dir(&stray).unwrap();
    std::fs::write(stray.join("bootstrap.json.bad"), "{").unwrap();
    let (code, findings) = doctor(&daemon, &state);
    assert_eq!(code, 0, "{findings:?}");
    assert!(complaint(&findings, "leftovers").contains("stray"), "{findings:?}");
    assert!(complaint(&findings, "quarantine").contains("bootstrap.json"), "{findings:?}");
    std::fs::remove_dir_all(&stray).unwrap();
    // A socket that others may write to.
    let socket = daemon.socket();
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    let (_, findings) = doctor(&daemon, &state);
    assert!(complaint(&findings, "sockets").contains("mode 666"), "{findings:?}");

    daemon.terminate();
    let (code, findings) = doctor(&daemon, &state);
    assert_eq!((code, verdict(&findings, "daemon")), (0, "warning"), "{findings:?}");
    assert!(complaint(&findings, "sockets").contains("does not exist"), "{findings:?}");
    std::fs::write(daemon.dir().join("root/db/longshore.db"), [7; 9000]).unwrap();
    let (code, findings) = doctor(&daemon, &state);
    assert_eq!((code, verdict(&findings, "database")), (1, "broken"), "{findings:?}");
    let closed = ReadOnly::on(daemon.dir().join("closed"));
    let (code, findings) = doctor(&daemon, &closed.0);
    assert_eq!((code, verdict(&findings, "state directory")), (1, "broken"), "{findings:?}");
}

/// A directory with these network configurations, and one plugin in another.
fn cni(dir: &std::path::Path, configurations: &[(&str, &str)]) -> String {
    let (conf, bin) = (dir.join("net.d"), dir.join("plugins"));
    for d in [&conf, &bin] {
        std::fs::create_dir_all(d).unwrap();
    }
    for (name, text) in configurations {
        std::fs::write(conf.join(name), text).unwrap();
    }
    std::fs::copy("/usr/lib/cni/bridge", bin.join("bridge")).unwrap();
    format!(
        "[network]\nmode = \"cni\"\n[network.cni]\nconf_dir = {conf:?}\nbin_dirs = [{bin:?}]\nnetworks = [\"good\", \"absent\"]\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn it_reads_network_configurations_and_looks_for_their_plugins() {
    let root = testkit::TempRoot::new();
    let config = cni(
        root.path(),
        &[
            ("10-good.conflist", r#"{"cniVersion": "1.0.0", "name": "good", "plugins": [{"type": "bridge"}]}"#),
            (
                "20-lacks.conflist",
                r#"{"cniVersion": "1.0.0", "name": "lacks", "plugins": [{"type": "no-such-plugin"}]}"#,
            ),
            ("30-broken.conflist", "{"),
        ],
    );
    let daemon = Daemon::on(root, &config).await;
    let (code, findings) = doctor(&daemon, &daemon.state());
    assert_eq!(code, 0, "{findings:?}");
    let of_cni = |verdict: &str| -> Vec<&str> {
        let those = findings.iter().filter(|f| f["check"] == "cni" && f["verdict"] == verdict);
        those.map(|f| f["found"].as_str().unwrap()).collect()
    };
    let amiss = of_cni("warning");
    for part in ["no-such-plugin", "30-broken.conflist", "absent"] {
        assert!(amiss.iter().any(|a| a.contains(part)), "{part:?} is missing in {amiss:?}");
    }
    assert!(of_cni("ok")[0].ends_with(": good"), "{findings:?}");
}
