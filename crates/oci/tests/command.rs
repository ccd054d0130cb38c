//! A runtime's binary behind the seam, played by shell scripts.
#![allow(clippy::unwrap_used)]

use longshore_oci::{Children, Command, Config, Launch, Runtime, Stdio, Unfinished};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};
use types::ErrorKind;

/// One at a time: a script that is being written while another test forks can't
/// be executed.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A runtime that does as `script` says; `$LOG` is its log file, `$PID` its pid
/// file where it was given one, `$LAST` the word before its last.
fn runtime(dir: &Path, script: &str) -> Command {
    let path = dir.join("fake");
    let text = format!(
        "#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in --log) LOG=$2;; --pid-file) PID=$2;; esac; \
         [ $# -gt 2 ] || LAST=${{LAST:-$1}}; shift; done\n{script}\n"
    );
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut config = Config::new(path, dir);
    config.deadline = Duration::from_secs(60);
    Command::new(config, Children::new())
}

fn launch(dir: &Path) -> Launch {
    Launch { stdio: Stdio::default(), console_socket: None, pid_file: dir.join("pid") }
}

#[tokio::test]
async fn a_failure_names_runtime_and_call_and_has_its_words() {
    let _turn = TURN.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let r = runtime(dir.path(), r#"echo '{"level":"error","msg":"container does not exist"}' > $LOG; exit 1"#);
    let e = r.start("web").await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound);
    assert_eq!(e.to_string(), "fake start: container does not exist");
    let e = runtime(dir.path(), "kill -9 $$").start("web").await.unwrap_err();
    assert!(e.to_string().contains("killed by signal 9"), "{e}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no log file is left");
}

#[tokio::test]
async fn what_a_killed_runc_had_mounted_keeps_no_delete_from_its_directory() {
    let _turn = TURN.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("root/web");
    let script = format!("rm -r {}", own.display());
    let mut config = runtime(dir.path(), &script).config().clone();
    config.root = Some(dir.path().join("root"));
    let runtime = Command::new(config, Children::new());
    for force in [true, false] {
        std::fs::create_dir_all(&own).unwrap();
        let binary = own.join("runc.aB3xYz");
        std::fs::write(&binary, "").unwrap();
        rustix::mount::mount_bind(dir.path().join("fake"), &binary).unwrap();
        runtime.delete("web", force).await.unwrap();
        assert!(!own.exists());
    }
}

#[tokio::test]
async fn a_delete_that_has_failed_half_done_is_brought_to_its_end() {
    let _turn = TURN.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("root/web");
    let unknown = r#"echo '{"level":"error","msg":"container does not exist"}' > $LOG; exit 1"#;
    let script = format!("case $LAST in --force) rm -rf {};; *) {unknown};; esac", own.display());
    let mut config = runtime(dir.path(), &script).config().clone();
    config.root = Some(dir.path().join("root"));
    let runtime = Command::new(config, Children::new());
    assert_eq!(runtime.delete("web", false).await.unwrap_err().kind(), ErrorKind::NotFound, "there is nothing");
    std::fs::create_dir_all(&own).unwrap();
    runtime.delete("web", false).await.unwrap();
    assert!(!own.exists());
}

