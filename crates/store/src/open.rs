//! Opening the database, and restoring one that is damaged.
//!
//! ```text
//!  open, quick_check, migrate, compare schema ──damaged──┐
//!  its mark against the copy's ─────────────────older────┤
//!           │ sound                                      ▼
//!           ▼                     longshore.db ──► longshore.db.damaged-<time>, -wal, -shm
//!         Store                   the copy, where it is sound ──► longshore.db; else an empty one
//! ```
//!
//! A disk that is full or can't be written is no damage: nothing is put aside then.

use crate::ballast::Ballast;
use crate::copy::{self, with_suffix};
use crate::mark::Mark;
use crate::{FILE_NAME, schema};
use rusqlite::{Connection, ErrorCode};
use std::collections::BTreeSet;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use types::{Error, Result, ResultExt};

/// So many damaged databases are kept, the newest.
const KEPT: usize = 3;
/// Between the database's name and the time at which it was put aside.
const ASIDE: &str = ".damaged-";

/// That a database was damaged, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// What was wrong with it.
    pub why: String,
    /// Where it lies now; `None` where nothing was there any more.
    pub aside: Option<PathBuf>,
    /// True where its records came back, false where there was no copy of them.
    pub complete: bool,
    /// When.
    pub at: SystemTime,
}

/// Why a database can't be used.
enum Ill {
    /// What is in it is wrong.
    Damaged(String),
    /// Anything else, such as a full disk.
    Other(Error),
}

impl Ill {
    fn of(error: rusqlite::Error, what: &str) -> Self {
        match error.sqlite_error_code() {
            // `Unknown` is SQLite's general error: a statement that the schema does not bear.
            Some(
                ErrorCode::DatabaseCorrupt
                | ErrorCode::NotADatabase
                | ErrorCode::Unknown
                | ErrorCode::ConstraintViolation
                | ErrorCode::TypeMismatch
                | ErrorCode::SchemaChanged,
            )
            | None => Self::Damaged(format!("{what}: {error}")),
            Some(_) => Self::Other(crate::error::told(error, what.to_string())),
        }
    }
}

/// Opens the database in `dir`, ready to be written; what was damaged is restored from
/// the copy in `copies`.
pub(crate) fn open(dir: &Path, copies: Option<&Path>) -> Result<(Connection, Mark, Option<Restored>)> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .context(|| format!("make the database's directory {}", dir.display()))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
        .context(|| format!("close {} to other users", dir.display()))?;
    let path = dir.join(FILE_NAME);
    let fresh = std::fs::metadata(&path).map_or(true, |m| m.len() == 0);
    let copy = copies.and_then(|dir| sound_copy(&dir.join(copy::FILE_NAME)));
    let mut opened = open_sound(&path);
    if matches!(opened, Err(Ill::Other(_))) && Ballast::give_up_in(dir) {
        opened = open_sound(&path);
    }
    let why = match opened {
        Ok((connection, mark)) => match &copy {
            Some((_, theirs)) if fresh => format!("it is gone, and was at change {}", theirs.sequence),
            Some((_, theirs)) if mark.is_older_than(theirs) => {
                format!("its last {} changes are missing", theirs.sequence - mark.sequence)
            }
            _ => return Ok((connection, mark, None)),
        },
        Err(Ill::Damaged(why)) => why,
        Err(Ill::Other(e)) => return Err(e),
    };
    let aside = if fresh { drop_remains(&path)? } else { Some(put_aside(&path)?) };
    let complete = copy.is_some();
    if let Some((copy, _)) = copy {
        let new = dir.join("restored.db");
        copy::write_whole(&copy, &new)?;
        std::fs::rename(&new, &path).context(|| format!("put {} in its place", path.display()))?;
    }
    let (connection, mark) = open_sound(&path).map_err(|ill| match ill {
        Ill::Damaged(why) => Error::internal(format!("the restored database {}: {why}", path.display())),
        Ill::Other(e) => e,
    })?;
    let restored = Restored { why, aside, complete, at: SystemTime::now() };
    say(&path, &restored);
    Ok((connection, mark, Some(restored)))
}

fn say(path: &Path, restored: &Restored) {
    let aside = restored.aside.as_ref().map(|p| format!("; it lies aside as {}", p.display())).unwrap_or_default();
    let rest = if restored.complete {
        "its records were restored from their copy"
    } else {
        "there is no copy of its records: what runs goes on, but its records and the images are gone"
    };
    tracing::error!("the database {} was damaged ({}): {rest}{aside}", path.display(), restored.why);
}

/// The copy, if it is whole.
fn sound_copy(path: &Path) -> Option<(Connection, Mark)> {
    if !path.exists() {
        return None;
    }
    let opened = copy::open(path).map_err(|e| Ill::of(e, "open it")).and_then(|c| {
        check(&c)?;
        Ok((Mark::read(&c).map_err(Ill::Other)?, c))
    });
    match opened {
        Ok((Some(mark), connection)) => Some((connection, mark)),
        Ok((None, _)) => None,
        Err(Ill::Damaged(e)) => {
            tracing::warn!("the copy of the database {} can't be used: {e}", path.display());
            None
        }
        Err(Ill::Other(e)) => {
            tracing::warn!("the copy of the database {} can't be used: {e}", path.display());
            None
        }
    }
}

