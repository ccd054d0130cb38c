//! Ports of the node, from everywhere that a packet can come from.

mod support;

use longshore_network::{Builtin, BuiltinConfig, HostPorts, Net, Protocol};
use std::collections::BTreeSet;
use support::*;
use types::ErrorKind;

#[test]
fn a_host_port_is_reached_from_everywhere_in_both_families() {
    on_node(|node| async move {
        let world = outside();
        let net = node.builtin(BuiltinConfig::default()).await;
        let (a, b) = (Netns::new(), Netns::new());
        let got = net.attach(&request("a", &a, vec![tcp(8080)])).await.unwrap();
        net.attach(&request("b", &b, vec![])).await.unwrap();
        // Of both families.
        let listener = a.listen("[::]:80");
        for (node, gateway, outside) in [
            ("192.0.2.1:8080", "10.85.0.1:8080", "192.0.2.2"),
            ("[2001:db8::1]:8080", "[fd4c:6f6e:6773::1]:8080", "2001:db8::2"),
        ] {
            let from_world = exchange(&listener, world.connect(node).unwrap());
            assert_eq!(from_world.ip().to_canonical().to_string(), outside, "the world's address is kept");
            exchange(&listener, b.connect(node).unwrap());
            exchange(&listener, b.connect(gateway).unwrap());
            exchange(&listener, a.connect(node).unwrap());
            exchange(&listener, a.connect(gateway).unwrap());
            exchange(&listener, connect(node).unwrap());
            exchange(&listener, connect(gateway).unwrap());
            if outside.contains('.') {
                exchange(&listener, connect("127.0.0.1:8080").unwrap());
                exchange(&listener, connect("127.0.0.7:8080").unwrap());
            }
        }
        // Not to be had, and so refused at once.
        let refused = connect("[::1]:8080").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        // Other nodes' ports stay theirs.
        let listener = world.listen("192.0.2.2:8080");
        exchange(&listener, b.connect("192.0.2.2:8080").unwrap());

        net.detach("a").await.unwrap();
        assert_eq!(connect("127.0.0.1:8080").unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        assert_eq!(world.connect("192.0.2.1:8080").unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        assert!(!sh("nft list table inet longshore").contains(&v4(&got.addresses).to_string()));
    });
}

#[test]
fn udp_goes_there_and_back_and_moves_with_its_port() {
    on_node(|node| async move {
        let world = outside();
        let net = node.builtin(BuiltinConfig::default()).await;
        let (a, b) = (Netns::new(), Netns::new());
        let ports = vec![port(Protocol::Udp, None, 5353, 53)];
        // Sent before any pod has the port: the entry must not stick to the node.
        let early = world.udp("0.0.0.0:4000");
        let early6 = world.udp("[::]:4001");
        for _ in 0..2 {
            early.send_to(b"early", "192.0.2.1:5353").unwrap();
            early6.send_to(b"early", "[2001:db8::1]:5353").unwrap();
        }
        net.attach(&request("a", &a, ports.clone())).await.unwrap();
        let at_a = a.udp("[::]:53");
        // The refusals of the early packets are read off first.
        let mut word = [0; 8];
        early.set_read_timeout(Some(SHORT)).unwrap();
        while early.recv(&mut word).is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused) {}
        early.set_read_timeout(Some(LONG)).unwrap();
        exchange_udp(&at_a, &early, "192.0.2.1:5353");
        exchange_udp(&at_a, &early6, "[2001:db8::1]:5353");
        exchange_udp(&at_a, &udp("127.0.0.1:0"), "127.0.0.1:5353");
        exchange_udp(&at_a, &a.udp("0.0.0.0:0"), "192.0.2.1:5353");
        drop(at_a);
        net.detach("a").await.unwrap();
        net.attach(&request("b", &b, ports)).await.unwrap();
        let at_b = b.udp("[::]:53");
        exchange_udp(&at_b, &early, "192.0.2.1:5353");
        exchange_udp(&at_b, &early6, "[2001:db8::1]:5353");
        net.attach(&request("a", &a, vec![])).await.unwrap();
        exchange_udp(&at_b, &a.udp("0.0.0.0:0"), "192.0.2.1:5353");
    });
}

#[test]
fn a_host_ip_is_the_only_address_that_answers() {
    on_node(|node| async move {
        let world = outside();
        sh("ip addr add 192.0.2.9/24 dev up0");
        let net = node.builtin(BuiltinConfig::default()).await;
        let (a, b) = (Netns::new(), Netns::new());
        net.attach(&request("a", &a, vec![port(Protocol::Tcp, Some("192.0.2.1"), 8080, 80)])).await.unwrap();
        let ports = vec![
            port(Protocol::Tcp, Some("192.0.2.9"), 8080, 80),
            port(Protocol::Tcp, Some("127.0.0.1"), 8080, 80),
            port(Protocol::Tcp, Some("2001:db8::1"), 8080, 80),
            port(Protocol::Tcp, Some("8.8.8.8"), 8081, 80),
        ];
        net.attach(&request("b", &b, ports)).await.unwrap();
        let (at_a, at_b) = (a.listen("[::]:80"), b.listen("[::]:80"));
        exchange(&at_a, world.connect("192.0.2.1:8080").unwrap());
        exchange(&at_b, world.connect("192.0.2.9:8080").unwrap());
        exchange(&at_b, connect("127.0.0.1:8080").unwrap());
        exchange(&at_b, world.connect("[2001:db8::1]:8080").unwrap());
        exchange(&at_b, b.connect("[2001:db8::1]:8080").unwrap());
        assert!(connect("10.85.0.1:8080").is_err());
        assert!(connect("[fd4c:6f6e:6773::1]:8080").is_err());
        // An address that isn't the node's catches nobody's traffic.
        world.sh("ip addr add 8.8.8.8/32 dev lo");
        let real = world.listen("8.8.8.8:8081");
        exchange(&real, a.connect("8.8.8.8:8081").unwrap());
        exchange(&real, connect("8.8.8.8:8081").unwrap());
    });
}

#[test]
fn a_port_that_is_held_names_its_pod() {
    on_node(|node| async move {
        let net = node.builtin(BuiltinConfig::default()).await;
        let (a, b) = (Netns::new(), Netns::new());
        net.attach(&request("holder", &a, vec![tcp(8080), port(Protocol::Tcp, Some("192.0.2.1"), 8081, 80)]))
            .await
            .unwrap();
        for taken in [
            tcp(8080),
            port(Protocol::Tcp, Some("127.0.0.1"), 8080, 1),
            port(Protocol::Tcp, Some("::"), 8080, 1),
            tcp(8081),
            port(Protocol::Tcp, Some("0.0.0.0"), 8081, 1),
        ] {
            let e = net.attach(&request("b", &b, vec![tcp(7000), taken])).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::AlreadyExists, "{e}");
            assert!(e.to_string().contains("held by pod holder") && e.to_string().contains("/tcp"), "{e}");
        }
        let claims = node.store.network_claims().await.unwrap();
        assert_eq!(claims.len(), 1, "the other pod holds nothing: {claims:?}");
        let free = vec![
            port(Protocol::Udp, None, 8080, 80),
            port(Protocol::Tcp, Some("192.0.2.2"), 8081, 80),
            port(Protocol::Tcp, Some("::"), 8081, 80),
            port(Protocol::Sctp, None, 8080, 80),
        ];
        net.attach(&request("b", &b, free)).await.unwrap();
        // This kernel may lack SCTP: that the rule is there must do.
        let table = sh("nft list table inet longshore");
        assert!(table.contains("sctp . 8080 : 10.85.0.") && table.contains("udp . 8080 : "), "{table}");
        assert!(table.contains("tcp . 192.0.2.2 . 8081"), "{table}");
    });
}

