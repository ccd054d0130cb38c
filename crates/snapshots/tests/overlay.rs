//! Snapshots on a real overlayfs.
#![allow(clippy::unwrap_used)]

use longshore_snapshots::{IdMap, IdRange, Mount, Overlay, Snapshotter};
use rustix::fs::{FileType, Mode, XattrFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use store::Store;
use testkit::TempRoot;
use types::ErrorKind;

async fn open(root: &TempRoot) -> Overlay {
    let store = Store::open(&root.join("db")).unwrap();
    Overlay::open(&root.join("snapshots"), store).await.unwrap()
}

async fn layer(s: &Overlay, id: &str, parent: Option<&str>, fill: impl FnOnce(&Path)) {
    let draft = s.begin_layer(id, parent).await.unwrap();
    fill(&draft.path);
    s.commit_layer(draft).await.unwrap();
}

/// Mounts as the shim does.
fn mount(mounts: &[Mount], at: &Path) {
    std::fs::create_dir_all(at).unwrap();
    for m in mounts {
        let options = CString::new(m.options.join(",")).unwrap();
        match m.kind.as_str() {
            "bind" => rustix::mount::mount_bind(&m.source, at).unwrap(),
            kind => {
                rustix::mount::mount(m.source.as_str(), at, kind, MountFlags::empty(), options.as_c_str()).unwrap();
            }
        }
    }
}

fn directories(root: &TempRoot) -> Vec<String> {
    let mut all: Vec<String> = std::fs::read_dir(root.join("snapshots"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    all.sort();
    all
}

#[tokio::test]
async fn a_container_sees_the_layers_merged_and_writes_its_own() {
    let root = TempRoot::new();
    let s = open(&root).await;
    layer(&s, "one", None, |fs| {
        std::fs::write(fs.join("a"), "1").unwrap();
        std::fs::write(fs.join("gone"), "1").unwrap();
        std::fs::set_permissions(fs, std::fs::Permissions::from_mode(0o751)).unwrap();
    })
    .await;
    layer(&s, "two", Some("one"), |fs| {
        std::fs::write(fs.join("b"), "2").unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, fs.join("gone"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    })
    .await;
    s.keep(vec!["two".into()]).await.unwrap();
    let mounts = s.prepare("box", Some("two"), None).await.unwrap();
    assert_eq!(s.mounts("box").await.unwrap(), mounts);
    let at = root.join("rootfs");
    mount(&mounts, &at);
    assert_eq!(std::fs::read_to_string(at.join("a")).unwrap(), "1");
    assert_eq!(std::fs::read_to_string(at.join("b")).unwrap(), "2");
    assert!(!at.join("gone").exists());
    assert_eq!(std::fs::metadata(&at).unwrap().permissions().mode() & 0o7777, 0o751);
    let before = s.usage("box").await.unwrap();
    std::fs::write(at.join("c"), vec![3u8; 100 << 10]).unwrap();
    let after = s.usage("box").await.unwrap();
    assert!(after.bytes >= before.bytes + (100 << 10) && after.inodes == before.inodes + 1);
    assert!(s.total_usage().await.unwrap().active.bytes >= after.bytes);
    assert_eq!(s.prepare("box", Some("two"), None).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(s.prepare("x", Some("nope"), None).await.unwrap_err().kind(), ErrorKind::NotFound);
    rustix::mount::unmount(&at, UnmountFlags::empty()).unwrap();
    // The image goes first, the container keeps the layers.
    s.keep(vec![]).await.unwrap();
    assert_eq!(directories(&root).len(), 3);
    assert_eq!(s.list().await.unwrap(), ["box"]);
    s.remove("box").await.unwrap();
    s.remove("box").await.unwrap();
    assert!(directories(&root).is_empty());
}

#[tokio::test]
async fn an_image_without_layers_is_an_empty_directory() {
    let root = TempRoot::new();
    let s = open(&root).await;
    let map = IdMap {
        uids: vec![IdRange { container: 0, host: 70_000, size: 10 }],
        gids: vec![IdRange { container: 0, host: 80_000, size: 10 }],
    };
    mount(&s.prepare("box", None, Some(&map)).await.unwrap(), &root.join("rootfs"));
    let meta = std::fs::metadata(root.join("rootfs")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (70_000, 80_000));
}

#[tokio::test]
async fn a_user_namespaced_container_gets_layers_that_its_ids_own() {
    let root = TempRoot::new();
    let s = open(&root).await;
    layer(&s, "one", None, |fs| {
        std::fs::create_dir(fs.join("dir")).unwrap();
        std::fs::write(fs.join("dir/file"), "1").unwrap();
        std::fs::hard_link(fs.join("dir/file"), fs.join("link")).unwrap();
        std::os::unix::fs::chown(fs.join("dir/file"), Some(5), Some(6)).unwrap();
        std::fs::set_permissions(fs.join("dir/file"), std::fs::Permissions::from_mode(0o4755)).unwrap();
        std::os::unix::fs::symlink("/nowhere", fs.join("sym")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, fs.join("wh"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        // cap_net_raw+ep, revision 2
        let cap = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        rustix::fs::setxattr(fs.join("dir/file"), "security.capability", &cap, XattrFlags::empty()).unwrap();
        rustix::fs::setxattr(fs.join("dir"), "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
    })
    .await;
    s.keep(vec!["one".into()]).await.unwrap();
    let range = |host, size| vec![IdRange { container: 0, host, size }];
    let map = IdMap { uids: range(100_000, 1000), gids: range(200_000, 1000) };
    // Two at once share one copy.
    let (a, b) = tokio::join!(s.prepare("a", Some("one"), Some(&map)), s.prepare("b", Some("one"), Some(&map)));
    a.unwrap();
    b.unwrap();
    assert_eq!(directories(&root), ["1", "2", "3", "4"]);
    let copy = root.join("snapshots/2/fs");
    let file = std::fs::metadata(copy.join("dir/file")).unwrap();
    assert_eq!((file.uid(), file.gid(), file.mode() & 0o7777), (100_005, 200_006, 0o4755));
    assert_eq!(file.ino(), std::fs::metadata(copy.join("link")).unwrap().ino());
    assert_eq!(std::fs::metadata(copy.join("dir")).unwrap().uid(), 100_000);
    assert_eq!(std::fs::symlink_metadata(copy.join("sym")).unwrap().uid(), 100_000);
    assert_eq!(std::fs::symlink_metadata(copy.join("wh")).unwrap().rdev(), 0);
    let mut cap = [0u8; 64];
    let n = rustix::fs::getxattr(copy.join("dir/file"), "security.capability", &mut cap).unwrap();
    assert_eq!((n, cap[3], &cap[20..24]), (24, 3, &100_000u32.to_le_bytes()[..]));
    assert_eq!(rustix::fs::getxattr(copy.join("dir"), "trusted.overlay.opaque", &mut cap).unwrap(), 1);
    let upper = std::fs::metadata(root.join("snapshots/3/fs")).unwrap();
    assert_eq!((upper.uid(), upper.gid()), (100_000, 200_000));
    // A mapping too small for the image's files is refused and leaves nothing.
    let small = IdMap { uids: range(1, 3), gids: range(1, 3) };
    assert_eq!(s.prepare("c", Some("one"), Some(&small)).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    s.remove("a").await.unwrap();
    s.remove("b").await.unwrap();
    assert_eq!(directories(&root), ["1"]);
}

#[tokio::test]
async fn what_a_crash_left_is_removed_at_the_next_opening() {
    let root = TempRoot::new();
    {
        let s = open(&root).await;
        layer(&s, "whole", None, |_| {}).await;
        layer(&s, "lost", None, |_| {}).await;
        s.begin_layer("draft", None).await.unwrap();
        s.prepare("box", Some("whole"), None).await.unwrap();
    }
    std::fs::create_dir_all(root.join("snapshots/77/fs/deep")).unwrap();
    std::fs::create_dir(root.join("snapshots/lost+found")).unwrap();
    std::fs::remove_dir_all(root.join("snapshots/2")).unwrap();
    let s = open(&root).await;
    assert_eq!(directories(&root), ["1", "4", "lost+found"]);
    assert!(s.layer("whole").await.unwrap().is_some());
    assert!(s.layer("lost").await.unwrap().is_none() && s.layer("draft").await.unwrap().is_none());
    s.mounts("box").await.unwrap();
}

#[tokio::test]
async fn cve_2021_41103_the_snapshots_are_closed_to_other_users() {
    let root = TempRoot::new();
    let s = open(&root).await;
    s.prepare("box", None, None).await.unwrap();
    for dir in ["snapshots", "snapshots/1"] {
        assert_eq!(std::fs::metadata(root.join(dir)).unwrap().permissions().mode() & 0o7777, 0o700, "{dir}");
    }
}

#[tokio::test]
async fn too_many_layers_are_refused_with_a_reason_and_leave_nothing() {
    let root = TempRoot::new();
    let s = open(&root).await;
    let mut below: Option<String> = None;
    for n in 0..130 {
        let id = format!("l{n}");
        layer(&s, &id, below.as_deref(), |_| {}).await;
        below = Some(id);
    }
    let e = s.prepare("box", below.as_deref(), None).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
    assert!(e.to_string().contains("130 layers"), "{e}");
    assert!(s.list().await.unwrap().is_empty());
    let hold = s.hold(vec!["l129".into()]);
    s.sweep().await.unwrap();
    assert_eq!(directories(&root).len(), 130);
    drop(hold);
    s.sweep().await.unwrap();
    assert!(directories(&root).is_empty());
}

#[tokio::test]
async fn a_full_disk_leaves_no_snapshot_behind() {
    let root = TempRoot::small_disk(16 << 20);
    let s = open(&root).await;
    layer(&s, "one", None, |fs| std::fs::write(fs.join("big"), vec![1u8; 3 << 20]).unwrap()).await;
    let hold = s.hold(vec!["one".into()]);
    root.fill();
    let map = IdMap {
        uids: vec![IdRange { container: 0, host: 1000, size: 10 }],
        gids: vec![IdRange { container: 0, host: 1000, size: 10 }],
    };
    let e = s.prepare("box", Some("one"), Some(&map)).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::ResourceExhausted, "{e}");
    assert_eq!(directories(&root), ["1"]);
    drop(hold);
}
