//! Random lives of real containers against the invariants of exits
//! (behaviours.md section 5), the model of `state.rs` on real processes.
//!
//! `LONGSHORE_MODEL_SECONDS` makes it longer than its default of 10 s,
//! `LONGSHORE_MODEL_SEED` repeats a run's choices.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::common::{Bundle, Shape, sh};
use harness::{CALL, Io, Seen, Shim};
use proto::containerd::task::v3 as task;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// xorshift64*: choices that can be repeated.
struct Choice(u64);

impl Choice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % n
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// What was answered to the calls about one exec.
#[derive(Default, Debug)]
struct Known {
    added: bool,
    started: Option<bool>,
    exit: Option<u32>,
}

/// One container from create to delete, and what must be true of its events.
async fn life(shim: &Shim, choice: &mut Choice) {
    let private_pids = choice.below(2) == 0;
    let init = match choice.below(4) {
        0 => "exit 3".to_string(),
        1 => format!("sleep 0.{}; exit 4", choice.below(4)),
        2 => "sleep 1000 & sleep 1000 & sleep 0.2; exit 5".to_string(),
        _ => "sleep 1000".to_string(),
    };
    let b = Bundle::new(&Shape { private_pids, args: sh(&init), ..Shape::default() });
    shim.create(&b, Io::default()).await.unwrap();
    let mut execs: BTreeMap<String, Known> = BTreeMap::new();
    let mut started = false;
    for step in 0..choice.below(14) {
        let id = format!("e{}", choice.below(4));
        match choice.below(8) {
            0 | 1 => started |= shim.start_task(&b).await.is_ok(),
            2 | 3 => {
                let script = ["exit 6", "sleep 0.1", "sleep 1000", "sleep 1000 & exit 7"][index(choice, 4)];
                let args = if choice.below(5) == 0 { vec!["/bin/nope".to_string()] } else { sh(script) };
                // A name that is new each time tells the generations apart.
                let id = format!("{id}-{step}");
                let spec = harness::common::process(&args, false).to_string().into_bytes();
                let request = task::ExecProcessRequest {
                    id: b.id.clone(),
                    exec_id: id.clone(),
                    spec: Some(prost_types::Any { type_url: String::new(), value: spec }),
                    ..Default::default()
                };
                let added = shim.task.exec(CALL, request).await.is_ok();
                let known = Known { added, ..Known::default() };
                execs.insert(id, known);
            }
            4 | 5 => {
                // Several at once, and perhaps a kill of init, or of one on its way up.
                let waiting: Vec<String> =
                    execs.iter().filter(|(_, k)| k.added && k.started.is_none()).map(|(id, _)| id.clone()).collect();
                let starts = waiting.iter().map(|id| {
                    let request = task::StartRequest { id: b.id.clone(), exec_id: id.clone() };
                    shim.task.start(CALL, request)
                });
                let victim = match choice.below(6) {
                    0 => Some(String::new()),
                    1..4 => waiting.get(index(choice, waiting.len().max(1))).cloned(),
                    _ => None,
                };
                let after = Duration::from_millis(choice.below(40));
                let killer = async {
                    if let Some(victim) = victim {
                        tokio::time::sleep(after).await;
                        let _ = shim.kill(&b, &victim, 9).await;
                    }
                };
                let (answers, ()) = tokio::join!(all_of(starts.collect()), killer);
                for (id, answer) in waiting.iter().zip(answers) {
                    execs.get_mut(id).unwrap().started = Some(answer.is_ok());
                }
            }
            6 => {
                if let Some(id) = execs.keys().nth(index(choice, execs.len().max(1))) {
                    let _ = shim.kill(&b, id, 9).await;
                }
            }
            _ => {
                let gone: Vec<String> = execs.keys().cloned().collect();
                if let Some(id) = gone.get(index(choice, gone.len().max(1)))
                    && let Ok(exit) = shim.delete(&b, id).await
                {
                    execs.get_mut(id).unwrap().exit = Some(exit);
                }
            }
        }
    }
    if !started {
        // It may have been killed before: then Start is refused and Delete does all.
        let _ = shim.start_task(&b).await;
    }
    let _ = shim.kill(&b, "", 9).await;
    let exit = shim.wait(&b, "").await.unwrap();
    assert!([3, 4, 5, 137].contains(&exit), "{exit}");
    for (id, known) in execs.iter_mut().filter(|(_, k)| k.started == Some(true) && k.exit.is_none()) {
        known.exit = Some(shim.wait(&b, id).await.unwrap());
    }
    assert_eq!(shim.delete(&b, "").await.unwrap(), exit, "code never changes");
    // runc's delete fails half done over what a killed call of it has left mounted.
    let state = b.runtime_root().join("test").join(&b.id);
    assert!(
        !state.exists(),
        "{} is left: {:?}",
        state.display(),
        std::fs::read_dir(&state).unwrap().collect::<Vec<_>>()
    );
    check(&b.id, &shim.events_until(&b, "/tasks/delete").await, &execs, exit);
}

