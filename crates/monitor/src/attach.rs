//! The attach socket and its clients (behaviours.md section 2).
//!
//! ```text
//! out  a packet: one byte (2 stdout, 3 stderr), then up to 8192 bytes
//! in   raw bytes for stdin, up to 32768 in a packet
//! ```
//!
//! A client that does not read holds up the process's output, as a pipe would, and
//! nothing else: no byte is lost, nothing spins, and an exit is reported all the same.

use crate::poll::{EDGE, Flags, Poll, Token};
use crate::settings::Sockets;
use crate::socket::{Link, Named, bind};
use crate::streams::Stdin;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use stdio::Stream;
use types::{Result, ResultExt};

/// The most bytes of one packet of a client's.
const PACKET: usize = 32768;
/// More clients than this wait outside: each costs a descriptor.
const MOST: usize = 64;
/// After what time the door is tried again when nobody could be let in, since
/// descriptors have run out, say.
const RETRY: Duration = Duration::from_secs(1);
/// A client that sends without end lets others have their turn.
const TURNS: usize = 8;

/// The socket and who has come.
#[derive(Debug)]
pub struct Attach {
    /// `None` once nobody is let in any more.
    socket: Option<(Named, Option<Link>)>,
    listening: bool,
    /// When to listen again after a failure; it stays until somebody has come in.
    retry: Option<Instant>,
    clients: Vec<Client>,
    next: u32,
    /// The end of a client's input is the end of the process's.
    ends_stdin: bool,
    /// Some client may have more to be read.
    pub again: bool,
}

#[derive(Debug)]
struct Client {
    id: u32,
    fd: OwnedFd,
    /// Packets that had no room.
    out: VecDeque<Box<[u8]>>,
    /// What stdin had no room for.
    input: Vec<u8>,
    readable: bool,
    /// It has not said that no more input comes.
    sends: bool,
    /// It still takes output.
    takes: bool,
}

/// The byte in front of each packet.
fn mark(stream: Stream) -> u8 {
    match stream {
        Stream::Stdout => 2,
        Stream::Stderr => 3,
    }
}

