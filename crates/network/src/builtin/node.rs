//! The node's side: the bridge, its addresses, forwarding.

use super::BuiltinConfig;
use crate::netlink::{Batch, Socket, route};
use crate::{IpRange, Mac};
use ::types::{Error, Result};
use std::net::IpAddr;

/// What an interface has where nothing says otherwise.
const USUAL_MTU: u32 = 1500;
/// Addresses of no host, whose route is the default one (RFC 5737, RFC 3849).
const ANYWHERE: [&str; 2] = ["198.51.100.1", "2001:db8::1"];

/// The bridge that stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Node {
    /// Its index.
    pub(crate) bridge: u32,
    /// Of the pods' interfaces.
    pub(crate) mtu: u32,
}

/// Makes what is missing of the bridge, its addresses and the node's settings.
///
/// # Errors
/// `FailedPrecondition` where another kind of interface has the bridge's name, or
/// the kernel lacks IPv6 for an IPv6 range.
pub(crate) fn ensure(config: &BuiltinConfig) -> Result<Node> {
    let socket = Socket::open(sys::netlink::Protocol::Route)?;
    let name = &config.bridge;
    let mtu = match config.mtu {
        Some(mtu) => mtu,
        None => mtu_of_default_route(&socket)?,
    };
    if route::link(&socket, name)?.is_none() {
        warn_of_overlaps(&socket, &config.ranges)?;
        let mut batch = Batch::default();
        route::add_bridge(&mut batch, name, bridge_mac(config), config.mtu);
        socket.run(&batch)?;
    }
    let bridge = match route::link(&socket, name)? {
        Some(link) if link.kind == "bridge" => link,
        Some(link) => {
            let what = format!("the interface {name} is no bridge but of kind {:?}", link.kind);
            return Err(Error::precondition(what).hint("configure another name for the bridge"));
        }
        None => return Err(Error::precondition(format!("the bridge {name} has just been removed"))),
    };
    settings(config)?;
    let mut batch = Batch::default();
    if !bridge.up {
        route::set_up(&mut batch, bridge.index, name);
    }
    for range in &config.ranges {
        route::add_address(&mut batch, bridge.index, name, range.gateway());
    }
    // An address that is there already is as wanted.
    match socket.carry_out(&batch)?.into_iter().find(|e| e.errno != rustix::io::Errno::EXIST) {
        Some(e) => Err(e.into()),
        None => Ok(Node { bridge: bridge.index, mtu }),
    }
}

/// Whether the bridge stands as it did.
pub(crate) fn stands(config: &BuiltinConfig, node: Node) -> Result<bool> {
    let socket = Socket::open(sys::netlink::Protocol::Route)?;
    Ok(route::link(&socket, &config.bridge)?.is_some_and(|l| l.index == node.bridge && l.up))
}

/// Whether a pod's link is up and plugged into the bridge.
///
/// # Errors
/// `FailedPrecondition`, naming what is amiss.
pub(crate) fn check_link(config: &BuiltinConfig, name: &str) -> Result<()> {
    let socket = Socket::open(sys::netlink::Protocol::Route)?;
    let Some(link) = route::link(&socket, name)? else {
        return Err(Error::precondition(format!("its interface {name} is gone")).hint("the pod has to be made anew"));
    };
    let bridge = route::link(&socket, &config.bridge)?.map_or(0, |l| l.index);
    if !link.up {
        return Err(Error::precondition(format!("its interface {name} is down")).hint(format!("ip link set {name} up")));
    }
    if bridge == 0 || link.master != bridge {
        let hint = format!("ip link set {name} master {}", config.bridge);
        return Err(
            Error::precondition(format!("its interface {name} is not plugged into {}", config.bridge)).hint(hint)
        );
    }
    Ok(())
}

/// Removes the bridge, unless an interface is plugged into it. True when it is gone.
pub(crate) fn remove_bridge(name: &str) -> Result<bool> {
    let socket = Socket::open(sys::netlink::Protocol::Route)?;
    let all = route::links(&socket)?;
    let Some(bridge) = all.iter().find(|l| l.name == name && l.kind == "bridge") else { return Ok(true) };
    if all.iter().any(|l| l.master == bridge.index) {
        return Ok(false);
    }
    let mut batch = Batch::default();
    route::del_link(&mut batch, name);
    socket.run(&batch)?;
    Ok(true)
}

