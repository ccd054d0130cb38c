//! The metadata database: SQLite in WAL mode, one writer thread.
//!
//! ```text
//! <dir>/longshore.db        0600, in a directory of 0700
//! <dir>/longshore.db-wal    anyone may read along with sqlite3 while we run
//! <dir>/longshore.db-shm
//! <dir>/ballast             4 MiB, given up when the disk is full
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
mod error;
mod images;
mod meta;
mod network;
mod pods;
mod schema;
mod snapshots;
mod writer;

pub use error::SqlExt;
pub use images::{ImageRecord, ManifestRecord};
pub use network::{AddressRange, AddressWish, NetworkClaims, PortClaim};
pub use pods::{ContainerRecord, PodRecord};
pub use snapshots::{SnapshotKind, SnapshotRecord};

use rusqlite::{Connection, OpenFlags, Transaction};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use types::{Error, Result, ResultExt};
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
    /// A database of a newer release is opened as it is: migrations only add.
    ///
    /// # Errors
    /// When the directory or the file can't be made or read, or is no database.
    pub fn open(dir: &Path) -> Result<Store> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .context(|| format!("make the database's directory {}", dir.display()))?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
            .context(|| format!("close {} to other users", dir.display()))?;
        let path = dir.join(FILE_NAME);
        // SQLite gives its -wal and -shm files the mode of the database itself.
        std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .context(|| format!("open the database {}", path.display()))?;
        let mut connection = connect(&path, false)?;
        connection
            .pragma_update(None, "journal_mode", "WAL")
            .and_then(|()| connection.pragma_update(None, "synchronous", "NORMAL"))
            .sql(|| format!("set up the database {}", path.display()))?;
        schema::migrate(&mut connection).map_err(|e| e.within(path.display()))?;
        let writer = Writer::start(connection, dir)?;
        Ok(Store { inner: Arc::new(Inner { path, writer, readers: Mutex::new(Vec::new()) }) })
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
                None => connect(&inner.path, true)?,
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
        self.inner.writer.stop();
        self.inner.readers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// A connection with the settings that all of ours share.
fn connect(path: &Path, read_only: bool) -> Result<Connection> {
    let access = if read_only { OpenFlags::SQLITE_OPEN_READ_ONLY } else { OpenFlags::SQLITE_OPEN_READ_WRITE };
    let connection = Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)
        .sql(|| format!("open the database {}", path.display()))?;
    connection
        .busy_timeout(BUSY_TIMEOUT)
        // 512 KiB of pages: the whole of a usual node's database, and little to idle with.
        .and_then(|()| connection.pragma_update(None, "cache_size", -512))
        .sql(|| format!("set up the database {}", path.display()))?;
    Ok(connection)
}
