//! The sandbox service: a pod's life without a process of its own.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::common::{Bundle, Shape, sh};
use harness::{CALL, Io, Shim, code, connect, pid_in, runtime_but_for};
use proto::containerd::runtime::sandbox::v1 as api;
use proto::containerd::task::v3 as task;
use std::time::Duration;

#[tokio::test]
async fn a_sandbox_lives_as_its_caller_says() {
    let shim = Shim::start().await;
    let client = connect(&shim.dir.path().join("s/shim.sock")).await;
    let s = api::SandboxClient::new(client, api::SandboxClient::SERVICE);
    let id = || "pod".to_string();
    let status = || async {
        s.sandbox_status(CALL, api::SandboxStatusRequest { sandbox_id: id(), verbose: true }).await.unwrap()
    };

    let unknown = s.ping_sandbox(CALL, api::PingRequest { sandbox_id: id() }).await.unwrap_err();
    assert_eq!(code(&unknown), ttrpc::Code::NOT_FOUND);
    s.create_sandbox(CALL, api::CreateSandboxRequest { sandbox_id: id(), ..Default::default() }).await.unwrap();
    assert_eq!(status().await.state, "SANDBOX_NOTREADY");
    let started = s.start_sandbox(CALL, api::StartSandboxRequest { sandbox_id: id() }).await.unwrap();
    assert!(started.pid == 0 && started.created_at.is_some());
    s.ping_sandbox(CALL, api::PingRequest { sandbox_id: id() }).await.unwrap();
    let seen = status().await;
    assert_eq!((seen.state.as_str(), seen.created_at), ("SANDBOX_READY", started.created_at));
    assert_eq!(seen.info["shimPid"], shim.pid.to_string());
    let platform = s.platform(CALL, api::PlatformRequest { sandbox_id: id() }).await.unwrap().platform.unwrap();
    assert_eq!(platform.os, "linux");
    assert!(!platform.architecture.is_empty() && platform.architecture != "x86_64");

    let b = Bundle::new(&Shape { args: sh("while :; do sleep 1; done"), ..Shape::default() });
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let request = api::SandboxMetricsRequest { sandbox_id: id() };
    let metrics = s.sandbox_metrics(CALL, request).await.unwrap().metrics.unwrap();
    assert!(metrics.id == "pod" && metrics.data.is_some() && metrics.timestamp.is_some());

    let waiting = s.clone();
    let wait =
        tokio::spawn(
            async move { waiting.wait_sandbox(CALL, api::WaitSandboxRequest { sandbox_id: "pod".into() }).await },
        );
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!wait.is_finished());
    for _ in 0..2 {
        s.stop_sandbox(CALL, api::StopSandboxRequest { sandbox_id: id(), timeout_secs: 20 }).await.unwrap();
    }
    assert_eq!(shim.wait(&b, "").await.unwrap(), 137, "a stopped sandbox runs nothing");
    let waited = wait.await.unwrap().unwrap();
    let seen = status().await;
    assert!(seen.state == "SANDBOX_NOTREADY" && seen.exited_at.is_some());
    assert_eq!(seen.exited_at, waited.exited_at);

    let shutdown = || s.shutdown_sandbox(CALL, api::ShutdownSandboxRequest { sandbox_id: id() });
    assert_eq!(code(&shutdown().await.unwrap_err()), ttrpc::Code::FAILED_PRECONDITION);
    shim.delete(&b, "").await.unwrap();
    shutdown().await.unwrap();
    for _ in 0..6000 {
        if !shim.alive() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the shim outlives its sandbox");
}

#[tokio::test]
async fn a_shim_that_ends_answers_who_waits_and_takes_nothing_more() {
    let shim = Shim::start().await;
    let client = connect(&shim.dir.path().join("s/shim.sock")).await;
    let s = api::SandboxClient::new(client, api::SandboxClient::SERVICE);
    s.create_sandbox(CALL, api::CreateSandboxRequest { sandbox_id: "pod".into(), ..Default::default() }).await.unwrap();
    s.start_sandbox(CALL, api::StartSandboxRequest { sandbox_id: "pod".into() }).await.unwrap();
    let waiting = s.clone();
    let wait =
        tokio::spawn(
            async move { waiting.wait_sandbox(CALL, api::WaitSandboxRequest { sandbox_id: "pod".into() }).await },
        );
    tokio::time::sleep(Duration::from_millis(50)).await;
    s.shutdown_sandbox(CALL, api::ShutdownSandboxRequest { sandbox_id: "pod".into() }).await.unwrap();
    assert!(wait.await.unwrap().unwrap().exited_at.is_some());
    let late = task::CreateTaskRequest { id: "late".into(), bundle: "/b".into(), ..Default::default() };
    assert!(shim.task.create(CALL, late).await.is_err());
}

#[tokio::test]
async fn a_sandbox_that_is_stopped_has_no_container_on_its_way_up() {
    let shim = Shim::start().await;
    let client = connect(&shim.dir.path().join("s/shim.sock")).await;
    let s = api::SandboxClient::new(client, api::SandboxClient::SERVICE);
    s.create_sandbox(CALL, api::CreateSandboxRequest { sandbox_id: "pod".into(), ..Default::default() }).await.unwrap();
    s.start_sandbox(CALL, api::StartSandboxRequest { sandbox_id: "pod".into() }).await.unwrap();
    let b = Bundle::new(&Shape::default());
    let binary = runtime_but_for(b.path(), "create", "sleep 1000 & wait");
    let stopping = async {
        let call = pid_in(&b.path().join("pid")).await;
        s.stop_sandbox(CALL, api::StopSandboxRequest { sandbox_id: "pod".into(), timeout_secs: 60 }).await.unwrap();
        assert!(!std::path::Path::new(&format!("/proc/{call}")).exists(), "the call of the runtime goes on");
    };
    let (made, ()) = tokio::join!(shim.create_by(&b, &binary, Vec::new()), stopping);
    assert_eq!(code(&made.unwrap_err()), ttrpc::Code::CANCELLED);
    let late = shim.create(&b, Io::default()).await.unwrap_err();
    assert!(code(&late) == ttrpc::Code::FAILED_PRECONDITION && late.to_string().contains("stopped"), "{late}");
}
