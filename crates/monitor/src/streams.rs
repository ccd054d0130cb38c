//! The process's streams, our ends of them.

use crate::poll::{EDGE, Flags, Poll, Token, never_block};
use crate::settings::Settings;
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use stdio::Stream;
use types::Result;

/// The most bytes of one read, and of one packet to an attach client.
pub const CHUNK: usize = 8192;

/// What a read has brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Got {
    /// So many bytes.
    Bytes(usize),
    /// None now.
    Nothing,
    /// The other side is closed for good.
    End,
}

/// A stream that the process writes to.
#[derive(Debug)]
pub struct Source {
    /// Which one; a terminal counts as stdout.
    pub stream: Stream,
    fd: OwnedFd,
    terminal: bool,
    watched: bool,
    /// A terminal has told that it has bytes, and has not been read empty since.
    pub ready: bool,
}

impl Source {
    /// Our end of a pipe, or a terminal's master.
    pub fn new(stream: Stream, fd: OwnedFd, terminal: bool) -> Self {
        Self { stream, fd, terminal, watched: false, ready: false }
    }

    fn token(&self) -> Token {
        if self.stream == Stream::Stderr { Token::Stderr } else { Token::Stdout }
    }

    /// Waits for bytes, or no more while nobody could take them. A hang-up can't be
    /// masked, so that one who does not want to hear of it has to leave.
    pub fn listen(&mut self, poll: &Poll, on: bool) {
        if on && !self.watched {
            // A terminal that nobody has open is hung up until somebody opens it.
            let flags = if self.terminal { Flags::IN | EDGE } else { Flags::IN };
            self.watched = poll.watch(&self.fd, self.token(), flags).is_ok();
        } else if !on && self.watched {
            poll.forget(&self.fd);
            self.watched = false;
        }
    }

    /// Whether it can be read without being told so anew.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Reads once.
    pub fn read(&self, buffer: &mut [u8]) -> Got {
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut *buffer)) {
            Ok(0) => Got::End,
            Ok(n) => Got::Bytes(n),
            Err(Errno::AGAIN) => Got::Nothing,
            // How a terminal says that nobody has it open now.
            Err(Errno::IO) if self.terminal => Got::Nothing,
            Err(_) => Got::End,
        }
    }

    /// How many bytes wait in it.
    pub fn waiting(&self) -> u64 {
        rustix::io::ioctl_fionread(&self.fd).unwrap_or(0)
    }

    /// The descriptor.
    pub fn fd(&self) -> impl AsFd + '_ {
        &self.fd
    }
}

/// The stream that the process reads from.
#[derive(Debug)]
pub enum Stdin {
    /// It has none; what clients send is thrown away.
    None,
    /// Its terminal has not come yet.
    Awaited,
    /// Our end.
    Open {
        /// The pipe's writing end, or a terminal's master.
        fd: OwnedFd,
        /// The poll tells when there is room.
        watched: bool,
    },
}

impl Stdin {
    /// An open one.
    pub fn open(fd: OwnedFd) -> Self {
        Self::Open { fd, watched: false }
    }

    /// Writes what has room; returns how much of `bytes` is done with.
    pub fn write(&mut self, bytes: &[u8], poll: &Poll) -> usize {
        let Self::Open { fd, watched } = self else {
            return if matches!(self, Self::None) { bytes.len() } else { 0 };
        };
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::write(&*fd, &bytes[done..]) {
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !*watched {
                        *watched = poll.watch(&*fd, Token::Stdin, Flags::OUT | EDGE).is_ok();
                    }
                    return done;
                }
                // The process has closed it, or has ended.
                Err(_) => {
                    *self = Self::None;
                    return bytes.len();
                }
            }
        }
        done
    }

    /// The process sees the end of its input.
    pub fn close(&mut self) {
        *self = Self::None;
    }
}

/// Both sides of the process's streams.
#[derive(Default)]
pub struct Pipes {
    /// The runtime's ends, of stdin, stdout and stderr.
    pub theirs: [Option<OwnedFd>; 3],
    /// Our end of stdin.
    pub stdin: Option<OwnedFd>,
    /// Our ends of what it writes to.
    pub sources: Vec<Source>,
}

impl Pipes {
    /// The runtime's own errors come by the pipe of stderr, with a terminal too.
    ///
    /// # Errors
    /// Where descriptors have run out.
    pub fn make(s: &Settings) -> Result<Self> {
        let mut pipes = Self::default();
        if s.stdin && !s.terminal {
            let (theirs, ours) = stdio::fifo::pipe()?;
            never_block(&ours)?;
            (pipes.theirs[0], pipes.stdin) = (Some(theirs), Some(ours));
        }
        for (i, stream) in [(1, Stream::Stdout), (2, Stream::Stderr)] {
            if stream == Stream::Stdout && s.terminal {
                continue;
            }
            let (ours, theirs) = stdio::fifo::pipe()?;
            never_block(&ours)?;
            pipes.theirs[i] = Some(theirs);
            pipes.sources.push(Source::new(stream, ours, false));
        }
        Ok(pipes)
    }
}
