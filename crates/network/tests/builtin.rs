//! The built-in network on nodes of the tests' own: who reaches whom, what is left.

#![allow(clippy::unwrap_used)]

mod support;

use longshore_network::{Bandwidth, Builtin, BuiltinConfig, IpRange, Mac, Net, interface_stats};
use std::collections::BTreeSet;
use std::net::{IpAddr, UdpSocket};
use support::*;
use types::ErrorKind;

fn small(range: &str) -> BuiltinConfig {
    BuiltinConfig { ranges: vec![range.parse().unwrap()], ..BuiltinConfig::default() }
}

fn live(pods: &[&str]) -> BTreeSet<String> {
    pods.iter().map(ToString::to_string).collect()
}

/// Interfaces other than lo.
fn links() -> Vec<String> {
    let all = sh("ip -o link show | sed 's/^[0-9]*: //; s/[@:].*//'");
    all.lines().filter(|l| *l != "lo").map(str::to_owned).collect()
}

#[test]
fn pods_reach_each_other_and_the_node_at_once() {
    on_node(|node| async move {
        let net = node.builtin(BuiltinConfig::default()).await;
        let (a, b) = (Netns::new(), Netns::new());
        let first = net.attach(&request("a", &a, vec![])).await.unwrap();
        let second = net.attach(&request("b", &b, vec![])).await.unwrap();
        assert_eq!(first.addresses.len(), 2, "{first:?}");
        assert_eq!(first.gateways, ["10.85.0.1", "fd4c:6f6e:6773::1"].map(|g| g.parse::<IpAddr>().unwrap()));
        for (address, any) in [(v4(&second.addresses), "0.0.0.0"), (v6(&second.addresses), "::")] {
            let address = IpAddr::to_string(&address);
            let at = |port: u16| if any == "::" { format!("[{address}]:{port}") } else { format!("{address}:{port}") };
            // The address itself is bound to: it is not tentative.
            let listener = b.listen(&at(80));
            exchange(&listener, a.connect(&at(80)).unwrap());
            exchange(&listener, connect(&at(80)).unwrap());
            let server = b.udp(&at(53));
            exchange_udp(&server, &a.udp(if any == "::" { "[::]:0" } else { "0.0.0.0:0" }), &at(53));
        }
        let at_node = std::net::TcpListener::bind("10.85.0.1:81").unwrap();
        exchange(&at_node, a.connect("10.85.0.1:81").unwrap());
        let at_node = std::net::TcpListener::bind("[fd4c:6f6e:6773::1]:81").unwrap();
        exchange(&at_node, a.connect("[fd4c:6f6e:6773::1]:81").unwrap());

        let stats = interface_stats(&a.path()).await.unwrap();
        let eth0 = stats.iter().find(|s| s.name == "eth0").unwrap();
        assert!(eth0.rx_bytes > 0 && eth0.tx_packets > 0 && eth0.rx_errors == 0, "{eth0:?}");
        let shown = a.sh("ip -o link show eth0; ip addr show eth0");
        assert!(shown.contains(&first.mac.unwrap().to_string()) && !shown.contains("tentative"), "{shown}");
        let host = sh(&format!("ip link show {}", first.host_interface.unwrap()));
        assert!(host.contains("longshore pod a"), "{host}");
    });
}

#[test]
fn the_world_sees_the_node_and_routers_are_still_heard() {
    on_node(|node| async move {
        let world = outside();
        sh("sysctl -qw net.ipv6.conf.up0.accept_ra=1");
        let net = node.builtin(BuiltinConfig::default()).await;
        let pod = Netns::new();
        net.attach(&request("a", &pod, vec![])).await.unwrap();
        let listener = world.listen("192.0.2.2:80");
        assert_eq!(exchange(&listener, pod.connect("192.0.2.2:80").unwrap()).ip().to_string(), "192.0.2.1");
        let listener = world.listen("[2001:db8::2]:80");
        assert_eq!(exchange(&listener, pod.connect("[2001:db8::2]:80").unwrap()).ip().to_string(), "2001:db8::1");
        assert_eq!(sh("sysctl -n net.ipv6.conf.up0.accept_ra").trim(), "2");
    });
}

#[test]
fn cve_2020_10749_pods_and_bridge_take_no_router_advertisements() {
    no_router_is_heard(BuiltinConfig::default());
}

