//! sd_notify from inside: a socket in the bundle, whose harmless messages go on to
//! the host's.

use crate::poll::{EDGE, Flags, Poll, Token};
use crate::socket::{Named, bind};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use std::os::fd::OwnedFd;
use std::path::Path;
use types::{Result, ResultExt};

/// The longest message.
const LONGEST: usize = 32768;

/// Both sides.
#[derive(Debug)]
pub struct Notify {
    inside: Named,
    outside: OwnedFd,
    address: SocketAddrUnix,
    connected: bool,
    /// A message that the host's side had no room for.
    waiting: Option<Vec<u8>>,
    watched: bool,
}

impl Notify {
    /// Makes `notify/notify.sock` in the bundle, for messages to `host`.
    ///
    /// # Errors
    /// Those of the file system; `InvalidArgument` where `host` is too long a path.
    pub fn make(bundle: &Path, host: &Path, poll: &Poll) -> Result<Self> {
        let all = Mode::RWXU | Mode::RWXG | Mode::RWXO;
        let inside = bind(bundle, "notify/notify.sock", SocketType::DGRAM, all)?;
        let what = || format!("reach the notify socket {}", host.display());
        let name = host.to_string_lossy();
        // systemd writes an abstract socket with an @.
        let address = match name.strip_prefix('@') {
            Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes()),
            None => SocketAddrUnix::new(host),
        }
        .context(what)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let outside = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None).context(what)?;
        poll.watch(&inside.fd, Token::Notify, Flags::IN)?;
        Ok(Self { inside, outside, address, connected: false, waiting: None, watched: false })
    }

    /// Passes on what has come.
    pub fn receive(&mut self, poll: &Poll) {
        let mut bytes = vec![0u8; LONGEST];
        while self.waiting.is_none() {
            // Descriptors that come along are closed by not being taken.
            match rustix::net::recv(&self.inside.fd, &mut bytes[..], RecvFlags::DONTWAIT) {
                Ok((_, n)) => {
                    let passed = filter(&bytes[..n.min(LONGEST)]);
                    if !passed.is_empty() {
                        self.waiting = Some(passed);
                        self.go_on(poll);
                    }
                }
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Sends what had no room.
    pub fn go_on(&mut self, poll: &Poll) {
        let Some(message) = &self.waiting else { return };
        let sent = if self.connected { Ok(()) } else { rustix::net::connect(&self.outside, &self.address) };
        self.connected = sent.is_ok();
        let sent = sent.and_then(|()| rustix::net::send(&self.outside, message, SendFlags::NOSIGNAL));
        match sent {
            Err(Errno::AGAIN | Errno::NOBUFS | Errno::INTR) => {
                if !self.watched {
                    self.watched = poll.watch(&self.outside, Token::NotifyOut, Flags::OUT | EDGE).is_ok();
                    poll.forget(&self.inside.fd);
                }
                return;
            }
            Err(e) => {
                crate::say::warn(format_args!("the host's notify socket takes no message: {e}"));
                self.connected = false;
            }
            Ok(_) => {}
        }
        self.waiting = None;
        if std::mem::take(&mut self.watched) {
            poll.forget(&self.outside);
            let _ = poll.watch(&self.inside.fd, Token::Notify, Flags::IN);
        }
    }
}

/// The lines that say how the service is; none that changes what the host's manager
/// does with it (MAINPID=, FDSTORE=1, …).
fn filter(message: &[u8]) -> Vec<u8> {
    const WHOLE: [&[u8]; 5] = [b"READY=1", b"RELOADING=1", b"STOPPING=1", b"WATCHDOG=1", b"WATCHDOG=trigger"];
    const BEGIN: [&[u8]; 4] = [b"STATUS=", b"ERRNO=", b"BUSERROR=", b"MONOTONIC_USEC="];
    let passes = |line: &&[u8]| WHOLE.contains(line) || BEGIN.iter().any(|b| line.starts_with(b));
    let lines: Vec<&[u8]> = message.split(|b| matches!(b, b'\n' | b'\r')).filter(passes).collect();
    lines.join(&b'\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_lines_go_on() {
        let got = filter(b"READY=1\nMAINPID=1\r\nSTATUS=a b\nREADY=10\nFDSTORE=1\n");
        assert_eq!(got, b"READY=1\nSTATUS=a b");
        assert!(filter(b"MAINPID=1").is_empty());
    }

    #[test]
    fn messages_wait_for_room_and_arrive_in_order() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("notify")).unwrap();
        let host = std::os::unix::net::UnixDatagram::bind(dir.path().join("host")).unwrap();
        let poll = Poll::new().unwrap();
        let mut n = Notify::make(dir.path(), &dir.path().join("host"), &poll).unwrap();
        let inside = std::os::unix::net::UnixDatagram::unbound().unwrap();
        inside.connect(dir.path().join("notify/notify.sock")).unwrap();
        inside.set_nonblocking(true).unwrap();
        let mut count = 0;
        while n.waiting.is_none() {
            inside.send(format!("STATUS={count}").as_bytes()).unwrap();
            count += 1;
            n.receive(&poll);
        }
        let mut buffer = [0u8; 64];
        for i in 0..count {
            let length = host.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], format!("STATUS={i}").as_bytes());
            n.go_on(&poll);
        }
        assert!(n.waiting.is_none());
    }
}
