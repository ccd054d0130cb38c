//! The metadata database: SQLite in WAL mode, one writer thread.
//!
//! ```text
//! <dir>/longshore.db        0600, in a directory of 0700
//! <dir>/longshore.db-wal    anyone may read along with sqlite3 while we run
//! <dir>/longshore.db-shm
//! <dir>/longshore.db.damaged-<time>   one that was damaged, kept for people to look at
//! <dir>/ballast             4 MiB, given up when the disk is full
//! <copies>/copy.db          the same records once more, for when the first is damaged
//! ```
//!
//! Pods and containers commit with `synchronous=NORMAL`: that survives a crash
//! of ours; after a power loss the last moments may be missing and are
//! reconciled from what is on disk and running. Images and snapshots commit
//! with `FULL`.
//!
//! Records hold JSON as text. They are handed out as they stand, so that one
//! that can't be parsed costs its caller one record and not the list.

mod ballast;
mod copy;
mod error;
mod images;
mod mark;
mod meta;
mod network;
mod open;
mod pods;
mod schema;
mod snapshots;
mod writer;

pub use error::SqlExt;
pub use images::{ImageRecord, ManifestRecord};
pub use network::{AddressRange, AddressWish, NetworkClaims, PortClaim};
pub use open::{Restored, examine, set_aside};
pub use pods::{ContainerRecord, PodRecord};
pub use snapshots::{SnapshotKind, SnapshotRecord};

use rusqlite::{Connection, OpenFlags, Transaction};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use types::{Error, Result};
use writer::{Purpose, Writer};

/// The database's file name inside its directory.
pub const FILE_NAME: &str = "longshore.db";
/// How long a connection waits for another process's lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// Reading connections that are kept for the next reader.
const IDLE_READERS: usize = 2;

/// What a commit has survived once it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The death of our process (`synchronous=NORMAL`).
    Normal,
    /// A power loss (`synchronous=FULL`).
    Full,
}

/// A handle to the database; clones share it.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    restored: Option<Restored>,
    writer: Writer,
    readers: Mutex<Vec<Connection>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("path", &self.inner.path).finish()
    }
}

impl Store {
    /// Opens or makes the database in `dir`, and brings its schema forward.
    ///
    /// A database of a newer release is opened as it is: migrations only add. A damaged
    /// one is put aside, and an empty one begun.
    ///
    /// # Errors
    /// When the directory or the file can't be made, read or written.
    pub fn open(dir: &Path) -> Result<Store> {
        Self::begin(dir, None)
    }

    /// The same, with a copy of all records in the directory `copies`, from which a
    /// damaged database is restored.
    ///
    /// # Errors
    /// As [`Store::open`]; a copy that can't be made is logged, and tried again.
    pub fn open_with_copy(dir: &Path, copies: &Path) -> Result<Store> {
        Self::begin(dir, Some(copies))
    }

    fn begin(dir: &Path, copies: Option<&Path>) -> Result<Store> {
        let (connection, mark, restored) = open::open(dir, copies)?;
        let writer = Writer::start(connection, dir, copies, mark.sequence)?;
        let path = dir.join(FILE_NAME);
        Ok(Store { inner: Arc::new(Inner { path, restored, writer, readers: Mutex::new(Vec::new()) }) })
    }

    /// That this opening found a damaged database, and what became of it.
    pub fn restored(&self) -> Option<&Restored> {
        self.inner.restored.as_ref()
    }

    /// Where the database is.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Runs `f` in a transaction on the writer thread and commits it: something
    /// new, which a full disk refuses. Once sent, the transaction is carried out
    /// even if this future is dropped.
    ///
    /// # Errors
    /// What `f` returned (then nothing is committed), or why the commit failed.
    pub async fn write<T, F>(&self, durability: Durability, f: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnMut(&Transaction<'_>) -> Result<T> + Send + 'static,
    {
        self.inner.writer.send(durability, Purpose::New, f)?.await.map_err(|_| writer::closed())?
    }

    /// The same for a change or an end of what is there, which must go through on a
    /// full disk too: there the ballast is given up and `f` runs a second time,
    /// which is why it is `FnMut`; its first run has been rolled back by then.
    ///
    /// # Errors
    /// As [`Store::write`].
    pub async fn write_end<T, F>(&self, durability: Durability, f: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnMut(&Transaction<'_>) -> Result<T> + Send + 'static,
    {
        self.inner.writer.send(durability, Purpose::End, f)?.await.map_err(|_| writer::closed())?
    }

    /// Runs `f` on a read-only connection in a blocking thread.
    ///
    /// # Errors
    /// What `f` returned, or why no connection could be had.
    pub async fn read<T, F>(&self, f: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let inner = self.inner.clone();
        let task = tokio::task::spawn_blocking(move || {
            let idle = inner.readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let connection = match idle {
                Some(c) => c,
                None => connect(&inner.path, true).sql(|| format!("open the database {}", inner.path.display()))?,
            };
            let result = f(&connection);
            let mut readers = inner.readers.lock().unwrap_or_else(PoisonError::into_inner);
            if readers.len() < IDLE_READERS {
                readers.push(connection);
            }
            result
        });
        task.await.map_err(|e| Error::internal("read the database").because(e))?
    }

    /// Carries out what has been sent so far and closes the writer; later
    /// writes through other clones are refused. Blocks until it is done.
    pub fn close(self) {
        // The writer last: whoever is last brings the log into the database, which readers can't.
        self.inner.readers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.inner.writer.stop();
    }
}

/// A connection with the settings that all of ours share.
fn connect(path: &Path, read_only: bool) -> rusqlite::Result<Connection> {
    let access = if read_only { OpenFlags::SQLITE_OPEN_READ_ONLY } else { OpenFlags::SQLITE_OPEN_READ_WRITE };
    let connection = Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // 512 KiB of pages: the whole of a usual node's database, and little to idle with.
    connection.pragma_update(None, "cache_size", -512)?;
    Ok(connection)
}
