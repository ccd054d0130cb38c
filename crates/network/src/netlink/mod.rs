//! Netlink, as far as we speak it: one writer and one reader of its attributes
//! for links, nf_tables and connection tracking alike.
//!
//! ```text
//! mod.rs        messages and attributes
//! socket.rs     sent, answered, refused
//! route.rs      links, addresses, routes
//! qdisc.rs      limits of traffic
//! conntrack.rs  entries that must be forgotten
//! ```
//!
//! A [`Batch`] goes to the kernel in one call, which carries it out before the call
//! returns: its answers are there then, so nothing waits and nothing is async.

pub(crate) mod conntrack;
pub(crate) mod qdisc;
pub(crate) mod route;
mod socket;

pub(crate) use socket::{Refused, Socket, messages};

/// Flags of a request (`linux/netlink.h`).
pub(crate) mod flags {
    pub(crate) const REQUEST: u16 = 0x001;
    pub(crate) const ACK: u16 = 0x004;
    pub(crate) const DUMP: u16 = 0x300;
    pub(crate) const REPLACE: u16 = 0x100;
    pub(crate) const EXCL: u16 = 0x200;
    pub(crate) const CREATE: u16 = 0x400;
    pub(crate) const APPEND: u16 = 0x800;
}

/// Length of a message's header.
const HEADER: usize = 16;
/// Marks an attribute that holds attributes.
const NESTED: u16 = 0x8000;
/// Both marks of an attribute's type.
const TYPE_MASK: u16 = 0x3fff;

/// Where attributes are written one after the other, each padded to 4 bytes.
#[derive(Debug, Default, Clone)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Bytes as they are: a message's fixed part.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.pad();
    }

    pub(crate) fn attr(&mut self, kind: u16, value: &[u8]) {
        self.framed(kind, |w| w.bytes.extend_from_slice(value));
    }

    pub(crate) fn u32(&mut self, kind: u16, value: u32) {
        self.attr(kind, &value.to_ne_bytes());
    }

    /// Netfilter's numbers, which travel in network order.
    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        self.attr(kind, &value.to_be_bytes());
    }

    /// Text with the NUL that the kernel expects.
    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        self.framed(kind, |w| {
            w.bytes.extend_from_slice(value.as_bytes());
            w.bytes.push(0);
        });
    }

    /// An attribute that holds what `fill` writes: at most 64 KiB, which the callers
    /// with long lists see to. The kernel refuses what doesn't fit.
    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        self.framed(kind | NESTED, fill);
    }

    fn framed(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        fill(self);
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// Messages for one call to the kernel, each with the words that its refusal gets.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    writer: Writer,
    what: Vec<String>,
}

impl Batch {
    /// Adds a message: `fill` writes its fixed part and its attributes. Its sequence
    /// number is its place in the batch.
    pub(crate) fn push(&mut self, what: impl Into<String>, kind: u16, flags: u16, fill: impl FnOnce(&mut Writer)) {
        let start = self.writer.bytes.len();
        let sequence = u32::try_from(self.what.len()).unwrap_or(u32::MAX);
        self.what.push(what.into());
        self.writer.bytes.extend_from_slice(&[0; HEADER]);
        fill(&mut self.writer);
        let length = u32::try_from(self.writer.bytes.len() - start).unwrap_or(u32::MAX);
        let header = &mut self.writer.bytes[start..start + HEADER];
        header[..4].copy_from_slice(&length.to_ne_bytes());
        header[4..6].copy_from_slice(&kind.to_ne_bytes());
        header[6..8].copy_from_slice(&(flags | flags::REQUEST).to_ne_bytes());
        header[8..12].copy_from_slice(&sequence.to_ne_bytes());
    }

    pub(crate) fn len(&self) -> usize {
        self.what.len()
    }

    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.writer.bytes
    }
}

/// The attributes in `bytes`; what is cut short ends the list.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The attribute of this type.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| *k == kind).map(|(_, value)| value)
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Text up to its NUL.
pub(crate) fn text_of(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut w = Writer::default();
        w.text(3, "eth0");
        w.nest(18, |w| {
            w.attr(1, b"abc");
            w.u32(2, 7);
        });
        w.be32(4, 1);
        let bytes = w.into_bytes();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(text_of(attribute(&bytes, 3).unwrap()), "eth0");
        let inner = attribute(&bytes, 18).unwrap();
        assert_eq!(attribute(inner, 1).unwrap(), b"abc");
        assert_eq!(u32_at(attribute(inner, 2).unwrap(), 0), Some(7));
        assert_eq!(attribute(&bytes, 4).unwrap(), [0, 0, 0, 1]);
        assert_eq!(attribute(&bytes, 5), None);
    }

    #[test]
    fn attributes_that_are_cut_short_end_the_list() {
        for bytes in [&[][..], &[8, 0, 1], &[8, 0, 1, 0, 9], &[0, 0, 0, 0], &[3, 0, 0, 0, 1, 2, 3, 4]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
        assert_eq!(attributes(&[5, 0, 1, 0, 9]).count(), 1, "without its padding");
    }

    #[test]
    fn a_batch_numbers_its_messages() {
        let mut batch = Batch::default();
        batch.push("one", 16, 0, |w| w.raw(&[1; 16]));
        batch.push("two", 17, flags::ACK, |w| w.u32(1, 2));
        let bytes = batch.bytes();
        assert_eq!((u32_at(bytes, 0), u32_at(bytes, 8)), (Some(32), Some(0)));
        assert_eq!((u32_at(bytes, 32), u16_at(bytes, 36), u32_at(bytes, 40)), (Some(24), Some(17), Some(1)));
    }
}
