//! The expressions of a rule. Each works on registers of 4 bytes; a concatenated
//! key lies in successive ones.

use crate::netlink::Writer;

/// The registers `NFT_REG32_00` and on.
pub(crate) const R0: u32 = 8;
pub(crate) const R1: u32 = 9;
pub(crate) const R2: u32 = 10;
pub(crate) const R4: u32 = 12;
pub(crate) const R5: u32 = 13;
pub(crate) const R6: u32 = 14;

const ELEM: u16 = 1;
const NAME: u16 = 1;
const DATA: u16 = 2;
const VALUE: u16 = 1;
const VERDICT: u16 = 2;

const EQ: u32 = 0;
const NEQ: u32 = 1;

/// Families, by netfilter's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub(crate) fn of(address: std::net::IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// `NFPROTO_IPV4`, `NFPROTO_IPV6`
    fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }

    /// Bytes of an address.
    pub(crate) fn length(self) -> u32 {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }

    /// Where the source address stands in the header; the destination follows it.
    fn source(self) -> u32 {
        match self {
            Self::V4 => 12,
            Self::V6 => 8,
        }
    }
}

/// Where new addresses come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nat {
    /// The packet goes to the address and the port in these registers.
    Destination { address: u32, port: u32 },
    /// It comes from the address of the interface that it leaves by; `scatter`
    /// takes a port at random, so that many connections at once rarely meet.
    Masquerade { scatter: bool },
}

/// A rule's expressions, in order.
#[derive(Debug, Default)]
pub(crate) struct Expressions {
    writer: Writer,
}