/// Names and aliases of the interfaces plugged into the bridge.
pub(crate) fn plugged(name: &str) -> Result<Vec<(String, Option<String>)>> {
    let socket = Socket::open(sys::netlink::Protocol::Route)?;
    let all = route::links(&socket)?;
    let Some(index) = all.iter().find(|l| l.name == name).map(|l| l.index) else { return Ok(Vec::new()) };
    Ok(all.into_iter().filter(|l| l.master == index).map(|l| (l.name, l.alias)).collect())
}

/// Of its own, so that it doesn't change with the interfaces plugged into it.
fn bridge_mac(config: &BuiltinConfig) -> Mac {
    config.ranges.first().map_or(Mac([0x0a, 0x58, 0, 0, 0, 1]), |r| mac_for(r.gateway().address))
}

/// A locally administered address made of an IP address: whoever gets that address
/// next has the same, and no neighbour remembers a wrong one.
pub(crate) fn mac_for(address: IpAddr) -> Mac {
    let octets = route::octets(address);
    let mut mac = [0x0a, 0x58, 0, 0, 0, 0];
    mac[2..].copy_from_slice(&octets[octets.len() - 4..]);
    Mac(mac)
}

fn mtu_of_default_route(socket: &Socket) -> Result<u32> {
    for address in ANYWHERE.iter().filter_map(|a| a.parse().ok()) {
        let Some(index) = route::interface_towards(socket, address)? else { continue };
        if let Some(link) = route::link_at(socket, index)?.filter(|l| l.name != "lo") {
            return Ok(link.mtu);
        }
    }
    Ok(USUAL_MTU)
}

fn warn_of_overlaps(socket: &Socket, ranges: &[IpRange]) -> Result<()> {
    let routed = route::routed_networks(socket)?;
    for range in ranges {
        for (net, _) in routed.iter().filter(|(net, _)| net.prefix > 0 && range.overlaps(*net)) {
            tracing::warn!(%range, %net, "the pods' addresses overlap a network that this node reaches otherwise");
        }
    }
    Ok(())
}

fn settings(config: &BuiltinConfig) -> Result<()> {
    let bridge = &config.bridge;
    // CVE-2020-10749: no pod tells the node its routes, whatever addresses pods have.
    route::set_conf("ipv6", bridge, "accept_ra", "0")?;
    let has = |v4: bool| config.ranges.iter().any(|r| r.gateway().address.is_ipv4() == v4);
    if has(true) {
        route::write_proc("/proc/sys/net/ipv4/ip_forward", "1")?;
        route::set_conf("ipv4", bridge, "route_localnet", "1")?;
    }
    if has(false) {
        if !super::node_has_ipv6() {
            return Err(Error::precondition("this node has no IPv6, but pods are to have IPv6 addresses")
                .hint("configure IPv4 ranges only"));
        }
        route::set_conf("ipv6", bridge, "disable_ipv6", "0")?;
        route::set_conf("ipv6", bridge, "accept_dad", "0")?;
        forward_ipv6()?;
    }
    Ok(())
}

/// A node that forwards no longer listens to its routers, unless it is told to: one
/// that has its default route from them would lose it.
fn forward_ipv6() -> Result<()> {
    const FORWARDING: &str = "/proc/sys/net/ipv6/conf/all/forwarding";
    if std::fs::read_to_string(FORWARDING).is_ok_and(|v| v.trim() == "1") {
        return Ok(());
    }
    let interfaces = std::fs::read_dir("/proc/sys/net/ipv6/conf").into_iter().flatten().flatten();
    for name in interfaces.filter_map(|e| e.file_name().into_string().ok()) {
        let path = format!("/proc/sys/net/ipv6/conf/{name}/accept_ra");
        let listens = std::fs::read_to_string(&path).is_ok_and(|v| v.trim() == "1");
        if listens && !["all", "default", "lo"].contains(&name.as_str()) {
            route::write_proc(&path, "2")?;
        }
    }
    route::write_proc(FORWARDING, "1")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_one_hardware_address() {
        assert_eq!(mac_for("10.85.0.2".parse().unwrap()).to_string(), "0a:58:0a:55:00:02");
        assert_eq!(mac_for("fd00::1:2".parse().unwrap()).to_string(), "0a:58:00:01:00:02");
    }
}
