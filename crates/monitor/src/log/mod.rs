//! Where output goes, beside attached clients.
//!
//! ```text
//! k8s_file.rs  a file of lines like the CRI's, truncated or rotated when full
//! journal.rs   the journal's own protocol
//! ```

mod journal;
mod k8s_file;

use crate::poll::{EDGE, Flags, Poll, Token};
use crate::settings::LogSettings;
use journal::Journal;
use k8s_file::K8sFile;
use stdio::Stream;
use types::Result;

/// All logs of one process.
#[derive(Debug, Default)]
pub struct Logs {
    file: Option<K8sFile>,
    journal: Option<Journal>,
    watched: (bool, bool),
}

impl Logs {
    /// Opens them.
    ///
    /// # Errors
    /// Where the file can't be opened, or may not be where it is.
    pub fn open(settings: &LogSettings) -> Result<Self> {
        let file = settings.file.as_deref().map(|path| K8sFile::open(path, settings)).transpose()?;
        Ok(Self { file, journal: settings.journal.clone().map(Journal::new), watched: (false, false) })
    }

    /// Takes what one read has brought.
    pub fn write(&mut self, stream: Stream, bytes: &[u8]) {
        if let Some(file) = &mut self.file {
            file.write(stream, bytes);
        }
        if let Some(journal) = &mut self.journal {
            journal.write(stream, bytes);
        }
    }

    /// Whether some target has no room: more should not be read until it has.
    pub fn stalled(&self) -> bool {
        self.file.as_ref().is_some_and(K8sFile::stalled) || self.journal.as_ref().is_some_and(Journal::stalled)
    }

    /// Has the poll tell when a stalled target has room.
    pub fn watch(&mut self, poll: &Poll) {
        if let Some(file) = self.file.as_ref().filter(|f| f.stalled() && !self.watched.0) {
            self.watched.0 = poll.watch(file.fd(), Token::LogFile, Flags::OUT | EDGE).is_ok();
        }
        if let Some(fd) = self.journal.as_ref().filter(|j| j.stalled() && !self.watched.1).and_then(Journal::fd) {
            self.watched.1 = poll.watch(fd, Token::Journal, Flags::OUT | EDGE).is_ok();
        }
    }

    /// Goes on where there was no room.
    pub fn go_on(&mut self) {
        if let Some(file) = &mut self.file {
            file.go_on();
        }
        if let Some(journal) = &mut self.journal {
            journal.go_on();
            // A journal that was restarted has another socket next time.
            self.watched.1 &= journal.fd().is_some();
        }
    }

    /// Opens the file anew: it has been moved away.
    pub fn reopen(&mut self) {
        if let Some(file) = &mut self.file {
            // The poll forgets a descriptor that is closed.
            self.watched.0 = false;
            file.reopen();
        }
    }

    /// The streams have ended: what was kept for a line's end goes out.
    pub fn finish(&mut self) {
        if let Some(journal) = &mut self.journal {
            journal.finish();
        }
    }

    /// Has the kernel bring the file to the disk.
    pub fn sync(&self) {
        if let Some(file) = &self.file {
            file.sync();
        }
    }
}
