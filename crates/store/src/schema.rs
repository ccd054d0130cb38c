//! The schema, as steps that only add.
//!
//! `PRAGMA user_version` counts the steps that a database has seen. A release
//! runs the steps that it knows and the database lacks; one that meets a higher
//! number than its own leaves the schema alone, since what it knows is still
//! there. So never drop, rename or retype: add tables, and columns with defaults.

use rusqlite::Connection;

const STEPS: &[&str] = &[
    "
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE pods (
    id            TEXT PRIMARY KEY,
    name_key      TEXT NOT NULL UNIQUE,
    created_at_ns INTEGER NOT NULL,
    config_json   TEXT NOT NULL,
    state_json    TEXT NOT NULL
);

CREATE TABLE containers (
    id            TEXT PRIMARY KEY,
    pod_id        TEXT NOT NULL,
    name_key      TEXT NOT NULL UNIQUE,
    created_at_ns INTEGER NOT NULL,
    config_json   TEXT NOT NULL,
    state_json    TEXT NOT NULL
);
CREATE INDEX containers_of_pod ON containers (pod_id);

CREATE TABLE timeline (
    pod_id TEXT PRIMARY KEY,
    json   TEXT NOT NULL
);

CREATE TABLE images (
    id            TEXT PRIMARY KEY,
    chain_id      TEXT NOT NULL,
    size          INTEGER NOT NULL,
    created_at_ns INTEGER NOT NULL,
    config        BLOB NOT NULL
);
CREATE TABLE image_refs (
    reference TEXT PRIMARY KEY,
    image_id  TEXT NOT NULL
);
CREATE INDEX refs_of_image ON image_refs (image_id);
CREATE TABLE image_manifests (
    digest     TEXT PRIMARY KEY,
    image_id   TEXT NOT NULL,
    media_type TEXT NOT NULL,
    body       BLOB NOT NULL
);

CREATE TABLE snapshots (
    -- never reused, so that a directory left behind can't be taken for a new one
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    key           TEXT NOT NULL UNIQUE,
    kind          TEXT NOT NULL,
    parent        INTEGER,
    kept          INTEGER NOT NULL DEFAULT 0,
    bytes         INTEGER NOT NULL DEFAULT 0,
    inodes        INTEGER NOT NULL DEFAULT 0,
    created_at_ns INTEGER NOT NULL
);
CREATE INDEX children_of_snapshot ON snapshots (parent);
",
    "
CREATE TABLE pod_addresses (
    range   TEXT NOT NULL,
    number  INTEGER NOT NULL,
    address TEXT NOT NULL,
    pod_id  TEXT NOT NULL,
    UNIQUE (range, number)
);
CREATE INDEX addresses_of_pod ON pod_addresses (pod_id);

CREATE TABLE address_ranges (
    range      TEXT PRIMARY KEY,
    last_given INTEGER NOT NULL
);

CREATE TABLE host_ports (
    pod_id         TEXT NOT NULL,
    protocol       TEXT NOT NULL,
    -- empty: every address of the node
    host_ip        TEXT NOT NULL,
    host_port      INTEGER NOT NULL,
    container_port INTEGER NOT NULL,
    target         TEXT NOT NULL,
    UNIQUE (host_port, protocol, host_ip)
);
CREATE INDEX ports_of_pod ON host_ports (pod_id);
",
];

/// The version that this release brings a database to.
#[allow(clippy::cast_possible_wrap, reason = "a handful of steps")]
pub(crate) const KNOWN: i64 = STEPS.len() as i64;

/// The version that a database has.
pub(crate) fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("PRAGMA user_version", [], |row| row.get(0))
}

/// Brings `connection`'s schema forward, each step in its own transaction; a failure
/// comes with what it was about.
pub(crate) fn migrate(connection: &mut Connection) -> Result<(), (String, rusqlite::Error)> {
    let version = version(connection).map_err(|e| ("read the schema's version".into(), e))?;
    let done = usize::try_from(version).unwrap_or(0);
    for (index, step) in STEPS.iter().enumerate().skip(done) {
        let number = index + 1;
        one(connection, step, number).map_err(|e| (format!("migrate the schema to version {number}"), e))?;
    }
    Ok(())
}

fn one(connection: &mut Connection, step: &str, number: usize) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    transaction.execute_batch(step)?;
    transaction.pragma_update(None, "user_version", i64::try_from(number).unwrap_or(i64::MAX))?;
    transaction.commit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_releases_schema_is_left_alone() {
        let mut c = Connection::open_in_memory().unwrap();
        migrate(&mut c).unwrap();
        c.execute_batch("ALTER TABLE pods ADD COLUMN colour TEXT DEFAULT 'red'; PRAGMA user_version = 999").unwrap();
        migrate(&mut c).unwrap();
        assert_eq!(version(&c).unwrap(), 999);
        c.execute(
            "INSERT INTO pods (id, name_key, created_at_ns, config_json, state_json) VALUES ('a','a',0,'','')",
            [],
        )
        .unwrap();
    }

    #[test]
    fn each_older_schema_is_brought_forward_with_what_is_in_it() {
        for old in 1..STEPS.len() {
            let mut c = Connection::open_in_memory().unwrap();
            for (index, step) in STEPS.iter().enumerate().take(old) {
                one(&mut c, step, index + 1).unwrap();
            }
            c.execute_batch("INSERT INTO pods VALUES ('a', 'name', 1, '{}', 'kept')").unwrap();
            migrate(&mut c).unwrap();
            assert_eq!(version(&c).unwrap(), KNOWN);
            let kept: String = c.query_row("SELECT state_json FROM pods WHERE id = 'a'", [], |r| r.get(0)).unwrap();
            assert_eq!(kept, "kept");
        }
    }
}
