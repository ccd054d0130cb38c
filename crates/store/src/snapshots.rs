//! Snapshots: layers by chain id, containers' writable ones by key.
//!
//! A layer lives while it is `kept` (an image names it), held (an operation
//! under way needs it) or has children; the rest is swept.

use crate::{Durability, SqlExt, Store};
use rusqlite::{OptionalExtension, Row, Transaction, params};
use types::{Error, Result};

/// What a snapshot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotKind {
    /// A layer that is being unpacked.
    Draft,
    /// A whole, read-only layer.
    Layer,
    /// A container's writable top.
    Active,
}

impl SnapshotKind {
    fn name(self) -> &'static str {
        match self {
            Self::Draft => "draft",
            Self::Layer => "layer",
            Self::Active => "active",
        }
    }

    fn of(name: &str) -> Self {
        match name {
            "layer" => Self::Layer,
            "active" => Self::Active,
            _ => Self::Draft,
        }
    }
}

/// A snapshot as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRecord {
    /// Its number, which names its directory; never reused.
    pub id: i64,
    /// Chain id of a layer, or the key of a container's snapshot.
    pub key: String,
    /// What it is for.
    pub kind: SnapshotKind,
    /// The layer beneath it.
    pub parent: Option<i64>,
    /// Disk use of a whole layer in bytes, measured once.
    pub bytes: u64,
    /// Inodes of a whole layer, measured once.
    pub inodes: u64,
    /// When it was made, in nanoseconds since the epoch.
    pub created_at_ns: i64,
}

const COLUMNS: &str = "id, key, kind, parent, bytes, inodes, created_at_ns";

impl Store {
    /// Adds a snapshot of `kind` on top of the layer `parent` (a key) and
    /// returns it. A left-over draft of the same key is replaced.
    ///
    /// # Errors
    /// `AlreadyExists` for a known key, `NotFound` for an unknown parent.
    pub async fn add_snapshot(
        &self,
        key: &str,
        kind: SnapshotKind,
        parent: Option<&str>,
        now_ns: i64,
    ) -> Result<SnapshotRecord> {
        let (key, parent) = (key.to_owned(), parent.map(str::to_owned));
        self.write(Durability::Normal, move |t| {
            let what = || format!("store snapshot {key}");
            let below = match &parent {
                None => None,
                Some(p) => match by_key(t, p)? {
                    Some(layer) if layer.kind == SnapshotKind::Layer => Some(layer.id),
                    _ => return Err(Error::not_found(format!("layer {p} is not on this node")).within(what())),
                },
            };
            t.execute("DELETE FROM snapshots WHERE key=?1 AND kind='draft'", [&key]).sql(what)?;
            t.execute(
                "INSERT INTO snapshots (key, kind, parent, created_at_ns) VALUES (?1,?2,?3,?4)",
                params![key, kind.name(), below, now_ns],
            )
            .sql(what)?;
            Ok(SnapshotRecord {
                id: t.last_insert_rowid(),
                key: key.clone(),
                kind,
                parent: below,
                bytes: 0,
                inodes: 0,
                created_at_ns: now_ns,
            })
        })
        .await
    }

    /// Makes the draft `id` a whole layer of that many bytes and inodes.
    ///
    /// # Errors
    /// `NotFound` when there is no such draft.
    pub async fn commit_snapshot(&self, id: i64, bytes: u64, inodes: u64) -> Result<()> {
        self.write(Durability::Normal, move |t| {
            let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
            let changed = t
                .execute(
                    "UPDATE snapshots SET kind='layer', bytes=?2, inodes=?3 WHERE id=?1 AND kind='draft'",
                    params![id, number(bytes), number(inodes)],
                )
                .sql(|| format!("commit snapshot {id}"))?;
            if changed == 0 { Err(Error::not_found(format!("there is no draft snapshot {id}"))) } else { Ok(()) }
        })
        .await
    }

    /// Forgets a draft or a container's snapshot, and returns its number.
    /// An unknown key is `None`.
    ///
    /// # Errors
    /// `FailedPrecondition` for a layer: those are swept.
    pub async fn delete_snapshot(&self, key: &str) -> Result<Option<i64>> {
        let key = key.to_owned();
        self.write_end(Durability::Normal, move |t| match by_key(t, &key)? {
            None => Ok(None),
            Some(s) if s.kind == SnapshotKind::Layer => {
                Err(Error::precondition(format!("snapshot {key} is a layer, which only a sweep removes")))
            }
            Some(s) => {
                t.execute("DELETE FROM snapshots WHERE id=?1", [s.id]).sql(|| format!("delete snapshot {key}"))?;
                Ok(Some(s.id))
            }
        })
        .await
    }

    /// Forgets the snapshot of this number whatever it is (its directory is gone).
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn forget_snapshot(&self, id: i64) -> Result<()> {
        self.write_end(Durability::Normal, move |t| {
            t.execute("DELETE FROM snapshots WHERE id=?1", [id]).sql(|| format!("forget snapshot {id}"))?;
            Ok(())
        })
        .await
    }

