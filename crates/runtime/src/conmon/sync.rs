//! The sync pipe: JSON lines from the monitor (behaviours.md section 2).
//!
//! ```text
//! create                {"pid":N}
//! exec, api-version 0   {"exit_code":N}
//! exec, api-version 1   {"data":PID}  then  {"data":STATUS}
//! a failure             a negative number, with or without "message"
//! ```

use rustix::io::Errno;
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use types::{Error, Result, ResultExt};

/// More than this before a newline is no line of a monitor's.
const LONGEST: usize = 64 << 10;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    /// A pid, or an exit status.
    pub(crate) number: i64,
    /// What went wrong.
    pub(crate) message: Option<String>,
}

/// Our end of the pipe.
pub(crate) struct Sync {
    fd: AsyncFd<OwnedFd>,
    read: Vec<u8>,
}

impl Sync {
    pub(crate) fn new(fd: OwnedFd) -> Result<Self> {
        let fd = stdio::watch(fd, Interest::READABLE).context(|| "watch a monitor's sync pipe".into())?;
        Ok(Self { fd, read: Vec::new() })
    }

    /// The next line; `None` at the pipe's end, which means that the monitor has
    /// gone. May be dropped and called again.
    ///
    /// # Errors
    /// What is no such line; the monitor then counts as dead too.
    pub(crate) async fn next(&mut self) -> Result<Option<Line>> {
        loop {
            if let Some(end) = self.read.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return parse(&line).map(Some);
            }
            if self.read.len() > LONGEST {
                return Err(Error::internal("the monitor writes without end to its sync pipe"));
            }
            let mut ready = self.fd.readable().await.context(|| "wait for a monitor".into())?;
            let mut some = [0u8; 4096];
            match rustix::io::read(self.fd.get_ref(), &mut some) {
                Ok(0) | Err(Errno::CONNRESET) => return Ok(None),
                Ok(n) => self.read.extend_from_slice(&some[..n]),
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e).context(|| "read a monitor's sync pipe".into()),
            }
        }
    }
}

fn parse(line: &[u8]) -> Result<Line> {
    let text = String::from_utf8_lossy(line);
    let shown = || {
        let shown: String = text.trim().chars().take(200).collect();
        format!("the monitor says {shown:?}, which is no line of a conmon's")
    };
    let value: serde_json::Value = serde_json::from_str(&text).context_kind(types::ErrorKind::Internal, shown)?;
    let number = ["data", "pid", "exit_code"].iter().find_map(|k| value.get(k)?.as_i64());
    let message = value.get("message").and_then(serde_json::Value::as_str).map(str::to_string);
    match number {
        Some(number) => Ok(Line { number, message: message.filter(|m| !m.trim().is_empty()) }),
        None => Err(Error::internal(shown())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn all_dialects_are_read() {
        let line = |number, message: Option<&str>| Line { number, message: message.map(str::to_string) };
        assert_eq!(parse(b"{\"pid\": 17}\n").unwrap(), line(17, None));
        assert_eq!(
            parse(b"{\"exit_code\":-1, \"message\": \"a \\\"b\\\"\\nc\"}").unwrap(),
            line(-1, Some("a \"b\"\nc"))
        );
        assert_eq!(parse(b"{\"data\":0,\"message\":\"\"}").unwrap(), line(0, None));
        assert!(parse(b"{}").is_err() && parse(b"[conmon:e]: no").is_err());
    }

    #[tokio::test]
    async fn lines_come_in_pieces_and_the_end_is_seen() {
        let (ours, theirs) = rustix::pipe::pipe().unwrap();
        let mut theirs = std::fs::File::from(theirs);
        let mut sync = Sync::new(ours).unwrap();
        theirs.write_all(b"{\"data\":5}\n{\"da").unwrap();
        assert_eq!(sync.next().await.unwrap().unwrap().number, 5);
        theirs.write_all(b"ta\":6}\n").unwrap();
        assert_eq!(sync.next().await.unwrap().unwrap().number, 6);
        drop(theirs);
        assert_eq!(sync.next().await.unwrap(), None);
    }
}
