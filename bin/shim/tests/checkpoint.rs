//! Checkpoint, through a runtime that only pretends and through the real one.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::common::{Bundle, Shape, sh};
use harness::{CALL, Fifo, Shim, code};
use proto::containerd::runc::v1::{CheckpointOptions, Options};
use proto::containerd::task::v3 as task;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    testkit::script(&script, text);
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

/// A runtime that is runc, but runs what it shall restore from the beginning.
fn restorer(dir: &Path) -> PathBuf {
    let script = dir.join("restorer");
    let text = format!(
        r#"#!/bin/sh
n=$#
case " $* " in *" restore "*) echo "$@" >{} ;; esac
while [ $n -gt 0 ]; do
  a=$1; shift; n=$((n - 1))
  case $a in
    restore) set -- "$@" run ;;
    --image-path | --work-path) shift; n=$((n - 1)) ;;
    *) set -- "$@" "$a" ;;
  esac
done
exec runc "$@"
"#,
        dir.join("arguments").display()
    );
    testkit::script(&script, text);
    script
}

fn from_checkpoint(b: &Bundle, binary: &Path, checkpoint: &Path, stdout: &str) -> task::CreateTaskRequest {
    let options = Options {
        root: b.runtime_root().display().to_string(),
        binary_name: binary.display().to_string(),
        ..Default::default()
    };
    task::CreateTaskRequest {
        id: b.id.clone(),
        bundle: b.path().display().to_string(),
        stdout: stdout.into(),
        checkpoint: checkpoint.display().to_string(),
        options: Some(proto::pack("containerd.runc.v1.Options", &options)),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_container_from_a_checkpoint_runs_from_start_on() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape { args: sh("echo restored; sleep 0.2; exit 6"), ..Shape::default() });
    let binary = restorer(b.path());
    let nowhere = from_checkpoint(&b, &binary, &b.path().join("nowhere"), "");
    let e = shim.task.create(CALL, nowhere).await.unwrap_err();
    assert_eq!(code(&e), ttrpc::Code::INVALID_ARGUMENT, "{e}");
    let image = b.path().join("image");
    std::fs::create_dir(&image).unwrap();
    let create = |stdout: &str| shim.task.create(CALL, from_checkpoint(&b, &binary, &image, stdout));
    if !installed("criu") {
        let e = create("").await.unwrap_err();
        assert!(code(&e) == ttrpc::Code::FAILED_PRECONDITION && e.to_string().contains("criu"), "{e}");
        return;
    }
    // Deleted before it was ever started.
    assert_eq!(create("").await.unwrap().pid, 0, "nothing runs before Start");
    shim.delete(&b, "").await.unwrap();
    shim.events.seen.lock().unwrap().clear();

    let out = Fifo::new(b.path(), "o");
    create(out.uri()).await.unwrap();
    assert_eq!(shim.state(&b).await.unwrap().status, 1);
    assert!(!b.path().join("arguments").exists(), "nothing runs before Start");
    let waiting = shim.wait(&b, "");
    let started = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        shim.start_task(&b).await.unwrap()
    };
    let (exit, pid) = tokio::join!(waiting, started);
    assert!(exit.unwrap() == 6 && pid > 0);
    let arguments = std::fs::read_to_string(b.path().join("arguments")).unwrap();
    assert!(arguments.contains(&format!("--image-path {}", image.display())), "{arguments}");
    assert_eq!(out.text().await, "restored\n");
    assert_eq!(shim.delete(&b, "").await.unwrap(), 6);
    let seen = shim.events_until(&b, "/tasks/delete").await;
    let topics: Vec<&str> = seen.iter().map(|s| s.0.as_str()).collect();
    assert_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
}

