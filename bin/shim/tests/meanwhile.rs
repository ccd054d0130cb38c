//! What is asked of a container while a call of its runtime is under way.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::common::{Bundle, Shape, sh};
use harness::{CALL, Fifo, Io, Shim, code, pid_in, runtime_but_for};
use proto::containerd::task::v3 as task;
use std::io::Write;

#[tokio::test]
async fn input_that_is_closed_while_an_exec_starts_ends() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    let go = b.path().join("go");
    let script = format!("while [ ! -e {} ]; do sleep 0.01; done", go.display());
    shim.create_by(&b, &runtime_but_for(b.path(), "exec", &script), Vec::new()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let (input, out) = (b.path().join("i"), Fifo::new(b.path(), "o"));
    stdio::fifo::make(&input).unwrap();
    let closing = async {
        pid_in(&b.path().join("pid")).await;
        std::fs::OpenOptions::new().write(true).open(&input).unwrap().write_all(b"hi\n").unwrap();
        let req = task::CloseIoRequest { id: b.id.clone(), exec_id: "e".into(), stdin: true };
        shim.task.close_io(CALL, req).await.unwrap();
        std::fs::write(&go, "").unwrap();
    };
    let io = Io { stdin: input.to_str().unwrap(), stdout: out.uri(), ..Io::default() };
    let command = ["/bin/cat".to_string()];
    let (started, ()) = tokio::join!(shim.exec(&b, "e", &command, io), closing);
    started.unwrap();
    let ended = tokio::time::timeout(std::time::Duration::from_secs(60), shim.wait(&b, "e")).await;
    assert_eq!(ended.expect("cat sees the end of its input").unwrap(), 0);
    assert_eq!(out.text().await, "hi\n");
    shim.delete(&b, "e").await.unwrap();
    shim.kill(&b, "", 9).await.unwrap();
    shim.wait(&b, "").await.unwrap();
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn an_exec_that_is_not_up_when_its_container_s_end_is_told_is_ended() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    shim.create_by(&b, &runtime_but_for(b.path(), "exec", "sleep 1000 & wait"), Vec::new()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let killing = async {
        let call = pid_in(&b.path().join("pid")).await;
        shim.kill(&b, "", 9).await.unwrap();
        assert_eq!(shim.wait(&b, "").await.unwrap(), 137, "after the bound");
        call
    };
    let command = sh("exit 0");
    let (started, call) = tokio::join!(shim.exec(&b, "e", &command, Io::default()), killing);
    let e = started.unwrap_err();
    assert!(code(&e) == ttrpc::Code::FAILED_PRECONDITION && e.to_string().contains("init has exited"), "{e}");
    assert!(!std::path::Path::new(&format!("/proc/{call}")).exists(), "the call of the runtime goes on");
    let seen = shim.events_until(&b, "/tasks/exit").await;
    assert!(seen.iter().all(|s| s.0 != "/tasks/exec-started"), "{seen:?}");
    shim.delete(&b, "").await.unwrap();
}
