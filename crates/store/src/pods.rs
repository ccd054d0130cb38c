//! Pods, containers and their timelines.

use crate::{Durability, SqlExt, Store};
use rusqlite::types::ValueRef;
use rusqlite::{OptionalExtension, Row, params};
use types::{Error, Result};

/// A pod as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRecord {
    /// Its id.
    pub id: String,
    /// `namespace/name/uid/attempt`; unique.
    pub name_key: String,
    /// When it was made, in nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// What it was asked to be; never changes.
    pub config_json: String,
    /// What it is.
    pub state_json: String,
}

/// A container as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerRecord {
    /// Its id.
    pub id: String,
    /// The pod that it belongs to.
    pub pod_id: String,
    /// `pod id/name/attempt`; unique.
    pub name_key: String,
    /// When it was made, in nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// What it was asked to be; changes only by an update of its resources.
    pub config_json: String,
    /// What it is.
    pub state_json: String,
}

/// Fails with `NotFound` where an update met no row.
fn expect_one(changed: usize, what: &str, id: &str) -> Result<()> {
    if changed == 0 { Err(Error::not_found(format!("{what} {id} is not in the database"))) } else { Ok(()) }
}

impl Store {
    /// Writes a pod, new or known by its id.
    ///
    /// # Errors
    /// `AlreadyExists` when another pod has its `name_key`.
    pub async fn put_pod(&self, pod: PodRecord) -> Result<()> {
        self.write(Durability::Normal, move |t| {
            t.prepare_cached(
                "INSERT INTO pods (id, name_key, created_at_ns, config_json, state_json) VALUES (?1,?2,?3,?4,?5)
                 ON CONFLICT (id) DO UPDATE SET name_key=?2, created_at_ns=?3, config_json=?4, state_json=?5",
            )
            .and_then(|mut s| {
                s.execute(params![pod.id, pod.name_key, pod.created_at_ns, pod.config_json, pod.state_json])
            })
            .sql(|| format!("store pod {} ({})", pod.id, pod.name_key))?;
            Ok(())
        })
        .await
    }

    /// Writes what a pod is now.
    ///
    /// # Errors
    /// `NotFound` when it is not stored.
    pub async fn update_pod_state(&self, id: &str, state_json: String) -> Result<()> {
        let id = id.to_owned();
        self.write_end(Durability::Normal, move |t| {
            let changed = t
                .prepare_cached("UPDATE pods SET state_json=?2 WHERE id=?1")
                .and_then(|mut s| s.execute(params![id, state_json]))
                .sql(|| format!("store the state of pod {id}"))?;
            expect_one(changed, "pod", &id)
        })
        .await
    }

