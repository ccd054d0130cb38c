//! Archives, ours and other tools', good and evil.
#![allow(clippy::unwrap_used)]

mod common;

use common::Node;
use longshore_images::Platform;
use snapshots::Snapshotter;
use std::process::Command;
use testkit::{ImageBuilder, Layer, LayerCompression, TempRoot};
use types::ErrorKind;

fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

#[tokio::test]
async fn every_kind_of_archive_gives_the_same_image() {
    let node = Node::new().await;
    let image = ImageBuilder::busybox().user("1000").env("A", "b").file("/etc/x", b"hello", 0o600).volume("/data");
    let (archive, docker, layout) = (node.root.join("a.tar"), node.root.join("d.tar"), node.root.join("layout"));
    image.oci_archive(&archive, "example.com/a:1");
    image.docker_archive(&docker, "docker:2");
    image.oci_layout(&layout, "layout:3");
    for (path, name) in [
        (&archive, "example.com/a:1"),
        (&docker, "docker.io/library/docker:2"),
        (&layout, "docker.io/library/layout:3"),
    ] {
        let imported = node.images.import(path, None).await.unwrap();
        assert_eq!(imported.len(), 1);
        assert_eq!(imported[0].id, image.id());
        assert_eq!(imported[0].references[0], name);
    }
    assert_eq!(node.images.list(None).len(), 1);
    let found = node.images.get("layout:3").unwrap();
    assert_eq!(found.repo_tags.len(), 3);
    assert_eq!(found.repo_digests.len(), 2);
    assert_eq!(found.config.config().as_ref().unwrap().user().as_deref(), Some("1000"));
    let top = node.top(&found).await;
    assert_eq!(std::fs::read(top.join("etc/x")).unwrap(), b"hello");
    assert_eq!(node.images.list(Some("docker:2")).len(), 1);
    assert!(node.images.list(Some("other")).is_empty());
    assert!(node.images.fs_info().await.unwrap().used_bytes > 1_000_000);
    // By any name the whole image goes.
    node.images.remove("example.com/a:1").await.unwrap();
    node.images.remove("example.com/a:1").await.unwrap();
    node.assert_empty().await;
}

#[tokio::test]
async fn an_import_is_named_by_its_caller() {
    let node = Node::new().await;
    let path = node.root.join("a.tar");
    let image = ImageBuilder::scratch().file("x", b"1", 0o644);
    image.oci_archive(&path, "latest");
    let imported = node.images.import(&path, None).await.unwrap();
    assert!(imported[0].references.is_empty(), "a bare tag names nothing");
    let imported = node.images.import(&path, Some("q.io/mine:7")).await.unwrap();
    assert_eq!(imported[0].references[0], "q.io/mine:7");
    assert_eq!(node.images.get("q.io/mine:7").unwrap().id, image.id());
    let by_digest = format!("q.io/mine@sha256:{}", "a".repeat(64));
    assert!(node.images.import(&path, Some(&by_digest)).await.is_err());
}

#[tokio::test]
async fn archives_of_skopeo_and_umoci_are_read() {
    let node = Node::new().await;
    let image = ImageBuilder::busybox().file("/etc/x", b"hello", 0o644);
    let layout = node.root.join("layout");
    image.oci_layout(&layout, "v1");
    let source = format!("oci:{}:v1", layout.display());
    for (kind, name, ours) in [
        ("docker-archive", "skopeo:1", "docker.io/library/skopeo:1"),
        ("oci-archive", "example.com/skopeo:2", "example.com/skopeo:2"),
    ] {
        let file = node.root.join(kind);
        run("skopeo", &["copy", "-q", &source, &format!("{kind}:{}:{name}", file.display())]);
        let imported = node.images.import(&file, None).await.unwrap();
        assert_eq!(imported[0].references[0], ours);
        run("gzip", &[file.to_str().unwrap()]);
        node.images.import(&file.with_extension("gz"), None).await.unwrap();
    }
    let zstd = node.root.join("zstd");
    run(
        "skopeo",
        &[
            "copy",
            "-q",
            "--dest-compress-format",
            "zstd",
            "--dest-compress",
            &source,
            &format!("oci:{}:z/z:1", zstd.display()),
        ],
    );
    node.images.import(&zstd, None).await.unwrap();

    // A layer that umoci computed: a removal, a replaced directory, a link.
    let (umoci, bundle) = (format!("{}:v1", layout.display()), node.root.join("bundle"));
    run("umoci", &["unpack", "--image", &umoci, bundle.to_str().unwrap()]);
    std::fs::remove_file(bundle.join("rootfs/etc/group")).unwrap();
    std::fs::write(bundle.join("rootfs/tmp/new"), "new").unwrap();
    run("umoci", &["repack", "--image", &umoci, bundle.to_str().unwrap()]);
    let imported = node.images.import(&layout, Some("umoci")).await.unwrap();
    let top = node.top(&node.images.get(&imported[0].id).unwrap()).await;
    assert_eq!(std::fs::read(top.join("tmp/new")).unwrap(), b"new");
    let hidden = std::fs::symlink_metadata(top.join("etc/group")).unwrap();
    assert!(std::os::unix::fs::FileTypeExt::is_char_device(&hidden.file_type()));
}