    /// The snapshot of this key; asked of the writer, so that it is in order
    /// with sweeps that were sent before.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn snapshot(&self, key: &str) -> Result<Option<SnapshotRecord>> {
        let key = key.to_owned();
        self.write(Durability::Normal, move |t| by_key(t, &key)).await
    }

    /// The layers under the snapshot `id`, topmost first, without itself.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn ancestors(&self, id: i64) -> Result<Vec<SnapshotRecord>> {
        self.write(Durability::Normal, move |t| {
            let sql = format!(
                "WITH RECURSIVE chain(level, sid) AS (
                   SELECT 0, parent FROM snapshots WHERE id=?1
                   UNION ALL SELECT level+1, s.parent FROM chain JOIN snapshots s ON s.id=chain.sid)
                 SELECT {COLUMNS} FROM chain JOIN snapshots ON snapshots.id=chain.sid ORDER BY level"
            );
            t.prepare_cached(&sql)
                .and_then(|mut s| s.query_map([id], record_of)?.collect())
                .sql(|| format!("read the layers under snapshot {id}"))
        })
        .await
    }

    /// Sees to it that new snapshots get numbers above `last`.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn reserve_snapshots(&self, last: i64) -> Result<()> {
        self.write_end(Durability::Normal, move |t| {
            let what = || format!("reserve the numbers of snapshots up to {last}");
            let now: Option<i64> = t
                .query_row("SELECT seq FROM sqlite_sequence WHERE name='snapshots'", [], |row| row.get(0))
                .optional()
                .sql(what)?;
            let statement = match now {
                Some(now) if now >= last => return Ok(()),
                Some(_) => "UPDATE sqlite_sequence SET seq=?1 WHERE name='snapshots'",
                None => "INSERT INTO sqlite_sequence (name, seq) VALUES ('snapshots', ?1)",
            };
            t.execute(statement, [last]).sql(what)?;
            Ok(())
        })
        .await
    }

    /// Every snapshot, in the order they were made.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotRecord>> {
        self.read(|c| {
            c.prepare_cached(&format!("SELECT {COLUMNS} FROM snapshots ORDER BY id"))
                .and_then(|mut s| s.query_map([], record_of)?.collect())
                .sql(|| "list the snapshots".into())
        })
        .await
    }

    /// Marks exactly the layers `keep` (with what is under them) as an image's.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn keep_layers(&self, keep: Vec<String>) -> Result<()> {
        self.write_end(Durability::Full, move |t| {
            let what = || "mark the images' layers".to_owned();
            t.execute("UPDATE snapshots SET kept=0 WHERE kept<>0", []).sql(what)?;
            let mut mark = t.prepare_cached("UPDATE snapshots SET kept=1 WHERE key=?1").sql(what)?;
            for key in &keep {
                mark.execute([key]).sql(what)?;
            }
            Ok(())
        })
        .await
    }

    /// Forgets every layer that is neither kept, nor held, nor under another
    /// snapshot, and returns their numbers. `held` runs on the writer thread.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn sweep_layers(&self, mut held: impl FnMut(&str) -> bool + Send + 'static) -> Result<Vec<i64>> {
        self.write_end(Durability::Normal, move |t| {
            let what = || "sweep unused layers".to_owned();
            let mut swept = Vec::new();
            loop {
                let candidates: Vec<(i64, String)> = t
                    .prepare_cached(
                        "SELECT id, key FROM snapshots AS s WHERE kind='layer' AND kept=0
                         AND NOT EXISTS (SELECT 1 FROM snapshots WHERE parent=s.id)",
                    )
                    .and_then(|mut s| s.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect())
                    .sql(what)?;
                let before = swept.len();
                for (id, _) in candidates.iter().filter(|(_, key)| !held(key)) {
                    t.execute("DELETE FROM snapshots WHERE id=?1", [id]).sql(what)?;
                    swept.push(*id);
                }
                // A removed child may have freed its parent.
                if swept.len() == before {
                    return Ok(swept);
                }
            }
        })
        .await
    }
}

fn by_key(t: &Transaction<'_>, key: &str) -> Result<Option<SnapshotRecord>> {
    t.prepare_cached(&format!("SELECT {COLUMNS} FROM snapshots WHERE key=?1"))
        .and_then(|mut s| s.query_row([key], record_of).optional())
        .sql(|| format!("read snapshot {key}"))
}

fn record_of(row: &Row<'_>) -> rusqlite::Result<SnapshotRecord> {
    let count = |n: i64| u64::try_from(n).unwrap_or(0);
    Ok(SnapshotRecord {
        id: row.get(0)?,
        key: row.get(1)?,
        kind: SnapshotKind::of(&row.get::<_, String>(2)?),
        parent: row.get(3)?,
        bytes: count(row.get(4)?),
        inodes: count(row.get(5)?),
        created_at_ns: row.get(6)?,
    })
}
