//! Images as volumes, against a real daemon, shim and runtime.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{Cri, Daemon, IMAGE, busybox, container};
use proto::cri::*;
use testkit::{ImageBuilder, Layer};
use tonic::Code;

const DATA: &str = "localhost/test/data:1";
const PLAIN: &str = "localhost/test/plain:1";

async fn start() -> (Daemon, Cri) {
    let daemon = Daemon::start().await;
    daemon.import(&busybox(), IMAGE);
    let below = Layer::new().dir("etc/", 0o755).file("etc/a", b"from below", 0o644).file("etc/gone", b"x", 0o644);
    let below = below.dir("cut/", 0o755).file("cut/gone", b"x", 0o644);
    let above = Layer::new().dir("etc/", 0o755).file("etc/b", b"from above", 0o644).file("etc/.wh.gone", b"", 0o644);
    let above = above.dir("cut/", 0o755).file("cut/.wh..wh..opq", b"", 0o644).file("cut/.wh.gone", b"", 0o644);
    let above = above.file("cut/kept", b"x", 0o644);
    daemon.import(&ImageBuilder::scratch().layer(below).layer(above), DATA);
    daemon.import(&ImageBuilder::scratch().file("only", b"one layer", 0o644), PLAIN);
    let cri = daemon.cri().await;
    (daemon, cri)
}

fn image_mount(path: &str, image: &str, sub_path: &str) -> Mount {
    Mount {
        container_path: path.into(),
        readonly: true,
        image: Some(ImageSpec { image: image.into(), ..Default::default() }),
        image_sub_path: sub_path.into(),
        ..Default::default()
    }
}

async fn read(cri: &Cri, id: &str, script: &str) -> (i32, String) {
    let answer = cri.exec(id, &["sh", "-c", script], 10).await.unwrap();
    (answer.exit_code, String::from_utf8_lossy(&answer.stdout).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_mounted_read_only_and_kept_while_a_container_has_them() {
    let (mut daemon, cri) = start().await;
    let config = daemon.pod("volumes");
    let pod = cri.run_pod(&config).await.unwrap();
    let mut c = container("main", IMAGE, &["sleep", "1000"]);
    c.mounts = vec![
        image_mount("/data", DATA, ""),
        image_mount("/part", DATA, "etc"),
        image_mount("/b", DATA, "etc/b"),
        image_mount("/plain", PLAIN, ""),
        image_mount("/cut", DATA, "cut"),
    ];
    let id = cri.run(&pod, &c, &config).await.unwrap();
    let script = "cat /data/etc/a /data/etc/b /part/a /b /plain/only; ls /data/etc /part /cut";
    let expected = (
        0,
        "from belowfrom abovefrom belowfrom aboveone layer/cut:\nkept\n\n/data/etc:\na\nb\n\n/part:\na\nb\n"
            .to_string(),
    );
    assert_eq!(read(&cri, &id, script).await, expected);
    for path in ["/data/x", "/part/x", "/plain/x", "/b"] {
        let (code, _) = read(&cri, &id, &format!("echo x > {path}")).await;
        assert_ne!(code, 0, "{path} was written to");
    }
    // The image goes, what is mounted of it stays, also for a daemon that comes later.
    for image in [DATA, PLAIN] {
        let image = Some(ImageSpec { image: image.into(), ..Default::default() });
        cri.images.clone().remove_image(RemoveImageRequest { image }).await.unwrap();
    }
    daemon.kill();
    daemon.begin().await;
    let cri = daemon.cri().await;
    assert_eq!(read(&cri, &id, script).await, expected);
    cri.stop(&id, 0).await.unwrap();
    let layers = || std::fs::read_dir(daemon.dir().join("root/snapshots")).unwrap().count();
    let with = layers();
    cri.remove(&id).await.unwrap();
    // Three layers of the two images, the container's top, and those of five mounts.
    assert_eq!(with - layers(), 9, "what nothing needs any more is removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_image_mount_is_named_and_leaves_nothing() {
    let (daemon, cri) = start().await;
    let config = daemon.pod("bad-volumes");
    let pod = cri.run_pod(&config).await.unwrap();
    let before = daemon.footprint();
    let writable = Mount { readonly: false, ..image_mount("/data", DATA, "") };
    for (mount, code, word) in [
        (image_mount("/data", "localhost/none:1", ""), Code::NotFound, "localhost/none:1"),
        (image_mount("/data", DATA, "nowhere"), Code::InvalidArgument, "nowhere"),
        (image_mount("/data", DATA, "../../.."), Code::InvalidArgument, "../../.."),
        (writable, Code::InvalidArgument, "read-only"),
    ] {
        let mut c = container("main", IMAGE, &["true"]);
        c.mounts = vec![image_mount("/good", PLAIN, ""), mount];
        let e = cri.create(&pod, &c, &config).await.unwrap_err();
        assert_eq!(e.code(), code, "{e}");
        assert!(e.message().contains(word), "{e}");
    }
    daemon.leaves_nothing_but(&before);
}
