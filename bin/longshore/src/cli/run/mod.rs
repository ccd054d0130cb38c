//! `run`: a container from an image in one command.
//!
//! ```text
//! flags ── config.rs ─> image (pull) ─> pod.rs: make or join ─> create ─> start
//!                                                                          │
//!            log file ── log/follow.rs ──> our stdout and stderr           │
//!            our stdin ─ stdin.rs ─> FIFO                                   │
//!            signals ──> StopContainer, the second kills                   │
//!            exit code <── wait.rs: CRI's events <─────────────────────────┘
//! ```
//!
//! Whatever fails on the way up is undone before the failure is reported.

mod config;
pub mod pod;
mod stdin;
pub mod wait;

use super::args::{Pull, RunArgs};
use super::client::{Answer, Client};
use super::exec::exit_code;
use super::lifecycle::delete_pod;
use super::log::{Follower, Printer, Start};
use super::output::{is_broken_pipe, print, print_json};
use super::{Context, images, logs};
use pod::Joined;
use proto::cri::{
    ContainerConfig, ContainerState, ContainerStatus, CreateContainerRequest, RemoveContainerRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
};
use serde_json::json;
use std::path::Path;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use types::{Error, ErrorKind, Result, ResultExt, check_identifier, new_id};

/// The exit code for a process that could not be started, as docker's and podman's.
const NOT_STARTED: u8 = 126;
/// The reason that CRI's status gives for such a container.
const START_ERROR: &str = "StartError";

/// The signals that ask us to end.
struct Signals([Signal; 3]);

impl Signals {
    fn new() -> Result<Self> {
        let one = |kind| signal(kind).context(|| "listen for signals".to_string());
        Ok(Self([one(SignalKind::interrupt())?, one(SignalKind::terminate())?, one(SignalKind::hangup())?]))
    }

    async fn next(&mut self) {
        let [a, b, c] = &mut self.0;
        tokio::select! {
            _ = a.recv() => {}
            _ = b.recv() => {}
            _ = c.recv() => {}
        }
    }

    /// Lets `work` end and then fails if we were asked to end meanwhile: what a call
    /// has made is known only from its answer, and must be undone.
    async fn finish_first<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<(T, bool)> {
        tokio::pin!(work);
        let mut asked = false;
        loop {
            tokio::select! {
                result = &mut work => return Ok((result?, asked)),
                () = self.next() => asked = true,
            }
        }
    }
}

fn interrupted() -> Error {
    Error::new(ErrorKind::Cancelled, "interrupted before the container was started; nothing is left of it")
}

/// Runs a container and gives its exit code (0 with --detach).
pub async fn run(context: &Context, args: RunArgs) -> Result<u8> {
    let name = name(&args)?;
    let mut container = config::container(&args, &name)?;
    let mut signals = Signals::new()?;
    let mut client = context.connect().await?;
    let image = tokio::select! {
        image = image(&mut client, &args) => image?,
        () = signals.next() => return Err(interrupted()),
    };
    if let Some(spec) = &mut container.image {
        spec.image = image;
    }
    let (joined, asked) = signals.finish_first(pod::join(&mut client, &args, &name)).await?;
    if let Some(security) = container.linux.as_mut().and_then(|l| l.security_context.as_mut()) {
        security.namespace_options = Some(joined.namespaces());
    }
    if asked {
        return Err(undo(&mut client, &joined, None, interrupted()).await);
    }
    let (id, asked) = match signals.finish_first(create(&mut client, &joined, container)).await {
        Ok(created) => created,
        Err(e) => return Err(undo(&mut client, &joined, None, e).await),
    };
    if asked {
        return Err(undo(&mut client, &joined, Some(&id), interrupted()).await);
    }
    let result = if args.detach {
        start(&mut client, &name, &id).await.map(|()| None)
    } else {
        attended(&mut client, &args, &name, &id, &mut signals).await.map(Some)
    };
    match result {
        Ok(None) => detached(context, &joined, &id).map(|()| 0),
        Ok(Some(status)) => {
            ended(&mut client, &args, &joined, &id).await?;
            Ok(exit_code(status.exit_code))
        }
        Err(Failure::Start(e)) => {
            let code = if never_ran(&mut client, &id).await { Some(NOT_STARTED) } else { None };
            let e = undo(&mut client, &joined, Some(&id), e).await;
            let Some(code) = code else { return Err(e) };
            eprintln!("longshore: {e}");
            Ok(code)
        }
        Err(Failure::Later(e)) => Err(e),
    }
}

