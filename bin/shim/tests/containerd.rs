//! A real peer: Debian's containerd drives the shim through `ctr`.
#![allow(clippy::unwrap_used)]

mod peer;

use peer::{Containerd, installed};
use std::path::{Path, PathBuf};
use std::time::Duration;

#[test]
fn ctr_runs_execs_kills_and_removes() {
    if !installed("containerd") || !installed("ctr") {
        eprintln!("skipped: containerd is not installed");
        return;
    }
    let mut c = Containerd::start();
    for code in [0, 1, 7] {
        let out = c.run(&["--rm"], "r", &format!("echo hello; exit {code}"));
        assert_eq!(out.status.code(), Some(code), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(out.stdout, b"hello\n");
    }
    let out = c.run(&["--rm"], "k", "kill -9 $$");
    // PID 1 can't kill itself: it goes on to its end.
    assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));

    let out = c.run(&["-d"], "d", "trap 'exit 9' TERM; while :; do sleep 0.1; done");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let out = c.ctr(&["task", "exec", "--exec-id", "e1", "d", "/bin/sh", "-c", "echo in; exit 5"]);
    assert_eq!((out.status.code(), out.stdout.as_slice()), (Some(5), &b"in\n"[..]));
    let out = c.ctr_fed("fed\n", &["task", "exec", "--exec-id", "e0", "d", "/bin/cat"]);
    assert_eq!((out.status.code(), out.stdout.as_slice()), (Some(0), &b"fed\n"[..]), "{out:?}");
    assert!(c.ok(&["task", "ls"]).contains("RUNNING"));
    c.ok(&["task", "pause", "d"]);
    assert!(c.ok(&["task", "ls"]).contains("PAUSED"));
    c.ok(&["task", "resume", "d"]);
    assert!(c.ok(&["task", "metrics", "d"]).contains("memory"));
    assert!(c.ok(&["task", "ps", "d"]).lines().count() >= 2);

    // The daemon dies and comes back: the task is still there.
    c.kill_9_and_restart();
    assert!(c.ok(&["task", "ls"]).contains("RUNNING"));
    let out = c.ctr(&["task", "exec", "--exec-id", "e2", "d", "/bin/sh", "-c", "exit 6"]);
    assert_eq!(out.status.code(), Some(6), "{}", String::from_utf8_lossy(&out.stderr));
    c.ok(&["task", "kill", "d"]);
    for _ in 0..1200 {
        if c.ok(&["task", "ls"]).contains("STOPPED") {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let out = c.ctr(&["task", "rm", "d"]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() || said.contains("exited with code 9") || out.status.code() == Some(9), "{out:?}");
    c.ok(&["container", "rm", "d"]);
    assert_eq!(c.shims(), 0, "no bundle is left");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(c.dir.path().to_str().unwrap()), "no mount is left");
}

#[test]
fn a_dead_shim_is_reported_and_cleaned_up() {
    if !installed("containerd") || !installed("ctr") {
        eprintln!("skipped: containerd is not installed");
        return;
    }
    let c = Containerd::start();
    let out = c.run(&["-d"], "dead", "while :; do sleep 1; done");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let bundle = c.bundles().join("dead");
    let pid: i32 = std::fs::read_to_string(bundle.join("shim.pid")).unwrap().trim().parse().unwrap();
    sys::pidfd::PidFd::open(pid).unwrap().signal(types::Signal::KILL).unwrap();
    // It goes last, after the mounts.
    for _ in 0..1200 {
        if !bundle.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!bundle.exists(), "the bundle is left");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(bundle.to_str().unwrap()), "no mount is left");
    c.ok(&["container", "rm", "dead"]);
}

/// Where a test's logging binary leaves what it gets, and its URI.
fn logger(dir: &Path, name: &str) -> (PathBuf, String) {
    let script = dir.join("logger.sh");
    let text = "echo $$ >$1/pid; echo $CONTAINER_NAMESPACE $CONTAINER_ID >$1/who
        cat <&3 >>$1/out & cat <&4 >>$1/err & printf x >&5; exec 3<&- 4<&- 5>&-; wait";
    std::fs::write(&script, text.replace("$1", "\"$1\"")).unwrap();
    let into = dir.join(format!("into {name}"));
    std::fs::create_dir(&into).unwrap();
    let uri = format!("binary:///bin/sh?{}={}", script.display(), into.display()).replace(' ', "+");
    (into, uri)
}

