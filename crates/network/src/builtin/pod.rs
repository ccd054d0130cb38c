//! A pod's side: a veth pair whose one end is made in the pod at once.

use super::node::Node;
use crate::netlink::{Batch, Socket, qdisc, route};
use crate::{Bandwidth, INTERFACE, Mac, Net};
use ::types::{Error, Result};
use rustix::fd::AsFd;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use sys::namespace::Kind;

/// What the names of the node's ends begin with.
pub(crate) const PREFIX: &str = "lsh";
/// What their aliases begin with; the pod's id follows.
pub(crate) const ALIAS: &str = "longshore pod ";
/// An interface's name has 15 bytes.
const DIGITS: usize = 12;
/// Ids of pods have more digits; whatever is shorter is hashed.
const LONG_ID: usize = 32;

/// All that one pod's link needs.
#[derive(Debug)]
pub(crate) struct Plug {
    pub(crate) pod_id: String,
    pub(crate) netns: PathBuf,
    pub(crate) mac: Mac,
    pub(crate) addresses: Vec<Net>,
    pub(crate) gateways: Vec<IpAddr>,
    pub(crate) bandwidth: Bandwidth,
}

/// The node's end; a function of the pod's id alone.
pub(crate) fn host_interface(pod_id: &str) -> String {
    let digits = pod_id.get(..DIGITS).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
    match digits.filter(|_| pod_id.len() >= LONG_ID) {
        Some(digits) => format!("{PREFIX}{digits}"),
        None => format!("{PREFIX}{:012x}", fnv(pod_id) & 0xffff_ffff_ffff),
    }
}

/// FNV-1a: stable over releases, which the standard library's hashes aren't.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

impl Plug {
    /// Makes the link and everything in the pod's namespace. What is left after an
    /// error goes with [`unplug`].
    ///
    /// # Errors
    /// Names the step; `NotFound` or `FailedPrecondition` for a namespace that isn't
    /// one, `AlreadyExists` where the pod has such an interface.
    pub(crate) fn make(&self, node: Node) -> Result<()> {
        let what = || format!("attach pod {} to the network", self.pod_id);
        self.make_link(node).map_err(|e| e.within(what()))?;
        sys::namespace::inside(&[(Kind::Net, &self.netns)], |_| self.furnish()).map_err(|e| e.within(what()))
    }

    fn make_link(&self, node: Node) -> Result<()> {
        sys::namespace::inode(&self.netns)?;
        let netns = sys::namespace::open(&self.netns)?;
        let socket = Socket::open(sys::netlink::Protocol::Route)?;
        let name = host_interface(&self.pod_id);
        let mut batch = Batch::default();
        let veth = route::Veth {
            name: &name,
            alias: &format!("{ALIAS}{}", self.pod_id),
            bridge: node.bridge,
            mtu: node.mtu,
            peer: INTERFACE,
            peer_mac: self.mac,
            netns: netns.as_fd(),
        };
        route::add_veth(&mut batch, &veth);
        socket.run(&batch)?;
        match self.bandwidth.ingress {
            Some(bits) => limit(&socket, &name, bits),
            None => Ok(()),
        }
    }

    /// In the pod's namespace, on a thread that ends there.
    fn furnish(&self) -> Result<()> {
        let socket = Socket::open(sys::netlink::Protocol::Route)?;
        let link = route::link(&socket, INTERFACE)?
            .ok_or_else(|| Error::precondition(format!("{INTERFACE} has just been removed from the pod")))?;
        if self.addresses.iter().any(|n| n.address.is_ipv6()) {
            route::set_conf("ipv6", INTERFACE, "disable_ipv6", "0")?;
            // Usable at once.
            route::set_conf("ipv6", INTERFACE, "accept_dad", "0")?;
        }
        // CVE-2020-10749: no neighbour tells the pod its routes.
        route::set_conf("ipv6", INTERFACE, "accept_ra", "0")?;
        let mut batch = Batch::default();
        route::set_up(&mut batch, link.index, INTERFACE);
        for net in &self.addresses {
            route::add_address(&mut batch, link.index, INTERFACE, *net);
        }
        for gateway in &self.gateways {
            route::add_default_route(&mut batch, link.index, *gateway);
        }
        if let Some(bits) = self.bandwidth.egress {
            qdisc::limit(&mut batch, link.index, INTERFACE, bits);
        }
        socket.run(&batch)
    }
}

fn limit(socket: &Socket, name: &str, bits: u64) -> Result<()> {
    let gone = || Error::precondition(format!("{name} has just been removed"));
    let link = route::link(socket, name)?.ok_or_else(gone)?;
    let mut batch = Batch::default();
    qdisc::limit(&mut batch, link.index, name, bits);
    socket.run(&batch)
}

/// Removes an interface of the node, and with it the pod's end; none is success.
pub(crate) fn unplug(name: &str) -> Result<()> {
    let socket = Socket::open(sys::netlink::Protocol::Route)?;
    let mut batch = Batch::default();
    route::del_link(&mut batch, name);
    match socket.run(&batch) {
        Err(e) if !e.is_not_found() => Err(e),
        _ => Ok(()),
    }
}

/// Counters of an interface, since it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InterfaceStats {
    /// Its name in the pod.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Receptions that failed.
    pub rx_errors: u64,
    /// Packets received and dropped.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Transmissions that failed.
    pub tx_errors: u64,
    /// Packets to be sent and dropped.
    pub tx_dropped: u64,
}

pub(crate) fn stats(netns: &Path) -> Result<Vec<InterfaceStats>> {
    let links =
        sys::namespace::inside(&[(Kind::Net, netns)], |_| route::links(&Socket::open(sys::netlink::Protocol::Route)?))?;
    let stats = |l: route::Link| {
        let c = l.stats?;
        Some(InterfaceStats {
            name: l.name,
            rx_bytes: c.rx_bytes,
            rx_packets: c.rx_packets,
            rx_errors: c.rx_errors,
            rx_dropped: c.rx_dropped,
            tx_bytes: c.tx_bytes,
            tx_packets: c.tx_packets,
            tx_errors: c.tx_errors,
            tx_dropped: c.tx_dropped,
        })
    };
    Ok(links.into_iter().filter_map(stats).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_follow_from_the_id() {
        let id = "0123456789abcdef".repeat(4);
        assert_eq!(host_interface(&id), "lsh0123456789ab");
        let short = host_interface("pod-a");
        assert_eq!(short.len(), 15);
        assert_eq!(short, host_interface("pod-a"));
        assert_ne!(short, host_interface("pod-b"));
    }
}