/// As `portmap` would: a pod on a bridge that is not ours.
#[test]
fn pods_of_other_networks_can_have_ports_too() {
    on_node(|node| async move {
        let world = outside();
        let pods: Vec<Netns> = (0..2).map(|_| Netns::new()).collect();
        sh("ip link add cni0 type bridge; ip addr add 10.44.0.1/24 dev cni0; ip addr add fd44::1/64 dev cni0 nodad
            ip link set cni0 up; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        for (n, pod) in pods.iter().enumerate() {
            let address = n + 2;
            sh(&format!(
                "ip link add v{n} type veth peer name eth0 netns {}; ip link set v{n} master cni0 up; ip link set v{n} type bridge_slave hairpin on",
                pod.path().display()
            ));
            pod.sh(&format!(
                "ip addr add 10.44.0.{address}/24 dev eth0; ip addr add fd44::{address}/64 dev eth0 nodad
                 ip link set eth0 up; ip route add default via 10.44.0.1; ip route add default via fd44::1"
            ));
        }
        let ports = HostPorts::open("longshore", node.store.clone()).await.unwrap();
        let addresses: Vec<Net> = ["10.44.0.2/24", "fd44::2/64"].map(|n| n.parse().unwrap()).to_vec();
        ports.add("a", &addresses, &[tcp(8080)]).await.unwrap();
        let listener = pods[0].listen("[::]:80");
        for client in [
            world.connect("192.0.2.1:8080"),
            world.connect("[2001:db8::1]:8080"),
            pods[0].connect("10.44.0.1:8080"),
            pods[0].connect("[fd44::1]:8080"),
            pods[1].connect("192.0.2.1:8080"),
            pods[1].connect("[fd44::1]:8080"),
            connect("127.0.0.1:8080"),
            connect("10.44.0.1:8080"),
        ] {
            exchange(&listener, client.unwrap());
        }
        // Beside the built-in network, in the same table.
        let config = BuiltinConfig { ranges: vec!["10.99.0.0/24".parse().unwrap()], ..BuiltinConfig::default() };
        let net = Builtin::with_host_ports(config, node.store.clone(), ports.clone()).unwrap();
        let own = Netns::new();
        net.attach(&request("own", &own, vec![tcp(8081)])).await.unwrap();
        let at_own = own.listen("0.0.0.0:80");
        exchange(&at_own, pods[1].connect("10.44.0.1:8081").unwrap());
        exchange(&listener, own.connect("10.99.0.1:8080").unwrap());
        let removed = net.reconcile(&BTreeSet::from(["own".to_owned()])).await.unwrap();
        assert_eq!(removed, ["host ports of pod a"]);
        assert!(connect("10.44.0.1:8080").is_err());
        exchange(&at_own, connect("127.0.0.1:8081").unwrap());
        net.detach("own").await.unwrap();
        let localnet = || sh("cat /proc/sys/net/ipv4/conf/cni0/route_localnet");
        assert_eq!(localnet(), "1\n");
        net.release().await.unwrap();
        assert_eq!(sh("nft list tables"), "");
        assert_eq!(localnet(), "0\n", "CVE-2020-8558: what kept its neighbours out of 127/8 is gone");
    });
}

/// CVE-2020-8558: the table keeps the bridge's neighbours out of 127/8, whatever else it holds.
#[test]
fn without_masquerade_and_host_ports_the_table_stands_with_the_bridge() {
    on_node(|node| async move {
        let config = BuiltinConfig { masquerade: false, ..BuiltinConfig::default() };
        let net = node.builtin(config.clone()).await;
        let pod = Netns::new();
        net.attach(&request("a", &pod, vec![])).await.unwrap();
        // As the next daemon begins.
        let net = {
            drop(net);
            node.builtin(config).await
        };
        assert!(net.reconcile(&BTreeSet::from(["a".to_owned()])).await.unwrap().is_empty());
        assert!(sh("nft list table inet longshore").contains("127.0.0.0/8"));
        net.detach("a").await.unwrap();
        net.release().await.unwrap();
        assert_eq!(sh("nft list tables"), "");
    });
}

#[test]
fn many_ports_of_one_pod_fit_into_one_transaction() {
    on_node(|node| async move {
        let net = node.builtin(BuiltinConfig::default()).await;
        let (a, b) = (Netns::new(), Netns::new());
        let ports: Vec<_> = (0..3000).map(|n| port(Protocol::Tcp, None, 10_000 + n, 80)).collect();
        net.attach(&request("a", &a, ports)).await.unwrap();
        let listener = a.listen("0.0.0.0:80");
        exchange(&listener, connect("127.0.0.1:12999").unwrap());
        // The whole table anew, with all of them.
        sh("nft flush ruleset");
        net.attach(&request("b", &b, vec![tcp(9999)])).await.unwrap();
        exchange(&listener, connect("127.0.0.1:10000").unwrap());
        net.detach("a").await.unwrap();
        assert!(!sh("nft list table inet longshore").contains("12999"));
    });
}

#[test]
fn a_table_that_is_flushed_comes_back_by_itself() {
    on_node(|node| async move {
        let net = node.builtin(BuiltinConfig::default()).await;
        let ports = net.host_ports().clone();
        let keeper = tokio::spawn(async move { ports.keep().await });
        let a = Netns::new();
        net.attach(&request("a", &a, vec![tcp(8080)])).await.unwrap();
        let before = sh("nft list table inet longshore");
        for _ in 0..3 {
            sh("nft flush ruleset; nft add table inet other");
            let back = async {
                while !sh("nft list tables").contains("longshore") {
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(LONG, back).await.unwrap();
            assert_eq!(sh("nft list table inet longshore"), before);
        }
        // Parts of it come back too, whoever took them away and left the rest.
        for part in ["flush chain inet longshore hostports", "flush map inet longshore ports4"] {
            sh(&format!("nft {part}"));
            let back = async {
                while sh("nft list table inet longshore") != before {
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(LONG, back).await.unwrap();
        }
        // Its own changes are no reason, which would bring a removed table back.
        net.detach("a").await.unwrap();
        net.release().await.unwrap();
        tokio::time::sleep(SHORT).await;
        assert_eq!(sh("nft list tables"), "table inet other\n");
        keeper.abort();
    });
}
