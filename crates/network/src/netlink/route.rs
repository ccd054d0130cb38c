//! Links, addresses and routes (`linux/rtnetlink.h`, `linux/if_link.h`).

use super::{Batch, Refused, Socket, Writer, attribute, attributes, flags, text_of, u32_at, u64_at};
use crate::{Mac, Net};
use ::types::{Result, ResultExt};
use rustix::fd::{AsRawFd, BorrowedFd};
use std::net::IpAddr;

const NEW_LINK: u16 = 16;
const DEL_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const GET_ROUTE: u16 = 26;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_STATS64: u16 = 23;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_NET_NS_FD: u16 = 28;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const INFO_SLAVE_KIND: u16 = 4;
const INFO_SLAVE_DATA: u16 = 5;
const VETH_PEER: u16 = 1;
const BRIDGE_PORT_HAIRPIN: u16 = 4;
const INET6_ADDR_GEN_MODE: u16 = 8;
/// `IN6_ADDR_GEN_MODE_NONE`
const NO_LINK_LOCAL: u8 = 1;
const UP: u32 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const NODAD: u32 = 2;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
/// Table main, set by an administrator, everywhere, to a host or net.
const MAIN_STATIC: [u8; 4] = [254, 4, 0, 1];

pub(crate) fn family(address: IpAddr) -> u8 {
    // AF_INET, AF_INET6
    if address.is_ipv4() { 2 } else { 10 }
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// A link as it was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) up: bool,
    pub(crate) mtu: u32,
    pub(crate) mac: Option<Mac>,
    pub(crate) master: u32,
    pub(crate) alias: Option<String>,
    pub(crate) stats: Option<Counters>,
}

/// The first eight counters of `struct rtnl_link_stats64`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) rx_packets: u64,
    pub(crate) tx_packets: u64,
    pub(crate) rx_bytes: u64,
    pub(crate) tx_bytes: u64,
    pub(crate) rx_errors: u64,
    pub(crate) tx_errors: u64,
    pub(crate) rx_dropped: u64,
    pub(crate) tx_dropped: u64,
}

/// `struct ifinfomsg`
fn link_header(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut h = [0; 16];
    h[4..8].copy_from_slice(&index.to_ne_bytes());
    h[8..12].copy_from_slice(&flags.to_ne_bytes());
    h[12..].copy_from_slice(&change.to_ne_bytes());
    h
}

fn link_of(body: &[u8]) -> Option<Link> {
    let mut link = Link { index: u32_at(body, 4)?, up: u32_at(body, 8)? & UP != 0, ..Link::default() };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            IFLA_IFNAME => link.name = text_of(value),
            IFLA_MTU => link.mtu = u32_at(value, 0)?,
            IFLA_MASTER => link.master = u32_at(value, 0)?,
            IFLA_ADDRESS => link.mac = value.try_into().ok().map(Mac),
            IFLA_IFALIAS => link.alias = Some(text_of(value)),
            IFLA_LINKINFO => link.kind = attribute(value, INFO_KIND).map(text_of).unwrap_or_default(),
            IFLA_STATS64 => link.stats = counters_of(value),
            _ => {}
        }
    }
    Some(link)
}

fn counters_of(value: &[u8]) -> Option<Counters> {
    let at = |n: usize| u64_at(value, n * 8);
    Some(Counters {
        rx_packets: at(0)?,
        tx_packets: at(1)?,
        rx_bytes: at(2)?,
        tx_bytes: at(3)?,
        rx_errors: at(4)?,
        tx_errors: at(5)?,
        rx_dropped: at(6)?,
        tx_dropped: at(7)?,
    })
}

/// The link of this name; `None` where there is none.
pub(crate) fn link(socket: &Socket, name: &str) -> Result<Option<Link>> {
    let mut found = None;
    let mut question = Batch::default();
    question.push(format!("look for the interface {name}"), GET_LINK, flags::ACK, |w| {
        w.raw(&link_header(0, 0, 0));
        w.text(IFLA_IFNAME, name);
    });
    match socket.ask(&question, |_, body| found = link_of(body))? {
        Err(e) if e.errno != rustix::io::Errno::NODEV => Err(e.into()),
        _ => Ok(found),
    }
}

/// Every link.
pub(crate) fn links(socket: &Socket) -> Result<Vec<Link>> {
    let mut found = Vec::new();
    let mut question = Batch::default();
    question.push("list the interfaces", GET_LINK, flags::DUMP, |w| w.raw(&link_header(0, 0, 0)));
    socket.ask(&question, |_, body| found.extend(link_of(body)))??;
    Ok(found)
}

