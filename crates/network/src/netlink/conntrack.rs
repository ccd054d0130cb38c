//! Entries of connection tracking that must be forgotten when a host port comes or
//! goes: a UDP peer that goes on sending keeps its entry, and with it the way that
//! its first packet took, for ever.

use super::{Batch, Socket, Writer, attribute, flags};
use ::types::Result;
use rustix::io::Errno;

const CONNTRACK: u16 = 1 << 8;
const GET: u16 = CONNTRACK | 1;
const DELETE: u16 = CONNTRACK | 2;
const TUPLE_ORIG: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const PROTO_NUM: u16 = 1;
const PROTO_DST_PORT: u16 = 3;
const FILTER: u16 = 25;
const FILTER_ORIG_FLAGS: u16 = 1;
/// What of the tuple counts: the protocol's number and the destination port.
const NUMBER_AND_PORT: u32 = 1 << 3 | 1 << 5;

/// Forgets the entries of packets of `protocol` (its IP number) that were sent to
/// one of `ports`, wherever they were led, in both families.
///
/// # Errors
/// Names the port.
pub(crate) fn forget(socket: &Socket, protocol: u8, ports: &[u16]) -> Result<()> {
    for port in ports {
        // AF_INET, AF_INET6
        for family in [2, 10] {
            let mut batch = Batch::default();
            let what = format!("forget tracked connections to port {port}");
            batch.push(what, DELETE, flags::ACK, |w| filtered(w, family, protocol, *port));
            match socket.carry_out(&batch)?.into_iter().next() {
                None => {}
                Some(e) if e.errno == Errno::NOENT => {}
                // Kernels before 6.8 delete by whole tuples only.
                Some(e) if matches!(e.errno, Errno::INVAL | Errno::OPNOTSUPP) => {
                    forget_singly(socket, family, protocol, *port)?;
                }
                Some(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

/// Reads the table and deletes what matches, entry by entry.
fn forget_singly(socket: &Socket, family: u8, protocol: u8, port: u16) -> Result<()> {
    let mut question = Batch::default();
    question.push("list tracked connections", GET, flags::DUMP, |w| w.raw(&[family, 0, 0, 0]));
    let mut tuples = Vec::new();
    socket.ask(&question, |_, body| {
        let tuple = body.get(4..).and_then(|b| attribute(b, TUPLE_ORIG));
        tuples.extend(tuple.filter(|t| is_to(t, protocol, port)).map(<[u8]>::to_vec));
    })??;
    let mut batch = Batch::default();
    for tuple in &tuples {
        batch.push(format!("forget a tracked connection to port {port}"), DELETE, flags::ACK, |w| {
            w.raw(&[family, 0, 0, 0]);
            w.nest(TUPLE_ORIG, |w| w.raw(tuple));
        });
    }
    // One that has ended by itself meanwhile is as good.
    match socket.carry_out(&batch)?.into_iter().find(|e| e.errno != Errno::NOENT) {
        Some(e) => Err(e.into()),
        None => Ok(()),
    }
}

fn is_to(tuple: &[u8], protocol: u8, port: u16) -> bool {
    let Some(proto) = attribute(tuple, TUPLE_PROTO) else { return false };
    attribute(proto, PROTO_NUM) == Some(&[protocol]) && attribute(proto, PROTO_DST_PORT) == Some(&port.to_be_bytes())
}

fn filtered(w: &mut Writer, family: u8, protocol: u8, port: u16) {
    w.raw(&[family, 0, 0, 0]);
    w.nest(TUPLE_ORIG, |w| {
        w.nest(TUPLE_PROTO, |w| {
            w.attr(PROTO_NUM, &[protocol]);
            w.attr(PROTO_DST_PORT, &port.to_be_bytes());
        });
    });
    w.nest(FILTER, |w| w.u32(FILTER_ORIG_FLAGS, NUMBER_AND_PORT));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use sys::namespace::{Kind, on_own_thread};

    /// Ports that the entries of the thread's namespace lead to.
    fn tracked() -> Vec<u16> {
        let socket = Socket::open(sys::netlink::Protocol::Netfilter).unwrap();
        let mut question = Batch::default();
        question.push("list", GET, flags::DUMP, |w| w.raw(&[0, 0, 0, 0]));
        let mut ports = Vec::new();
        let port = |body: &[u8]| {
            let proto = attribute(attribute(body.get(4..)?, TUPLE_ORIG)?, TUPLE_PROTO)?;
            Some(u16::from_be_bytes(attribute(proto, PROTO_DST_PORT)?.try_into().ok()?))
        };
        socket.ask(&question, |_, body| ports.extend(port(body))).unwrap().unwrap();
        ports.sort_unstable();
        ports
    }

    #[test]
    fn only_what_was_sent_to_the_port_is_forgotten_either_way() {
        on_own_thread("conntrack", |thread| {
            thread.unshare(&[Kind::Net])?;
            sys::link::set_up("lo")?;
            let socket = Socket::open(sys::netlink::Protocol::Netfilter)?;
            // Tracking begins with the first rule that asks for it.
            crate::host_ports::Rules::new("t".into(), Default::default()).make(&socket)?;
            let send = || {
                for to in ["127.0.0.1:5001", "127.0.0.1:5002", "[::1]:5001", "[::1]:5002"] {
                    let from = if to.starts_with('[') { "[::1]:0" } else { "127.0.0.1:0" };
                    UdpSocket::bind(from).unwrap().send_to(b"x", to).unwrap();
                }
            };
            send();
            assert_eq!(tracked(), [5001, 5001, 5002, 5002]);
            forget(&socket, 6, &[5001])?;
            assert_eq!(tracked().len(), 4, "another protocol's port");
            forget(&socket, 17, &[5001])?;
            assert_eq!(tracked(), [5002, 5002]);
            forget(&socket, 17, &[5001])?;
            forget_singly(&socket, 2, 17, 5002)?;
            assert_eq!(tracked(), [5002]);
            forget_singly(&socket, 10, 17, 5002)?;
            forget_singly(&socket, 10, 17, 5002)?;
            assert_eq!(tracked(), [0u16; 0]);
            Ok(())
        })
        .unwrap();
    }
}
