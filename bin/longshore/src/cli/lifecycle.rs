//! `stop` and `rm`, of pods and of containers.

use super::args::{RemoveArgs, StopArgs};
use super::client::{Answer, Client, all_of};
use super::find::{self, Named, Target, target};
use super::output::{print, print_json};
use super::run::pod::{OWN_POD, remove_logs};
use super::{Context, find::Target::Pod};
use proto::cri::{
    Container, ContainerState, PodSandbox, RemoveContainerRequest, RemovePodSandboxRequest, StopContainerRequest,
    StopPodSandboxRequest,
};
use serde_json::json;
use types::{Error, Result};

/// Stops each target; goes on after a failure and reports all.
pub async fn stop(context: &Context, args: &StopArgs) -> Result<()> {
    let mut client = context.connect().await?;
    let (pods, containers) = (find::pods(&mut client).await?, find::containers(&mut client).await?);
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    for given in &args.targets {
        let result = match target(given, &pods, &containers) {
            Ok(Pod(pod)) => stop_pod(&mut client, &pod, &containers, args.timeout).await,
            Ok(Target::Container(container)) => stop_container(&mut client, &container, args.timeout).await,
            Err(e) => Err(e),
        };
        report(context, given, result, &mut done, &mut failures)?;
    }
    finish(context, "stop", &done, failures)
}

/// Removes each target; goes on after a failure and reports all.
pub async fn remove(context: &Context, args: &RemoveArgs) -> Result<()> {
    let mut client = context.connect().await?;
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    for given in &args.targets {
        // Asked anew each time: `rm POD CONTAINER` may have removed it already.
        let (pods, containers) = (find::pods(&mut client).await?, find::containers(&mut client).await?);
        let result = match target(given, &pods, &containers) {
            Ok(Pod(pod)) => remove_pod(&mut client, &pod, &containers, args.force).await,
            Ok(Target::Container(container)) => {
                remove_container(&mut client, &container, (&pods, &containers), args.force).await
            }
            Err(e) => Err(e),
        };
        report(context, given, result, &mut done, &mut failures)?;
    }
    finish(context, "remove", &done, failures)
}

fn report(
    context: &Context,
    given: &str,
    result: Result<()>,
    done: &mut Vec<String>,
    failures: &mut Vec<Error>,
) -> Result<()> {
    match result {
        Ok(()) if context.json() => done.push(given.to_string()),
        Ok(()) => print(&format!("{given}\n"))?,
        Err(e) => failures.push(e),
    }
    Ok(())
}

fn finish(context: &Context, what: &str, done: &[String], failures: Vec<Error>) -> Result<()> {
    if context.json() {
        print_json(&json!(done))?;
    }
    all_of(what, failures)
}

fn runs(container: &Container) -> bool {
    matches!(container.state(), ContainerState::ContainerRunning | ContainerState::ContainerUnknown)
}

async fn stop_container(client: &mut Client, container: &Container, timeout: i64) -> Result<()> {
    let request = StopContainerRequest { container_id: container.id.clone(), timeout };
    client.runtime.stop_container(request).await.answer(|| format!("stop container {}", container.name()))?;
    Ok(())
}

/// Containers first, together and with their time to end; stopping the pod kills
/// whatever is left.
async fn stop_pod(client: &mut Client, pod: &PodSandbox, containers: &[Container], timeout: i64) -> Result<()> {
    let inside = containers.iter().filter(|c| c.pod_sandbox_id == pod.id && runs(c));
    let stops: Vec<_> = inside
        .map(|container| {
            let (mut client, container) = (client.clone(), container.clone());
            tokio::spawn(async move { stop_container(&mut client, &container, timeout).await })
        })
        .collect();
    let mut failures = Vec::new();
    for stop in stops {
        match stop.await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => failures.push(e),
            Err(e) => failures.push(Error::internal("stop a container").because(e)),
        }
    }
    let request = StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
    let stopped = client.runtime.stop_pod_sandbox(request).await.answer(|| format!("stop pod {}", pod.name()));
    failures.extend(stopped.err());
    if failures.is_empty() { Ok(()) } else { Error::join(&format!("stop pod {}", pod.name()), failures) }
}

async fn remove_pod(client: &mut Client, pod: &PodSandbox, containers: &[Container], force: bool) -> Result<()> {
    let running: Vec<&str> =
        containers.iter().filter(|c| c.pod_sandbox_id == pod.id && runs(c)).map(Named::name).collect();
    if !running.is_empty() && !force {
        return Err(Error::precondition(format!("pod {} still runs {}", pod.name(), running.join(", ")))
            .hint(format!("'longshore stop {}' stops it, --force removes it nevertheless", pod.name())));
    }
    delete_pod(client, pod).await
}

/// Stops and removes a pod, its containers, and the logs that `run` made for it.
pub async fn delete_pod(client: &mut Client, pod: &PodSandbox) -> Result<()> {
    let what = |verb: &str| format!("{verb} pod {}", pod.name());
    let id = || pod.id.clone();
    let request = StopPodSandboxRequest { pod_sandbox_id: id() };
    client.runtime.stop_pod_sandbox(request).await.answer(|| what("stop"))?;
    let request = RemovePodSandboxRequest { pod_sandbox_id: id() };
    client.runtime.remove_pod_sandbox(request).await.answer(|| what("remove"))?;
    remove_logs(client, pod).await
}

async fn remove_container(
    client: &mut Client,
    container: &Container,
    (pods, containers): (&[PodSandbox], &[Container]),
    force: bool,
) -> Result<()> {
    if runs(container) && !force {
        return Err(Error::precondition(format!("container {} still runs", container.name()))
            .hint(format!("'longshore stop {}' stops it, --force removes it nevertheless", container.name())));
    }
    let request = RemoveContainerRequest { container_id: container.id.clone() };
    client.runtime.remove_container(request).await.answer(|| format!("remove container {}", container.name()))?;
    // A pod that `run` made for this container alone has no use without it.
    let pod = pods.iter().find(|p| p.id == container.pod_sandbox_id && p.labels.contains_key(OWN_POD));
    let others = containers.iter().any(|c| c.pod_sandbox_id == container.pod_sandbox_id && c.id != container.id);
    match pod {
        Some(pod) if !others => delete_pod(client, pod).await,
        _ => Ok(()),
    }
}