fn index(choice: &mut Choice, n: usize) -> usize {
    usize::try_from(choice.below(n as u64)).unwrap()
}

/// All answers, in the order of the questions.
async fn all_of<T>(all: Vec<impl Future<Output = T>>) -> Vec<T> {
    let mut all: Vec<_> = all.into_iter().map(|f| (Box::pin(f), None)).collect();
    std::future::poll_fn(|cx| {
        let mut waits = false;
        for (future, answer) in &mut all {
            if answer.is_none() {
                match future.as_mut().poll(cx) {
                    std::task::Poll::Ready(a) => *answer = Some(a),
                    std::task::Poll::Pending => waits = true,
                }
            }
        }
        if waits { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    all.into_iter().map(|(_, answer)| answer.unwrap()).collect()
}

fn check(id: &str, seen: &[Seen], execs: &BTreeMap<String, Known>, exit: u32) {
    let of =
        |exec: &str| -> Vec<(&str, u32)> { seen.iter().filter(|s| s.2 == exec).map(|s| (s.0.as_str(), s.3)).collect() };
    let own = of("");
    let topics: Vec<&str> = own.iter().map(|s| s.0).collect();
    let (with, without) = (
        ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"],
        ["/tasks/create", "/tasks/exit", "/tasks/delete"],
    );
    assert!(topics == with || topics == without, "container {id}: {seen:?}");
    assert_eq!(own[own.len() - 2].1, exit);
    assert_eq!(seen.last().unwrap().0, "/tasks/delete", "container {id}: {seen:?}");
    let last = seen.iter().rfind(|s| s.0 == "/tasks/exit").unwrap();
    assert_eq!(last.2, "", "init's exit is the last: {seen:?}");
    for (exec, known) in execs {
        let events: Vec<&str> = of(exec).iter().map(|s| s.0).collect();
        let want: &[&str] = match (known.added, known.started) {
            (false, _) => &[],
            (true, Some(true)) => &["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"],
            (true, _) => &["/tasks/exec-added"],
        };
        assert_eq!(events, want, "exec {exec} of {id}, {known:?}: {seen:?}");
        if known.started == Some(true) {
            assert_eq!(Some(of(exec)[2].1), known.exit, "exec {exec} of {id}: {seen:?}");
        }
    }
}

#[tokio::test]
async fn random_lives_keep_the_invariants() {
    let bound = Duration::from_secs(number("LONGSHORE_MODEL_SECONDS").unwrap_or(10));
    let seed = number("LONGSHORE_MODEL_SEED").unwrap_or_else(|| u64::from(std::process::id()) + 1);
    eprintln!("LONGSHORE_MODEL_SEED={seed}");
    let shim = Shim::start().await;
    let began = Instant::now();
    let worker = |n: u64| {
        let shim = &shim;
        async move {
            let mut choice = Choice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(n) | 1);
            let mut lives = 0;
            while began.elapsed() < bound {
                life(shim, &mut choice).await;
                lives += 1;
            }
            lives
        }
    };
    let lives: u32 = all_of((0..4).map(worker).collect()).await.into_iter().sum();
    eprintln!("{lives} lives");
    assert!(lives > 0);
    // Nothing of them is left in the shim: no child, no descriptor that grows.
    let children = || -> String {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", shim.pid)).unwrap();
        tasks.map(|t| std::fs::read_to_string(t.unwrap().path().join("children")).unwrap_or_default()).collect()
    };
    let fds = || std::fs::read_dir(format!("/proc/{}/fd", shim.pid)).unwrap().count();
    harness::until("a shim without children and with few descriptors", || children().trim().is_empty() && fds() < 20)
        .await;
}