/// A bridge, up. One that is there is left as it is and is no error (`EEXIST`
/// comes back to who asked for `CREATE` alone).
pub(crate) fn add_bridge(batch: &mut Batch, name: &str, mac: Mac, mtu: Option<u32>) {
    batch.push(format!("make the bridge {name}"), NEW_LINK, flags::ACK | flags::CREATE | flags::EXCL, |w| {
        w.raw(&link_header(0, UP, UP));
        w.text(IFLA_IFNAME, name);
        w.attr(IFLA_ADDRESS, &mac.0);
        if let Some(mtu) = mtu {
            w.u32(IFLA_MTU, mtu);
        }
        w.nest(IFLA_LINKINFO, |w| w.text(INFO_KIND, "bridge"));
    });
}

/// One end in the node, plugged into a bridge; the other, under its final name, in
/// a pod.
#[derive(Debug)]
pub(crate) struct Veth<'a> {
    pub(crate) name: &'a str,
    /// Shown by `ip link`, for whoever wonders whose it is.
    pub(crate) alias: &'a str,
    pub(crate) bridge: u32,
    pub(crate) mtu: u32,
    pub(crate) peer: &'a str,
    pub(crate) peer_mac: Mac,
    pub(crate) netns: BorrowedFd<'a>,
}

/// Makes the pair and plugs the node's end in, up. Hairpin mode, for packets of a
/// pod to itself where bridged packets pass netfilter (br_netfilter); no link-local
/// address, which a bridge's port has no use for.
pub(crate) fn add_veth(batch: &mut Batch, veth: &Veth<'_>) {
    let name = veth.name;
    batch.push(
        format!("make the veth pair {name}, {}", veth.peer),
        NEW_LINK,
        flags::ACK | flags::CREATE | flags::EXCL,
        |w| {
            w.raw(&link_header(0, 0, 0));
            w.text(IFLA_IFNAME, name);
            w.u32(IFLA_MTU, veth.mtu);
            w.nest(IFLA_LINKINFO, |w| {
                w.text(INFO_KIND, "veth");
                w.nest(INFO_DATA, |w| w.nest(VETH_PEER, |w| peer(w, veth)));
            });
        },
    );
    batch.push(format!("plug {name} into the bridge"), NEW_LINK, flags::ACK, |w| {
        w.raw(&link_header(0, UP, UP));
        w.text(IFLA_IFNAME, name);
        w.u32(IFLA_MASTER, veth.bridge);
        w.text(IFLA_IFALIAS, veth.alias);
        w.nest(IFLA_AF_SPEC, |w| w.nest(u16::from(AF_INET6), |w| w.attr(INET6_ADDR_GEN_MODE, &[NO_LINK_LOCAL])));
    });
    batch.push(format!("set {name} to hairpin mode"), NEW_LINK, flags::ACK, |w| {
        w.raw(&link_header(0, 0, 0));
        w.text(IFLA_IFNAME, name);
        w.nest(IFLA_LINKINFO, |w| {
            w.text(INFO_SLAVE_KIND, "bridge");
            w.nest(INFO_SLAVE_DATA, |w| w.attr(BRIDGE_PORT_HAIRPIN, &[1]));
        });
    });
}

const AF_INET6: u8 = 10;

fn peer(w: &mut Writer, veth: &Veth<'_>) {
    w.raw(&link_header(0, 0, 0));
    w.text(IFLA_IFNAME, veth.peer);
    w.u32(IFLA_MTU, veth.mtu);
    w.attr(IFLA_ADDRESS, &veth.peer_mac.0);
    w.attr(IFLA_NET_NS_FD, &veth.netns.as_raw_fd().to_ne_bytes());
}

/// Brings a link up.
pub(crate) fn set_up(batch: &mut Batch, index: u32, name: &str) {
    batch.push(format!("bring {name} up"), NEW_LINK, flags::ACK, |w| w.raw(&link_header(index, UP, UP)));
}

/// Removes a link, and with a veth its peer.
pub(crate) fn del_link(batch: &mut Batch, name: &str) {
    batch.push(format!("remove the interface {name}"), DEL_LINK, flags::ACK, |w| {
        w.raw(&link_header(0, 0, 0));
        w.text(IFLA_IFNAME, name);
    });
}

/// Gives a link an address, usable at once (IPv6's are not tried out first).
pub(crate) fn add_address(batch: &mut Batch, index: u32, name: &str, net: Net) {
    batch.push(format!("give {name} the address {net}"), NEW_ADDRESS, flags::ACK | flags::CREATE | flags::EXCL, |w| {
        let [a, b, c, d] = index.to_ne_bytes();
        w.raw(&[family(net.address), net.prefix, 0, 0, a, b, c, d]);
        let address = octets(net.address);
        w.attr(IFA_LOCAL, &address);
        w.attr(IFA_ADDRESS, &address);
        if net.address.is_ipv6() {
            w.u32(IFA_FLAGS, NODAD);
        }
    });
}

