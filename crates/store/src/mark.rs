//! Which database this is, and how many transactions have changed it: so that one that
//! has lost its last changes, as with a torn log, can be told from its copy.

use crate::SqlExt;
use rusqlite::{Connection, OptionalExtension};
use types::Result;

const LINEAGE: &str = "lineage";
const SEQUENCE: &str = "sequence";

/// What tells a database and its copy apart from others, and from older states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Random, from the database's making on.
    pub lineage: String,
    /// One more with each transaction that changes anything.
    pub sequence: i64,
}

impl Mark {
    /// The mark of a database, if it has one yet.
    pub(crate) fn read(connection: &Connection) -> Result<Option<Self>> {
        let value = |key: &str| -> Result<Option<String>> {
            connection
                .query_row("SELECT value FROM meta WHERE key=?1", [key], |row| row.get(0))
                .optional()
                .sql(|| format!("read the database's {key}"))
        };
        let Some(lineage) = value(LINEAGE)? else { return Ok(None) };
        let sequence = value(SEQUENCE)?.and_then(|s| s.parse().ok()).unwrap_or(0);
        Ok(Some(Self { lineage, sequence }))
    }

    /// The mark of a database, which gets one where it has none.
    pub(crate) fn ensure(connection: &Connection) -> Result<Self> {
        if let Some(mark) = Self::read(connection)? {
            return Ok(mark);
        }
        connection
            .execute("INSERT INTO meta (key, value) VALUES (?1, lower(hex(randomblob(16))))", [LINEAGE])
            .sql(|| "mark the database".into())?;
        Ok(Self::read(connection)?.unwrap_or(Self { lineage: String::new(), sequence: 0 }))
    }

    /// Whether `copy` is this database at a later state.
    pub(crate) fn is_older_than(&self, copy: &Mark) -> bool {
        self.lineage == copy.lineage && self.sequence < copy.sequence
    }
}

/// Counts a transaction, as its last statement.
pub(crate) fn set_sequence(connection: &Connection, sequence: i64) -> Result<()> {
    connection
        .prepare_cached("INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)")
        .and_then(|mut s| s.execute((SEQUENCE, sequence.to_string())))
        .sql(|| "count a database transaction".into())?;
    Ok(())
}
