//! What attaching and detaching a pod costs, on a node of its own.
//!
//! `cargo run --release -p longshore-network --example attach -- 300`
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use longshore_network::{AttachRequest, Bandwidth, Builtin, BuiltinConfig, PortMapping, Protocol};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use sys::namespace::{self, Kind, Wanted};

fn main() {
    let rounds: u16 = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(300);
    namespace::on_own_thread("node", |thread| {
        thread.unshare(&[Kind::Net])?;
        sys::link::set_up("lo")?;
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(measure(rounds));
        Ok(())
    })
    .unwrap();
}

async fn measure(rounds: u16) {
    let dir = tempfile::tempdir().unwrap();
    let net = Builtin::open(BuiltinConfig::default(), store::Store::open(dir.path()).unwrap()).await.unwrap();
    let pods: Vec<OwnedFd> = (0..rounds).map(|_| netns()).collect();
    for (what, ports) in [("without host ports", 0), ("with one host port", 1)] {
        let (mut on, mut off) = (Vec::new(), Vec::new());
        // Half of them stay, as on a node in use.
        for (n, pod) in pods.iter().enumerate() {
            let request = request(u16::try_from(n).unwrap(), pod, ports);
            let started = Instant::now();
            net.attach(&request).await.unwrap();
            on.push(started.elapsed());
            if n % 2 == 0 {
                let started = Instant::now();
                net.detach(&request.pod_id).await.unwrap();
                off.push(started.elapsed());
            }
        }
        println!("{what}: attach {}, detach {}", figures(on), figures(off));
        for n in 0..rounds {
            net.detach(&format!("p{n}")).await.unwrap();
        }
    }
    let started = Instant::now();
    let many: Vec<_> = (0..rounds.min(50)).map(|n| request(n, &pods[usize::from(n)], 1)).collect();
    let all = tokio::task::LocalSet::new();
    for request in many {
        let net = net.clone();
        all.spawn_local(async move { net.attach(&request).await.map(drop).unwrap() });
    }
    all.await;
    println!("50 at once: {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
}

fn netns() -> OwnedFd {
    let wanted = Wanted { net: true, ..Wanted::default() };
    namespace::make(&wanted, &mut |_| {}, |links| namespace::open(&links.join("net"))).unwrap()
}

fn request(n: u16, pod: &OwnedFd, ports: u16) -> AttachRequest {
    let port =
        |p| PortMapping { protocol: Protocol::Tcp, container_port: 80, host_port: 10_000 + n + p, host_ip: None };
    AttachRequest {
        pod_id: format!("p{n}"),
        name: String::new(),
        namespace: String::new(),
        uid: String::new(),
        netns: format!("/proc/self/fd/{}", pod.as_raw_fd()).into(),
        ports: (0..ports).map(port).collect(),
        static_ips: Vec::new(),
        mac: None,
        bandwidth: Bandwidth::default(),
        dns: None,
        cgroup: String::new(),
        device_id: None,
        annotations: Default::default(),
    }
}

fn figures(mut all: Vec<Duration>) -> String {
    all.sort_unstable();
    let at = |part: usize| all[(all.len() - 1) * part / 100].as_secs_f64() * 1e3;
    format!("median {:.2} ms, 90 % {:.2} ms", at(50), at(90))
}
