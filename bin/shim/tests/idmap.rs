//! A root file system whose owners are mapped, as containerd's snapshotters ask
//! for it.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::common::{Bundle, Shape, busybox_root, sh};
use harness::{CALL, Fifo, Shim, code};
use proto::containerd::runc::v1::Options;
use proto::containerd::task::v3 as task;
use proto::containerd::types::Mount;

fn overlay(dir: &std::path::Path, more: &[&str]) -> Mount {
    let layers: Vec<String> = ["top", "base"].map(|l| dir.join(l).display().to_string()).to_vec();
    let mut options = vec![
        format!("lowerdir={}", layers.join(":")),
        format!("upperdir={}", dir.join("upper").display()),
        format!("workdir={}", dir.join("work").display()),
    ];
    options.extend(more.iter().map(ToString::to_string));
    Mount { r#type: "overlay".into(), source: "overlay".into(), target: String::new(), options }
}

#[tokio::test]
async fn owners_of_lower_layers_are_mapped_and_nothing_is_left() {
    let shim = Shim::start().await;
    let layers = tempfile::tempdir().unwrap();
    for d in ["top", "upper", "work"] {
        std::fs::create_dir(layers.path().join(d)).unwrap();
    }
    std::fs::write(layers.path().join("top/file"), "").unwrap();
    busybox_root(&layers.path().join("base"));
    let b = Bundle::new(&Shape { args: sh("/bin/busybox stat -c %u:%g /file /etc/passwd"), ..Shape::default() });
    std::fs::remove_dir_all(b.path().join("rootfs")).unwrap();
    let out = Fifo::new(b.path(), "out");
    let options = Options { root: b.runtime_root().display().to_string(), ..Default::default() };
    let request = |more: &[&str]| task::CreateTaskRequest {
        id: b.id.clone(),
        bundle: b.path().display().to_string(),
        rootfs: vec![overlay(layers.path(), more)],
        stdout: out.uri().into(),
        options: Some(proto::pack("containerd.runc.v1.Options", &options)),
        ..Default::default()
    };
    let half = shim.task.create(CALL, request(&["uidmap=0:100000:65536"])).await.unwrap_err();
    assert_eq!(code(&half), ttrpc::Code::INVALID_ARGUMENT);
    let mapped = request(&["uidmap=0:100000:65536", "gidmap=0:200000:65536"]);
    match shim.task.create(CALL, mapped).await {
        Err(e) if code(&e) == ttrpc::Code::UNIMPLEMENTED => {
            eprintln!("skipped: {e}");
            return;
        }
        created => created.unwrap(),
    };
    shim.start_task(&b).await.unwrap();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 0);
    shim.delete(&b, "").await.unwrap();
    assert_eq!(out.text().await, "100000:200000\n100000:200000\n");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let left: Vec<&str> = mounts.lines().filter(|l| l.contains(layers.path().to_str().unwrap())).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(layers.path().join("top/file").exists());
}
