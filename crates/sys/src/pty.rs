//! Terminals: the master that a runtime sends over a console socket, its size.

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::termios::Winsize;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

/// Receives the one descriptor that a runtime sends over its console socket.
///
/// More descriptors than one are closed again, as are those of a message that
/// brought none of use (behaviours of runc's `--console-socket`).
///
/// # Errors
/// `UnexpectedEof` where the peer has hung up or sent no descriptor.
pub fn receive_master(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut name = [0u8; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(&mut name)];
    rustix::net::recvmsg(socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut master = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            for fd in fds {
                master.get_or_insert(fd);
            }
        }
    }
    master.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the console socket brought no terminal"))
}

/// Sets the size of a terminal in characters.
///
/// # Errors
/// ENOTTY where it is none.
pub fn resize(master: impl AsFd, width: u16, height: u16) -> io::Result<()> {
    Ok(rustix::termios::tcsetwinsize(master, Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 })?)
}