#[test]
fn ctr_s_log_uris_are_served() {
    if !installed("containerd") || !installed("ctr") {
        eprintln!("skipped: containerd is not installed");
        return;
    }
    let c = Containerd::start();
    let text = |dir: &Path, name: &str| std::fs::read_to_string(dir.join(name)).unwrap_or_default();
    let there = |dir: &Path| Path::new("/proc").join(text(dir, "pid").trim()).exists();

    let (into, uri) = logger(c.dir.path(), "run");
    let out = c.run(&["--rm", "--log-uri", &uri], "lb", "echo out; echo err >&2; exit 7");
    assert_eq!(out.status.code(), Some(7), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!((text(&into, "out").as_str(), text(&into, "err").as_str()), ("out\n", "err\n"));
    assert_eq!(text(&into, "who"), format!("{} lb\n", c.namespace));
    assert!(!there(&into), "it is gone when ctr is");

    let file = c.dir.path().join("made/log");
    let uri = format!("file://{}", file.display());
    let out = c.run(&["--rm", "--log-uri", &uri], "lf", "echo out; echo err >&2");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(std::fs::read_to_string(&file).unwrap().len(), "out\nerr\n".len());

    // A running container outlives its logging binary, an exec has its own.
    let (into, uri) = logger(c.dir.path(), "d");
    let out = c.run(&["-d", "--log-uri", &uri], "ld", "trap 'exit 9' TERM; while :; do echo x; sleep 0.1; done");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let (exec, uri) = logger(c.dir.path(), "e");
    let out = c.ctr(&["task", "exec", "--exec-id", "e", "--log-uri", &uri, "ld", "/bin/sh", "-c", "echo in; exit 5"]);
    assert_eq!(out.status.code(), Some(5), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!((text(&exec, "out"), text(&exec, "who")), ("in\n".into(), format!("{} e\n", c.namespace)));
    let pid = text(&into, "pid").trim().parse().unwrap();
    sys::pidfd::PidFd::open(pid).unwrap().signal(types::Signal::KILL).unwrap();
    for _ in 0..400 {
        if !there(&into) {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!there(&into) && text(&into, "out").starts_with("x\n"));
    assert!(c.ok(&["task", "ls"]).contains("RUNNING"));
    c.ok(&["task", "kill", "ld"]);
    for _ in 0..1200 {
        if c.ok(&["task", "ls"]).contains("STOPPED") {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let out = c.ctr(&["task", "rm", "ld"]);
    assert!(out.status.success() || out.status.code() == Some(9), "{out:?}");
    c.ok(&["container", "rm", "ld"]);
    assert_eq!(c.shims(), 0, "no bundle is left");

    // One that never comes up fails the run and says why.
    let out = c.run(&["--rm", "--log-uri", "binary-v2:///bin/true"], "ln", "exit 0");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("/bin/true") && said.contains("descriptor 5"), "{said}");
    let _ = c.ctr(&["container", "rm", "ln"]);
    assert_eq!(c.shims(), 0, "no bundle is left");
}

#[test]
fn a_group_shares_a_shim_and_outlives_its_daemon() {
    if !installed("containerd") || !installed("ctr") {
        eprintln!("skipped: containerd is not installed");
        return;
    }
    let mut c = Containerd::start();
    let pod = ["-d", "--annotation", "io.kubernetes.cri.sandbox-id=pod"];
    for name in ["pod", "one", "two"] {
        let out = c.run(&pod, name, "trap 'exit 9' TERM; while :; do sleep 0.1; done");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    let state = c.bundles();
    let pid = |name: &str| std::fs::read_to_string(state.join(name).join("shim.pid")).unwrap();
    assert_eq!((pid("one"), pid("two")), (pid("pod"), pid("pod")));

    let execs = [("pod", 3), ("one", 4), ("two", 5), ("pod", 6), ("one", 7), ("two", 8)];
    for (n, (name, code)) in execs.into_iter().enumerate() {
        match n {
            0 => c.kill_9_and_restart(),
            3 => c.restart(),
            _ => {}
        }
        assert_eq!(c.ok(&["task", "ls"]).matches("RUNNING").count(), 3);
        let out = c.ctr(&["task", "exec", "--exec-id", "e", name, "/bin/sh", "-c", &format!("exit {code}")]);
        assert_eq!(out.status.code(), Some(code), "{}", String::from_utf8_lossy(&out.stderr));
    }
    // The others live on when one of them goes, though the caller then asks the
    // shim to end.
    let end = |name: &str| {
        c.ok(&["task", "kill", name]);
        for _ in 0..1200 {
            if c.ok(&["task", "ls"]).lines().any(|l| l.starts_with(name) && l.contains("STOPPED")) {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        c.ctr(&["task", "rm", name]);
        c.ok(&["container", "rm", name]);
    };
    end("pod");
    assert_eq!(c.ok(&["task", "ls"]).matches("RUNNING").count(), 2);
    let out = c.ctr(&["task", "exec", "--exec-id", "f", "one", "/bin/sh", "-c", "exit 6"]);
    assert_eq!(out.status.code(), Some(6), "{}", String::from_utf8_lossy(&out.stderr));
    let shim = pid("one");
    end("one");
    end("two");
    assert_eq!(c.shims(), 0, "no bundle is left");
    for _ in 0..3000 {
        if !Path::new("/proc").join(&shim).join("fd/0").exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("the group's shim {shim} outlives its last container");
}

#[test]
fn ctr_has_terminals_and_codes_of_signals() {
    if !installed("containerd") || !installed("ctr") {
        eprintln!("skipped: containerd is not installed");
        return;
    }
    let c = Containerd::start();
    let run = ["run", "--rm", "-t", "--runtime", "io.containerd.longshore.v2", "local/busybox:1", "t", "/bin/sh", "-c"];
    let out =
        c.on_terminal(&[&run[..], &["test -t 0 && test -t 1 && test -t 2 && echo on a terminal; exit 3"]].concat());
    let shown = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(shown.contains("on a terminal\r") && out.status.code() == Some(3), "{out:?}");

    // Init is killed while ctr waits for it. Nothing is asserted before it is dead:
    // ctr would wait for ever.
    let (code, shown, codes) = std::thread::scope(|s| {
        let waiting = s.spawn(|| c.run(&[], "k", "trap '' TERM; while :; do sleep 0.1; done").status.code());
        for _ in 0..200 {
            if c.ok(&["task", "ls"]).lines().any(|l| l.starts_with("k ") && l.contains("RUNNING")) {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let exec = ["task", "exec", "-t", "--exec-id", "e", "k", "/bin/sh", "-c", "test -t 1 && echo also; exit 4"];
        let shown = c.on_terminal(&exec);
        let codes = ["TERM", "KILL", "USR1"].map(|signal| {
            let script = format!("kill -{signal} $$; sleep 100");
            c.ctr(&["task", "exec", "--exec-id", signal, "k", "/bin/sh", "-c", &script]).status.code()
        });
        let _ = c.ctr(&["task", "kill", "-s", "SIGKILL", "k"]);
        (waiting.join().unwrap(), shown, codes)
    });
    assert!(String::from_utf8_lossy(&shown.stdout).contains("also\r") && shown.status.code() == Some(4), "{shown:?}");
    assert_eq!(codes, [Some(143), Some(137), Some(138)]);
    assert_eq!(code, Some(137));
    c.ctr(&["task", "rm", "k"]);
    c.ok(&["container", "rm", "k"]);
    assert_eq!(c.shims(), 0, "no bundle is left");
}

/// Calls `work` with 0 to `n`, sixteen at a time.
fn sixteen_at_a_time(n: usize, work: impl Fn(usize) + Sync) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|s| {
        for _ in 0..16 {
            s.spawn(|| {
                loop {
                    let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if i >= n {
                        return;
                    }
                    work(i);
                }
            });
        }
    });
}

#[test]
fn three_hundred_containers_and_execs_lose_and_reorder_no_event() {
    const N: usize = 300;
    if !installed("containerd") || !installed("ctr") {
        eprintln!("skipped: containerd is not installed");
        return;
    }
    let c = Containerd::start();
    let events = c.events();
    assert!(c.run(&["-d"], "host", "while :; do sleep 1; done").status.success());
    // Recorded from here on, at the latest; until then nothing is counted.
    let mut probe = 0;
    while events.tasks().is_empty() {
        assert!(probe < 100, "ctr events records nothing");
        let _ = c.ctr(&["task", "exec", "--exec-id", &format!("probe{probe}"), "host", "/bin/true"]);
        probe += 1;
    }
    let code = |n: usize| u64::try_from(n % 100).unwrap();
    sixteen_at_a_time(2 * N, |i| {
        // Both kinds side by side.
        let n = i / 2;
        let script = format!("exit {}", code(n));
        let out = if i % 2 == 0 {
            c.run(&["--rm"], &format!("c{n}"), &script)
        } else {
            c.ctr(&["task", "exec", "--exec-id", &format!("e{n}"), "host", "/bin/sh", "-c", &script])
        };
        assert_eq!(out.status.code().map(|c| u64::try_from(c).unwrap()), Some(code(n)), "{n}: {out:?}");
    });
    let of = |all: &[(String, serde_json::Value)], container: &str, exec: Option<&str>| -> Vec<(String, u64)> {
        let mine = all.iter().filter(|(topic, e)| {
            // An exit's id is the exec's, or the container's own.
            let id = if topic == "/tasks/exit" { &e["id"] } else { &e["exec_id"] };
            let of_exec = id.as_str().filter(|i| *i != container && !i.is_empty());
            e["container_id"] == container && of_exec == exec
        });
        mine.map(|(topic, e)| (topic.clone(), e["exit_status"].as_u64().unwrap_or(0))).collect()
    };
    // The last ones may still be on their way.
    let mut all = events.tasks();
    // Those of the probes don't count.
    let of_exec =
        |e: &serde_json::Value| e["container_id"] == "host" && e["id"].as_str().is_some_and(|id| id.starts_with('e'));
    for _ in 0..1200 {
        if all.iter().filter(|(t, _)| t == "/tasks/delete").count() >= N
            && all.iter().filter(|(t, e)| t == "/tasks/exit" && of_exec(e)).count() >= N
        {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
        all = events.tasks();
    }
    for n in 0..N {
        let at = |topic: &str| (topic.to_string(), 0);
        let exit = ("/tasks/exit".to_string(), code(n));
        let want = [at("/tasks/create"), at("/tasks/start"), exit.clone(), ("/tasks/delete".to_string(), code(n))];
        assert_eq!(of(&all, &format!("c{n}"), None), want, "c{n}");
        let want = [at("/tasks/exec-added"), at("/tasks/exec-started"), exit];
        assert_eq!(of(&all, "host", Some(&format!("e{n}"))), want, "e{n}");
    }
}
