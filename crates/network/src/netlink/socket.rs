//! Sending a batch and reading what the kernel says to it.

use super::{Batch, HEADER, attribute, text_of, u16_at, u32_at};
use ::types::{Error, ErrorKind, Result, ResultExt};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, netlink};
use std::fmt;
use sys::netlink::Protocol;

/// `NLMSG_ERROR`, which is an acknowledgement where its number is 0.
const ERROR: u16 = 2;
/// `NLMSG_DONE`.
const DONE: u16 = 3;
/// Flags of an error: the request is left out; attributes follow.
const CAPPED: u16 = 0x100;
const HAS_ATTRIBUTES: u16 = 0x200;
/// `NLMSGERR_ATTR_MSG`: the kernel's words.
const WORDS: u16 = 1;
/// What one read takes at most; the kernel makes parts of a dump no longer.
const PART: usize = 64 * 1024;
/// Room for a whole rule set on its way in: 10 000 host ports take 1 MiB.
const SEND_BUFFER: usize = 8 * 1024 * 1024;

/// A message that the kernel refused.
#[derive(Debug)]
pub(crate) struct Refused {
    /// What it was to do.
    pub(crate) what: String,
    pub(crate) errno: Errno,
    /// The kernel's own words, where it has any.
    words: Option<String>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, std::io::Error::from(self.errno))?;
        self.words.iter().try_for_each(|w| write!(f, ": {w}"))
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        let kind = match refused.errno {
            Errno::NODEV | Errno::NOENT | Errno::NXIO => ErrorKind::NotFound,
            Errno::EXIST => ErrorKind::AlreadyExists,
            Errno::PERM | Errno::ACCESS => ErrorKind::PermissionDenied,
            Errno::NOBUFS | Errno::NOMEM | Errno::NOSPC | Errno::NFILE => ErrorKind::ResourceExhausted,
            Errno::OPNOTSUPP | Errno::AFNOSUPPORT | Errno::PROTONOSUPPORT => ErrorKind::FailedPrecondition,
            _ => ErrorKind::Internal,
        };
        let unsupported = kind == ErrorKind::FailedPrecondition;
        let error = Error::new(kind, refused.to_string());
        if unsupported { error.hint("the kernel lacks what this needs") } else { error }
    }
}

/// A netlink socket; it stays in the network namespace that it was opened in.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: rustix::fd::OwnedFd,
}

impl Socket {
    /// In the calling thread's network namespace.
    pub(crate) fn open(protocol: Protocol) -> Result<Self> {
        Ok(Self { fd: sys::netlink::open(protocol)? })
    }

    /// Sends `batch` and returns the messages that were refused, in order. Others
    /// were carried out: each stands for itself, but for nf_tables' transactions.
    pub(crate) fn carry_out(&self, batch: &Batch) -> Result<Vec<Refused>> {
        let mut refused = Vec::new();
        if batch.len() == 0 {
            return Ok(refused);
        }
        self.send(batch)?;
        // All answers have been queued by the time that sending returned.
        while let Some(part) = self.receive(RecvFlags::DONTWAIT)? {
            for m in messages(&part).filter(|m| m.kind == ERROR) {
                refused.extend(refusal(batch, m.flags, m.sequence, m.body));
            }
        }
        Ok(refused)
    }

    /// The same for a batch that is to be carried out as a whole; the first refusal
    /// is the error.
    pub(crate) fn run(&self, batch: &Batch) -> Result<()> {
        match self.carry_out(batch)?.into_iter().next() {
            Some(refused) => Err(refused.into()),
            None => Ok(()),
        }
    }

    /// Sends a question of one message and gives the body of each answer to `each`.
    pub(crate) fn ask(&self, question: &Batch, mut each: impl FnMut(u16, &[u8])) -> Result<Result<(), Refused>> {
        self.send(question)?;
        while let Some(part) = self.receive(RecvFlags::empty())? {
            for m in messages(&part) {
                match m.kind {
                    DONE => return Ok(Ok(())),
                    ERROR => return Ok(refusal(question, m.flags, m.sequence, m.body).map_or(Ok(()), Err)),
                    kind => each(kind, m.body),
                }
            }
        }
        Ok(Ok(()))
    }

    /// The number by which the kernel names this socket to others; 0 before its first
    /// message.
    pub(crate) fn port(&self) -> u32 {
        let own = rustix::net::getsockname(&self.fd).ok();
        own.and_then(|own| netlink::SocketAddrNetlink::try_from(own).ok()).map_or(0, |own| own.pid())
    }

    fn send(&self, batch: &Batch) -> Result<()> {
        let what = || format!("send {} netlink messages", batch.len());
        if batch.writer.bytes.len() > PART {
            // Without CAP_NET_ADMIN this fails, and so will the messages.
            let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(&self.fd, SEND_BUFFER);
        }
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(&self.fd, &batch.writer.bytes, SendFlags::empty()))
            .context(what)?;
        if sent == batch.writer.bytes.len() {
            Ok(())
        } else {
            Err(Error::internal(what()).because(format!("{sent} bytes of {} were taken", batch.writer.bytes.len())))
        }
    }

    /// The next part; `None` when nothing is there and `DONTWAIT` is set.
    fn receive(&self, flags: RecvFlags) -> Result<Option<Vec<u8>>> {
        let mut part = vec![0; PART];
        match rustix::io::retry_on_intr(|| rustix::net::recv(&self.fd, &mut part[..], flags)) {
            Ok((_, length)) => {
                part.truncate(length);
                Ok(Some(part))
            }
            Err(Errno::AGAIN) => Ok(None),
            Err(e) => Err(e).context(|| "read the kernel's answer to netlink messages".into()),
        }
    }
}

/// A message that came.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    flags: u16,
    sequence: u32,
    /// The socket that it answers, or that caused what it announces.
    pub(crate) port: u32,
    pub(crate) body: &'a [u8],
}

/// The messages in what was received.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let message = Message {
            kind: u16_at(bytes, 4)?,
            flags: u16_at(bytes, 6)?,
            sequence: u32_at(bytes, 8)?,
            port: u32_at(bytes, 12)?,
            body: bytes.get(HEADER..length)?,
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn refusal(batch: &Batch, flags: u16, sequence: u32, body: &[u8]) -> Option<Refused> {
    let number = i32::from_ne_bytes(body.get(..4)?.try_into().ok()?);
    if number == 0 {
        return None;
    }
    let errno = Errno::from_raw_os_error(number.wrapping_neg());
    let what = usize::try_from(sequence).ok().and_then(|s| batch.what.get(s));
    let request = usize::try_from(u32_at(body, 4)?).ok()?;
    let after = if flags & CAPPED == 0 { 4 + request.next_multiple_of(4) } else { 4 + HEADER };
    let words = (flags & HAS_ATTRIBUTES != 0)
        .then(|| attribute(body.get(after..)?, WORDS).map(text_of))
        .flatten()
        .filter(|w| !w.is_empty());
    Some(Refused { what: what.cloned().unwrap_or_else(|| "a netlink message".into()), errno, words })
}
