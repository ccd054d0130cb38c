//! The terminal that the runtime sends over its console socket.

use crate::poll::{Flags, Poll, Token};
use crate::socket::{Named, bind};
use rustix::fs::Mode;
use rustix::net::{SocketFlags, SocketType};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use types::{Error, Result, ResultExt};

/// The socket that the runtime is told of; its name goes with it.
#[derive(Debug)]
pub struct Console {
    socket: Named,
    come: Option<OwnedFd>,
}

impl Console {
    /// Makes the socket in TMPDIR, where conmon has it too, or in /tmp.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn make(poll: &Poll) -> Result<Self> {
        let name = format!("conmon-term.{:.16}", types::new_id()?);
        let given = std::env::var_os("TMPDIR").map(PathBuf::from);
        // The runtime connects by the name, which has to fit into an address.
        let fits = |d: &PathBuf| d.is_absolute() && d.as_os_str().len() + name.len() < 106;
        let dir = given.filter(fits).unwrap_or_else(|| "/tmp".into());
        let socket = bind(&dir, &name, SocketType::STREAM, Mode::RWXU)?;
        rustix::net::listen(&socket.fd, 1).context(|| format!("listen on {}", socket.path().display()))?;
        poll.watch(&socket.fd, Token::Console, Flags::IN)?;
        Ok(Self { socket, come: None })
    }

    /// What the runtime is told.
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// The terminal's master, if it has come.
    ///
    /// # Errors
    /// Where the runtime came and brought none.
    pub fn receive(&mut self, poll: &Poll) -> Result<Option<OwnedFd>> {
        if self.come.is_none() {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let Ok(connection) = rustix::net::accept_with(&self.socket.fd, flags) else { return Ok(None) };
            poll.forget(&self.socket.fd);
            poll.watch(&connection, Token::Console, Flags::IN)?;
            self.come = Some(connection);
        }
        let Some(connection) = &self.come else { return Ok(None) };
        match sys::pty::receive_master(connection) {
            Ok(master) => {
                show_lines_as_usual(&master);
                Ok(Some(master))
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(Error::internal("the runtime brought no terminal").because(e)),
        }
    }
}

/// A newline moves to the line's beginning too, as the kubelet's terminals do.
fn show_lines_as_usual(master: &OwnedFd) {
    let changed = rustix::termios::tcgetattr(master).and_then(|mut t| {
        t.output_modes |= rustix::termios::OutputModes::ONLCR;
        rustix::termios::tcsetattr(master, rustix::termios::OptionalActions::Now, &t)
    });
    if let Err(e) = changed {
        crate::say::warn(format_args!("set up the terminal: {e}"));
    }
}
