//! The commands against a daemon that runs nothing: what they call, what they leave,
//! and what they say when something is wrong.

use super::fake::{Fake, command};
use super::{Context, args::Format};
use proto::cri::ContainerState;
use std::path::Path;
use types::ErrorKind;

#[tokio::test]
async fn a_daemon_that_does_not_answer_is_named_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let dead = dir.path().join("dead");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    for socket in [dir.path().join("none"), dead] {
        let context = Context { socket: socket.clone(), format: Format::Table };
        let e = context.connect().await.err().unwrap();
        assert_eq!(e.kind(), ErrorKind::Unavailable);
        let text = e.to_string();
        assert!(text.starts_with(&format!("no daemon answers on {}", socket.display())), "{text}");
        assert!(text.contains("longshore serve") && !text.contains('\n'), "{text}");
    }
}

#[tokio::test]
async fn unknown_and_ambiguous_names_change_nothing() {
    let fake = Fake::start();
    fake.add("aa01", "cc01", "web", ContainerState::ContainerRunning);
    fake.add("aa02", "cc02", "db", ContainerState::ContainerRunning);
    for words in [["stop", "nope"], ["rm", "nope"], ["logs", "nope"], ["timeline", "nope"], ["rmi", "nope"]] {
        let e = command(&fake, &words).await.unwrap_err();
        assert!(e.is_not_found() && e.to_string().contains("\"nope\""), "{words:?}: {e}");
        assert!(e.to_string().contains("longshore "), "{words:?} names no remedy: {e}");
    }
    for words in [["stop", "cc0"], ["rm", "aa"], ["logs", "cc"]] {
        let e = command(&fake, &words).await.unwrap_err().to_string();
        assert!(e.contains("may be any of 2") && e.contains("web"), "{words:?}: {e}");
    }
    assert!(command(&fake, &["exec", "cc0", "true"]).await.is_err());
    assert!(fake.calls().is_empty(), "{:?}", fake.calls());
}

#[tokio::test]
async fn stop_and_rm_go_on_after_a_failure() {
    let fake = Fake::start();
    fake.add("aa01", "cc01", "web", ContainerState::ContainerRunning);
    fake.add("aa02", "cc02", "db", ContainerState::ContainerExited);
    let e = command(&fake, &["rm", "web", "nope", "aa02"]).await.unwrap_err().to_string();
    assert!(e.contains("2 failures") && e.contains("web still runs") && e.contains("nope"), "{e}");
    assert_eq!(fake.calls(), ["stop_pod aa02", "remove_pod aa02"]);
    command(&fake, &["stop", "aa01"]).await.unwrap();
    assert_eq!(fake.calls()[2..], ["stop cc01", "stop_pod aa01"]);
    command(&fake, &["rm", "-f", "web"]).await.unwrap();
    assert_eq!(fake.calls()[4..], ["remove cc01"], "the pod was somebody else's and stays");
}

#[tokio::test]
async fn exec_passes_the_code_and_takes_long_answers() {
    let fake = Fake::start();
    fake.add("aa01", "cc01", "web", ContainerState::ContainerRunning);
    assert_eq!(command(&fake, &["exec", "web", "true"]).await.unwrap(), 7);
    let mut client = Context { socket: fake.socket(), format: Format::Table }.connect().await.unwrap();
    let request = proto::cri::ExecSyncRequest { container_id: "cc01".into(), cmd: vec!["long".into()], timeout: 0 };
    assert_eq!(client.runtime.exec_sync(request).await.unwrap().into_inner().stdout.len(), 16 << 20);
}

fn log_folder(fake: &Fake) -> String {
    std::fs::read_to_string(fake.root().join("log_directory")).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn run_passes_the_code_and_stops_its_pod_or_removes_it() {
    let fake = Fake::start();
    assert_eq!(command(&fake, &["run", "--name", "a", "busybox", "5"]).await.unwrap(), 5);
    let pod = format!("{:064x}", 0xa0);
    assert_eq!(fake.calls(), ["run_pod a".to_string(), format!("stop_pod {pod}")]);
    let logs = log_folder(&fake);
    assert!(Path::new(&logs).starts_with(fake.root().join("logs")), "{logs}");
    assert!(Path::new(&logs).join("a.log").exists());
    let e = command(&fake, &["run", "--name", "a", "busybox"]).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::AlreadyExists);
    command(&fake, &["rm", "a"]).await.unwrap();
    assert!(!Path::new(&logs).exists(), "the logs go with the pod");

    assert_eq!(command(&fake, &["run", "--rm", "--name", "b", "busybox", "300"]).await.unwrap(), 255);
    assert!(fake.calls().last().unwrap().starts_with("remove_pod"));
    assert!(!Path::new(&log_folder(&fake)).exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_fails_leaves_nothing() {
    let fake = Fake::start();
    let e = command(&fake, &["run", "elsewhere"]).await.unwrap_err().to_string();
    assert_eq!(e, "pull elsewhere: elsewhere is in no registry");
    assert!(command(&fake, &["run", "--pull", "never", "elsewhere"]).await.unwrap_err().is_not_found());
    assert_eq!(fake.calls(), ["pull elsewhere"]);

    let e = command(&fake, &["run", "busybox", "refuse-create"]).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidArgument);
    assert!(fake.calls().last().unwrap().starts_with("remove_pod"));
    assert!(!Path::new(&log_folder(&fake)).exists());

    assert_eq!(command(&fake, &["run", "busybox", "128"]).await.unwrap(), 126, "the process could not be started");
    assert!(fake.calls().last().unwrap().starts_with("remove_pod"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_join_a_pod_and_leave_it() {
    let fake = Fake::start();
    command(&fake, &["run", "-d", "--pod", "new:shared", "--name", "a", "busybox"]).await.unwrap();
    assert_eq!(command(&fake, &["run", "--rm", "--pod", "shared", "--name", "b", "busybox", "3"]).await.unwrap(), 3);
    let calls = fake.calls();
    assert_eq!(calls.len(), 2, "the pod stays: {calls:?}");
    assert!(calls[0] == "run_pod shared" && calls[1].starts_with("remove "), "{calls:?}");
    let e = command(&fake, &["run", "--pod", "shared", "--name", "a", "busybox"]).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::AlreadyExists);
    command(&fake, &["stop", "shared"]).await.unwrap();
    let e = command(&fake, &["run", "--pod", "shared", "busybox"]).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
}