#[tokio::test]
async fn calls_that_have_not_ended_are_found_by_their_bundle() {
    let _turn = TURN.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let bundle = dir.path().join("bundle");
    std::fs::create_dir(&bundle).unwrap();
    // It stays in the shell, whose command line is the call's.
    let begun = dir.path().join("begun");
    let never = dir.path().join("never");
    rustix::fs::mkfifoat(rustix::fs::CWD, &never, 0o600.into()).unwrap();
    let script = format!("echo >>{}; read -r line <{}", begun.display(), never.display());
    let r = runtime(dir.path(), &script);
    assert!(longshore_oci::unfinished_calls(&bundle).is_empty());
    let (abort, given_up) = tokio::sync::watch::channel(false);
    let r = r.until(given_up, |_| {});
    let document = bundle.join("exec-e.json");
    let look = async {
        while std::fs::read(&begun).map_or(0, |b| b.len()) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut found: Vec<_> = longshore_oci::unfinished_calls(&bundle).into_iter().map(|(what, _)| what).collect();
        found.sort_by_key(|what| *what == Unfinished::Exec);
        abort.send(true).unwrap();
        (found, longshore_oci::unfinished_calls(dir.path()).len())
    };
    let (create, exec, (found, others)) =
        tokio::join!(r.create("web", &bundle, launch(dir.path())), r.exec("web", &document, launch(dir.path())), look);
    assert_eq!(create.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(exec.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!((found, others), (vec![Unfinished::Container, Unfinished::Exec], 0));
    assert!(longshore_oci::unfinished_calls(&bundle).is_empty());
}

#[tokio::test]
async fn a_call_that_hangs_is_killed_at_its_deadline() {
    let _turn = TURN.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let config = runtime(dir.path(), "exec sleep 100").config().clone();
    let r = Command::new(Config { deadline: Duration::from_millis(500), ..config }, Children::new());
    let began = Instant::now();
    let e = r.pause("web").await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::DeadlineExceeded);
    assert!(began.elapsed() < Duration::from_secs(30) && e.to_string().contains("pause"), "{e}");
}

#[tokio::test]
async fn a_call_that_is_given_up_ends_at_once_with_its_children() {
    let _turn = TURN.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let child = dir.path().join("child");
    // In one write, and by the shell itself: no other child may be about.
    let script = format!("sleep 1000 & echo $! >{}; wait", child.display());
    let mut r = runtime(dir.path(), &script);
    // Its deadline is never reached.
    r = Command::new(Config { deadline: Duration::from_secs(600), ..r.config().clone() }, Children::new());
    let (abort, given_up) = tokio::sync::watch::channel(false);
    let (told, victims) = std::sync::mpsc::channel();
    let r = r.until(given_up, move |borne| told.send(borne.to_vec()).unwrap());
    let seen = async {
        while !std::fs::read_to_string(&child).is_ok_and(|pid| pid.ends_with('\n')) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        abort.send(true).unwrap();
    };
    let (e, ()) = tokio::join!(r.create("web", dir.path(), launch(dir.path())), seen);
    assert_eq!(e.unwrap_err().kind(), ErrorKind::Cancelled);
    let pid = std::fs::read_to_string(&child).unwrap();
    assert_eq!(victims.recv().unwrap(), [pid.trim().parse::<i32>().unwrap()]);
    // What it was about to make could come after whoever takes it away.
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    assert!(stat.is_empty() || stat.contains(") Z "), "the call's child lives on: {stat}");
}

/// A cgroup of v1's freezer: what is frozen in it does not die, as in a disk's wait.
struct Freezer(std::path::PathBuf);

impl Freezer {
    fn thaw(&self) {
        let _ = std::fs::write(self.0.join("freezer.state"), "THAWED");
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.thaw();
        for _ in 0..600 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[tokio::test]
async fn a_call_that_does_not_die_keeps_its_caller_for_a_while_only() {
    let _turn = TURN.lock().await;
    let freezer = Freezer(format!("/sys/fs/cgroup/freezer/lsh-test-{}", std::process::id()).into());
    if !Path::new("/sys/fs/cgroup/freezer/cgroup.procs").exists() || std::fs::create_dir(&freezer.0).is_err() {
        eprintln!("skipped: this node has no freezer of cgroups v1");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let script = format!("echo $$ >{0}/cgroup.procs; echo FROZEN >{0}/freezer.state; sleep 1000", freezer.0.display());
    let config = runtime(dir.path(), &script).config().clone();
    let children = Children::new();
    let r = Command::new(Config { deadline: Duration::from_secs(600), ..config }, children.clone());
    let (abort, given_up) = tokio::sync::watch::channel(false);
    let r = r.until(given_up, |_| {});
    let seen = async {
        while std::fs::read_to_string(freezer.0.join("freezer.state")).unwrap().trim() != "FROZEN" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        abort.send(true).unwrap();
    };
    let began = Instant::now();
    let (e, ()) = tokio::join!(r.create("web", dir.path(), launch(dir.path())), seen);
    let e = e.unwrap_err();
    assert!(e.kind() == ErrorKind::Cancelled && e.to_string().contains("not died within"), "{e}");
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    freezer.thaw();
    while children.sweep().unwrap() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// One that bears children without end, none of them in its group.
#[tokio::test]
async fn no_child_escapes_that_a_call_bears_while_it_is_killed() {
    let _turn = TURN.lock().await;
    for round in 0..10 {
        let dir = tempfile::tempdir().unwrap();
        let (begun, name) = (dir.path().join("begun"), format!("{}4714{round}", std::process::id()));
        let script = format!(
            "n=0; while [ $n -lt 300 ]; do setsid sleep {name} & n=$((n+1)); : >{}; done; wait",
            begun.display()
        );
        let r = runtime(dir.path(), &script);
        let (abort, given_up) = tokio::sync::watch::channel(false);
        let r = r.until(given_up, |_| {});
        let seen = async {
            while !begun.exists() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            abort.send(true).unwrap();
        };
        let (e, ()) = tokio::join!(r.create("web", dir.path(), launch(dir.path())), seen);
        assert_eq!(e.unwrap_err().kind(), ErrorKind::Cancelled);
        // A zombie has no command line.
        let lines = std::fs::read_dir("/proc").unwrap().flatten().map(|p| std::fs::read(p.path().join("cmdline")));
        let left = lines.flatten().filter(|l| l.ends_with(format!("sleep\0{name}\0").as_bytes())).count();
        assert_eq!(left, 0, "of round {round}");
    }
}

#[tokio::test]
async fn nothing_but_where_things_are_is_in_its_environment_and_no_descriptor_but_three() {
    let _turn = TURN.lock().await;
    let dir = tempfile::tempdir().unwrap();
    sys::process::inherit_nothing();
    let out = dir.path().join("seen");
    let script = format!("env | cut -d= -f1 | sort > {0}; ls /proc/self/fd >> {0}", out.display());
    runtime(dir.path(), &script).start("web").await.unwrap();
    let seen = std::fs::read_to_string(out).unwrap();
    // PWD, OLDPWD and _ are the shell's own; descriptor 3 is that of `ls`.
    let shell = ["PWD", "OLDPWD", "_", "0", "1", "2", "3"];
    let ours = ["PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"];
    for line in seen.lines() {
        assert!(shell.contains(&line) || ours.contains(&line), "{seen}");
    }
}

#[tokio::test]
async fn a_pid_file_that_is_missing_or_strange_is_an_error() {
    let _turn = TURN.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let e = runtime(dir.path(), "true").create("web", dir.path(), launch(dir.path())).await.unwrap_err();
    assert!(e.to_string().contains("left no pid file"), "{e}");
    let e = runtime(dir.path(), "echo x > $PID").create("web", dir.path(), launch(dir.path())).await.unwrap_err();
    assert!(e.to_string().contains("without a number"), "{e}");
    let e = runtime(dir.path(), "echo 0 > $PID").create("web", dir.path(), launch(dir.path())).await.unwrap_err();
    assert!(e.to_string().contains("process 0"), "{e}");
}