fn open_sound(path: &Path) -> Result<(Connection, Mark), Ill> {
    // SQLite gives its -wal and -shm files the mode of the database itself.
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .context(|| format!("open the database {}", path.display()))
        .map_err(Ill::Other)?;
    let what = format!("open the database {}", path.display());
    let mut connection = crate::connect(path, false).map_err(|e| Ill::of(e, &what))?;
    connection
        .pragma_update(None, "journal_mode", "WAL")
        .and_then(|()| connection.pragma_update(None, "synchronous", "NORMAL"))
        .map_err(|e| Ill::of(e, &what))?;
    check(&connection)?;
    schema::migrate(&mut connection).map_err(|(what, e)| Ill::of(e, &what))?;
    compare(&connection)?;
    let mark = Mark::ensure(&connection).map_err(Ill::Other)?;
    Ok((connection, mark))
}

/// Looks at each page.
fn check(connection: &Connection) -> Result<(), Ill> {
    let what = "check it";
    let found: String =
        connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(|e| Ill::of(e, what))?;
    if found == "ok" { Ok(()) } else { Err(Ill::Damaged(found.replace('\n', " "))) }
}

/// That each table and column of ours is there; more are a newer release's. Such a
/// release's database without one of ours is no damaged one.
fn compare(connection: &Connection) -> Result<(), Ill> {
    let columns = |c: &Connection| -> rusqlite::Result<BTreeSet<(String, String)>> {
        c.prepare(
            "SELECT t.name, c.name FROM sqlite_schema AS t JOIN pragma_table_info(t.name) AS c WHERE t.type='table'",
        )?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
    };
    let mut ours = Connection::open_in_memory().map_err(|e| Ill::of(e, "make the schema"))?;
    schema::migrate(&mut ours).map_err(|(what, e)| Ill::of(e, &what))?;
    let ours = columns(&ours).map_err(|e| Ill::of(e, "list the schema"))?;
    let theirs = columns(connection).map_err(|e| Ill::of(e, "list its schema"))?;
    match ours.difference(&theirs).next() {
        None => Ok(()),
        Some((table, column)) => {
            let what = format!("it has no column {column} in a table {table}");
            let version = schema::version(connection).map_err(|e| Ill::of(e, "read the schema's version"))?;
            if version <= schema::KNOWN {
                return Err(Ill::Damaged(what));
            }
            let path = connection.path().unwrap_or("longshore.db");
            Err(Ill::Other(
                Error::precondition(format!(
                    "the database {path} was written by a newer release: its schema is version {version}, this \
                     release knows version {}, and {what}",
                    schema::KNOWN
                ))
                .hint("start the newer release again"),
            ))
        }
    }
}

/// Renames the database and its log; a number is added where two fall into one second.
fn put_aside(path: &Path) -> Result<PathBuf> {
    let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let mut aside = with_suffix(path, &format!("{ASIDE}{time}"));
    let mut n = 1;
    while aside.exists() {
        n += 1;
        aside = with_suffix(path, &format!("{ASIDE}{time}-{n}"));
    }
    for suffix in ["-wal", "-shm", ""] {
        let (from, to) = (with_suffix(path, suffix), with_suffix(&aside, suffix));
        match std::fs::rename(&from, &to) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).context(|| format!("put the damaged {} aside as {}", from.display(), to.display()));
            }
            _ => {}
        }
    }
    for old in set_aside(path.parent().unwrap_or(path)).into_iter().rev().skip(KEPT) {
        for suffix in ["-wal", "-shm", ""] {
            let _ = std::fs::remove_file(with_suffix(&old, suffix));
        }
    }
    Ok(aside)
}

/// Of a database that is gone, a log may be left, which must not be the next one's.
fn drop_remains(path: &Path) -> Result<Option<PathBuf>> {
    for suffix in ["-wal", "-shm", ""] {
        let file = with_suffix(path, suffix);
        match std::fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).context(|| format!("remove {}", file.display()));
            }
            _ => {}
        }
    }
    Ok(None)
}

/// The damaged databases that lie aside in the database's directory, oldest first.
pub fn set_aside(dir: &Path) -> Vec<PathBuf> {
    let prefix = format!("{FILE_NAME}{ASIDE}");
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut found: Vec<PathBuf> = names
        .filter(|n| n.starts_with(&prefix) && !n.ends_with("-wal") && !n.ends_with("-shm"))
        .map(|n| dir.join(n))
        .collect();
    found.sort();
    found
}

/// Looks at the database in `dir` from outside, also while a daemon runs.
///
/// # Errors
/// What is wrong with it; `NotFound` where there is none.
pub fn examine(dir: &Path) -> Result<()> {
    let path = dir.join(FILE_NAME);
    if !path.exists() {
        return Err(Error::not_found(format!("there is no database {}", path.display())));
    }
    let connection = match crate::connect(&path, true).map_err(|e| Ill::of(e, "open it")) {
        Ok(connection) => connection,
        Err(ill) => return Err(told(&path, ill)),
    };
    match check(&connection).and_then(|()| compare(&connection)) {
        Ok(()) => Ok(()),
        Err(ill) => Err(told(&path, ill)),
    }
}

fn told(path: &Path, ill: Ill) -> Error {
    match ill {
        Ill::Damaged(why) => Error::internal(format!("the database {} is damaged: {why}", path.display())),
        Ill::Other(e) => e,
    }
}
