//! Netlink sockets. What is said over them is `network`'s.

use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink};
use std::os::fd::AsRawFd;
use types::{Result, ResultExt};

/// Whom a socket speaks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Links, addresses, routes, queueing disciplines.
    Route,
    /// nf_tables and connection tracking.
    Netfilter,
}

/// A socket of the calling thread's network namespace, and of that one for good,
/// wherever it is used later. Errors come with the kernel's own words and without
/// a copy of the request.
///
/// # Errors
/// When the kernel gives none.
pub fn open(protocol: Protocol) -> Result<OwnedFd> {
    let number = match protocol {
        Protocol::Route => None,
        Protocol::Netfilter => Some(netlink::NETFILTER),
    };
    let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, number)
        .context(|| format!("open a netlink socket ({protocol:?})"))?;
    for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
        // A kernel without the option (before 4.12) says no words; nothing is lost.
        let _ = set(&fd, option, 1);
    }
    Ok(fd)
}

/// A socket that hears of each change of nf_tables' rules.
///
/// # Errors
/// When the kernel gives none; `PermissionDenied` without CAP_NET_ADMIN.
pub fn nftables_events() -> Result<OwnedFd> {
    /// `NFNLGRP_NFTABLES`, 7, as a bit.
    const GROUP: u32 = 1 << 6;
    let fd = open(Protocol::Netfilter)?;
    // Any number for itself: a socket without one hears nothing.
    rustix::net::bind(&fd, &netlink::SocketAddrNetlink::new(0, GROUP))
        .context(|| "listen to changes of nftables".into())?;
    Ok(fd)
}

fn set(fd: &OwnedFd, option: libc::c_int, value: libc::c_int) -> std::io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or(4);
    // SAFETY: the value is an int that outlives the call, of the length given.
    let done =
        unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_NETLINK, option, (&raw const value).cast(), length) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_can_be_had() {
        open(Protocol::Route).unwrap();
        open(Protocol::Netfilter).unwrap();
        nftables_events().unwrap();
    }
}
