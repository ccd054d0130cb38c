//! Layers as evil as they come, unpacked beside a directory that must not change.
#![allow(clippy::unwrap_used)]

mod common;

use common::Node;
use rustix::fs::FileType;
use snapshots::Snapshotter;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use tar::EntryType;
use testkit::{Entry, ImageBuilder, Layer, TempRoot};

/// Imports an image of these layers; the directory of the topmost.
async fn unpack(node: &Node, layers: impl IntoIterator<Item = Layer>) -> types::Result<PathBuf> {
    let path = node.root.join("a.tar");
    let image = layers.into_iter().fold(ImageBuilder::scratch(), ImageBuilder::layer);
    image.docker_archive(&path, "a:1");
    node.images.import(&path, None).await?;
    Ok(node.top(&node.images.get("a:1").unwrap()).await)
}

/// A directory of the host's that layers try to reach.
struct Victim(TempRoot);

impl Victim {
    fn new() -> Self {
        let root = TempRoot::new();
        std::fs::write(root.join("file"), "host").unwrap();
        Self(root)
    }

    fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    fn assert_untouched(&self) {
        let names: Vec<_> = std::fs::read_dir(self.0.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["file"]);
        let meta = std::fs::metadata(self.0.join("file")).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o7777, meta.nlink()), (0, 0o644, 1));
        assert_eq!(std::fs::read(self.0.join("file")).unwrap(), b"host");
    }
}

fn owned(path: &str, kind: EntryType) -> Entry {
    Entry { mode: 0o4777, uid: 1234, gid: 1234, ..Entry::new(path, kind) }
}

#[tokio::test]
async fn cve_2021_32760_a_layer_reaches_nothing_outside_of_its_root() {
    let victim = Victim::new();
    let dir = victim.path();
    let up = format!("{}{}", "../".repeat(20), dir.trim_start_matches('/'));
    let evil = [
        // Through an absolute or climbing symlink as parent.
        Layer::new().symlink("out", dir).file("out/new", b"evil", 0o666),
        Layer::new().symlink("out", dir).file("out/file", b"evil", 0o666),
        Layer::new().symlink("out", &up).file("out/file", b"evil", 0o666),
        Layer::new().symlink("out", dir).entry(owned("out", EntryType::Directory)),
        Layer::new().symlink("out", dir).entry(owned("out/file", EntryType::Regular)),
        Layer::new().symlink("out", dir).file("out/.wh.file", b"", 0o644),
        Layer::new().symlink("out", dir).file("out/.wh..wh..opq", b"", 0o644),
        Layer::new().symlink("out", dir).symlink("out/link", "/etc"),
        Layer::new().symlink("a", dir).symlink("b", "a").symlink("c", "b").file("c/file", b"evil", 0o644),
        // Over a symlink as last component: the link is replaced.
        Layer::new().symlink("f", &format!("{dir}/file")).file("f", b"evil", 0o666),
        Layer::new().symlink("f", &format!("{dir}/file")).entry(owned("f", EntryType::Regular)),
        // Hard links, and writes through them.
        Layer::new().hardlink("l", &format!("{dir}/file")).file("l", b"evil", 0o666),
        Layer::new().hardlink("l", &format!("{up}/file")).file("l", b"evil", 0o666),
        Layer::new().symlink("out", dir).hardlink("l", "out/file").entry(owned("l", EntryType::Regular)),
        Layer::new().symlink("f", &format!("{dir}/file")).hardlink("l", "f").entry(owned("l", EntryType::Regular)),
        // Names that climb.
        Layer::new().file(&up, b"evil", 0o644),
        Layer::new().file(&format!("{up}/new"), b"evil", 0o644),
        Layer::new().file(&format!("a/../{up}/new"), b"evil", 0o644),
        Layer::new().file(&format!("{up}/.wh.file"), b"", 0o644),
        Layer::new().file(".wh...", b"", 0o644),
        Layer::new().file(".wh.", b"", 0o644),
        Layer::new().file("a/.wh..", b"", 0o644),
        // By way of the process that unpacks.
        Layer::new().symlink("out", "/proc/self/root").file(&format!("out{dir}/file"), b"evil", 0o644),
        Layer::new().symlink("out", "/proc/self/cwd").file("out/new", b"evil", 0o644),
        // The root itself may be no link.
        Layer::new().symlink("./", dir),
        Layer::new().symlink("", dir),
    ];
    for (n, layer) in evil.into_iter().enumerate() {
        let node = Node::new().await;
        // Whether refused or kept inside is each case's own business.
        let base = Layer::new().dir("etc", 0o755).file("etc/x", b"1", 0o644);
        let _ = unpack(&node, [base, layer]).await;
        victim.assert_untouched();
        for dir in ["/", ".", "/tmp"] {
            assert!(!Path::new(dir).join("new").exists(), "case {n}");
        }
    }
}

