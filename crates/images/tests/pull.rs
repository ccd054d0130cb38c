//! Pulls from Debian's docker-registry, and from servers that cut, lie and steal.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Node, Reply, Server, faithful, ranged};
use longshore_images::{Auth, RegistryConfig};
use snapshots::Snapshotter;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use testkit::{ImageBuilder, TempRoot, sha256};
use types::ErrorKind;

fn noisy() -> ImageBuilder {
    let noise: Vec<u8> = (0..400_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    ImageBuilder::scratch().file("noise", &noise, 0o644)
}

#[tokio::test]
async fn tag_digest_and_index_from_a_real_registry() {
    let registry = testkit::registry();
    let node = Node::new().await;
    let image = ImageBuilder::busybox().file("/etc/x", b"1", 0o644);
    let digest = registry.push("team/app", "v1", &image);
    let tag = format!("{}/team/app:v1", registry.host());
    let by_digest = format!("{}/team/app@{digest}", registry.host());
    assert_eq!(node.images.pull(&by_digest, None).await.unwrap(), image.id());
    let found = node.images.get(&by_digest).unwrap();
    assert!(found.repo_tags.is_empty());
    assert_eq!(node.images.pull(&tag, None).await.unwrap(), image.id());
    let found = node.images.get(&tag).unwrap();
    assert_eq!((&found.repo_tags[0], &found.repo_digests[0]), (&tag, &by_digest));
    let layers: usize = image.layer_blobs().iter().map(Vec::len).sum();
    assert_eq!(found.size as usize, layers + image.config_json().len() + image.manifest_json().len());

    // The platform that runs here, out of an index; the name by digest is the index's.
    let ours = ImageBuilder::scratch().file("mine", b"1", 0o644);
    let theirs = ImageBuilder::scratch().file("theirs", b"1", 0o644).architecture("s390x");
    let index = registry.push_index("multi", "latest", &[theirs, ours.clone()]);
    let multi = format!("{}/multi", registry.host());
    assert_eq!(node.images.pull(&multi, None).await.unwrap(), ours.id());
    let expected = [format!("{multi}@{index}")];
    assert_eq!(node.images.get(&multi).unwrap().repo_digests, expected);

    let e = node.images.pull(&format!("{}/team/app:none", registry.host()), None).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound, "{e}");
    assert_eq!(node.images.pull("NOT A NAME", None).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[tokio::test]
async fn a_moved_tag_leaves_the_old_image_its_digest() {
    let registry = testkit::registry();
    let node = Node::new().await;
    let name = format!("{}/app:v1", registry.host());
    let (old, new) = (noisy(), noisy().file("more", b"1", 0o644));
    registry.push("app", "v1", &old);
    node.images.pull(&name, None).await.unwrap();
    registry.push("app", "v1", &new);
    node.images.pull(&name, None).await.unwrap();
    assert_eq!(node.images.get(&name).unwrap().id, new.id());
    let moved = node.images.get(&old.id()).unwrap();
    assert!(moved.repo_tags.is_empty() && moved.repo_digests.len() == 1);
    // A container keeps what it stands on, no longer than it lives.
    node.snapshots.prepare("box", Some(&moved.chain_id), None).await.unwrap();
    node.images.remove(&old.id()).await.unwrap();
    node.images.remove(&name).await.unwrap();
    assert!(node.snapshots.layer(&moved.chain_id).await.unwrap().is_some());
    node.snapshots.remove("box").await.unwrap();
    node.assert_empty().await;
}

#[tokio::test]
async fn a_mirror_serves_every_registry_and_is_told_which() {
    let server = Server::new(faithful(&noisy()));
    let node = Node::mirrored(&format!("http://{}", server.address)).await;
    assert_eq!(node.images.pull("registry.k8s.io/pause:3.10", None).await.unwrap(), noisy().id());
    assert!(server.seen().iter().all(|s| s.path.contains("ns=registry.k8s.io")));
    assert!(node.images.get("registry.k8s.io/pause:3.10").is_some());
}

#[tokio::test]
async fn the_registry_is_asked_when_a_mirror_fails() {
    let server = Server::new(faithful(&noisy()));
    let empty = Server::new(|_, _| Reply::new(404, b"no"));
    let mirrors = vec![format!("http://{}", empty.address), "http://127.0.0.1:1".into()];
    let config = RegistryConfig { mirrors, ..Default::default() };
    let node = Node::with(TempRoot::new(), |c| drop(c.registries.insert(server.address.clone(), config))).await;
    assert_eq!(node.images.pull(&format!("{}/a", server.address), None).await.unwrap(), noisy().id());
}

#[tokio::test]
async fn image_digests_are_verified_after_a_resumed_download_too() {
    let image = noisy();
    let blob = image.layer_blobs().remove(0);
    let digest = sha256(&blob);
    let good = faithful(&image);
    let calls = AtomicU32::new(0);
    let server = Server::new(move |seen, own| {
        let mut reply = good(seen, own);
        // Cut twice, then go on from there.
        if seen.path.contains(&digest) && calls.fetch_add(1, Ordering::SeqCst) < 2 {
            reply.cut = Some(reply.body.len() / 3);
        }
        reply
    });
    let node = Node::new().await;
    assert_eq!(node.images.pull(&format!("{}/a", server.address), None).await.unwrap(), image.id());
    let ranges: Vec<_> = server.seen().into_iter().filter_map(|s| s.range).collect();
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert_eq!(ranges[0], format!("bytes={}-", blob.len() / 3));

    // A liar in the middle: what follows the cut is another's.
    let (image, blob) = (noisy(), blob);
    let (digest, good) = (sha256(&blob), faithful(&image));
    let server = Server::new(move |seen, own| {
        if !seen.path.contains(&digest) {
            return good(seen, own);
        }
        let mut evil = blob.clone();
        let last = evil.len() - 1;
        evil[last] ^= 1;
        let mut reply = ranged(seen, &evil);
        if seen.range.is_none() {
            reply.cut = Some(1000);
        }
        reply
    });
    let node = Node::new().await;
    let e = node.images.pull(&format!("{}/a", server.address), None).await.unwrap_err();
    assert!(e.to_string().contains("has digest"), "{e}");
    node.assert_empty().await;
}

#[tokio::test]
async fn wrong_manifests_and_endless_ones_are_refused() {
    let image = noisy();
    for (body, kind) in [
        (vec![b' '; 5 << 20], ErrorKind::ResourceExhausted),
        (b"{\"schemaVersion\":2,\"manifests\":[],\"layers\":[]}".to_vec(), ErrorKind::InvalidArgument),
    ] {
        let server = Server::new(move |_, _| Reply::new(200, &body));
        let node = Node::new().await;
        let e = node.images.pull(&format!("{}/a", server.address), None).await.unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
    }
    // By digest, another manifest than asked for is no answer.
    let server = Server::new(faithful(&image));
    let node = Node::new().await;
    let name = format!("{}/a@sha256:{}", server.address, "0".repeat(64));
    assert!(node.images.pull(&name, None).await.unwrap_err().to_string().contains("has digest"));
    node.assert_empty().await;
}

#[tokio::test]
async fn a_dead_or_silent_registry_is_an_error_in_bounded_time() {
    let node = Node::with(TempRoot::new(), |c| {
        c.retries = 1;
        c.idle_timeout = Duration::from_millis(300);
    })
    .await;
    let e = node.images.pull("127.0.0.1:1/a", None).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
    let silent = Server::new(|_, _| {
        std::thread::sleep(Duration::from_secs(60));
        Reply::new(200, b"")
    });
    let start = std::time::Instant::now();
    let e = node.images.pull(&format!("{}/a", silent.address), None).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn pulls_of_the_same_image_join_and_go_on_without_their_callers() {
    let good = faithful(&noisy());
    let server = Server::new(move |seen, own| {
        std::thread::sleep(Duration::from_millis(100));
        good(seen, own)
    });
    let node = Node::new().await;
    let name = format!("{}/a", server.address);
    // This caller leaves at once.
    let left = tokio::time::timeout(Duration::from_millis(20), node.images.pull(&name, None)).await;
    assert!(left.is_err());
    let all = futures::future::join_all((0..10).map(|_| node.images.pull(&name, None))).await;
    assert!(all.iter().all(|r| r.as_ref().is_ok_and(|id| *id == noisy().id())));
    assert_eq!(server.seen().len(), 3, "manifest, configuration and layer once each");
    // Under another name, the layer is not downloaded again.
    node.images.pull(&format!("{}/b", server.address), None).await.unwrap();
    assert_eq!(server.seen().len(), 5);
}

fn secret() -> Option<Auth> {
    Auth::from_cri("user", "secret", "", "", "", "").unwrap()
}

#[tokio::test]
async fn a_token_is_fetched_with_the_password_and_used_alone() {
    let good = faithful(&noisy());
    let server = Server::new(move |seen, own| match seen.authorization.as_deref() {
        _ if seen.path.starts_with("/token") => match seen.authorization.as_deref() {
            Some("Basic dXNlcjpzZWNyZXQ=") => Reply::new(200, br#"{"token":"T"}"#),
            _ => Reply::new(401, b"who?"),
        },
        Some("Bearer T") => good(seen, own),
        _ => Reply::new(401, b"token!")
            .header("WWW-Authenticate", &format!("Bearer realm=\"http://{own}/token\",service=\"s\"")),
    });
    let node = Node::new().await;
    let name = format!("{}/a", server.address);
    let e = node.images.pull(&name, None).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::PermissionDenied, "{e}");
    node.images.pull(&name, secret()).await.unwrap();
    let tokens = server.seen().iter().filter(|s| s.path.starts_with("/token")).count();
    assert_eq!(tokens, 2, "one for each pull");
    assert!(server.seen().iter().any(|s| s.path.contains("scope=repository%3Aa%3Apull&service=s")));
}

#[tokio::test]
async fn cve_2020_15157_a_redirect_to_another_host_gets_no_credentials() {
    let image = noisy();
    let thief = Server::new(faithful(&image));
    let (good, away) = (faithful(&image), thief.address.clone());
    let server = Server::new(move |seen, own| match seen.authorization.as_deref() {
        None => Reply::new(401, b"").header("WWW-Authenticate", "Basic realm=\"x\""),
        Some(_) if seen.path.contains("/blobs/") => {
            Reply::new(307, b"").header("Location", &format!("http://{away}{}", seen.path))
        }
        Some(_) => good(seen, own),
    });
    let node = Node::new().await;
    node.images.pull(&format!("{}/a", server.address), secret()).await.unwrap();
    assert!(!thief.seen().is_empty());
    assert!(thief.seen().iter().all(|s| s.authorization.is_none()));
}

#[tokio::test]
async fn cve_2020_15157_a_foreign_layers_address_gets_no_credentials() {
    let image = noisy();
    let blob = image.layer_blobs().remove(0);
    let digest = sha256(&blob);
    let thief_asks = Server::new(|_, own| {
        Reply::new(401, b"").header("WWW-Authenticate", &format!("Bearer realm=\"http://{own}/steal\""))
    });
    let thief_gives = Server::new(move |seen, _| ranged(seen, &blob));
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest_json()).unwrap();
    let layer = &mut manifest["layers"][0];
    layer["mediaType"] = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip".into();
    layer["urls"] =
        serde_json::json!([format!("http://{}/x", thief_asks.address), format!("http://{}/y", thief_gives.address)]);
    let manifest = serde_json::to_vec(&manifest).unwrap();
    let good = faithful(&image);
    let server = Server::new(move |seen, own| match seen.authorization.as_deref() {
        None => Reply::new(401, b"").header("WWW-Authenticate", "Basic realm=\"x\""),
        Some(_) if seen.path.contains(&digest) => Reply::new(404, b"elsewhere"),
        Some(_) if seen.path.contains("/manifests/") => Reply::new(200, &manifest),
        Some(_) => good(seen, own),
    });
    let node = Node::new().await;
    node.images.pull(&format!("{}/a", server.address), secret()).await.unwrap();
    let seen = [thief_asks.seen(), thief_gives.seen()].concat();
    assert_eq!(seen.len(), 2, "nobody followed the thief's challenge: {seen:?}");
    assert!(seen.iter().all(|s| s.authorization.is_none()));
}

#[tokio::test]
async fn a_mirror_gets_no_credentials_of_the_registry() {
    let server = Server::new(|_, _| Reply::new(401, b"").header("WWW-Authenticate", "Basic realm=\"x\""));
    let node = Node::mirrored(&format!("http://{}", server.address)).await;
    let e = node.images.pull("busybox", secret()).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::PermissionDenied);
    assert!(server.seen().iter().all(|s| s.authorization.is_none()));
}

#[tokio::test]
async fn a_full_disk_during_a_download_leaves_nothing() {
    let noise: Vec<u8> = (0..12u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let server = Server::new(faithful(&ImageBuilder::scratch().file("noise", &noise, 0o644)));
    let node = Node::with(TempRoot::small_disk(12 << 20), |_| {}).await;
    let e = node.images.pull(&format!("{}/a", server.address), None).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::ResourceExhausted, "{e}");
    node.assert_empty().await;
}

/// Pulls and removals of images that share layers, all at once: every pull
/// succeeds with whole layers, and in the end nothing is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn pulls_and_removals_at_once_lose_no_layer_and_leave_none() {
    let registry = testkit::registry();
    let node = Node::new().await;
    let base =
        ImageBuilder::scratch().file("base", b"1", 0o644).layer(testkit::Layer::new().file("second", b"2", 0o644));
    let mut names = Vec::new();
    for n in 0..6u8 {
        let image = base.clone().layer(testkit::Layer::new().file("own", &[n], 0o644));
        registry.push("shared", &format!("v{n}"), &image);
        names.push(format!("{}/shared:v{n}", registry.host()));
    }
    let work = names.iter().map(|name| {
        let (images, snapshots, name) = (node.images.clone(), node.snapshots.clone(), name.clone());
        tokio::spawn(async move {
            for round in 0..15 {
                let id = images.pull(&name, None).await.unwrap();
                let image = images.get(&id).unwrap();
                let key = format!("{name}-{round}");
                let mounts = snapshots.prepare(&key, Some(&image.chain_id), None).await.unwrap();
                let lower = mounts[0].options.iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap();
                let all: Vec<bool> = lower
                    .split(':')
                    .zip(["own", "second", "base"])
                    .map(|(dir, f)| std::path::Path::new(dir).join(f).exists())
                    .collect();
                assert_eq!(all, [true; 3]);
                images.remove(&name).await.unwrap();
                snapshots.remove(&key).await.unwrap();
            }
        })
    });
    for done in futures::future::join_all(work).await {
        done.unwrap();
    }
    node.assert_empty().await;
}

