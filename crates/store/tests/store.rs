//! The database as its users see it: records, durability of the schema, a full disk.

#![allow(clippy::unwrap_used, reason = "a failure has to stop the test")]

use longshore_store::{
    AddressRange, AddressWish, ContainerRecord, Durability, FILE_NAME, PodRecord, PortClaim, SnapshotKind, SqlExt,
    Store,
};
use rusqlite::Connection;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use types::ErrorKind;

fn pod(id: &str, name: &str) -> PodRecord {
    PodRecord {
        id: id.into(),
        name_key: name.into(),
        created_at_ns: 1,
        config_json: "{}".into(),
        state_json: "{}".into(),
    }
}

#[tokio::test]
async fn records_survive_a_reopening_and_names_are_unique() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.put_pod(pod("a", "ns/n/u/0")).await.unwrap();
    assert_eq!(store.put_pod(pod("b", "ns/n/u/0")).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
    store.update_pod_state("a", "not json at all".into()).await.unwrap();
    assert_eq!(store.update_pod_state("zz", String::new()).await.unwrap_err().kind(), ErrorKind::NotFound);
    let container = ContainerRecord {
        id: "c".into(),
        pod_id: "a".into(),
        name_key: "a/c/0".into(),
        created_at_ns: 2,
        config_json: "{}".into(),
        state_json: "{}".into(),
    };
    store.put_container(container.clone()).await.unwrap();
    store.put_timeline("a", "[]".into()).await.unwrap();
    store.set_boot_id("boot").await.unwrap();
    store.clone().close();
    assert_eq!(store.put_pod(pod("x", "x")).await.unwrap_err().kind(), ErrorKind::Unavailable);

    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.pods().await.unwrap()[0].state_json, "not json at all");
    assert_eq!(store.containers().await.unwrap(), [container]);
    assert_eq!(store.timeline("a").await.unwrap().as_deref(), Some("[]"));
    assert_eq!(store.boot_id().await.unwrap().as_deref(), Some("boot"));
    store.delete_pod("a").await.unwrap();
    store.delete_pod("a").await.unwrap();
    assert!(store.pods().await.unwrap().is_empty() && store.containers().await.unwrap().is_empty());
    assert_eq!(store.timeline("a").await.unwrap(), None);
}

/// What is done to a database file while nobody has it open, and a word of the reason
/// that is told then.
type Damage = (&'static str, fn(&Path), &'static str);

const DAMAGES: [Damage; 8] = [
    ("a garbage header", |db| overwrite(db, 0, 100), "not a database"),
    ("garbage in a page", |db| overwrite(db, 4096, 3000), ""),
    ("cut off in the middle", |db| cut(db, db.metadata().unwrap().len() / 2), ""),
    ("empty", |db| cut(db, 0), "it is gone"),
    ("gone", |db| std::fs::remove_file(db).unwrap(), "it is gone"),
    ("an older version than it has", |db| sql(db, "PRAGMA user_version = 1"), "already exists"),
    ("a table is missing", |db| sql(db, "DROP TABLE image_refs"), "image_refs"),
    (
        "its last changes are lost",
        |db| sql(db, "DELETE FROM pods; UPDATE meta SET value = '3' WHERE key = 'sequence'"),
        "changes are missing",
    ),
];

fn overwrite(db: &Path, at: u64, len: usize) {
    use std::os::unix::fs::FileExt;
    let garbage: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
    std::fs::File::options().write(true).open(db).unwrap().write_all_at(&garbage, at).unwrap();
}

fn cut(db: &Path, len: u64) {
    std::fs::File::options().write(true).open(db).unwrap().set_len(len).unwrap();
}

fn sql(db: &Path, text: &str) {
    Connection::open(db).unwrap().execute_batch(text).unwrap();
}

