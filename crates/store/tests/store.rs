//! The database as its users see it: records, durability of the schema, a full disk.

use longshore_store::{ContainerRecord, Durability, FILE_NAME, PodRecord, SnapshotKind, SqlExt, Store};
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
