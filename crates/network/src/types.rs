//! What a pod asks of its network and what it gets, whoever attaches it.

use ::types::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// The name of a pod's own interface, as both peers and all tools have it.
pub const INTERFACE: &str = "eth0";

/// A transport protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// As CNI and nftables write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// A port of the node that leads to a port of the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PortMapping {
    /// The protocol.
    pub protocol: Protocol,
    /// The port in the pod.
    pub container_port: u16,
    /// The port of the node; never 0.
    pub host_port: u16,
    /// The one address of the node that it is bound to; `None` is all of them.
    pub host_ip: Option<IpAddr>,
}

/// The most traffic of a pod, in bits per second, seen from the pod; `None` is no
/// limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Towards the pod.
    pub ingress: Option<u64>,
    /// From the pod.
    pub egress: Option<u64>,
}

/// The hardware address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::invalid(format!("{text:?} is no hardware address")).hint("such as 0a:58:0a:00:00:02");
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(bad());
        }
        Ok(Self(mac))
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// An address with the length of its network's prefix in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Net {
    /// The address itself, host bits included.
    pub address: IpAddr,
    /// At most 32 or 128.
    pub prefix: u8,
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Net {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::invalid(format!("{text:?} is no ADDRESS/BITS"));
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let (address, prefix): (IpAddr, u8) = (address.parse().map_err(|_| bad())?, prefix.parse().map_err(|_| bad())?);
        let widest = if address.is_ipv4() { 32 } else { 128 };
        if prefix > widest { Err(bad()) } else { Ok(Self { address, prefix }) }
    }
}

impl From<IpAddr> for Net {
    /// The address alone, with the longest prefix.
    fn from(address: IpAddr) -> Self {
        Self { address, prefix: if address.is_ipv4() { 32 } else { 128 } }
    }
}

impl Serialize for Net {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Net {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Names that resolvers are told, as CNI's capability `dns` passes them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Addresses of name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Options of resolv.conf.
    pub options: Vec<String>,
}

/// A pod that is to be attached to its network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachRequest {
    /// Its id.
    pub pod_id: String,
    /// Its name in Kubernetes.
    pub name: String,
    /// Its namespace in Kubernetes.
    pub namespace: String,
    /// Its uid in Kubernetes.
    pub uid: String,
    /// Where its network namespace is pinned.
    pub netns: PathBuf,
    /// Ports of the node that lead to it.
    pub ports: Vec<PortMapping>,
    /// Addresses that it must get; none leaves the choice to the network. The length
    /// of the prefix counts only where the network has none of its own.
    pub static_ips: Vec<Net>,
    /// The hardware address that it must get.
    pub mac: Option<Mac>,
    /// Its limits of traffic.
    pub bandwidth: Bandwidth,
    /// What its resolvers are told.
    pub dns: Option<Dns>,
    /// Its cgroup, relative to a hierarchy's root; empty where it has none.
    pub cgroup: String,
    /// The device that it was given, by CNI's capability `deviceID`.
    pub device_id: Option<String>,
    /// The pod's annotations, for plugins that ask for them.
    pub annotations: BTreeMap<String, String>,
}

/// What a pod has got from its network; stored with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Its addresses, the first one is the pod's own.
    pub addresses: Vec<Net>,
    /// The routers that it sends to.
    pub gateways: Vec<IpAddr>,
    /// The hardware address of its interface.
    pub mac: Option<Mac>,
    /// The node's end of the link, where there is one.
    pub host_interface: Option<String>,
    /// The largest packet of its interface in bytes, where it is known.
    pub mtu: Option<u32>,
}

/// A pod's attachment to one network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attached {
    /// The network's name.
    pub network: String,
    /// The interface's name in the pod.
    pub interface: String,
    /// What the pod has got.
    pub attachment: Attachment,
    /// All that the last CNI plugin has answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in ["10.88.0.2/16", "fd00::2/64", "0.0.0.0/0"] {
            assert_eq!(text.parse::<Net>().unwrap().to_string(), text);
        }
        for bad in ["10.88.0.2", "10.88.0.2/33", "fd00::/129", "x/1", "1.2.3.4/", "1.2.3.4/-1"] {
            assert!(bad.parse::<Net>().is_err(), "{bad}");
        }
        assert_eq!("0A:58:0a:00:00:02".parse::<Mac>().unwrap().to_string(), "0a:58:0a:00:00:02");
        for bad in
            ["", "0a:58:0a:00:00", "0a:58:0a:00:00:02:03", "01:00:00:00:00:00", "00:00:00:00:00:00", "a:58:0a:0:0:2"]
        {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