#[tokio::test]
async fn a_damaged_database_is_restored_from_its_copy_and_kept_aside() {
    for (what, damage, says) in DAMAGES {
        let dir = tempfile::tempdir().unwrap();
        let (db, copies) = (dir.path().join("db"), dir.path().join("state/db"));
        let store = Store::open_with_copy(&db, &copies).unwrap();
        assert_eq!(store.restored(), None);
        for n in 0..20 {
            store.put_pod(pod(&format!("p{n}"), &format!("ns/{n}"))).await.unwrap();
        }
        store.put_pod(pod("twice", "ns/0")).await.unwrap_err();
        store.delete_pod("p3").await.unwrap();
        store.add_snapshot("layer", SnapshotKind::Draft, None, 1).await.unwrap();
        let layer = store.add_snapshot("layer", SnapshotKind::Draft, None, 1).await.unwrap();
        store.commit_snapshot(layer.id, 10, 1).await.unwrap();
        let top = store.add_snapshot("c", SnapshotKind::Active, Some("layer"), 2).await.unwrap();
        let (pods, snapshots) = (store.pods().await.unwrap(), store.snapshots().await.unwrap());
        store.close();

        damage(&db.join(FILE_NAME));
        let store = Store::open_with_copy(&db, &copies).unwrap();
        let restored = store.restored().unwrap_or_else(|| panic!("{what}: it is damaged")).clone();
        assert!(restored.complete && restored.why.contains(says), "{what}: {restored:?}");
        let kept = longshore_store::set_aside(&db);
        assert_eq!(restored.aside.iter().cloned().collect::<Vec<_>>(), kept, "{what}");
        assert_eq!(kept.len(), usize::from(!["gone", "empty"].contains(&what)), "{what}");
        assert_eq!((store.pods().await.unwrap(), store.snapshots().await.unwrap()), (pods, snapshots), "{what}");
        longshore_store::examine(&db).unwrap();
        // It goes on as if nothing had been: numbers are not given twice.
        let next = store.add_snapshot("d", SnapshotKind::Active, Some("layer"), 3).await.unwrap();
        assert!(next.id > top.id, "{what}");
        store.close();
        assert_eq!(Store::open_with_copy(&db, &copies).unwrap().restored(), None, "{what}");
    }
}

#[tokio::test]
async fn a_newer_releases_database_is_used_or_refused_but_never_taken_for_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let (db, copies) = (dir.path().join("db"), dir.path().join("state/db"));
    let file = db.join(FILE_NAME);
    let store = Store::open_with_copy(&db, &copies).unwrap();
    store.put_pod(pod("a", "a")).await.unwrap();
    store.close();
    sql(
        &file,
        "ALTER TABLE pods ADD COLUMN colour TEXT NOT NULL DEFAULT 'red'; UPDATE pods SET colour = 'blue';
         CREATE TABLE newer (x TEXT); INSERT INTO newer VALUES ('kept'); PRAGMA user_version = 999",
    );
    let store = Store::open_with_copy(&db, &copies).unwrap();
    assert_eq!(store.restored(), None);
    store.put_pod(pod("b", "b")).await.unwrap();
    store.update_pod_state("a", "new".into()).await.unwrap();
    store.close();
    // From the copy, too, comes all that the newer release has written.
    overwrite(&file, 0, 4096);
    let store = Store::open_with_copy(&db, &copies).unwrap();
    assert!(store.restored().unwrap().complete);
    assert_eq!(store.pods().await.unwrap().len(), 2);
    store.close();
    let words =
        |query: &str| -> String { Connection::open(&file).unwrap().query_row(query, [], |r| r.get(0)).unwrap() };
    assert_eq!(words("SELECT group_concat(colour) FROM (SELECT colour FROM pods ORDER BY id)"), "blue,red");
    assert_eq!(words("SELECT x FROM newer"), "kept");
    assert_eq!(words("SELECT CAST(user_version AS TEXT) FROM pragma_user_version"), "999");

    let aside = longshore_store::set_aside(&db);
    sql(&file, "ALTER TABLE pods RENAME COLUMN config_json TO config");
    let e = Store::open_with_copy(&db, &copies).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
    let said = format!("{e}");
    for part in [&*file.to_string_lossy(), "a newer release", "version 999", "config_json", "start the newer release"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(longshore_store::examine(&db).unwrap_err().kind(), ErrorKind::FailedPrecondition);
    assert_eq!(longshore_store::set_aside(&db), aside, "nothing is put aside");
    assert_eq!(words("SELECT config FROM pods WHERE id = 'a'"), "{}");
}

#[tokio::test]
async fn without_a_copy_an_empty_database_is_begun() {
    let dir = tempfile::tempdir().unwrap();
    let (db, copies) = (dir.path().join("db"), dir.path().join("state/db"));
    let store = Store::open_with_copy(&db, &copies).unwrap();
    store.put_pod(pod("a", "a")).await.unwrap();
    store.close();
    for _ in 0..5 {
        overwrite(&db.join(FILE_NAME), 0, 4096);
        overwrite(&copies.join("copy.db"), 0, 4096);
        let store = Store::open_with_copy(&db, &copies).unwrap();
        let restored = store.restored().unwrap();
        assert!(!restored.complete && restored.aside.is_some(), "{restored:?}");
        assert_eq!(store.pods().await.unwrap(), []);
        store.put_pod(pod("b", "b")).await.unwrap();
        store.close();
    }
    assert_eq!(longshore_store::set_aside(&db).len(), 3, "the newest are kept");
}

