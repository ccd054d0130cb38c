//! Network interfaces, as far as one ioctl goes.

use std::os::fd::AsRawFd;
use types::{Error, Result, ResultExt};

/// `struct ifreq` with its `ifr_flags` arm: 16 bytes of name, 24 of union.
#[repr(C)]
struct FlagsRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// Brings an interface of the calling thread's network namespace up.
///
/// One socket and two ioctls: netlink would cost a message codec for the same.
///
/// # Errors
/// `InvalidArgument` for a name longer than 15 bytes, `Internal` where there is no
/// such interface or CAP_NET_ADMIN is missing.
pub fn set_up(name: &str) -> Result<()> {
    let what = || format!("bring the network interface {name:?} up");
    let mut request = FlagsRequest { name: [0; libc::IFNAMSIZ], flags: 0, rest: [0; 22] };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(Error::invalid(what()).because("its name must have 1 to 15 bytes"));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .context(what)?;
    // SAFETY: the request is as long as the kernel's ifreq and outlives the call;
    // the name in it ends with NUL.
    let got = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &raw mut request) };
    if got != 0 {
        return Err(std::io::Error::last_os_error()).context(what);
    }
    let up = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    if request.flags & up != 0 {
        return Ok(());
    }
    request.flags |= up;
    // SAFETY: as above.
    let set = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut request) };
    if set != 0 {
        return Err(std::io::Error::last_os_error()).context(what);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_not_there_is_named() {
        assert_eq!(size_of::<FlagsRequest>(), 40);
        let e = set_up("no-such-if0").unwrap_err();
        assert!(e.to_string().contains("no-such-if0"), "{e}");
        assert!(set_up("a-name-that-is-too-long").is_err());
    }
}