impl Attach {
    /// Makes the socket, and the short link to its directory.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn make(sockets: &Sockets, uuid: Option<&str>, bundle: &Path, ends_stdin: bool, poll: &Poll) -> Result<Self> {
        let link = match (sockets, uuid) {
            (Sockets::Link(dir), Some(uuid)) => Some(Link::make(dir, uuid, bundle)?),
            _ => None,
        };
        let dir = link.as_ref().map_or(bundle, Link::path);
        let socket = bind(dir, "attach", SocketType::SEQPACKET, Mode::RWXU)?;
        rustix::net::listen(&socket.fd, 10).context(|| format!("listen on {}", socket.path().display()))?;
        poll.watch(&socket.fd, Token::Listener, Flags::IN)?;
        let socket = Some((socket, link));
        Ok(Self { socket, listening: true, retry: None, clients: Vec::new(), next: 0, ends_stdin, again: false })
    }

    /// Takes in who has come.
    pub fn accept(&mut self, poll: &Poll) {
        let Some((socket, _)) = &self.socket else { return };
        while self.listening && self.clients.len() < MOST {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let fd = match rustix::net::accept_with(&socket.fd, flags) {
                Ok(fd) => fd,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(Errno::AGAIN) => return,
                Err(e) => {
                    if self.retry.is_none() {
                        crate::say::warn(format_args!("an attach client can't be let in: {e}"));
                    }
                    self.retry = Some(Instant::now() + RETRY);
                    break;
                }
            };
            self.retry = None;
            let id = self.next;
            self.next = self.next.wrapping_add(1);
            let flags = Flags::IN | Flags::OUT | Flags::RDHUP | EDGE;
            if let Err(e) = poll.watch(&fd, Token::Client(id), flags) {
                crate::say::warn(format_args!("an attach client can't be let in: {e}"));
                continue;
            }
            let (out, input) = (VecDeque::new(), Vec::new());
            self.clients.push(Client { id, fd, out, input, readable: false, sends: true, takes: true });
        }
        // Those who wait outside are let in when one has left, or after a while.
        if self.listening {
            poll.forget(&socket.fd);
            self.listening = false;
        }
    }

    /// When the door is to be tried again.
    pub fn due(&self) -> Option<Instant> {
        self.retry.filter(|_| self.socket.is_some() && !self.listening)
    }

    fn listen(&mut self, poll: &Poll) {
        if let Some((socket, _)) = self.socket.as_ref().filter(|_| !self.listening) {
            self.listening = poll.watch(&socket.fd, Token::Listener, Flags::IN).is_ok();
            if !self.listening {
                self.retry = Some(Instant::now() + RETRY);
            }
        }
    }

    /// Whether some client is behind.
    pub fn stalled(&self) -> bool {
        self.clients.iter().any(|c| !c.out.is_empty())
    }

    /// Sends what one read has brought to everybody.
    pub fn send(&mut self, stream: Stream, bytes: &[u8]) {
        if self.clients.is_empty() {
            return;
        }
        let mut packet = Vec::with_capacity(bytes.len() + 1);
        packet.push(mark(stream));
        packet.extend_from_slice(bytes);
        for client in self.clients.iter_mut().filter(|c| c.takes) {
            client.out.push_back(packet.as_slice().into());
            client.flush();
        }
    }

    /// Something has happened to a client.
    pub fn event(&mut self, id: u32, flags: Flags) {
        let Some(client) = self.clients.iter_mut().find(|c| c.id == id) else { return };
        client.readable = true;
        if flags.intersects(Flags::HUP | Flags::ERR) {
            client.takes = false;
            client.out.clear();
        }
        client.flush();
    }

    /// Brings clients' input to the process, as far as there is room, and lets go of
    /// clients that have gone.
    pub fn feed(&mut self, stdin: &mut Stdin, poll: &Poll) {
        self.again = false;
        let mut ended = false;
        for client in &mut self.clients {
            ended |= client.feed(stdin, poll);
            // A terminal that has not come yet tells when it has.
            self.again |= client.readable && client.sends && client.input.is_empty();
        }
        if ended && self.ends_stdin {
            stdin.close();
        }
        let before = self.clients.len();
        self.clients.retain(|c| c.takes || c.sends || !c.input.is_empty());
        if self.clients.len() < before {
            sys::malloc::trim();
            self.listen(poll);
        } else if self.due().is_some_and(|due| due <= Instant::now()) {
            self.listen(poll);
        }
    }

    /// Nobody is let in any more, the socket's name is taken back, and clients that
    /// have all of the output see its end.
    pub fn close_door(&mut self) {
        self.socket = None;
        self.listening = false;
        self.clients.retain(|c| !c.out.is_empty());
    }

    /// How many packets clients have not taken yet.
    pub fn behind(&self) -> usize {
        self.clients.iter().map(|c| c.out.len()).sum()
    }
}

impl Client {
    fn flush(&mut self) {
        while let Some(packet) = self.out.front() {
            match rustix::net::send(self.fd.as_fd(), packet, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(_) => drop(self.out.pop_front()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS) => return,
                Err(_) => {
                    self.takes = false;
                    self.out.clear();
                }
            }
        }
    }

    /// Whether it has said that no more input comes, and all of it is delivered.
    fn feed(&mut self, stdin: &mut Stdin, poll: &Poll) -> bool {
        for _ in 0..TURNS {
            if !self.input.is_empty() {
                let done = stdin.write(&self.input, poll);
                self.input.drain(..done);
                if !self.input.is_empty() {
                    return false;
                }
                self.input = Vec::new();
            }
            if !self.readable || !self.sends {
                return false;
            }
            let mut packet = vec![0u8; PACKET];
            match rustix::net::recv(&self.fd, &mut packet[..], RecvFlags::DONTWAIT) {
                Ok((_, n)) if n > 0 => {
                    packet.truncate(n.min(PACKET));
                    self.input = packet;
                }
                // A peer that has gone without reading all of its output is told of once; what
                // it sent before comes afterwards.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    return false;
                }
                Ok(_) | Err(_) => {
                    self.sends = false;
                    return true;
                }
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketAddrUnix};
    use std::fs::File;
    use std::io::Read;

    struct Fixture {
        dir: tempfile::TempDir,
        poll: Poll,
        attach: Attach,
    }

    fn fixture(ends_stdin: bool) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let poll = Poll::new().unwrap();
        let attach = Attach::make(&Sockets::Bundle, None, dir.path(), ends_stdin, &poll).unwrap();
        Fixture { dir, poll, attach }
    }