/// Where criu does not work, or the image is none, Start says so and Delete does
/// all that is left to do.
#[tokio::test]
async fn a_restore_that_fails_leaves_nothing() {
    if !installed("criu") {
        eprintln!("skipped: criu is not installed");
        return;
    }
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    let image = b.path().join("image");
    std::fs::create_dir(&image).unwrap();
    shim.task.create(CALL, from_checkpoint(&b, Path::new("runc"), &image, "")).await.unwrap();
    let e = shim.start_task(&b).await.unwrap_err();
    assert!(e.to_string().contains("restore") || e.to_string().contains("criu"), "{e}");
    assert_eq!(shim.state(&b).await.unwrap().status, 1, "it never ran");
    shim.delete(&b, "").await.unwrap();
    let known = std::fs::read_dir(b.runtime_root().join("test")).map_or(0, Iterator::count);
    assert_eq!(known, 0, "the runtime knows nothing of it");
}

/// A shim that finds a criu, whatever is installed: nothing here comes to call it.
async fn with_criu(programs: &Path) -> Shim {
    testkit::script(&programs.join("criu"), "#!/bin/sh\nexit 1\n");
    Shim::start_with(proto::TASK_SERVICES[0], Some(programs)).await
}

#[tokio::test]
async fn a_container_is_killed_before_and_while_it_is_restored() {
    let programs = tempfile::tempdir().unwrap();
    let shim = with_criu(programs.path()).await;
    let b = Bundle::new(&Shape::default());
    let image = b.path().join("image");
    std::fs::create_dir(&image).unwrap();
    let binary = harness::runtime_but_for(b.path(), "restore", "sleep 1000 & wait");
    for started in [false, true] {
        shim.events.seen.lock().unwrap().clear();
        shim.task.create(CALL, from_checkpoint(&b, &binary, &image, "")).await.unwrap();
        let term = shim.kill(&b, "", 15).await.unwrap_err();
        assert_eq!(code(&term), ttrpc::Code::FAILED_PRECONDITION, "there is nobody to hear it, and it is not gone");
        if started {
            let killing = async {
                let call = harness::pid_in(&b.path().join("pid")).await;
                shim.kill(&b, "", 9).await.unwrap();
                assert!(!Path::new(&format!("/proc/{call}")).exists(), "the call of the runtime goes on");
            };
            let (start, ()) = tokio::join!(shim.start_task(&b), killing);
            assert_eq!(code(&start.unwrap_err()), ttrpc::Code::CANCELLED);
        } else {
            shim.kill(&b, "", 9).await.unwrap();
        }
        assert_eq!(shim.wait(&b, "").await.unwrap(), 137);
        assert_eq!(code(&shim.kill(&b, "", 9).await.unwrap_err()), ttrpc::Code::NOT_FOUND);
        assert_eq!(code(&shim.start_task(&b).await.unwrap_err()), ttrpc::Code::FAILED_PRECONDITION);
        assert_eq!(shim.delete(&b, "").await.unwrap(), 137);
        let seen = shim.events_until(&b, "/tasks/delete").await;
        let topics: Vec<&str> = seen.iter().map(|s| s.0.as_str()).collect();
        assert_eq!(topics, ["/tasks/create", "/tasks/exit", "/tasks/delete"]);
    }
    let known = std::fs::read_dir(b.runtime_root().join("test")).map_or(0, Iterator::count);
    assert_eq!(known, 0, "the runtime knows nothing of it");
}

#[tokio::test]
async fn input_that_is_closed_before_a_restore_ends() {
    let programs = tempfile::tempdir().unwrap();
    let shim = with_criu(programs.path()).await;
    let b = Bundle::new(&Shape { args: vec!["/bin/cat".into()], ..Shape::default() });
    let (image, input) = (b.path().join("image"), b.path().join("i"));
    std::fs::create_dir(&image).unwrap();
    stdio::fifo::make(&input).unwrap();
    let req = from_checkpoint(&b, &restorer(b.path()), &image, "");
    shim.task.create(CALL, task::CreateTaskRequest { stdin: input.display().to_string(), ..req }).await.unwrap();
    let close = task::CloseIoRequest { id: b.id.clone(), exec_id: String::new(), stdin: true };
    shim.task.close_io(CALL, close).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(60), shim.wait(&b, "")).await;
    assert_eq!(ended.expect("cat sees the end of its input").unwrap(), 0);
    shim.delete(&b, "").await.unwrap();
}