impl Expressions {
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.writer.into_bytes()
    }

    fn push(mut self, name: &str, fill: impl FnOnce(&mut Writer)) -> Self {
        self.writer.nest(ELEM, |w| {
            w.text(NAME, name);
            w.nest(DATA, fill);
        });
        self
    }

    fn meta(self, key: u32, register: u32) -> Self {
        self.push("meta", |w| {
            w.be32(1, register);
            w.be32(2, key);
        })
    }

    fn compare(self, register: u32, operation: u32, value: &[u8]) -> Self {
        self.push("cmp", |w| {
            w.be32(1, register);
            w.be32(2, operation);
            w.nest(3, |w| w.attr(VALUE, value));
        })
    }

    fn payload(self, register: u32, base: u32, offset: u32, length: u32) -> Self {
        self.push("payload", |w| {
            w.be32(1, register);
            w.be32(2, base);
            w.be32(3, offset);
            w.be32(4, length);
        })
    }

    fn mask(self, register: u32, mask: &[u8]) -> Self {
        self.push("bitwise", |w| {
            w.be32(1, register);
            w.be32(2, register);
            w.be32(3, u32::try_from(mask.len()).unwrap_or(u32::MAX));
            w.nest(4, |w| w.attr(VALUE, mask));
            w.nest(5, |w| w.attr(VALUE, &vec![0; mask.len()]));
        })
    }

    /// Only packets of this family.
    pub(crate) fn family(self, family: Family) -> Self {
        self.meta(15, R0).compare(R0, EQ, &[family.number()])
    }

    /// Only packets that did not come by `lo`, whose index is 1 in each namespace.
    pub(crate) fn not_from_lo(self) -> Self {
        self.meta(4, R0).compare(R0, NEQ, &1u32.to_ne_bytes())
    }

    /// The protocol's number into a register.
    pub(crate) fn protocol(self, register: u32) -> Self {
        self.meta(16, register)
    }

    /// The source address into registers.
    pub(crate) fn source(self, family: Family, register: u32) -> Self {
        self.payload(register, 1, family.source(), family.length())
    }

    /// The destination address into registers.
    pub(crate) fn destination(self, family: Family, register: u32) -> Self {
        self.payload(register, 1, family.source() + family.length(), family.length())
    }

    /// The destination port into a register.
    pub(crate) fn port(self, register: u32) -> Self {
        self.payload(register, 2, 2, 2)
    }

    /// The port that the connection's first packet was sent to, into a register.
    pub(crate) fn original_port(self, register: u32) -> Self {
        self.push("ct", |w| {
            w.be32(1, register);
            w.be32(2, 12);
            w.attr(3, &[0]);
        })
    }

    /// Only packets of connections whose destination was changed.
    pub(crate) fn destination_changed(self) -> Self {
        const STATUS: u32 = 2;
        const DST_NAT: u32 = 1 << 5;
        self.push("ct", |w| {
            w.be32(1, R0);
            w.be32(2, STATUS);
        })
        .mask(R0, &DST_NAT.to_ne_bytes())
        .compare(R0, NEQ, &[0; 4])
    }

    /// Only where the address in the registers lies in this network.
    pub(crate) fn within(self, register: u32, network: &[u8], prefix: u8) -> Self {
        let mask: Vec<u8> = (0..network.len()).map(|byte| mask_byte(prefix, byte)).collect();
        let masked: Vec<u8> = network.iter().zip(&mask).map(|(n, m)| n & m).collect();
        self.mask(register, &mask).compare(register, EQ, &masked)
    }

    /// Only packets whose destination is no address of this node.
    pub(crate) fn destined_elsewhere(self) -> Self {
        const DADDR: u32 = 2;
        const ADDRTYPE: u32 = 3;
        const RTN_LOCAL: u32 = 2;
        self.push("fib", |w| {
            w.be32(1, R0);
            w.be32(2, ADDRTYPE);
            w.be32(3, DADDR);
        })
        .compare(R0, NEQ, &RTN_LOCAL.to_ne_bytes())
    }

    /// Only where the key that begins in this register is in the set.
    pub(crate) fn in_set(self, set: &str, key: u32) -> Self {
        self.push("lookup", |w| {
            w.text(1, set);
            w.be32(2, key);
        })
    }

    /// Only where it is in the map; its value goes into registers.
    pub(crate) fn map(self, map: &str, key: u32, value: u32) -> Self {
        self.push("lookup", |w| {
            w.text(1, map);
            w.be32(2, key);
            w.be32(3, value);
        })
    }

    pub(crate) fn nat(self, family: Family, nat: Nat) -> Self {
        const PROTO_SPECIFIED: u32 = 2;
        const RANDOM_FULLY: u32 = 16;
        match nat {
            Nat::Destination { address, port } => self.push("nat", |w| {
                w.be32(1, 1);
                w.be32(2, u32::from(family.number()));
                w.be32(3, address);
                w.be32(5, port);
                w.be32(7, PROTO_SPECIFIED);
            }),
            Nat::Masquerade { scatter: true } => self.push("masq", |w| w.be32(1, RANDOM_FULLY)),
            Nat::Masquerade { scatter: false } => self.push("masq", |_| {}),
        }
    }

    fn verdict(self, code: i32, chain: Option<&str>) -> Self {
        self.push("immediate", |w| {
            // NFT_REG_VERDICT
            w.be32(1, 0);
            w.nest(2, |w| {
                w.nest(VERDICT, |w| {
                    w.attr(1, &code.to_be_bytes());
                    if let Some(chain) = chain {
                        w.text(2, chain);
                    }
                });
            });
        })
    }

    pub(crate) fn drop(self) -> Self {
        self.verdict(0, None)
    }

    /// Back to the chain that jumped here.
    pub(crate) fn back(self) -> Self {
        self.verdict(-5, None)
    }

    pub(crate) fn jump(self, chain: &str) -> Self {
        self.verdict(-3, Some(chain))
    }
}

/// The byte of a mask with so many leading ones.
fn mask_byte(prefix: u8, byte: usize) -> u8 {
    let ones = usize::from(prefix).saturating_sub(byte * 8).min(8);
    if ones == 0 { 0 } else { 0xff << (8 - ones) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_their_ones_first() {
        let mask = |prefix| (0..4).map(|b| mask_byte(prefix, b)).collect::<Vec<_>>();
        assert_eq!(mask(0), [0, 0, 0, 0]);
        assert_eq!(mask(12), [255, 240, 0, 0]);
        assert_eq!(mask(32), [255; 4]);
    }
}