    impl Fixture {
        fn client(&mut self) -> OwnedFd {
            let fd = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
            rustix::net::connect(&fd, &SocketAddrUnix::new(self.dir.path().join("attach")).unwrap()).unwrap();
            self.attach.accept(&self.poll);
            fd
        }

        fn turn(&mut self, stdin: &mut Stdin) {
            let now = std::time::Instant::now();
            for (token, flags) in self.poll.wait(Some(now)).unwrap() {
                if let Token::Client(id) = token {
                    self.attach.event(id, flags);
                }
            }
            self.attach.feed(stdin, &self.poll);
        }
    }

    fn receive(fd: &OwnedFd) -> Vec<u8> {
        let mut bytes = vec![0u8; 9000];
        let (_, n) = rustix::net::recv(fd, &mut bytes[..], RecvFlags::empty()).unwrap();
        bytes.truncate(n);
        bytes
    }

    #[test]
    fn packets_are_marked_and_input_is_raw() {
        let mut f = fixture(true);
        let client = f.client();
        f.attach.send(Stream::Stdout, b"out");
        f.attach.send(Stream::Stderr, b"err");
        assert_eq!((receive(&client), receive(&client)), (b"\x02out".to_vec(), b"\x03err".to_vec()));
        let (r, w) = stdio::fifo::pipe().unwrap();
        crate::poll::never_block(&w).unwrap();
        let mut stdin = Stdin::open(w);
        rustix::net::send(&client, b"input", SendFlags::empty()).unwrap();
        drop(client);
        f.turn(&mut stdin);
        let mut text = String::new();
        File::from(r).read_to_string(&mut text).unwrap();
        assert_eq!(text, "input", "and the client's end was the process's");
        assert!(f.attach.clients.is_empty());
    }

    #[test]
    fn stdin_can_outlive_its_client() {
        let mut f = fixture(false);
        let (_r, w) = stdio::fifo::pipe().unwrap();
        let mut stdin = Stdin::open(w);
        drop(f.client());
        f.turn(&mut stdin);
        assert!(matches!(stdin, Stdin::Open { .. }));
    }

    #[test]
    fn one_that_only_stops_sending_still_gets_output() {
        let mut f = fixture(true);
        let client = f.client();
        rustix::net::shutdown(&client, rustix::net::Shutdown::Write).unwrap();
        let mut stdin = Stdin::None;
        f.turn(&mut stdin);
        f.attach.send(Stream::Stdout, b"x");
        assert_eq!(receive(&client), b"\x02x");
        assert!(!f.attach.again, "its end is not looked at again");
    }

    #[test]
    fn one_that_does_not_read_stalls_and_loses_nothing() {
        let mut f = fixture(true);
        let client = f.client();
        let mut sent = 0;
        while !f.attach.stalled() {
            f.attach.send(Stream::Stdout, &[b'x'; 8192]);
            sent += 1;
        }
        assert_eq!(f.attach.behind(), 1);
        for _ in 0..sent {
            assert_eq!(receive(&client).len(), 8193);
            f.turn(&mut Stdin::None);
        }
        assert!(!f.attach.stalled());
    }

    #[test]
    fn one_that_goes_while_it_is_behind_is_forgotten() {
        let mut f = fixture(true);
        let client = f.client();
        while !f.attach.stalled() {
            f.attach.send(Stream::Stdout, &[b'x'; 8192]);
        }
        drop(client);
        f.turn(&mut Stdin::None);
        assert!(!f.attach.stalled() && f.attach.clients.is_empty());
    }

    #[test]
    fn the_hundredth_waits_outside() {
        let mut f = fixture(true);
        let mut clients: Vec<OwnedFd> = (0..MOST).map(|_| f.client()).collect();
        assert!(!f.attach.listening);
        let late = f.client();
        assert_eq!(f.attach.clients.len(), MOST);
        clients.pop();
        // Each of them has room: that is told too, some at a time.
        while !f.attach.listening {
            f.turn(&mut Stdin::None);
        }
        f.attach.accept(&f.poll);
        f.attach.send(Stream::Stdout, b"x");
        assert_eq!(receive(&late), b"\x02x");
    }
}