    /// Forgets a pod, its containers and its timeline; an unknown one is no error.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn delete_pod(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        self.write_end(Durability::Normal, move |t| {
            for sql in [
                "DELETE FROM containers WHERE pod_id=?1",
                "DELETE FROM timeline WHERE pod_id=?1",
                "DELETE FROM pods WHERE id=?1",
            ] {
                t.prepare_cached(sql).and_then(|mut s| s.execute([&id])).sql(|| format!("delete pod {id}"))?;
            }
            Ok(())
        })
        .await
    }

    /// Every pod, in the order they were made.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn pods(&self) -> Result<Vec<PodRecord>> {
        self.read(|c| {
            c.prepare_cached(
                "SELECT id, name_key, created_at_ns, config_json, state_json FROM pods ORDER BY created_at_ns, id",
            )
            .and_then(|mut s| s.query_map([], pod_of)?.collect())
            .sql(|| "list the pods".into())
        })
        .await
    }

    /// Writes a container, new or known by its id.
    ///
    /// # Errors
    /// `AlreadyExists` when another container has its `name_key`.
    pub async fn put_container(&self, container: ContainerRecord) -> Result<()> {
        self.write(Durability::Normal, move |t| {
            let c = &container;
            t.prepare_cached(
                "INSERT INTO containers (id, pod_id, name_key, created_at_ns, config_json, state_json)
                 VALUES (?1,?2,?3,?4,?5,?6) ON CONFLICT (id) DO UPDATE
                 SET pod_id=?2, name_key=?3, created_at_ns=?4, config_json=?5, state_json=?6",
            )
            .and_then(|mut s| {
                s.execute(params![c.id, c.pod_id, c.name_key, c.created_at_ns, c.config_json, c.state_json])
            })
            .sql(|| format!("store container {} ({})", c.id, c.name_key))?;
            Ok(())
        })
        .await
    }

    /// Writes what a container is now.
    ///
    /// # Errors
    /// `NotFound` when it is not stored.
    pub async fn update_container_state(&self, id: &str, state_json: String) -> Result<()> {
        let id = id.to_owned();
        self.write_end(Durability::Normal, move |t| {
            let changed = t
                .prepare_cached("UPDATE containers SET state_json=?2 WHERE id=?1")
                .and_then(|mut s| s.execute(params![id, state_json]))
                .sql(|| format!("store the state of container {id}"))?;
            expect_one(changed, "container", &id)
        })
        .await
    }

    /// Forgets a container; an unknown one is no error.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn delete_container(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        self.write_end(Durability::Normal, move |t| {
            t.prepare_cached("DELETE FROM containers WHERE id=?1")
                .and_then(|mut s| s.execute([&id]))
                .sql(|| format!("delete container {id}"))?;
            Ok(())
        })
        .await
    }

    /// Every container, in the order they were made.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn containers(&self) -> Result<Vec<ContainerRecord>> {
        self.read(|c| {
            c.prepare_cached(
                "SELECT id, pod_id, name_key, created_at_ns, config_json, state_json FROM containers
                 ORDER BY created_at_ns, id",
            )
            .and_then(|mut s| s.query_map([], container_of)?.collect())
            .sql(|| "list the containers".into())
        })
        .await
    }

    /// Keeps the timeline of a pod's start, in place of an older one.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn put_timeline(&self, pod_id: &str, json: String) -> Result<()> {
        let pod_id = pod_id.to_owned();
        self.write(Durability::Normal, move |t| {
            t.prepare_cached("INSERT OR REPLACE INTO timeline (pod_id, json) VALUES (?1, ?2)")
                .and_then(|mut s| s.execute(params![pod_id, json]))
                .sql(|| format!("store the timeline of pod {pod_id}"))?;
            Ok(())
        })
        .await
    }

    /// The timeline of a pod's start, if any is kept.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn timeline(&self, pod_id: &str) -> Result<Option<String>> {
        let pod_id = pod_id.to_owned();
        self.read(move |c| {
            c.prepare_cached("SELECT json FROM timeline WHERE pod_id=?1")
                .and_then(|mut s| s.query_row([&pod_id], |row| row.get(0)).optional())
                .sql(|| format!("read the timeline of pod {pod_id}"))
        })
        .await
    }

    /// Forgets a pod's timeline; an unknown one is no error.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn delete_timeline(&self, pod_id: &str) -> Result<()> {
        let pod_id = pod_id.to_owned();
        self.write_end(Durability::Normal, move |t| {
            t.execute("DELETE FROM timeline WHERE pod_id=?1", [&pod_id])
                .sql(|| format!("delete the timeline of pod {pod_id}"))?;
            Ok(())
        })
        .await
    }
}

/// A column as text, whatever is in it: a bad row costs its reader that row and not the
/// list.
fn text(row: &Row<'_>, at: usize) -> rusqlite::Result<String> {
    Ok(match row.get_ref(at)? {
        ValueRef::Text(raw) | ValueRef::Blob(raw) => String::from_utf8_lossy(raw).into_owned(),
        ValueRef::Integer(n) => n.to_string(),
        ValueRef::Real(n) => n.to_string(),
        ValueRef::Null => String::new(),
    })
}

fn pod_of(row: &Row<'_>) -> rusqlite::Result<PodRecord> {
    Ok(PodRecord {
        id: text(row, 0)?,
        name_key: text(row, 1)?,
        created_at_ns: row.get(2).unwrap_or(0),
        config_json: text(row, 3)?,
        state_json: text(row, 4)?,
    })
}

fn container_of(row: &Row<'_>) -> rusqlite::Result<ContainerRecord> {
    Ok(ContainerRecord {
        id: text(row, 0)?,
        pod_id: text(row, 1)?,
        name_key: text(row, 2)?,
        created_at_ns: row.get(3).unwrap_or(0),
        config_json: text(row, 4)?,
        state_json: text(row, 5)?,
    })
}