#[tokio::test]
async fn images_survive_a_restart_and_leftovers_do_not() {
    let mut node = Node::new().await;
    let path = node.root.join("a.tar");
    ImageBuilder::scratch().file("x", b"1", 0o644).oci_archive(&path, "a:1");
    node.images.import(&path, None).await.unwrap();
    std::fs::write(node.root.join("images/ingest/0-sha256-junk"), "half").unwrap();
    let hold = node.snapshots.hold(vec!["orphan".into()]);
    let draft = node.snapshots.begin_layer("orphan", None).await.unwrap();
    node.snapshots.commit_layer(draft).await.unwrap();
    drop(hold);
    node = Node::with(node.root, |c| c.pinned = vec!["a:1".into()]).await;
    assert!(node.images.get("a:1").unwrap().pinned);
    assert!(node.snapshots.layer("orphan").await.unwrap().is_none());
    assert!(std::fs::read_dir(node.root.join("images/ingest")).unwrap().next().is_none());
    // Layers that vanished take only their image along.
    std::fs::remove_dir_all(node.root.join("snapshots/1")).unwrap();
    node = Node::with(node.root, |_| {}).await;
    node.assert_empty().await;
}

#[tokio::test]
async fn cve_2023_25153_oversized_import_metadata_is_bounded() {
    let node = Node::new().await;
    let path = node.root.join("a.tar");
    for name in ["index.json", "manifest.json"] {
        std::fs::write(&path, Layer::new().file(name, &vec![b' '; 5 << 20], 0o644).tar()).unwrap();
        let e = node.images.import(&path, None).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ResourceExhausted, "{e}");
    }
    // A size that is only claimed, and names without end.
    let mut header = tar::Header::new_gnu();
    header.set_path("index.json").unwrap();
    header.set_size(1 << 40);
    header.set_cksum();
    std::fs::write(&path, header.as_bytes()).unwrap();
    assert!(node.images.import(&path, None).await.is_err());
    let names = (0..20).fold(Layer::new(), |l, n| l.file(&format!("{n}{}", "n".repeat(1_000_000)), b"", 0o644));
    std::fs::write(&path, names.tar()).unwrap();
    assert_eq!(node.images.import(&path, None).await.unwrap_err().kind(), ErrorKind::ResourceExhausted);
    node.assert_empty().await;
}

#[tokio::test]
async fn image_digests_of_an_archive_are_verified() {
    let node = Node::new().await;
    let layout = node.root.join("layout");
    let image = ImageBuilder::scratch().file("x", b"1", 0o644).compression(LayerCompression::None);
    let blob = |bytes: &[u8]| layout.join(format!("blobs/{}", testkit::sha256(bytes).replace(':', "/")));
    let parts = [image.manifest_json(), image.config_json(), image.layer_blobs().remove(0)];
    for part in &parts {
        image.oci_layout(&layout, "a:1");
        let mut bad = part.clone();
        let at = bad.iter().position(|b| *b == b'1').unwrap();
        bad[at] = b'2';
        std::fs::write(blob(part), bad).unwrap();
        assert!(node.images.import(&layout, None).await.is_err());
        node.assert_empty().await;
    }
    // A docker archive's layers have only their diff ids.
    let (good, bad) = (node.root.join("good.tar"), node.root.join("bad.tar"));
    image.docker_archive(&good, "a:1");
    let mut bytes = std::fs::read(&good).unwrap();
    let content = bytes.windows(2).rposition(|w| w == b"1\0").unwrap();
    bytes[content] = b'9';
    std::fs::write(&bad, bytes).unwrap();
    assert!(node.images.import(&bad, None).await.is_err());
    node.assert_empty().await;
}

#[tokio::test]
async fn what_is_no_archive_is_refused() {
    let node = Node::new().await;
    let path = node.root.join("x");
    for content in [b"".to_vec(), b"hello".to_vec(), vec![0x1f, 0x8b, 8, 0], Layer::new().file("a", b"b", 0o644).tar()]
    {
        std::fs::write(&path, content).unwrap();
        assert!(node.images.import(&path, None).await.is_err());
    }
    assert_eq!(node.images.import(&node.root.join("none"), None).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(node.images.import("/dev/zero".as_ref(), None).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    let fifo = node.root.join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    assert_eq!(node.images.import(&fifo, None).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    node.assert_empty().await;
}

#[tokio::test]
async fn a_full_disk_leaves_nothing_and_the_next_import_works() {
    let node = Node::with(TempRoot::small_disk(40 << 20), |_| {}).await;
    let other = TempRoot::new();
    let path = other.join("a.tar");
    let noise: Vec<u8> = (0..8u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    ImageBuilder::busybox().file("noise", &noise, 0o644).oci_archive(&path, "a:1");
    let before = std::fs::read_dir(node.root.path()).unwrap().count();
    let filler = node.root.fill();
    let e = node.images.import(&path, None).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::ResourceExhausted, "{e}");
    node.assert_empty().await;
    std::fs::remove_file(filler).unwrap();
    assert_eq!(std::fs::read_dir(node.root.path()).unwrap().count(), before);
    node.images.import(&path, None).await.unwrap();
}

#[tokio::test]
async fn an_image_for_another_platform_is_named() {
    let other = Platform { os: "linux".into(), architecture: "riscv64".into(), variant: String::new() };
    let node = Node::with(TempRoot::new(), |c| c.platform = Some(other)).await;
    let layout = node.root.join("layout");
    let image = ImageBuilder::scratch().architecture("amd64");
    image.oci_layout(&layout, "a:1");
    let manifest = image.manifest_json();
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": testkit::sha256(&manifest),
         "size": manifest.len(), "platform": image.platform_json()}]});
    let inner = serde_json::to_vec(&index).unwrap();
    std::fs::write(layout.join("blobs").join(testkit::sha256(&inner).replace(':', "/")), &inner).unwrap();
    let outer = serde_json::json!({"schemaVersion": 2, "manifests": [
        {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": testkit::sha256(&inner), "size": inner.len()}]});
    std::fs::write(layout.join("index.json"), serde_json::to_vec(&outer).unwrap()).unwrap();
    let e = node.images.import(&layout, None).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound);
    assert!(e.to_string().contains("linux/riscv64") && e.to_string().contains("linux/amd64"), "{e}");
}