#[tokio::test]
async fn below_a_symlink_what_it_leads_to_is_made_inside() {
    let node = Node::new().await;
    let layer = Layer::new()
        .symlink("var/run", "/run")
        .file("var/run/lock/x", b"1", 0o644)
        .symlink("a/b", "../../../c/d")
        .symlink("c", "/e")
        .file("a/b/y", b"2", 0o644);
    let top = unpack(&node, [layer]).await.unwrap();
    assert_eq!(std::fs::read(top.join("run/lock/x")).unwrap(), b"1");
    assert_eq!(std::fs::read(top.join("e/d/y")).unwrap(), b"2");
    assert!(top.join("var/run").is_symlink() && top.join("a/b").is_symlink() && top.join("c").is_symlink());
    let node = Node::new().await;
    let turns = Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", b"1", 0o644);
    unpack(&node, [turns]).await.unwrap_err();
    node.assert_empty().await;
}

#[tokio::test]
async fn an_absolute_name_is_inside_and_a_climbing_one_refused() {
    let node = Node::new().await;
    let top = unpack(&node, [Layer::new().file("/abs", b"1", 0o644).file("./rel", b"2", 0o644)]).await.unwrap();
    assert!(top.join("abs").exists() && top.join("rel").exists());
    let node = Node::new().await;
    let e = unpack(&node, [Layer::new().file("../x", b"1", 0o644)]).await.unwrap_err();
    assert!(e.to_string().contains("../x"), "{e}");
    node.assert_empty().await;
}

#[tokio::test]
async fn owners_modes_times_links_and_devices_come_as_they_were() {
    let node = Node::new().await;
    let mut file = owned("dir/file", EntryType::Regular);
    file.data = b"content".to_vec();
    // cap_net_raw and cap_setpcap as permitted: the mask has a newline's byte in it.
    let capability = [1, 0, 0, 2, 0x0a, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0].to_vec();
    file.pax = vec![
        ("SCHILY.xattr.user.note".into(), b"a\nb".to_vec()),
        ("SCHILY.xattr.trusted.overlay.redirect".into(), b"/etc".to_vec()),
        ("SCHILY.xattr.user.overlay.opaque".into(), b"y".to_vec()),
        ("SCHILY.xattr.security.capability".into(), capability),
        ("mtime".into(), b"1234567890.5".to_vec()),
    ];
    let long = "n".repeat(150);
    let device = Entry { device: (1, 3), mode: 0o620, ..Entry::new("dev/null", EntryType::Char) };
    let layer = Layer::new()
        .entry(Entry { mode: 0o1777, mtime: 42, uid: 7, ..Entry::new("dir/", EntryType::Directory) })
        .entry(file)
        .hardlink("dir/hard", "dir/file")
        .entry(Entry { link: "/dir/file".into(), uid: 9, ..Entry::new("sym", EntryType::Symlink) })
        .entry(device)
        .entry(Entry::new("fifo", EntryType::Fifo))
        .entry(Entry { device: (0, 0), ..Entry::new("fake-whiteout", EntryType::Char) })
        .file(&long, b"long", 0o644)
        .file("twice", b"first", 0o644)
        .file("twice", b"second", 0o600);
    let top = unpack(&node, [layer]).await.unwrap();
    let at = |name: &str| std::fs::symlink_metadata(top.join(name)).unwrap();
    let file = at("dir/file");
    assert_eq!((file.uid(), file.gid(), file.mode() & 0o7777), (1234, 1234, 0o4777));
    assert_eq!((file.mtime(), file.mtime_nsec()), (1_234_567_890, 500_000_000));
    assert_eq!(file.ino(), at("dir/hard").ino());
    assert_eq!((at("dir").mode() & 0o7777, at("dir").mtime(), at("dir").uid()), (0o1777, 42, 7));
    assert_eq!((at("sym").uid(), at("sym").mtime()), (9, 1_000_000_000));
    assert_eq!(std::fs::read_link(top.join("sym")).unwrap(), Path::new("/dir/file"));
    assert!(at("dev/null").file_type().is_char_device() && at("fifo").file_type().is_fifo());
    assert_eq!((at("dev/null").rdev(), at("dev/null").mode() & 0o777), (rustix::fs::makedev(1, 3), 0o620));
    assert!(!top.join("fake-whiteout").exists());
    assert_eq!(std::fs::read(top.join(&long)).unwrap(), b"long");
    assert_eq!(std::fs::read(top.join("twice")).unwrap(), b"second");
    let mut value = [0u8; 64];
    let xattr = |name: &str, value: &mut [u8]| rustix::fs::getxattr(top.join("dir/file"), name, value);
    let n = xattr("user.note", &mut value).unwrap();
    assert_eq!(&value[..n], b"a\nb");
    assert_eq!(xattr("security.capability", &mut value).unwrap(), 20);
    assert!(xattr("trusted.overlay.redirect", &mut value).is_err());
    assert!(xattr("user.overlay.opaque", &mut value).is_err());
}