#[tokio::test]
async fn https_needs_a_certificate_that_somebody_vouches_for() {
    let registry = testkit::registry_tls();
    let image = ImageBuilder::scratch().file("x", b"1", 0o644);
    let layout = TempRoot::new();
    image.oci_layout(layout.path(), "v1");
    let pushed = std::process::Command::new("skopeo")
        .args(["copy", "-q", "--dest-tls-verify=false", &format!("oci:{}:v1", layout.path().display())])
        .arg(format!("docker://{}/a:v1", registry.host()))
        .status()
        .unwrap();
    assert!(pushed.success());
    let stranger = RegistryConfig { mirrors: vec![registry.url()], mirror_only: true, ..Default::default() };
    let insecure = RegistryConfig { insecure_skip_verify: true, ..stranger.clone() };
    let known = RegistryConfig { ca_file: Some(registry.ca_file()), ..stranger.clone() };
    for (config, works) in [(stranger, false), (insecure, true), (known, true)] {
        let node = Node::with(TempRoot::new(), |c| {
            c.retries = 0;
            c.registries.insert("*".into(), config);
        })
        .await;
        let pulled = node.images.pull("q.io/a:v1", None).await;
        match pulled {
            Ok(id) => assert!(works && id == image.id()),
            Err(e) => assert!(!works && e.kind() == ErrorKind::Unavailable, "{e}"),
        }
    }
}
