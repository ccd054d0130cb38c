//! A second database with the same records, where what runs has its state: should the
//! first be damaged, they are taken from there.
//!
//! ```text
//!  writer thread:  f, COMMIT in the database ──► f, COMMIT in the copy
//!                                                 │ fails, or changes another number of rows
//!                                                 ▼
//!                                          made anew, whole (VACUUM INTO), when it next can be
//! ```
//!
//! It follows by statements and not by pages, so that a damaged page never reaches it. It
//! is not written through to the disk: it outlives us, not the node, whose end nothing
//! that runs outlives either.

use crate::SqlExt;
use crate::writer::Job;
use rusqlite::{Connection, TransactionBehavior};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use types::{Error, Result, ResultExt};

/// The copy's file name inside its directory.
pub(crate) const FILE_NAME: &str = "copy.db";
/// How long after a failed making it is tried again.
const RETRY: Duration = Duration::from_secs(10);
/// Pages of cache in KiB: it is written to and hardly ever read.
const CACHE_KIB: i64 = -64;

/// The copy that follows.
#[derive(Debug)]
pub(crate) struct Copy {
    dir: PathBuf,
    /// `None` where it does not follow at present.
    connection: Option<Connection>,
    tried: Option<Instant>,
}

impl Copy {
    /// A copy in `dir`, yet to be made.
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), connection: None, tried: None }
    }

    /// Makes it anew from `main`. The old one stays until the new one is whole.
    pub(crate) fn make(&mut self, main: &Connection) {
        self.connection = None;
        let tried_before = self.tried.replace(Instant::now()).is_some();
        match make(&self.dir, main) {
            Ok(connection) => {
                if tried_before {
                    tracing::info!("the copy of the database in {} follows again", self.dir.display());
                }
                self.connection = Some(connection);
                self.tried = None;
            }
            Err(e) if tried_before => tracing::debug!("still no copy of the database: {e}"),
            Err(e) => tracing::warn!(
                "there is no copy of the database's latest changes, should it be damaged; it is tried again: {e}"
            ),
        }
    }

    /// Repeats in the copy what `main` has just committed, which changed `changes` rows.
    pub(crate) fn follow(&mut self, main: &Connection, job: &mut dyn Job, sequence: i64, changes: u64) {
        if let Some(copy) = &mut self.connection {
            match repeat(copy, job, sequence) {
                Ok(same) if same == changes => return,
                Ok(other) => tracing::warn!("the copy of the database changed {other} rows in place of {changes}"),
                Err(e) => tracing::debug!("the copy of the database does not follow: {e}"),
            }
        } else if self.tried.is_some_and(|at| at.elapsed() < RETRY) {
            return;
        }
        self.make(main);
    }
}

fn repeat(copy: &mut Connection, job: &mut dyn Job, sequence: i64) -> Result<u64> {
    let before = copy.total_changes();
    let what = || "change the copy of the database".to_string();
    let transaction = copy.transaction_with_behavior(TransactionBehavior::Immediate).sql(what)?;
    job.repeat(&transaction)?;
    let changes = transaction.total_changes() - before;
    crate::mark::set_sequence(&transaction, sequence)?;
    transaction.commit().sql(what)?;
    Ok(changes)
}

fn make(dir: &Path, main: &Connection) -> Result<Connection> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .and_then(|()| std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)))
        .context(|| format!("make {}", dir.display()))?;
    let path = dir.join(FILE_NAME);
    write_whole(main, &dir.join("new.db"))?;
    // The log of the old one must never be taken for the new one's.
    for suffix in ["-wal", "-shm"] {
        remove(&with_suffix(&path, suffix))?;
    }
    std::fs::rename(dir.join("new.db"), &path).context(|| format!("put {} in its place", path.display()))?;
    open(&path).sql(|| format!("open {}", path.display()))
}

/// Opens a copy for writing; nothing of it is checked.
pub(crate) fn open(path: &Path) -> rusqlite::Result<Connection> {
    let connection = crate::connect(path, false)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "OFF")?;
    connection.pragma_update(None, "cache_size", CACHE_KIB)?;
    Ok(connection)
}

/// Writes all of `from` into a new database, 0600.
pub(crate) fn write_whole(from: &Connection, to: &Path) -> Result<()> {
    remove(to)?;
    let text = to.to_str().ok_or_else(|| Error::invalid(format!("{} is no UTF-8", to.display())))?;
    from.execute("VACUUM INTO ?1", [text]).sql(|| format!("write {}", to.display()))?;
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o600))
        .context(|| format!("close {} to other users", to.display()))
}

/// `longshore.db` and "-wal" are `longshore.db-wal`.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context(|| format!("remove {}", path.display())),
        _ => Ok(()),
    }
}