/// The kernel has IPv6 on every interface, whatever addresses pods have.
#[test]
fn cve_2020_10749_nor_do_they_where_pods_have_ipv4_alone() {
    no_router_is_heard(BuiltinConfig { ranges: vec!["10.85.0.0/16".parse().unwrap()], ..BuiltinConfig::default() });
}

fn no_router_is_heard(config: BuiltinConfig) {
    on_node(|node| async move {
        let net = node.builtin(config).await;
        let pod = Netns::new();
        net.attach(&request("a", &pod, vec![])).await.unwrap();
        assert_eq!(pod.sh("cat /proc/sys/net/ipv6/conf/eth0/accept_ra").trim(), "0");
        assert_eq!(
            sh("cat /proc/thread-self/net/dev >/dev/null; cat /proc/sys/net/ipv6/conf/longshore0/accept_ra").trim(),
            "0"
        );
    });
}

/// The pod gives itself a way to 127.0.0.1 over its wire, and the node's loopback
/// server must hear nothing. That the packets arrive at all is seen by taking the
/// rule away.
#[test]
fn cve_2020_8558_loopback_from_a_neighbour_is_dropped() {
    on_node(|node| async move {
        let net = node.builtin(BuiltinConfig::default()).await;
        let pod = Netns::new();
        net.attach(&request("a", &pod, vec![])).await.unwrap();
        pod.sh("sysctl -qw net.ipv4.conf.eth0.route_localnet=1
                ip route del table local local 127.0.0.0/8 dev lo
                ip route del table local local 127.0.0.1 dev lo
                ip route add 127.0.0.1 via 10.85.0.1 dev eth0");
        let server = UdpSocket::bind("127.0.0.1:9999").unwrap();
        let client = pod.run(|| UdpSocket::bind("10.85.0.2:7777").unwrap());
        server.set_read_timeout(Some(SHORT)).unwrap();
        for _ in 0..3 {
            client.send_to(b"spoof", "127.0.0.1:9999").unwrap();
        }
        let mut word = [0; 8];
        assert!(server.recv(&mut word).is_err(), "a neighbour reached 127.0.0.1");
        sh("nft flush chain inet longshore spoofed");
        server.set_read_timeout(Some(LONG)).unwrap();
        client.send_to(b"control", "127.0.0.1:9999").unwrap();
        assert_eq!(server.recv(&mut word).unwrap(), 7, "the packets do arrive without the rule");
    });
}

#[test]
fn a_node_that_cannot_be_prepared_is_not_ready_until_it_can() {
    on_node(|node| async move {
        let net = node.builtin(BuiltinConfig::default()).await;
        net.status().await.unwrap();
        sh("ip link add longshore0 type veth peer name other0");
        let e = net.attach(&request("a", &Netns::new(), vec![])).await.unwrap_err();
        let unready = net.status().await.unwrap_err();
        assert!(e.to_string().contains("longshore0 is no bridge"), "{e}");
        assert!(unready.to_string().contains("longshore0 is no bridge"), "{unready}");
        sh("ip link del longshore0");
        // No pod comes while it isn't ready, so it has to see for itself.
        let begun = std::time::Instant::now();
        while let Err(e) = net.status().await {
            assert!(begun.elapsed() < LONG, "{e}");
            tokio::time::sleep(SHORT).await;
        }
        net.attach(&request("a", &Netns::new(), vec![])).await.unwrap();
    });
}

#[test]
fn an_exhausted_range_is_named_and_an_address_freed_is_used_again() {
    on_node(|node| async move {
        let net = node.builtin(small("10.99.0.0/29")).await;
        let pods: Vec<Netns> = (0..6).map(|_| Netns::new()).collect();
        for (n, pod) in pods[..5].iter().enumerate() {
            let got = net.attach(&request(&format!("p{n}"), pod, vec![])).await.unwrap();
            assert_eq!(got.addresses[0].to_string(), format!("10.99.0.{}/29", n + 2));
        }
        let e = net.attach(&request("p5", &pods[5], vec![tcp(8080)])).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ResourceExhausted);
        let e = e.to_string();
        assert!(e.contains("10.99.0.0/29") && !e.contains("disk"), "{e}");
        assert_eq!(links().len(), 6, "five pods and the bridge: {:?}", links());
        net.detach("p1").await.unwrap();
        let got = net.attach(&request("p5", &pods[5], vec![tcp(8080)])).await.unwrap();
        assert_eq!(got.addresses[0].to_string(), "10.99.0.3/29");
        // Addresses rest: the next one is not the one that was freed last.
        net.detach("p5").await.unwrap();
        net.detach("p0").await.unwrap();
        let got = net.attach(&request("p0", &pods[0], vec![])).await.unwrap();
        assert_eq!(got.addresses[0].to_string(), "10.99.0.2/29");
    });
}

