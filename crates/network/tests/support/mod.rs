//! A node of its own for each test: a network namespace that only the test's thread,
//! and what it starts, is in. All of it ends with the descriptors that hold it.

#![allow(dead_code, clippy::unwrap_used)]

use longshore_network::{AttachRequest, Bandwidth, Builtin, BuiltinConfig, Net, PortMapping, Protocol};
use std::future::Future;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use store::Store;
use sys::namespace::{self, Kind, Wanted};

/// How long what must come may take.
pub const LONG: Duration = Duration::from_secs(20);
/// How long to wait for what must not come.
pub const SHORT: Duration = Duration::from_millis(500);

pub struct Node {
    /// Goes when the test has ended.
    pub dir: PathBuf,
    pub store: Store,
}

/// Runs a test on a node of its own.
pub fn on_node<F: Future<Output = ()>>(test: impl FnOnce(Node) -> F + Send) {
    namespace::on_own_thread("node", |thread| {
        thread.unshare(&[Kind::Net])?;
        sys::link::set_up("lo")?;
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(Node { dir: dir.path().to_owned(), store: store.clone() }));
        store.close();
        Ok(())
    })
    .unwrap();
}

impl Node {
    pub async fn builtin(&self, config: BuiltinConfig) -> Builtin {
        Builtin::open(config, self.store.clone()).await.unwrap()
    }
}

/// Namespaces are held by a descriptor, and so need no mount.
pub struct Netns {
    fd: OwnedFd,
}

impl Netns {
    pub fn new() -> Self {
        let wanted = Wanted { net: true, ..Wanted::default() };
        let fd = namespace::make(&wanted, &mut |_| {}, |links| namespace::open(&links.join("net"))).unwrap();
        Self { fd }
    }

    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd()).into()
    }

    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        namespace::inside(&[(Kind::Net, &self.path())], |_| Ok(work())).unwrap()
    }

    pub fn listen(&self, at: &str) -> TcpListener {
        self.run(|| TcpListener::bind(at).unwrap())
    }

    pub fn udp(&self, at: &str) -> UdpSocket {
        self.run(|| udp(at))
    }

    pub fn connect(&self, to: &str) -> std::io::Result<TcpStream> {
        self.run(|| connect(to))
    }

    pub fn sh(&self, script: &str) -> String {
        self.run(|| sh(script))
    }
}

pub fn udp(at: &str) -> UdpSocket {
    let socket = UdpSocket::bind(at).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket
}

pub fn connect(to: &str) -> std::io::Result<TcpStream> {
    connect_within(to, LONG)
}

pub fn connect_within(to: &str, bound: Duration) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to.parse().unwrap(), bound)?;
    stream.set_read_timeout(Some(LONG))?;
    Ok(stream)
}

/// Sends a word each way over a connection that `listener` has got, and returns the
/// peer as the server sees it.
pub fn exchange(listener: &TcpListener, mut client: TcpStream) -> SocketAddr {
    let (mut server, peer) = listener.accept().unwrap();
    server.set_read_timeout(Some(LONG)).unwrap();
    let mut word = [0; 4];
    client.write_all(b"ping").unwrap();
    server.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"ping");
    server.write_all(b"pong").unwrap();
    client.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"pong");
    peer
}

/// The same in datagrams.
pub fn exchange_udp(server: &UdpSocket, client: &UdpSocket, to: &str) -> SocketAddr {
    let mut word = [0; 16];
    client.send_to(b"ping", to).unwrap();
    let (n, peer) = server.recv_from(&mut word).unwrap();
    assert_eq!(&word[..n], b"ping");
    server.send_to(b"pong", peer).unwrap();
    let n = client.recv(&mut word).unwrap();
    assert_eq!(&word[..n], b"pong");
    peer
}

/// Runs a script in the calling thread's namespace and returns what it said.
pub fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn request(pod_id: &str, netns: &Netns, ports: Vec<PortMapping>) -> AttachRequest {
    request_at(pod_id, &netns.path(), ports)
}

pub fn request_at(pod_id: &str, netns: &Path, ports: Vec<PortMapping>) -> AttachRequest {
    AttachRequest {
        pod_id: pod_id.into(),
        name: pod_id.into(),
        namespace: "test".into(),
        uid: "uid".into(),
        netns: netns.into(),
        ports,
        static_ips: Vec::new(),
        mac: None,
        bandwidth: Bandwidth::default(),
        dns: None,
        cgroup: String::new(),
        device_id: None,
        annotations: Default::default(),
    }
}

pub fn port(protocol: Protocol, host_ip: Option<&str>, host_port: u16, container_port: u16) -> PortMapping {
    PortMapping { protocol, container_port, host_port, host_ip: host_ip.map(|h| h.parse().unwrap()) }
}

pub fn tcp(host_port: u16) -> PortMapping {
    port(Protocol::Tcp, None, host_port, 80)
}

/// A host beyond the node: 192.0.2.2 and 2001:db8::2, where the node is .1 and ::1.
pub fn outside() -> Netns {
    let other = Netns::new();
    let path = other.path();
    sh(&format!(
        "ip link add up0 type veth peer name out0 netns {}
         ip addr add 192.0.2.1/24 dev up0
         ip addr add 2001:db8::1/64 dev up0 nodad
         ip link set up0 up
         ip route add default via 192.0.2.2
         ip route add default via 2001:db8::2",
        path.display()
    ));
    other.sh("ip addr add 192.0.2.2/24 dev out0
         ip addr add 2001:db8::2/64 dev out0 nodad
         ip link set out0 up");
    other
}

pub fn v4(addresses: &[Net]) -> IpAddr {
    addresses.iter().find(|n| n.address.is_ipv4()).unwrap().address
}

pub fn v6(addresses: &[Net]) -> IpAddr {
    addresses.iter().find(|n| n.address.is_ipv6()).unwrap().address
}