#[tokio::test]
async fn whiteouts_hide_what_is_beneath_and_nothing_of_their_own_layer() {
    let node = Node::new().await;
    let base = Layer::new()
        .entry(Entry { mode: 0o1777, uid: 33, ..Entry::new("tmp/", EntryType::Directory) })
        .file("tmp/old", b"1", 0o644)
        .file("gone", b"1", 0o644)
        .file("replaced/file", b"1", 0o644)
        .file("hidden/then/back", b"1", 0o644);
    let upper = Layer::new()
        // Its directory has no entry here: it looks like the one beneath.
        .file("tmp/new", b"2", 0o644)
        .file(".wh.gone", b"", 0o644)
        .file("replaced/.wh..wh..opq", b"", 0o644)
        .file("replaced/mine", b"2", 0o644)
        .file(".wh.hidden", b"", 0o644)
        .file("hidden/anew", b"2", 0o644)
        .file("own", b"2", 0o644)
        .file(".wh.own", b"", 0o644)
        .file(".wh..wh.plnk/x", b"", 0o644);
    let top = unpack(&node, [base, upper]).await.unwrap();
    let at = |name: &str| std::fs::symlink_metadata(top.join(name)).unwrap();
    assert_eq!((at("tmp").mode() & 0o7777, at("tmp").uid()), (0o1777, 33));
    assert_eq!(FileType::from_raw_mode(at("gone").mode()), FileType::CharacterDevice);
    let opaque = |name: &str| {
        let mut value = [0u8; 4];
        rustix::fs::getxattr(top.join(name), "trusted.overlay.opaque", &mut value).is_ok()
    };
    assert!(opaque("replaced") && opaque("hidden") && !opaque("tmp"));
    assert_eq!(std::fs::read(top.join("own")).unwrap(), b"2");

    // And so the kernel sees it.
    let chain_id = node.images.get("a:1").unwrap().chain_id.clone();
    let mount = node.snapshots.prepare("box", Some(&chain_id), None).await.unwrap().remove(0);
    let rootfs = node.root.join("rootfs");
    std::fs::create_dir(&rootfs).unwrap();
    let options = std::ffi::CString::new(mount.options.join(",")).unwrap();
    rustix::mount::mount("overlay", &rootfs, "overlay", rustix::mount::MountFlags::empty(), options.as_c_str())
        .unwrap();
    for (path, there) in [
        ("tmp/old", true),
        ("tmp/new", true),
        ("gone", false),
        ("replaced/file", false),
        ("replaced/mine", true),
        ("hidden/then", false),
        ("hidden/anew", true),
    ] {
        assert_eq!(rootfs.join(path).exists(), there, "{path}");
    }
}

#[tokio::test]
async fn cve_2025_58183_sparse_files_and_huge_headers_cost_nothing() {
    let header = |kind: EntryType, size: u64| {
        let mut header = tar::Header::new_gnu();
        header.set_path("x").unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let mut sparse = Entry::new("big", EntryType::Regular);
    sparse.pax =
        vec![("GNU.sparse.major".into(), b"1".to_vec()), ("GNU.sparse.realsize".into(), b"1099511627776".to_vec())];
    for layer in [
        Layer::new().raw(&header(EntryType::GNUSparse, 1 << 40)),
        Layer::new().entry(sparse),
        Layer::new().raw(&header(EntryType::XHeader, 1 << 33)),
        Layer::new().raw(&header(EntryType::GNULongName, 1 << 33)),
        Layer::new().raw(&header(EntryType::Regular, 1 << 50)),
        Layer::new().raw(&[0xff; 512]),
    ] {
        let node = Node::new().await;
        assert!(unpack(&node, [layer]).await.is_err());
        node.assert_empty().await;
    }
}

#[tokio::test]
async fn what_stood_there_makes_way() {
    let node = Node::new().await;
    let deep: String = "d/".repeat(500);
    let layer = Layer::new()
        .file(&format!("a/{deep}x"), b"1", 0o644)
        .file("a", b"now a file", 0o644)
        .symlink("b", "nowhere")
        .dir("b/", 0o700)
        .dir("c/", 0o700)
        .file("c/kept", b"1", 0o644)
        .dir("c/", 0o711);
    let top = unpack(&node, [layer]).await.unwrap();
    assert_eq!(std::fs::read(top.join("a")).unwrap(), b"now a file");
    assert!(std::fs::symlink_metadata(top.join("b")).unwrap().is_dir());
    assert!(top.join("c/kept").exists());
    assert_eq!(std::fs::metadata(top.join("c")).unwrap().mode() & 0o777, 0o711);
}

#[tokio::test]
async fn ids_beyond_32_bits_are_refused() {
    for id in [u64::from(u32::MAX), 1 << 40] {
        let node = Node::new().await;
        let mut file = Entry::new("f", EntryType::Regular);
        file.pax = vec![("uid".into(), id.to_string().into_bytes())];
        assert!(unpack(&node, [Layer::new().entry(file)]).await.is_err());
        node.assert_empty().await;
    }
}
