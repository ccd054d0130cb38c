//! Podman with our monitor and with the original, side by side: whatever it does has
//! the same result with both.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{bin_dir, wait_for};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use testkit::{ImageBuilder, TempRoot};

const IMAGE: &str = "docker.io/library/bb:latest";
/// Podman takes seconds for some calls, more on a loaded machine.
const SOON: Duration = Duration::from_secs(60);

/// A Podman with directories, locks and cgroups of its own. Dropped, it removes its
/// containers and leaves nothing.
struct Podman {
    root: TempRoot,
    conmon: PathBuf,
    cgroup: String,
}

/// Debian's own, which ours is compared with.
fn original() -> PathBuf {
    let path = PathBuf::from("/usr/bin/conmon");
    assert!(path.exists(), "install conmon, or run 'make test', which does");
    path
}

impl Podman {
    fn new(conmon: PathBuf) -> Self {
        static MADE: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = MADE.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let cgroup = format!("longshore-podman-{}-{number}", std::process::id());
        let podman = Self { root: TempRoot::new(), conmon, cgroup };
        // The usual shared memory lock is one for all Podmans of the node.
        let config = "[engine]\nlock_type = \"file\"\nevents_logger = \"file\"\n[containers]\nlog_driver = \"k8s-file\"\n\
            default_ulimits = [\"nofile=1024:1024\", \"nproc=4096:4096\"]\n";
        std::fs::write(podman.root.join("containers.conf"), config).unwrap();
        let archive = podman.root.join("image.tar");
        ImageBuilder::busybox().docker_archive(&archive, IMAGE);
        podman.ok(&["load", "-q", "-i", archive.to_str().unwrap()]);
        podman
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut c = Command::new("podman");
        for (flag, dir) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            c.arg(flag).arg(self.root.join(dir));
        }
        c.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--runtime", "runc", "--conmon"]);
        c.arg(&self.conmon).args(args);
        c.env("CONTAINERS_CONF", self.root.join("containers.conf")).env("DISABLE_HC_SYSTEMD", "true");
        c.stdin(Stdio::null());
        c
    }

    fn call(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What it prints and how it ends, without what differs from run to run.
    fn told(&self, args: &[&str]) -> (String, Option<i32>) {
        let out = self.call(args);
        (String::from_utf8_lossy(&out.stdout).into_owned(), out.status.code())
    }

    fn ok(&self, args: &[&str]) -> String {
        let out = self.call(args);
        assert!(out.status.success(), "podman {args:?} with {}: {out:?}", self.conmon.display());
        String::from_utf8_lossy(&out.stdout).trim().to_string()
    }

    /// `podman run` with what each container has.
    fn run<'a>(&'a self, flags: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["run", "--network", "none", "--cgroup-parent", &self.cgroup];
        args.extend_from_slice(flags);
        args.push(IMAGE);
        args.extend_from_slice(command);
        args
    }

    /// The call as a line for a shell.
    fn line(&self, args: &[&str]) -> String {
        let command = self.command(args);
        let quote = |w: &std::ffi::OsStr| format!("'{}'", w.to_str().unwrap());
        let words: Vec<String> = [command.get_program()].into_iter().chain(command.get_args()).map(quote).collect();
        words.join(" ")
    }

    /// The same call on a terminal whose user types `input`; what it shows, and its end.
    fn typed(&self, args: &[&str], input: &str) -> (String, Option<i32>) {
        let command = self.command(args);
        let mut child = Command::new("script")
            .args(["-qec", &self.line(args), "/dev/null"])
            .envs(command.get_envs().filter_map(|(k, v)| Some((k, v?))))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("script is in bsdutils");
        let mut stdin = child.stdin.take().unwrap();
        for line in input.split_inclusive('\n') {
            // A user types when he has seen something.
            std::thread::sleep(Duration::from_millis(1500));
            stdin.write_all(line.as_bytes()).unwrap();
        }
        let out = child.wait_with_output().unwrap();
        drop(stdin);
        (String::from_utf8_lossy(&out.stdout).into_owned(), out.status.code())
    }

    fn inspect(&self, name: &str, field: &str) -> String {
        self.ok(&["inspect", "--format", &format!("{{{{{field}}}}}"), name])
    }

    fn wait_state(&self, name: &str, state: &str) {
        wait_for(state, SOON, || self.inspect(name, ".State.Status") == state);
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.call(&["pod", "rm", "-fa", "-t", "0"]);
        let _ = self.call(&["rm", "-fa", "-t", "0"]);
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let ours = self.root.path().to_str().unwrap();
        for point in mounts.lines().rev().filter_map(|l| l.split(' ').nth(1)).filter(|p| p.starts_with(ours)) {
            let _ = Command::new("umount").args(["-l", point]).status();
        }
        let hierarchies = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        let all =
            hierarchies.map(|h| h.path().join(&self.cgroup)).chain([Path::new("/sys/fs/cgroup").join(&self.cgroup)]);
        for dir in all.filter(|d| d.exists()) {
            // A monitor may still be on its last steps in one of them.
            for _ in 0..100 {
                remove_cgroups(&dir);
                if !dir.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

fn remove_cgroups(dir: &Path) {
    for below in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if below.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroups(&below.path());
        }
    }
    let _ = std::fs::remove_dir(dir);
}

/// The same with both, at the same time.
fn same<T: PartialEq + std::fmt::Debug + Send>(what: impl Fn(&Podman) -> T + Sync) -> T {
    let (ours, theirs) = std::thread::scope(|s| {
        let theirs = s.spawn(|| what(&Podman::new(original())));
        let ours = what(&Podman::new(bin_dir().join("longshore-conmon")));
        (ours, theirs.join())
    });
    let theirs = theirs.unwrap_or_else(|e| std::panic::resume_unwind(e));
    assert_eq!(ours, theirs, "ours and the original's");
    ours
}

#[test]
fn runs_and_execs_end_alike() {
    let seen = same(|p| {
        let mut seen = vec![p.told(&p.run(&["--rm"], &["sh", "-c", "echo out; echo err >&2; exit 3"]))];
        seen.push(p.told(&p.run(&["--rm"], &["sh", "-c", "sleep 60 & kill -9 $!; wait $!"])));
        seen.push((String::new(), p.call(&p.run(&["--rm"], &["/no/such/program"])).status.code()));
        p.ok(&p.run(&["-d", "--name", "c"], &["sh", "-c", "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done"]));
        seen.push(p.told(&["exec", "c", "sh", "-c", "echo in; exit 4"]));
        seen.push((String::new(), p.call(&["exec", "c", "/no/such/program"]).status.code()));
        let mut piped = p.command(&["exec", "-i", "c", "cat"]);
        let mut piped = piped.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        piped.stdin.take().unwrap().write_all(b"by pipe\n").unwrap();
        let piped = piped.wait_with_output().unwrap();
        seen.push((String::from_utf8_lossy(&piped.stdout).into_owned(), piped.status.code()));
        seen.push(p.told(&["logs", "c"]));
        seen.push(p.told(&["stop", "c"]));
        seen.push((p.inspect("c", ".State.ExitCode"), None));
        seen.push(p.told(&["restart", "c"]));
        seen.push((p.inspect("c", ".State.Status"), None));
        seen.push(p.told(&["kill", "-s", "KILL", "c"]));
        seen.push(p.told(&["wait", "c"]));
        seen.push(p.told(&["rm", "c"]));
        seen.push(p.told(&["ps", "-aq"]));
        seen
    });
    assert_eq!(seen[0], ("out\n".into(), Some(3)));
    assert_eq!((seen[1].1, seen[2].1, seen[3].clone()), (Some(137), Some(127), ("in\n".into(), Some(4))));
    assert_eq!(seen[5], ("by pipe\n".into(), Some(0)));
    assert_eq!((seen[8].0.as_str(), seen[10].0.as_str()), ("9", "running"));
}

#[test]
fn terminals_show_alike() {
    let seen = same(|p| {
        let mut seen = vec![p.typed(&p.run(&["-it", "--rm"], &["sh"]), "echo $((6*7))\nexit 5\n")];
        p.ok(&p.run(&["-dit", "--name", "t"], &["sh"]));
        seen.push(p.typed(&["exec", "-it", "t", "sh"], "echo $((6*8))\nexit 6\n"));
        seen.push(p.typed(&["attach", "t"], "echo $((6*9))\nexit 7\n"));
        p.wait_state("t", "exited");
        let code = p.inspect("t", ".State.ExitCode");
        // What a terminal shows is cut into writes as it comes; its words are the same.
        let shown = |(text, code): &(String, _)| (["42", "48", "54"].map(|n| text.contains(n)), *code);
        (seen.iter().map(shown).collect::<Vec<_>>(), code)
    });
    let shown = seen.0.iter().map(|(numbers, _)| numbers.iter().filter(|n| **n).count()).collect::<Vec<_>>();
    assert_eq!((shown, seen.1.as_str()), (vec![1, 1, 1], "7"), "{:?}", seen.0);
    assert_eq!((seen.0[0].1, seen.0[1].1), (Some(5), Some(6)));
}

#[test]
fn attached_clients_and_followed_logs_get_everything() {
    let seen = same(|p| {
        p.ok(&p.run(&["-di", "--name", "a"], &["sh", "-c", "cat; echo over; exit 8"]));
        let follow = p.command(&["logs", "-f", "a"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut attach = p.command(&["attach", "a"]);
        let mut attach = attach.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdin = attach.stdin.take().unwrap();
        std::thread::sleep(Duration::from_secs(1));
        stdin.write_all(b"one\ntwo\n").unwrap();
        drop(stdin);
        let attach = attach.wait_with_output().unwrap();
        let follow = follow.wait_with_output().unwrap();
        let text = |o: &Output| String::from_utf8_lossy(&o.stdout).into_owned();
        (text(&attach), attach.status.code(), text(&follow), p.told(&["logs", "a"]))
    });
    assert_eq!((seen.0.trim_end(), seen.2.trim_end()), ("one\ntwo\nover", "one\ntwo\nover"));
}

#[test]
fn logs_are_limited_and_containers_share_a_pod_alike() {
    let seen = same(|p| {
        let script = "for i in $(seq 1 2000); do echo line $i; done";
        p.ok(&p.run(&["--name", "l", "--log-opt", "max-size=10kb"], &["sh", "-c", script]));
        let log = PathBuf::from(p.inspect("l", ".HostConfig.LogConfig.Path"));
        let size = log.metadata().unwrap().len();
        assert!(size > 0 && size <= 10_240, "{}: {size}", log.display());
        // How much of the end is left depends on how reads fell.
        let (last, code) = p.told(&["logs", "--tail", "1", "l"]);
        let mut seen = vec![(last, code)];
        let health = ["-d", "--name", "h", "--health-cmd", "test -e /tmp/well", "--health-interval", "disable"];
        p.ok(&p.run(&health, &["sleep", "1000"]));
        seen.push(("sick".into(), p.call(&["healthcheck", "run", "h"]).status.code()));
        p.ok(&["exec", "h", "touch", "/tmp/well"]);
        seen.push(("well".into(), p.call(&["healthcheck", "run", "h"]).status.code()));
        p.ok(&[
            "pod",
            "create",
            "--name",
            "pod",
            "--network",
            "none",
            "--cgroup-parent",
            &p.cgroup,
            "--infra-image",
            IMAGE,
            "--infra-command",
            "/bin/sleep 1000",
            "--share",
            "ipc,uts",
        ]);
        for name in ["one", "two"] {
            p.ok(&["run", "-d", "--pod", "pod", "--name", name, IMAGE, "sleep", "1000"]);
        }
        seen.push(p.told(&["exec", "one", "hostname"]));
        seen.push(("pod stop".into(), p.call(&["pod", "stop", "-t", "0", "pod"]).status.code()));
        seen.push((p.inspect("two", ".State.ExitCode"), None));
        seen
    });
    assert_eq!(seen[0], ("line 2000\n".into(), Some(0)));
    assert_eq!((seen[1].1, seen[2].1, seen[5].0.as_str()), (Some(1), Some(0), "137"));
}

#[test]
fn options_act_alike() {
    let seen = same(|p| {
        std::fs::write(p.root.join("three"), "by descriptor\n").unwrap();
        let line = p.line(&p.run(&["--rm", "--preserve-fds", "1"], &["cat", "/proc/self/fd/3"]));
        let out = Command::new("/bin/sh")
            .args(["-c", &format!("exec {line} 3<'{}'", p.root.join("three").display())])
            .envs(p.command(&[]).get_envs().filter_map(|(k, v)| Some((k, v?))))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let mut seen = vec![(String::from_utf8_lossy(&out.stdout).into_owned(), out.status.code())];
        seen.push(p.told(&p.run(&["--rm", "--log-driver", "passthrough"], &["echo", "through"])));
        seen.push(("timeout".into(), p.call(&p.run(&["--rm", "--timeout", "2"], &["sleep", "1000"])).status.code()));
        p.ok(&p.run(&["-d", "--name", "r", "--restart", "on-failure:2"], &["sh", "-c", "echo again; exit 1"]));
        wait_for("two restarts", SOON, || p.inspect("r", ".RestartCount") == "2");
        p.wait_state("r", "exited");
        seen.push(p.told(&["logs", "r"]));
        seen
    });
    assert_eq!(seen[0], ("by descriptor\n".into(), Some(0)));
    assert_eq!((seen[1].0.as_str(), seen[3].0.as_str()), ("through\n", "again\nagain\nagain\n"));
}

/// `LONGSHORE_PODMAN_RUNS` sets how many; 200 take about half a minute.
#[test]
fn short_runs_in_parallel_miss_no_exit() {
    let runs: usize = std::env::var("LONGSHORE_PODMAN_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    let p = Podman::new(bin_dir().join("longshore-conmon"));
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|s| {
        for _ in 0..8 {
            s.spawn(|| {
                loop {
                    let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if n >= runs {
                        return;
                    }
                    let code = n % 120;
                    let script = format!("echo {n}; exit {code}");
                    let (text, status) = p.told(&p.run(&["--rm"], &["sh", "-c", &script]));
                    assert_eq!((text, status), (format!("{n}\n"), i32::try_from(code).ok()));
                }
            });
        }
    });
    assert_eq!(p.told(&["ps", "-aq"]).0, "", "--rm has removed each");
}
