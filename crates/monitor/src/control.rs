//! The FIFOs `ctl` and `winsz` in the bundle.
//!
//! ```text
//! ctl     1 HEIGHT WIDTH   the terminal's size
//!         2 0 0            the log was moved: open it anew
//! winsz   HEIGHT WIDTH     the terminal's size
//! ```

use crate::poll::{Flags, Poll, Token};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use types::{Result, ResultExt};

/// The longest line; what is longer is nothing of ours.
const LONGEST: usize = 200;
/// The greatest height and width: a program may take memory for each character.
const GREATEST: u16 = 1000;

/// What a line asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The terminal has so many lines and columns.
    Resize {
        /// Lines.
        height: u16,
        /// Columns.
        width: u16,
    },
    /// The log was moved.
    Reopen,
}

/// Which FIFO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Control,
    Winsz,
}

/// One FIFO with the line that has no end yet.
#[derive(Debug)]
struct Lines {
    kind: Kind,
    fd: OwnedFd,
    /// With a writer of our own, one that goes is no hang-up.
    _hold: OwnedFd,
    begun: Vec<u8>,
    /// The line is too long: what follows up to its end is dropped.
    overlong: bool,
}

/// Both FIFOs.
#[derive(Debug)]
pub struct Control {
    ctl: Lines,
    winsz: Lines,
}

impl Control {
    /// Makes both, in place of what an earlier monitor has left.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn make(bundle: &Path, poll: &Poll) -> Result<Self> {
        let ctl = Lines::make(Kind::Control, &bundle.join("ctl"))?;
        let winsz = Lines::make(Kind::Winsz, &bundle.join("winsz"))?;
        poll.watch(&ctl.fd, Token::Control, Flags::IN)?;
        poll.watch(&winsz.fd, Token::Winsz, Flags::IN)?;
        Ok(Self { ctl, winsz })
    }

    /// What has been written into `ctl`.
    pub fn read_ctl(&mut self) -> Vec<Order> {
        self.ctl.read()
    }

    /// What has been written into `winsz`.
    pub fn read_winsz(&mut self) -> Vec<Order> {
        self.winsz.read()
    }
}

impl Lines {
    fn make(kind: Kind, path: &Path) -> Result<Self> {
        let what = || format!("make FIFO {}", path.display());
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).context(what),
            _ => {}
        }
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP;
        rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, mode, 0).context(what)?;
        let open = |flags| rustix::fs::open(path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty());
        let fd = open(OFlags::RDONLY | OFlags::NONBLOCK).context(what)?;
        let hold = open(OFlags::WRONLY | OFlags::NONBLOCK).context(what)?;
        Ok(Self { kind, fd, _hold: hold, begun: Vec::new(), overlong: false })
    }

    fn read(&mut self) -> Vec<Order> {
        let mut orders = Vec::new();
        let mut bytes = [0u8; 256];
        loop {
            match rustix::io::read(self.fd.as_fd(), &mut bytes) {
                Ok(n) if n > 0 => self.feed(&bytes[..n], &mut orders),
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => return orders,
            }
        }
    }

    fn feed(&mut self, bytes: &[u8], orders: &mut Vec<Order>) {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            let (text, ended) = piece.strip_suffix(b"\n").map_or((piece, false), |t| (t, true));
            if self.begun.len() + text.len() > LONGEST {
                self.overlong = true;
            }
            if !self.overlong {
                self.begun.extend_from_slice(text);
            }
            if !ended {
                continue;
            }
            let line = std::mem::take(&mut self.begun);
            let order = if std::mem::take(&mut self.overlong) { None } else { order(self.kind, &line) };
            match order {
                Some(order) => orders.push(order),
                None => crate::say::warn(format_args!("{:?} FIFO: no such order", self.kind)),
            }
        }
    }
}

fn order(kind: Kind, line: &[u8]) -> Option<Order> {
    let mut numbers = Numbers(line);
    let what = match kind {
        Kind::Control => numbers.next()?,
        Kind::Winsz => 1,
    };
    let (height, width) = (numbers.next()?, numbers.next()?);
    let size = |n: i64| u16::try_from(n).ok().filter(|n| *n <= GREATEST);
    let (height, width) = (size(height)?, size(width)?);
    match what {
        1 => Some(Order::Resize { height, width }),
        2 => Some(Order::Reopen),
        _ => None,
    }
}

/// Numbers as scanf's `%d %d` reads them: blanks between, decimal, what follows the
/// last one wanted is of no interest.
struct Numbers<'a>(&'a [u8]);

impl Iterator for Numbers<'_> {
    type Item = i64;

    fn next(&mut self) -> Option<i64> {
        let text = self.0.trim_ascii_start();
        let sign = usize::from(matches!(text.first(), Some(b'-' | b'+')));
        let digits = text[sign..].iter().take_while(|b| b.is_ascii_digit()).count();
        let (number, rest) = text.split_at(sign + digits);
        self.0 = rest;
        std::str::from_utf8(number).ok()?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_scanf_does() {
        let control = |l: &str| order(Kind::Control, l.as_bytes());
        let resize = |height, width| Some(Order::Resize { height, width });
        assert_eq!(control("1 24 80"), resize(24, 80));
        assert_eq!(control("1 2 2 3"), resize(2, 2));
        assert_eq!(control("1 0010 0020"), resize(10, 20));
        assert_eq!(control("1 1000 1000"), resize(1000, 1000));
        assert_eq!(control("2 0 0"), Some(Order::Reopen));
        assert_eq!(order(Kind::Winsz, b"24 80"), resize(24, 80));
        for bad in ["", "foo", "1", "1 2", "999 2 2", "1 -1 -1", "1 10.5 20.3", "1 0x10 0x20", "1 1001 2", "1 2 100000"]
        {
            assert_eq!(control(bad), None, "{bad}");
        }
    }

    #[test]
    fn lines_come_in_pieces_and_long_ones_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let poll = Poll::new().unwrap();
        let mut c = Control::make(dir.path(), &poll).unwrap();
        let write = |text: &str| {
            let mut f = std::fs::OpenOptions::new().write(true).open(dir.path().join("ctl")).unwrap();
            std::io::Write::write_all(&mut f, text.as_bytes()).unwrap();
        };
        write("1 24");
        assert!(c.read_ctl().is_empty());
        write(" 80\n2 0 0\n");
        assert_eq!(c.read_ctl(), [Order::Resize { height: 24, width: 80 }, Order::Reopen]);
        write(&format!("1 2 2 {}\n1 3 3\n", "#".repeat(5000)));
        assert_eq!(c.read_ctl(), [Order::Resize { height: 3, width: 3 }]);
    }
}