/// Whether the container had been started when it failed: before, all is undone;
/// later, it is left as it is.
enum Failure {
    Start(Error),
    Later(Error),
}

fn name(args: &RunArgs) -> Result<String> {
    if let Some(name) = &args.name {
        check_identifier("--name", name)?;
        return Ok(name.clone());
    }
    let last = args.image.rsplit('/').next().unwrap_or_default();
    let base: String = last.chars().take_while(char::is_ascii_alphanumeric).take(32).collect();
    let base = if base.is_empty() || args.image.starts_with("sha256:") { "run" } else { &base };
    Ok(format!("{base}-{}", new_id()?.chars().take(6).collect::<String>()))
}

/// The id of the image, pulled where the flags and its absence ask for it.
async fn image(client: &mut Client, args: &RunArgs) -> Result<String> {
    let known = match args.pull {
        Pull::Always => None,
        Pull::Missing | Pull::Never => images::status(client, &args.image).await?,
    };
    match (known, args.pull) {
        (Some(image), _) => Ok(image.id),
        (None, Pull::Never) => Err(Error::not_found(format!("image {} is not here", args.image))
            .hint("leave out --pull never, or 'longshore import' it")),
        (None, _) => images::pull_image(client, &args.image).await,
    }
}

async fn create(client: &mut Client, joined: &Joined, config: ContainerConfig) -> Result<String> {
    let name = config.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
    let request = CreateContainerRequest {
        pod_sandbox_id: joined.pod.id.clone(),
        config: Some(config),
        sandbox_config: Some(joined.config.clone()),
    };
    let answer = client.runtime.create_container(request).await;
    Ok(answer.answer(|| format!("create container {name}"))?.container_id)
}

async fn start(client: &mut Client, name: &str, id: &str) -> Result<(), Failure> {
    let request = StartContainerRequest { container_id: id.to_string() };
    let answer = client.runtime.start_container(request).await;
    answer.answer(|| format!("start container {name}")).map(drop).map_err(Failure::Start)
}

/// True when the container's process could not be started, as opposed to a daemon
/// or shim that failed.
async fn never_ran(client: &mut Client, id: &str) -> bool {
    let status = wait::status(client, id).await;
    status.is_ok_and(|s| s.state() == ContainerState::ContainerExited && s.reason == START_ERROR)
}

/// Starts the container, passes its streams on and waits for its end.
async fn attended(
    client: &mut Client,
    args: &RunArgs,
    name: &str,
    id: &str,
    signals: &mut Signals,
) -> Result<ContainerStatus, Failure> {
    let log = wait::status(client, id).await.map_err(Failure::Start)?.log_path;
    start(client, name, id).await?;
    // Read from its beginning, but only now: a runtime that fails to start the
    // process says so in the log too, and the error tells it already.
    let follower = Follower::open(Path::new(&log), Start::Beginning).map_err(Failure::Start)?;
    if args.interactive {
        let fifo = stdin::fifo(client, id).await.map_err(Failure::Start)?;
        stdin::copy(client.clone(), id.to_string(), fifo);
    }
    let (ended, end) = oneshot::channel::<()>();
    let follow = follower.follow(async move { drop(end.await) }, logs::sink(Printer::new(false), false));
    let follow = tokio::spawn(follow);
    supervise(client, args, name, id, signals, (follow, ended)).await.map_err(Failure::Later)
}