#[tokio::test]
async fn a_copy_that_fell_behind_is_made_anew_and_another_databases_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let (db, copies) = (dir.path().join("db"), dir.path().join("copies"));
    // Nothing can be made below a file.
    std::fs::write(&copies, "").unwrap();
    let store = Store::open_with_copy(&db, &copies).unwrap();
    store.put_pod(pod("a", "a")).await.unwrap();
    store.close();
    std::fs::remove_file(&copies).unwrap();
    let store = Store::open_with_copy(&db, &copies).unwrap();
    // Behind our back: what then fails there brings a new copy.
    store.put_pod(pod("b", "b")).await.unwrap();
    sql(&copies.join("copy.db"), "DELETE FROM pods");
    store.update_pod_state("a", "new".into()).await.unwrap();
    store.close();
    cut(&db.join(FILE_NAME), 0);
    let store = Store::open_with_copy(&db, &copies).unwrap();
    assert!(store.restored().unwrap().complete);
    let states: Vec<String> = store.pods().await.unwrap().into_iter().map(|p| p.state_json).collect();
    assert_eq!(states, ["new", "{}"]);
    store.close();

    let other = dir.path().join("other");
    let store = Store::open(&other).unwrap();
    store.put_pod(pod("theirs", "t")).await.unwrap();
    store.close();
    let store = Store::open_with_copy(&other, &copies).unwrap();
    assert_eq!(store.restored(), None);
    assert_eq!(store.pods().await.unwrap()[0].id, "theirs");
}

#[tokio::test]
async fn cve_2021_41103_the_database_is_closed_to_other_users_but_open_to_sqlite3() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("deep/er");
    let store = Store::open(&at).unwrap();
    store.put_pod(pod("a", "a")).await.unwrap();
    let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&at), 0o700);
    for file in std::fs::read_dir(&at).unwrap() {
        assert_eq!(mode(&file.unwrap().path()), 0o600);
    }
    // Somebody else looks, and holds a read transaction, while we write.
    let other = Connection::open(at.join(FILE_NAME)).unwrap();
    other.execute_batch("BEGIN; SELECT * FROM pods").unwrap();
    store.put_pod(pod("b", "b")).await.unwrap();
    let seen: i64 = other.query_row("SELECT count(*) FROM pods", [], |r| r.get(0)).unwrap();
    assert!(seen >= 1);
}

#[tokio::test]
async fn a_failed_transaction_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let failed = store
        .write(Durability::Full, |t| {
            t.execute("INSERT INTO meta VALUES ('k','v')", []).sql(|| "k".into())?;
            Err::<(), _>(types::Error::invalid("no"))
        })
        .await;
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(store.meta("k").await.unwrap(), None);
}

#[tokio::test]
async fn layers_live_while_kept_held_or_built_upon() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    for (key, parent) in [("l1", None), ("l2", Some("l1")), ("l3", Some("l2"))] {
        let s = store.add_snapshot(key, SnapshotKind::Draft, parent, 0).await.unwrap();
        store.commit_snapshot(s.id, 10, 1).await.unwrap();
    }
    let active = store.add_snapshot("box", SnapshotKind::Active, Some("l2"), 0).await.unwrap();
    let chain: Vec<String> = store.ancestors(active.id).await.unwrap().into_iter().map(|s| s.key).collect();
    assert_eq!(chain, ["l2", "l1"]);
    assert_eq!(store.delete_snapshot("l3").await.unwrap_err().kind(), ErrorKind::FailedPrecondition);
    assert_eq!(
        store.add_snapshot("x", SnapshotKind::Active, Some("nope"), 0).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    store.keep_layers(vec!["l3".into()]).await.unwrap();
    assert!(store.sweep_layers(|_| false).await.unwrap().is_empty());
    store.keep_layers(vec![]).await.unwrap();
    assert!(store.sweep_layers(|k| k == "l3").await.unwrap().is_empty());
    assert_eq!(store.sweep_layers(|_| false).await.unwrap(), [3]);
    assert_eq!(store.delete_snapshot("box").await.unwrap(), Some(active.id));
    assert_eq!(store.delete_snapshot("box").await.unwrap(), None);
    assert_eq!(store.sweep_layers(|_| false).await.unwrap(), [2, 1]);
    // Numbers are never used again.
    assert_eq!(store.add_snapshot("l1", SnapshotKind::Draft, None, 0).await.unwrap().id, active.id + 1);
}