/// A default route.
pub(crate) fn add_default_route(batch: &mut Batch, index: u32, gateway: IpAddr) {
    let what = format!("route all traffic through {gateway}");
    batch.push(what, NEW_ROUTE, flags::ACK | flags::CREATE | flags::EXCL, |w| {
        let [table, protocol, scope, kind] = MAIN_STATIC;
        w.raw(&[family(gateway), 0, 0, 0, table, protocol, scope, kind, 0, 0, 0, 0]);
        w.attr(RTA_GATEWAY, &octets(gateway));
        w.u32(RTA_OIF, index);
    });
}

/// Index of the interface that packets to `address` leave by; `None` where there
/// is no route. Nothing is sent.
pub(crate) fn interface_towards(socket: &Socket, address: IpAddr) -> Result<Option<u32>> {
    let mut question = Batch::default();
    question.push(format!("look up the route to {address}"), GET_ROUTE, flags::ACK, |w| {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        w.raw(&[family(address), bits, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        w.attr(RTA_DST, &octets(address));
    });
    let mut index = None;
    // A refusal is the answer that there is none.
    let _: Result<(), Refused> = socket.ask(&question, |kind, body| {
        if kind == NEW_ROUTE {
            index = body.get(12..).and_then(|b| attribute(b, RTA_OIF)).and_then(|v| u32_at(v, 0));
        }
    })?;
    Ok(index)
}

/// The networks that are routed, but for default routes: each with the index of
/// the interface that leads there.
pub(crate) fn routed_networks(socket: &Socket) -> Result<Vec<(Net, u32)>> {
    let mut found = Vec::new();
    let mut question = Batch::default();
    question.push("list the routes", GET_ROUTE, flags::DUMP, |w| w.raw(&[0; 12]));
    socket.ask(&question, |_, body| found.extend(network_of(body)))??;
    Ok(found)
}

fn network_of(body: &[u8]) -> Option<(Net, u32)> {
    let (prefix, table) = (*body.get(1)?, *body.get(4)?);
    let attributes = body.get(12..)?;
    let address = match attribute(attributes, RTA_DST)? {
        v4 if v4.len() == 4 => IpAddr::from(<[u8; 4]>::try_from(v4).ok()?),
        v6 => IpAddr::from(<[u8; 16]>::try_from(v6).ok()?),
    };
    let index = u32_at(attribute(attributes, RTA_OIF)?, 0)?;
    (table == MAIN_STATIC[0]).then_some((Net { address, prefix }, index))
}

/// Name and length of an interface's index, from whichever socket's namespace.
pub(crate) fn link_at(socket: &Socket, index: u32) -> Result<Option<Link>> {
    let mut found = None;
    let mut question = Batch::default();
    question.push(format!("look for interface {index}"), GET_LINK, flags::ACK, |w| w.raw(&link_header(index, 0, 0)));
    match socket.ask(&question, |_, body| found = link_of(body))? {
        Err(e) if e.errno != rustix::io::Errno::NODEV => Err(e.into()),
        _ => Ok(found),
    }
}

/// Writes a sysctl of an interface in the calling thread's network namespace:
/// `family` is ipv4 or ipv6. False where the kernel hasn't got it.
pub(crate) fn set_conf(family: &str, interface: &str, key: &str, value: &str) -> Result<bool> {
    write_proc(&format!("/proc/sys/net/{family}/conf/{interface}/{key}"), value)
}

/// Writes a file of `/proc/sys/net`, unless it says so already. False where there
/// is none.
pub(crate) fn write_proc(path: &str, value: &str) -> Result<bool> {
    let what = || format!("write {value:?} to {path}");
    match std::fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Ok(now) if now.trim() == value => return Ok(true),
        _ => {}
    }
    std::fs::write(path, value).context(what)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lo_is_found_with_its_counters() {
        let socket = Socket::open(sys::netlink::Protocol::Route).unwrap();
        let lo = link(&socket, "lo").unwrap().unwrap();
        assert_eq!((lo.index, lo.name.as_str()), (1, "lo"));
        assert!(lo.stats.is_some());
        assert_eq!(link(&socket, "no-such-if").unwrap(), None);
        assert!(links(&socket).unwrap().iter().any(|l| l.name == "lo"));
        assert_eq!(interface_towards(&socket, "127.0.0.1".parse().unwrap()).unwrap(), Some(1));
    }
}