/// StopPodSandbox does not wait for the kernel to remove the link, and yet nobody gets
/// an address before its link is gone.
#[test]
fn who_leaves_holds_up_only_those_who_need_his_address() {
    on_node(|node| async move {
        let net = node.builtin(small("10.99.0.0/30")).await;
        let (a, b) = (Netns::new(), Netns::new());
        let mut wanted = request("b", &b, vec![tcp(8080)]);
        for round in 0..10 {
            net.attach(&request("a", &a, vec![tcp(8080)])).await.unwrap();
            let departure = net.part("a").await.unwrap();
            // The host port is free at once; the range's only address is not.
            wanted.static_ips = if round % 2 == 0 { vec![] } else { vec!["10.99.0.2/30".parse().unwrap()] };
            let got = net.attach(&wanted).await.unwrap();
            assert_eq!(got.addresses[0].to_string(), "10.99.0.2/30");
            assert_eq!(links().len(), 2, "the bridge and the new link: {:?}", links());
            departure.end().await.unwrap();
            // The same pod once more, and the end of all, wait too.
            drop(net.part("b").await.unwrap());
            net.attach(&wanted).await.unwrap();
            drop(net.part("b").await.unwrap());
            net.detach("b").await.unwrap();
            assert!(node.store.network_claims().await.unwrap().is_empty());
        }
        net.attach(&request("a", &a, vec![])).await.unwrap();
        drop(net.part("a").await.unwrap());
        net.release().await.unwrap();
        assert_eq!(links(), Vec::<String>::new());
    });
}

#[test]
fn attaching_twice_is_refused_and_detaching_twice_is_not() {
    on_node(|node| async move {
        let net = node.builtin(small("10.99.0.0/24")).await;
        let pod = Netns::new();
        net.attach(&request("a", &pod, vec![tcp(8080)])).await.unwrap();
        let e = net.attach(&request("a", &pod, vec![])).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::AlreadyExists, "{e}");
        connect_within("10.99.0.2:80", LONG).unwrap_err();
        drop(pod);
        net.detach("a").await.unwrap();
        net.detach("a").await.unwrap();
        net.detach("never-there").await.unwrap();
        net.release().await.unwrap();
        assert_eq!(links(), Vec::<String>::new());
        assert_eq!(sh("nft list tables"), "");
    });
}

#[test]
fn a_failed_attach_leaves_nothing() {
    on_node(|node| async move {
        let net = node.builtin(small("10.99.0.0/24")).await;
        let file = node.dir.join("file");
        std::fs::write(&file, "").unwrap();
        for (path, kind) in [(file, ErrorKind::FailedPrecondition), ("/nonexistent/ns".into(), ErrorKind::NotFound)] {
            let e = net.attach(&request_at("a", &path, vec![tcp(8080)])).await.unwrap_err();
            assert_eq!(e.kind(), kind, "{e}");
            assert!(e.to_string().contains(&path.display().to_string()), "{e}");
        }
        let taken = Netns::new();
        taken.sh("ip link add eth0 type bridge");
        let e = net.attach(&request("a", &taken, vec![tcp(8080)])).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::AlreadyExists, "{e}");
        assert_eq!(links(), ["longshore0"]);
        assert!(node.store.network_claims().await.unwrap().is_empty());
        sh("ip link del longshore0; ip link add longshore0 type veth peer name x0");
        let e = net.attach(&request("a", &Netns::new(), vec![])).await.unwrap_err();
        assert!(e.to_string().contains("longshore0 is no bridge"), "{e}");
        assert!(node.store.network_claims().await.unwrap().is_empty());
    });
}

