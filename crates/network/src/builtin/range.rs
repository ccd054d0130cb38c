//! The networks that pods' addresses come from.

use crate::Net;
use ::types::{Error, Result};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use store::AddressRange;

/// Larger networks exist, but no node has more pods: numbers stay within 63 bits.
const MOST_BITS: u8 = 62;

/// A network whose first address is the bridge's, the gateway; the others are for
/// pods. In IPv4 the last one is for broadcasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IpRange {
    /// The network's own address.
    base: IpAddr,
    prefix: u8,
}

impl IpRange {
    /// The network's own address and its length.
    pub fn network(self) -> Net {
        Net { address: self.base, prefix: self.prefix }
    }

    /// The bridge's address in it, with the network's prefix.
    pub fn gateway(self) -> Net {
        Net { address: self.at(1), prefix: self.prefix }
    }

    /// Whether the address is one of this network.
    pub fn contains(self, address: IpAddr) -> bool {
        address.is_ipv4() == self.base.is_ipv4()
            && network_of(Net { address, prefix: self.prefix }).address == self.base
    }

    /// Whether the two have addresses in common.
    pub fn overlaps(self, other: Net) -> bool {
        let shorter = self.prefix.min(other.prefix);
        let cut = |address| network_of(Net { address, prefix: shorter });
        self.base.is_ipv4() == other.address.is_ipv4() && cut(self.base) == cut(other.address)
    }

    fn at(self, number: u128) -> IpAddr {
        match self.base {
            IpAddr::V4(a) => Ipv4Addr::from(u32::from(a).wrapping_add(u32::try_from(number).unwrap_or(0))).into(),
            IpAddr::V6(a) => Ipv6Addr::from(u128::from(a).wrapping_add(number)).into(),
        }
    }

    /// How the database knows it: what may be given to pods.
    pub(crate) fn addresses(self) -> AddressRange {
        let bits = if self.base.is_ipv4() { 32 } else { 128 } - self.prefix;
        let all: i64 = 1 << bits.min(MOST_BITS);
        // The gateway and, in IPv4, the broadcast address are nobody's.
        let last = if self.base.is_ipv4() { all - 2 } else { all - 1 };
        AddressRange { name: self.to_string(), base: self.base, first: 2, last }
    }

    /// The number of a pod's address; `None` for one that no pod can have.
    pub(crate) fn number(self, address: IpAddr) -> Option<i64> {
        let number = match (self.base, address) {
            (IpAddr::V4(b), IpAddr::V4(a)) => i64::from(u32::from(a)) - i64::from(u32::from(b)),
            (IpAddr::V6(b), IpAddr::V6(a)) => i64::try_from(u128::from(a).checked_sub(u128::from(b))?).ok()?,
            _ => return None,
        };
        let range = self.addresses();
        (range.first..=range.last).contains(&number).then_some(number)
    }
}

/// The network that an address with its prefix belongs to.
pub(crate) fn network_of(net: Net) -> Net {
    let address = match net.address {
        IpAddr::V4(a) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(net.prefix)).unwrap_or(0);
            Ipv4Addr::from(u32::from(a) & mask).into()
        }
        IpAddr::V6(a) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(net.prefix)).unwrap_or(0);
            Ipv6Addr::from(u128::from(a) & mask).into()
        }
    };
    Net { address, prefix: net.prefix }
}

impl TryFrom<Net> for IpRange {
    type Error = Error;

    fn try_from(net: Net) -> Result<Self> {
        let base = network_of(net).address;
        let bad = |why: &str| Error::invalid(format!("{net} can't be a range of pods' addresses: {why}"));
        if base != net.address {
            return Err(bad(&format!("the network is {}/{}", base, net.prefix)));
        }
        let (least, most) = if base.is_ipv4() { (8, 30) } else { (48, 126) };
        if !(least..=most).contains(&net.prefix) {
            return Err(bad(&format!("its prefix must have {least} to {most} bits")));
        }
        if base.is_loopback() || base.is_multicast() || base.is_unspecified() {
            return Err(bad("such addresses are no host's"));
        }
        Ok(Self { base, prefix: net.prefix })
    }
}

impl FromStr for IpRange {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        text.parse::<Net>()?.try_into()
    }
}

impl fmt::Display for IpRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.network().fmt(f)
    }
}

impl serde::Serialize for IpRange {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for IpRange {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> IpRange {
        text.parse().unwrap()
    }

    #[test]
    fn gateway_and_broadcast_are_no_pods() {
        let small = range("10.9.0.0/30");
        assert_eq!(small.gateway().to_string(), "10.9.0.1/30");
        assert_eq!((small.addresses().first, small.addresses().last), (2, 2));
        let six = range("fd00::/126");
        assert_eq!((six.addresses().first, six.addresses().last), (2, 3));
        let wide = range("fd00::/64");
        assert_eq!(wide.number("fd00::1:0:0".parse().unwrap()), Some(1 << 32));
        assert_eq!(wide.number("fd00::1".parse().unwrap()), None);
        assert_eq!(small.number("10.9.0.3".parse().unwrap()), None);
        assert_eq!(small.number("10.9.0.2".parse().unwrap()), Some(2));
        assert!(small.contains("10.9.0.3".parse().unwrap()) && !small.contains("10.9.0.4".parse().unwrap()));
        assert!(wide.contains("fd00::ffff".parse().unwrap()) && !wide.contains("10.9.0.1".parse().unwrap()));
    }

    #[test]
    fn overlaps_are_seen_from_both_sides() {
        let ours = range("10.85.0.0/16");
        for (other, overlaps) in
            [("10.85.3.0/24", true), ("10.0.0.0/8", true), ("10.84.0.0/16", false), ("fd00::/64", false)]
        {
            assert_eq!(ours.overlaps(other.parse().unwrap()), overlaps, "{other}");
        }
    }

    #[test]
    fn what_is_no_range_is_refused_with_the_reason() {
        for (bad, why) in [
            ("10.9.0.1/24", "10.9.0.0/24"),
            ("10.9.0.0/31", "8 to 30"),
            ("fd00::/32", "48 to 126"),
            ("127.0.0.0/8", "no host's"),
            ("224.0.0.0/8", "no host's"),
            ("x", "ADDRESS/BITS"),
        ] {
            let e = bad.parse::<IpRange>().unwrap_err().to_string();
            assert!(e.contains(why), "{bad}: {e}");
        }
    }
}
