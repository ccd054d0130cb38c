//! The journal, by its native protocol: one datagram per entry, a field a line;
//! a value that holds a newline is told by its length.

use crate::settings::JournalSettings;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use stdio::Stream;
use stdio::cri_log::pieces;

const SOCKET: &str = "/run/systemd/journal/socket";
/// The longest part of a line that is kept for its end.
const KEPT: usize = 8192;

/// The way to the journal.
#[derive(Debug)]
pub struct Journal {
    settings: JournalSettings,
    /// The beginnings of lines, of stdout and stderr.
    begun: [Vec<u8>; 2],
    socket: Option<OwnedFd>,
    /// Entries that had no room.
    waiting: Vec<Vec<u8>>,
    refused: bool,
}

impl Journal {
    /// Entries with these fields; the journal itself is looked for when there is one.
    pub fn new(settings: JournalSettings) -> Self {
        Self { settings, begun: [Vec::new(), Vec::new()], socket: None, waiting: Vec::new(), refused: false }
    }

    /// What to wait for while it is stalled.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Whether it has no room.
    pub fn stalled(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Sends the whole lines and keeps the beginning of the last.
    pub fn write(&mut self, stream: Stream, bytes: &[u8]) {
        for (text, tag) in pieces(bytes) {
            let begun = &mut self.begun[usize::from(stream == Stream::Stderr)];
            if tag == b'P' && begun.len() + text.len() < KEPT {
                begun.extend_from_slice(text);
                continue;
            }
            let mut line = std::mem::take(begun);
            line.extend_from_slice(text);
            self.entry(stream, &line, tag == b'P');
        }
    }

    /// Sends what has no end, as partial.
    pub fn finish(&mut self) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            let line = std::mem::take(&mut self.begun[usize::from(stream == Stream::Stderr)]);
            if !line.is_empty() {
                self.entry(stream, &line, true);
            }
        }
    }

    fn entry(&mut self, stream: Stream, line: &[u8], partial: bool) {
        self.waiting.push(entry(&self.settings, stream, line, partial));
        self.go_on();
    }

    /// Sends what had no room.
    pub fn go_on(&mut self) {
        while let Some(first) = self.waiting.first() {
            let sent = match &self.socket {
                Some(socket) => rustix::net::send(socket, first, SendFlags::NOSIGNAL).map(drop),
                None => match connect() {
                    Ok(socket) => {
                        self.socket = Some(socket);
                        continue;
                    }
                    Err(e) => Err(e),
                },
            };
            match sent {
                Ok(()) => self.refused = false,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN | Errno::NOBUFS) if self.socket.is_some() => return,
                // A journal that was restarted is looked for again by the next entry.
                Err(e) => {
                    self.socket = None;
                    if !std::mem::replace(&mut self.refused, true) {
                        crate::say::warn(format_args!("the journal takes no entry: {e}"));
                    }
                }
            }
            self.waiting.remove(0);
        }
    }
}

fn connect() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(SOCKET)?)?;
    Ok(socket)
}

/// A line's own priority (`<N>` in front, as systemd's services have it), or the
/// stream's: notice of what is said, error of what is complained.
fn priority(stream: Stream, line: &[u8]) -> (u8, &[u8]) {
    match line {
        [b'<', n @ b'0'..=b'7', b'>', rest @ ..] => (n - b'0', rest),
        _ if stream == Stream::Stderr => (3, line),
        _ => (6, line),
    }
}

fn entry(settings: &JournalSettings, stream: Stream, line: &[u8], partial: bool) -> Vec<u8> {
    let (priority, text) = priority(stream, line);
    let mut out = Vec::with_capacity(text.len() + 256);
    field(&mut out, b"MESSAGE", text);
    field(&mut out, b"PRIORITY", &[b'0' + priority]);
    for f in &settings.fields {
        if let Some((name, value)) = f.split_once('=') {
            field(&mut out, name.as_bytes(), value.as_bytes());
        }
    }
    if partial && settings.mark_partial {
        field(&mut out, b"CONTAINER_PARTIAL_MESSAGE", b"true");
    }
    out
}

fn field(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    if value.contains(&b'\n') {
        out.push(b'\n');
        out.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        out.push(b'=');
    }
    out.extend_from_slice(value);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> JournalSettings {
        JournalSettings { fields: vec!["CONTAINER_NAME=a\nb".into()], mark_partial: true }
    }

    #[test]
    fn entries_have_their_fields() {
        let text = entry(&settings(), Stream::Stdout, b"<4>hello", true);
        let want =
            b"MESSAGE=hello\nPRIORITY=4\nCONTAINER_NAME\n\x03\0\0\0\0\0\0\0a\nb\nCONTAINER_PARTIAL_MESSAGE=true\n";
        assert_eq!(text, want);
        assert!(entry(&settings(), Stream::Stderr, b"x", false).starts_with(b"MESSAGE=x\nPRIORITY=3\n"));
        assert_eq!(priority(Stream::Stdout, b"<9>x"), (6, &b"<9>x"[..]));
    }

    #[test]
    fn a_line_waits_for_its_end() {
        let mut j = Journal::new(settings());
        j.write(Stream::Stdout, b"ab");
        assert_eq!(j.begun[0], b"ab");
        j.write(Stream::Stdout, b"c\nd");
        assert_eq!(j.begun[0], b"d");
        j.write(Stream::Stdout, &[b'x'; KEPT]);
        assert!(j.begun[0].is_empty(), "too long to be kept");
        j.finish();
    }
}
