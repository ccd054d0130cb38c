//! The monitor's own messages: to standard error, which is the caller's until we
//! have daemonised, and to syslog where that is asked for.

use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use std::fmt::Arguments;
use std::io::Write;
use std::sync::OnceLock;
use types::{Error, Result};

/// How much is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What ends us.
    Error,
    /// What goes on otherwise than it should.
    Warn,
    /// What happens.
    Info,
    /// How it happens.
    Debug,
    /// Every call.
    Trace,
}

impl Level {
    /// Reads a `--log-level`.
    ///
    /// # Errors
    /// `InvalidArgument` naming it.
    pub fn parse(name: &str) -> Result<Self> {
        match name.to_ascii_lowercase().as_str() {
            "error" | "fatal" | "panic" => Ok(Self::Error),
            "warn" | "warning" => Ok(Self::Warn),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err(Error::invalid(format!("No such log level {name}"))),
        }
    }

    /// What stands in front of a message in syslog.
    fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "nwarn",
            Self::Info => "ninfo",
            Self::Debug => "ndebug",
            Self::Trace => "ntrace",
        }
    }

    fn letter(self) -> char {
        match self {
            Self::Error => 'e',
            Self::Warn => 'w',
            Self::Info => 'i',
            Self::Debug => 'd',
            Self::Trace => 't',
        }
    }
}

struct Say {
    level: Level,
    syslog: Option<String>,
}

static SAY: OnceLock<Say> = OnceLock::new();

/// Sets what is said from now on; `syslog` names the container there. Once.
pub fn configure(level: Level, syslog: Option<&str>) {
    let _ = SAY.set(Say { level, syslog: syslog.map(|id| id.chars().take(20).collect()) });
}

fn say(level: Level, text: Arguments<'_>) {
    let now = SAY.get();
    if level > now.map_or(Level::Warn, |s| s.level) {
        return;
    }
    // Nobody may be there to read it.
    let _ = writeln!(std::io::stderr(), "[conmon:{}]: {text}", level.letter());
    if let Some(id) = now.and_then(|s| s.syslog.as_deref()) {
        let _ = to_syslog(line(level, id, text).as_bytes());
    }
}

/// A line as conmon has it. Facility "user"; errors, and all others as information.
fn line(level: Level, id: &str, text: Arguments<'_>) -> String {
    let priority = if level == Level::Error { 8 + 3 } else { 8 + 6 };
    format!("<{priority}>conmon[{}]: conmon {id} <{}>: {text}", std::process::id(), level.word())
}

fn to_syslog(line: &[u8]) -> std::result::Result<(), rustix::io::Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    let address = SocketAddrUnix::new("/dev/log")?;
    rustix::net::sendto(&socket, line, SendFlags::NOSIGNAL, &address).map(drop)
}

/// What ends us.
pub fn error(text: Arguments<'_>) {
    say(Level::Error, text);
}

/// What goes on otherwise than it should.
pub fn warn(text: Arguments<'_>) {
    say(Level::Warn, text);
}

/// What happens.
pub fn info(text: Arguments<'_>) {
    say(Level::Info, text);
}

/// How it happens.
pub fn debug(text: Arguments<'_>) {
    say(Level::Debug, text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syslog_s_lines_are_conmon_s() {
        let pid = std::process::id();
        assert_eq!(line(Level::Error, "abc", format_args!("x")), format!("<11>conmon[{pid}]: conmon abc <error>: x"));
        assert_eq!(line(Level::Warn, "abc", format_args!("y")), format!("<14>conmon[{pid}]: conmon abc <nwarn>: y"));
    }
}
