//! Checkpoint, through a runtime that only pretends and through the real one.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::common::{Bundle, Shape};
use harness::{CALL, Shim, code};
use proto::containerd::runc::v1::{CheckpointOptions, Options};
use proto::containerd::task::v3 as task;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

fn installed(binary: &str) -> bool {
    ["/usr/bin", "/usr/local/bin", "/usr/sbin", "/usr/local/sbin"].iter().any(|d| Path::new(d).join(binary).exists())
}

/// A runtime that is runc, but for checkpoints, of which it only notes the arguments.
fn pretender(dir: &Path) -> PathBuf {
    let script = dir.join("runtime");
    let note = dir.join("arguments");
    let text = format!(
        "#!/bin/sh\nfor a in \"$@\"; do\n  if [ \"$a\" = checkpoint ]; then echo \"$@\" > {}; exit 0; fi\ndone\nexec runc \"$@\"\n",
        note.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    script
}

async fn running(shim: &Shim, b: &Bundle, binary: &Path) {
    let options = Options {
        root: b.runtime_root().display().to_string(),
        binary_name: binary.display().to_string(),
        ..Default::default()
    };
    let req = task::CreateTaskRequest {
        id: b.id.clone(),
        bundle: b.path().display().to_string(),
        options: Some(proto::pack("containerd.runc.v1.Options", &options)),
        ..Default::default()
    };
    shim.task.create(CALL, req).await.unwrap();
}

fn request(b: &Bundle, exit: bool) -> task::CheckpointTaskRequest {
    let o = CheckpointOptions { exit, file_locks: true, ..Default::default() };
    task::CheckpointTaskRequest {
        id: b.id.clone(),
        path: b.path().join("image").display().to_string(),
        options: Some(proto::pack("containerd.runc.v1.CheckpointOptions", &o)),
    }
}

#[tokio::test]
async fn a_checkpoint_goes_through_the_runtime_and_is_told() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    running(&shim, &b, &pretender(b.path())).await;
    let early = shim.task.checkpoint(CALL, request(&b, false)).await.unwrap_err();
    assert_eq!(code(&early), ttrpc::Code::FAILED_PRECONDITION, "it has not been started");
    shim.start_task(&b).await.unwrap();
    let done = shim.task.checkpoint(CALL, request(&b, false)).await;
    if installed("criu") {
        done.unwrap();
        let arguments = std::fs::read_to_string(b.path().join("arguments")).unwrap();
        let image = b.path().join("image");
        assert!(arguments.contains(&format!("checkpoint --image-path {}", image.display())), "{arguments}");
        assert!(arguments.contains("--leave-running --file-locks"), "{arguments}");
        assert!(image.is_dir() && !b.path().join("criu-work").exists());
        shim.events_until(&b, "/tasks/checkpointed").await;
    } else {
        let e = done.unwrap_err();
        assert!(code(&e) == ttrpc::Code::FAILED_PRECONDITION && e.to_string().contains("criu"), "{e}");
    }
    shim.kill(&b, "", 9).await.unwrap();
    shim.wait(&b, "").await.unwrap();
    shim.delete(&b, "").await.unwrap();
}

/// criu works on few machines; where it doesn't, the container goes on unharmed
/// and the error says what criu says.
#[tokio::test]
async fn a_checkpoint_that_fails_harms_nobody() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    running(&shim, &b, Path::new("runc")).await;
    shim.start_task(&b).await.unwrap();
    match shim.task.checkpoint(CALL, request(&b, false)).await {
        Ok(()) => assert!(std::fs::read_dir(b.path().join("image")).unwrap().count() > 0),
        Err(e) => {
            eprintln!("criu does not work here: {e}");
            assert!(code(&e) == ttrpc::Code::FAILED_PRECONDITION && e.to_string().contains("criu"), "{e}");
        }
    }
    let state = shim.state(&b).await.unwrap();
    assert_eq!(state.status(), proto::containerd::v1::types::Status::Running);
    shim.kill(&b, "", 9).await.unwrap();
    shim.wait(&b, "").await.unwrap();
    shim.delete(&b, "").await.unwrap();
}
