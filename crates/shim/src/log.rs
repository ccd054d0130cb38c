//! The shim's own log: lines of key=value into the FIFO or file `log` of its
//! bundle, which containerd copies into its own. Nothing is written where there
//! is none, and nobody ever waits for a reader.

use rustix::fs::{Mode, OFlags};
use std::fmt::Display;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::OnceLock;

static SINK: OnceLock<OwnedFd> = OnceLock::new();

/// Opens `<bundle>/log`, once per process. Read-write, so that neither a missing
/// nor a restarted reader of the FIFO matters.
pub fn open(bundle: &Path) {
    let flags = OFlags::RDWR | OFlags::APPEND | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    if let Ok(fd) = rustix::fs::open(bundle.join("log"), flags, Mode::empty()) {
        let _ = SINK.set(fd);
    }
}

/// Writes one line.
pub fn line(level: &str, message: impl Display) {
    let Some(sink) = SINK.get() else { return };
    let at = stdio::cri_log::timestamp(std::time::SystemTime::now());
    let text = message.to_string();
    let line = format!("time=\"{at}\" level={level} msg={text:?}\n");
    // A full FIFO loses the line: the containers come first.
    let _ = rustix::io::write(sink, line.as_bytes());
}

/// Something that an operator should see.
pub fn warn(message: impl Display) {
    line("warning", message);
}