#[tokio::test]
async fn on_a_full_disk_stops_and_removals_still_commit() {
    let disk = testkit::TempRoot::small_disk(32 << 20);
    let store = Store::open(&disk.join("db")).unwrap();
    store.put_pod(pod("a", "a")).await.unwrap();
    let filler = disk.fill();
    // Something new gets none of the reserve that ends need.
    let refused = async {
        for n in 0..10_000 {
            let id = format!("new-{n}");
            if let Err(e) = store.put_pod(pod(&id, &id)).await {
                return e;
            }
        }
        panic!("ten thousand pods fit on a full disk");
    };
    assert_eq!(refused.await.kind(), ErrorKind::ResourceExhausted);
    assert_eq!(std::fs::metadata(disk.join("db/ballast")).unwrap().len(), 4 << 20);
    // The write-ahead log grows by a page or so each time; far more than fits without the ballast.
    for n in 0..100 {
        store.update_pod_state("a", format!("{{\"n\":{n},\"pad\":\"{}\"}}", "x".repeat(3000))).await.unwrap();
    }
    store.delete_pod("a").await.unwrap();
    assert_eq!(std::fs::metadata(disk.join("db/ballast")).unwrap().len(), 0);
    // When even the ballast is used up the error says what is wrong.
    let huge = store.set_meta("huge", &"x".repeat(16 << 20)).await.unwrap_err();
    assert_eq!(huge.kind(), ErrorKind::ResourceExhausted, "{huge}");
    std::fs::remove_file(&filler).unwrap();
    store.put_pod(pod("b", "b")).await.unwrap();
    store.clone().close();
    assert_eq!(std::fs::metadata(disk.join("db/ballast")).unwrap().len(), 4 << 20);
}

fn range(name: &str, last: i64) -> AddressRange {
    AddressRange { name: name.into(), base: [10, 9, 0, 0].into(), first: 2, last }
}

#[tokio::test]
async fn addresses_are_given_out_in_turn_and_never_twice() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let small = || vec![AddressWish::Next(vec![range("small", 4)])];
    for (pod, address) in [("a", "10.9.0.2"), ("b", "10.9.0.3"), ("c", "10.9.0.4")] {
        assert_eq!(store.claim_addresses(pod, small()).await.unwrap()[0].to_string(), address);
    }
    let full = store.claim_addresses("d", small()).await.unwrap_err();
    assert_eq!(full.kind(), ErrorKind::ResourceExhausted);
    assert!(full.to_string().contains("small") && full.to_string().contains("all 3 addresses"), "{full}");
    assert_eq!(store.claim_addresses("a", small()).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert!(store.free_addresses("b").await.unwrap() && !store.free_addresses("b").await.unwrap());
    assert_eq!(store.claim_addresses("d", small()).await.unwrap()[0].to_string(), "10.9.0.3");

    // The same network under another name, as after a change of the configuration.
    let other = vec![AddressWish::Next(vec![range("small", 4), range("other", 6)])];
    assert_eq!(store.claim_addresses("e", other).await.unwrap()[0].to_string(), "10.9.0.5");
    let exactly = |number| vec![AddressWish::Exactly(range("third", 6), number)];
    let held = store.claim_addresses("f", exactly(5)).await.unwrap_err();
    assert!(held.to_string().contains("held by pod e"), "{held}");
    assert_eq!(store.claim_addresses("f", exactly(6)).await.unwrap()[0].to_string(), "10.9.0.6");
    // All wishes or none.
    let both = vec![AddressWish::Exactly(range("third", 9), 8), AddressWish::Next(vec![range("small", 4)])];
    assert_eq!(store.claim_addresses("g", both).await.unwrap_err().kind(), ErrorKind::ResourceExhausted);
    assert!(store.network_claims().await.unwrap().iter().all(|c| c.pod_id != "g"));
    let held: Vec<String> = store.network_claims().await.unwrap().into_iter().map(|c| c.pod_id).collect();
    assert_eq!(held, ["a", "c", "d", "e", "f"]);
}

#[tokio::test]
async fn a_port_has_one_pod() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let port = |protocol: &str, host_ip: Option<&str>| PortClaim {
        protocol: protocol.into(),
        host_ip: host_ip.map(|h| h.parse().unwrap()),
        host_port: 80,
        container_port: 8080,
    };
    store.claim_ports("a", vec![port("tcp", Some("192.0.2.1")), port("udp", Some("::"))], "10.9.0.2/24").await.unwrap();
    for taken in [port("tcp", None), port("tcp", Some("0.0.0.0")), port("udp", Some("2001:db8::1")), port("udp", None)]
    {
        let e = store.claim_ports("b", vec![port("sctp", None), taken], "").await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::AlreadyExists);
        assert!(e.to_string().contains("host port 80/") && e.to_string().contains("held by pod a"), "{e}");
    }
    let free = vec![port("tcp", Some("192.0.2.2")), port("tcp", Some("::")), port("udp", Some("0.0.0.0"))];
    store.claim_ports("b", free.clone(), "10.9.0.3/24").await.unwrap();
    let claims = store.network_claims().await.unwrap();
    assert_eq!(claims[1].ports, free.into_iter().map(|c| (c, "10.9.0.3/24".to_owned())).collect::<Vec<_>>());
    assert!(store.free_ports("a").await.unwrap() && !store.free_ports("a").await.unwrap());
    store.claim_ports("c", vec![port("udp", Some("::1"))], "").await.unwrap();
}