#[test]
fn what_a_crash_left_is_found_by_the_pods_that_live() {
    on_node(|node| async move {
        let config = small("10.99.0.0/29");
        let (lives, dies) = (Netns::new(), Netns::new());
        {
            let net = node.builtin(config.clone()).await;
            net.attach(&request("lives", &lives, vec![tcp(8080)])).await.unwrap();
            net.attach(&request("dies", &dies, vec![tcp(8081)])).await.unwrap();
        }
        // Killed between the claim and its use.
        let range = longshore_range();
        let wish = store::AddressWish::Next(vec![range]);
        node.store.claim_addresses("ghost", vec![wish]).await.unwrap();
        // And a link that the database knows nothing of.
        sh("ip link add lsh0123456789ab type veth peer name x0; ip link set lsh0123456789ab master longshore0
            ip link set lsh0123456789ab alias 'longshore pod 0123'; nft flush ruleset");
        let net = node.builtin(config).await;
        let removed = net.reconcile(&live(&["lives"])).await.unwrap().join("\n");
        for part in ["of pod dies", "of pod ghost", "10.99.0.3", "10.99.0.4", "lsh0123456789ab of pod 0123"] {
            assert!(removed.contains(part), "{part} is not in {removed}");
        }
        assert!(!removed.contains("lives"), "{removed}");
        let claims = node.store.network_claims().await.unwrap();
        assert_eq!(claims.iter().map(|c| c.pod_id.as_str()).collect::<Vec<_>>(), ["lives"]);
        let mut left = links();
        left.retain(|l| l != "longshore0" && !l.starts_with("lsh"));
        assert_eq!((left.len(), links().len()), (0, 2), "{:?}", links());
        // The table, which somebody had flushed, is whole again.
        let listener = lives.listen("0.0.0.0:80");
        exchange(&listener, connect("127.0.0.1:8080").unwrap());
        assert!(!sh("nft list table inet longshore").contains("8081"));
        assert!(net.reconcile(&live(&["lives"])).await.unwrap().is_empty());
        let ghost_again = net.attach(&request("dies", &dies, vec![tcp(8081)])).await.unwrap();
        assert_eq!(ghost_again.addresses[0].to_string(), "10.99.0.5/29");
    });
}

fn longshore_range() -> store::AddressRange {
    store::AddressRange { name: "10.99.0.0/29".into(), base: [10, 99, 0, 0].into(), first: 2, last: 6 }
}

#[test]
fn fifty_at_once_and_nothing_left() {
    on_node(|node| async move {
        sh("nft add table inet other; nft add chain inet other c; nft add rule inet other c ip saddr 1.2.3.4 drop
            nft add table ip longshore");
        let before = sh("nft list table inet other");
        let net = node.builtin(BuiltinConfig::default()).await;
        let pods: Vec<Netns> = (0..50).map(|_| Netns::new()).collect();
        let requests: Vec<_> =
            pods.iter().enumerate().map(|(n, p)| request(&format!("p{n}"), p, vec![tcp(9000 + n as u16)])).collect();
        let attached: Vec<_> = join(requests.into_iter().map(|r| {
            let net = net.clone();
            async move { net.attach(&r).await }
        }))
        .await;
        let addresses: BTreeSet<String> =
            attached.into_iter().flat_map(|a| a.unwrap().addresses).map(|a| a.to_string()).collect();
        assert_eq!(addresses.len(), 100);
        assert_eq!(links().len(), 51);
        let listener = pods[49].listen("0.0.0.0:80");
        exchange(&listener, connect("127.0.0.1:9049").unwrap());
        for done in join((0..50).map(|n| {
            let net = net.clone();
            async move { net.detach(&format!("p{n}")).await }
        }))
        .await
        {
            done.unwrap();
        }
        let empty = sh("nft list table inet longshore");
        assert!(!empty.contains("elements"), "{empty}");
        net.release().await.unwrap();
        assert_eq!(links(), Vec::<String>::new());
        assert_eq!(sh("nft list table inet other"), before, "another tool's table");
        assert_eq!(sh("nft list tables"), "table inet other\ntable ip longshore\n");
        assert!(node.store.network_claims().await.unwrap().is_empty());
        let again = net.attach(&request("again", &pods[0], vec![tcp(9000)])).await.unwrap();
        let listener = pods[0].listen(&format!("{}:80", v4(&again.addresses)));
        exchange(&listener, connect("127.0.0.1:9000").unwrap());
    });
}

async fn join<T, F>(work: impl Iterator<Item = F>) -> Vec<T>
where
    T: 'static,
    F: Future<Output = T> + 'static,
{
    let local = tokio::task::LocalSet::new();
    let all: Vec<_> = work.map(|w| local.spawn_local(w)).collect();
    local.await;
    let mut done = Vec::new();
    for task in all {
        done.push(task.await.unwrap());
    }
    done
}

#[test]
fn a_bridge_and_a_table_that_somebody_removed_come_back() {
    on_node(|node| async move {
        let net = node.builtin(small("10.99.0.0/24")).await;
        let (a, b) = (Netns::new(), Netns::new());
        net.attach(&request("a", &a, vec![tcp(8080)])).await.unwrap();
        sh("nft flush ruleset");
        net.attach(&request("b", &b, vec![tcp(8081)])).await.unwrap();
        for (pod, at) in [(&a, "127.0.0.1:8080"), (&b, "127.0.0.1:8081")] {
            let listener = pod.listen("0.0.0.0:80");
            exchange(&listener, connect(at).unwrap());
        }
        net.detach("a").await.unwrap();
        sh("ip link del longshore0");
        net.attach(&request("a", &a, vec![tcp(8080)])).await.unwrap();
        let listener = a.listen("0.0.0.0:80");
        exchange(&listener, connect("127.0.0.1:8080").unwrap());
        sh("nft delete table inet longshore");
        net.detach("a").await.unwrap();
        net.detach("b").await.unwrap();
    });
}

#[test]
fn static_addresses_limits_and_the_mtu_are_as_asked_for() {
    on_node(|node| async move {
        let ranges: Vec<IpRange> = ["10.99.0.0/24", "fd00:99::/64"].map(|r| r.parse().unwrap()).to_vec();
        let net = node.builtin(BuiltinConfig { ranges, mtu: Some(1400), ..BuiltinConfig::default() }).await;
        let (a, b) = (Netns::new(), Netns::new());
        let mut wanted = request("a", &a, vec![]);
        wanted.static_ips = vec!["10.99.0.77".parse::<IpAddr>().unwrap().into(), "fd00:99::abcd/64".parse().unwrap()];
        wanted.mac = Some("0a:58:00:00:00:77".parse::<Mac>().unwrap());
        wanted.bandwidth = Bandwidth { ingress: Some(8_000_000), egress: Some(16_000_000) };
        let got = net.attach(&wanted).await.unwrap();
        let expected: Vec<Net> = ["10.99.0.77/24", "fd00:99::abcd/64"].map(|n| n.parse().unwrap()).to_vec();
        assert_eq!((got.addresses, got.mac, got.mtu), (expected, wanted.mac, Some(1400)));
        let shown = a.sh("ip link show eth0");
        assert!(shown.contains("mtu 1400") && shown.contains("0a:58:00:00:00:77"), "{shown}");
        let out = a.sh("tc qdisc show dev eth0");
        assert!(out.contains("tbf") && out.contains("16Mbit"), "{out}");
        let into = sh(&format!("tc qdisc show dev {}", got.host_interface.unwrap()));
        assert!(into.contains("tbf") && into.contains("8Mbit"), "{into}");
        let listener = a.listen("10.99.0.77:80");
        exchange(&listener, connect("10.99.0.77:80").unwrap());

        let mut same = request("b", &b, vec![]);
        same.static_ips = vec!["10.99.0.77".parse::<IpAddr>().unwrap().into()];
        let e = net.attach(&same).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::AlreadyExists);
        assert!(e.to_string().contains("10.99.0.77") && e.to_string().contains("pod a"), "{e}");
        same.static_ips = vec!["10.98.0.1".parse::<IpAddr>().unwrap().into()];
        assert_eq!(net.attach(&same).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    });
}

#[test]
fn the_mtu_is_that_of_the_default_route() {
    on_node(|node| async move {
        let _world = outside();
        sh("ip link set up0 mtu 1450");
        let net = Builtin::open(small("10.99.0.0/24"), node.store.clone()).await.unwrap();
        let pod = Netns::new();
        assert_eq!(net.attach(&request("a", &pod, vec![])).await.unwrap().mtu, Some(1450));
        assert!(pod.sh("ip link show eth0").contains("mtu 1450"));
    });
}

#[test]
fn a_limit_holds() {
    on_node(|node| async move {
        let net = node.builtin(small("10.99.0.0/24")).await;
        let pod = Netns::new();
        let mut limited = request("a", &pod, vec![]);
        limited.bandwidth = Bandwidth { ingress: Some(16_000_000), egress: None };
        net.attach(&limited).await.unwrap();
        let listener = pod.listen("10.99.0.2:80");
        let mut client = connect("10.99.0.2:80").unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let started = std::time::Instant::now();
        let reader = std::thread::spawn(move || std::io::copy(&mut server, &mut std::io::sink()).unwrap());
        std::io::Write::write_all(&mut client, &vec![0; 2_000_000]).unwrap();
        drop(client);
        assert_eq!(reader.join().unwrap(), 2_000_000);
        // 1 s at 2 MB/s; without a limit it takes a few milliseconds.
        assert!(started.elapsed() > std::time::Duration::from_millis(500), "{:?}", started.elapsed());
    });
}

/// A pod keeps its address, and its way out, when its range is taken out of the
/// configuration; nobody else gets that address.
#[test]
fn pods_of_a_former_range_live_on() {
    on_node(|node| async move {
        let world = outside();
        let (old, new) = (Netns::new(), Netns::new());
        node.builtin(small("10.99.0.0/24")).await.attach(&request("old", &old, vec![])).await.unwrap();
        let net = node.builtin(small("10.99.0.0/28")).await;
        net.reconcile(&live(&["old"])).await.unwrap();
        let got = net.attach(&request("new", &new, vec![])).await.unwrap();
        assert_eq!(got.addresses[0].to_string(), "10.99.0.3/28");
        let listener = world.listen("192.0.2.2:80");
        for pod in [&old, &new] {
            assert_eq!(exchange(&listener, pod.connect("192.0.2.2:80").unwrap()).ip().to_string(), "192.0.2.1");
        }
    });
}

/// The caller of an attach goes away; the detach that follows finds all of it.
#[test]
fn an_attach_whose_caller_went_away_is_detached_whole() {
    on_node(|node| async move {
        let net = node.builtin(small("10.99.0.0/24")).await;
        let pod = Netns::new();
        for n in 0..40_u64 {
            let request = request("a", &pod, vec![tcp(8080)]);
            let bound = std::time::Duration::from_micros(n * 100);
            let outcome = tokio::time::timeout(bound, net.attach(&request)).await;
            if let Ok(attached) = outcome {
                attached.unwrap();
            }
            net.detach("a").await.unwrap();
            assert_eq!(links(), ["longshore0"], "after {bound:?}");
            assert!(node.store.network_claims().await.unwrap().is_empty(), "after {bound:?}");
            assert!(!sh("nft list table inet longshore").contains("8080"), "after {bound:?}");
        }
    });
}

/// A process in a user namespace of its own, with a network namespace that belongs
/// to it.
struct Mapped(std::process::Child);

impl Mapped {
    fn new() -> Self {
        let mut command = std::process::Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "sh", "-c", "echo; exec sleep 300"]);
        let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut ready = [0; 1];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        Self(child)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_pod_with_a_user_namespace_is_attached_like_any_other() {
    on_node(|node| async move {
        let net = node.builtin(BuiltinConfig::default()).await;
        let mapped = Mapped::new();
        let path = std::path::PathBuf::from(format!("/proc/{}/ns/net", mapped.0.id()));
        let mut wanted = request_at("a", &path, vec![tcp(8080)]);
        wanted.bandwidth = Bandwidth { ingress: Some(80_000_000), egress: Some(80_000_000) };
        net.attach(&wanted).await.unwrap();
        let netns = [(sys::namespace::Kind::Net, path.as_path())];
        let listener = sys::namespace::inside(&netns, |_| Ok(std::net::TcpListener::bind("[::]:80").unwrap())).unwrap();
        exchange(&listener, connect("127.0.0.1:8080").unwrap());
        exchange(&listener, connect("[fd4c:6f6e:6773::2]:80").unwrap());
        assert!(interface_stats(&path).await.unwrap().iter().any(|s| s.name == "eth0" && s.rx_packets > 0));
        net.detach("a").await.unwrap();
    });
}