/// Waits for the end of the container and of its output; signals stop it: the first
/// with the time to end, the second without, the third leaves it to the daemon.
async fn supervise(
    client: &mut Client,
    args: &RunArgs,
    name: &str,
    id: &str,
    signals: &mut Signals,
    (mut follow, ended): (JoinHandle<Result<()>>, oneshot::Sender<()>),
) -> Result<ContainerStatus> {
    let stop = |timeout: i64| {
        let (mut client, request) = (client.clone(), StopContainerRequest { container_id: id.to_string(), timeout });
        let what = format!("stop container {name}");
        tokio::spawn(async move {
            if let Err(e) = client.runtime.stop_container(request).await.answer(|| what) {
                eprintln!("longshore: {e}");
            }
        });
    };
    let mut waiting = client.clone();
    let exit = wait::exit(&mut waiting, id);
    tokio::pin!(exit);
    let (mut ended, mut status, mut output, mut asked) = (Some(ended), None, None, 0);
    loop {
        tokio::select! {
            result = &mut exit, if status.is_none() => {
                status = Some(result?);
                drop(ended.take());
            }
            result = &mut follow, if output.is_none() => {
                let result = result.context(|| "follow the output".to_string()).and_then(|r| r);
                // Nobody reads what it says: it is asked to end, as SIGPIPE would have.
                if result.is_err() {
                    stop(args.stop_timeout);
                }
                output = Some(result);
            }
            () = signals.next() => {
                asked += 1;
                match asked {
                    1 => stop(args.stop_timeout),
                    2 => stop(0),
                    _ => return Err(Error::new(ErrorKind::Cancelled, format!("interrupted while container {name} was being stopped"))
                        .hint(format!("'longshore rm -f {name}' removes it"))),
                }
            }
        }
        if let (Some(status), Some(output)) = (&status, &mut output) {
            return match std::mem::replace(output, Ok(())) {
                Err(e) if !is_broken_pipe(&e) => Err(e),
                _ => Ok(status.clone()),
            };
        }
    }
}

fn detached(context: &Context, joined: &Joined, id: &str) -> Result<()> {
    if context.json() {
        return print_json(&json!({"containerId": id, "podSandboxId": joined.pod.id}));
    }
    print(&format!("{id}\n"))
}

/// After the container's end: --rm removes it; a pod of its own is stopped at least,
/// which frees all but its record and its log.
async fn ended(client: &mut Client, args: &RunArgs, joined: &Joined, id: &str) -> Result<()> {
    if args.rm && joined.own {
        return delete_pod(client, &joined.pod).await;
    }
    if args.rm {
        return remove_container(client, id).await;
    }
    if joined.own {
        let request = StopPodSandboxRequest { pod_sandbox_id: joined.pod.id.clone() };
        client.runtime.stop_pod_sandbox(request).await.answer(|| "stop the container's pod".to_string())?;
    }
    Ok(())
}

async fn remove_container(client: &mut Client, id: &str) -> Result<()> {
    let request = RemoveContainerRequest { container_id: id.to_string() };
    client.runtime.remove_container(request).await.answer(|| format!("remove container {id}"))?;
    Ok(())
}

/// Removes what was made so far, and gives the failure to report.
async fn undo(client: &mut Client, joined: &Joined, container: Option<&str>, why: Error) -> Error {
    let undone = match container {
        _ if joined.made => delete_pod(client, &joined.pod).await,
        Some(id) => remove_container(client, id).await,
        None => Ok(()),
    };
    match undone {
        Ok(()) => why,
        Err(e) => why.hint(format!("and undoing it failed too: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Command};
    use clap::Parser;

    fn named(words: &[&str]) -> Result<String> {
        match Cli::parse_from(["longshore", "run"].iter().chain(words)).command {
            Command::Run(args) => name(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn names_come_from_the_flag_or_the_image() {
        assert_eq!(named(&["--name", "web", "x"]).unwrap(), "web");
        assert!(named(&["--name", "../x", "x"]).is_err());
        assert!(named(&["localhost:5000/a/busybox:1.36"]).unwrap().starts_with("busybox-"));
        assert!(named(&["sha256:abcdef"]).unwrap().starts_with("run-"));
        assert!(named(&["..."]).unwrap().starts_with("run-"));
    }
}
