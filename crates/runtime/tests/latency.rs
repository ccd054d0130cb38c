//! What each step costs through the manager, our shim and containerd's in turn.
//! By hand: `cargo test -p longshore-runtime --test latency -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, reason = "a failure has to stop the test")]

mod common;

use common::{Kind, Node};
use longshore_runtime::Runtime;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use types::Signal;

const ROUNDS: usize = 30;
const EXECS: usize = 5;

type Times = BTreeMap<&'static str, Vec<Duration>>;

fn round(node: &mut Node, n: usize, times: &mut Times) {
    let pod = node.pod(&format!("pod{n}"));
    let task = node.task(&pod.id, &format!("c{n}"), &["/bin/sleep", "1000"]);
    let m = node.m().clone();
    let mut timed = |step: &'static str, began: Instant| times.entry(step).or_default().push(began.elapsed());
    let began = Instant::now();
    node.run(m.start_pod(&pod)).unwrap();
    timed("1 start_pod", began);
    let began = Instant::now();
    node.run(m.create_task(&pod, &task)).unwrap();
    timed("2 create_task", began);
    let began = Instant::now();
    node.run(m.start_task(&pod.id, &task.id)).unwrap();
    timed("3 start_task", began);
    for _ in 0..EXECS {
        let began = Instant::now();
        node.run(m.exec_sync(&pod.id, &task.id, node.exec(&["/bin/true"]))).unwrap();
        timed("4 exec_sync", began);
    }
    let began = Instant::now();
    node.run(m.kill_task(&pod.id, &task.id, Signal::KILL, false, "done")).unwrap();
    node.exit_of(&task.id);
    timed("5 kill to exit", began);
    let began = Instant::now();
    node.run(m.delete_task(&pod.id, &task.id)).unwrap();
    timed("6 delete_task", began);
    let began = Instant::now();
    node.run(m.stop_pod(&pod.id)).unwrap();
    timed("7 stop_pod", began);
}

#[test]
#[ignore = "a measurement, no check"]
fn latency() {
    let (mut ours, mut go) = (Node::new(Kind::Ours), Node::new(Kind::Go));
    let (mut of_ours, mut of_go) = (Times::new(), Times::new());
    for n in 0..ROUNDS {
        round(&mut ours, n, &mut of_ours);
        round(&mut go, n, &mut of_go);
    }
    println!("{:16}{:>10}{:>10}{:>10}{:>10}{:>8}", "ms", "ours p50", "p90", "go p50", "p90", "ratio");
    let at = |v: &mut Vec<Duration>, q: usize| {
        v.sort();
        v[(v.len() - 1) * q / 100].as_secs_f64() * 1e3
    };
    for (step, v) in &mut of_ours {
        let g = of_go.get_mut(step).unwrap();
        let (a, b, c, d) = (at(v, 50), at(v, 90), at(g, 50), at(g, 90));
        println!("{step:16}{a:10.2}{b:10.2}{c:10.2}{d:10.2}{:8.2}", a / c);
    }
}
