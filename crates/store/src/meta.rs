//! Single facts about the node and the database: `meta`.

use crate::{Durability, SqlExt, Store};
use rusqlite::{OptionalExtension, params};
use types::Result;

const BOOT_ID: &str = "boot_id";

impl Store {
    /// The value under `key`, if any.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn meta(&self, key: &str) -> Result<Option<String>> {
        let key = key.to_owned();
        self.read(move |c| {
            c.prepare_cached("SELECT value FROM meta WHERE key = ?1")
                .and_then(|mut s| s.query_row([&key], |row| row.get(0)).optional())
                .sql(|| format!("read {key}"))
        })
        .await
    }

    /// Sets the value under `key`, durably.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn set_meta(&self, key: &str, value: &str) -> Result<()> {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.write_end(Durability::Full, move |t| {
            t.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)", params![key, value])
                .sql(|| format!("write {key}"))?;
            Ok(())
        })
        .await
    }

    /// The kernel's boot id when this node's state was last taken up.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn boot_id(&self) -> Result<Option<String>> {
        self.meta(BOOT_ID).await
    }

    /// Remembers the boot id that the running state belongs to.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn set_boot_id(&self, id: &str) -> Result<()> {
        self.set_meta(BOOT_ID, id).await
    }
}
