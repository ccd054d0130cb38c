//! `pods` and `ps`.

use super::Context;
use super::args::{ListArgs, PsArgs};
use super::client::Answer;
use super::find;
use super::output::{Table, ago, print, print_json, shown_id, to_json};
use proto::cri::{
    Container, ContainerFilter, ContainerState, ContainerStateValue, ListContainersRequest, ListContainersResponse,
    ListPodSandboxRequest, PodSandboxState,
};
use std::collections::HashMap;
use types::Result;

/// Lists pods.
pub async fn pods(context: &Context, args: &ListArgs) -> Result<()> {
    let mut client = context.connect().await?;
    let answer = client.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await;
    let mut list = answer.answer(|| "list pods".to_string())?;
    list.items.sort_by_key(|p| std::cmp::Reverse(p.created_at));
    if context.json() {
        return print_json(&to_json("runtime.v1.ListPodSandboxResponse", &list)?);
    }
    if args.quiet {
        return print(&list.items.iter().map(|p| format!("{}\n", p.id)).collect::<String>());
    }
    let mut table = Table::new(&["POD ID", "CREATED", "STATE", "NAME", "NAMESPACE", "ATTEMPT", "RUNTIME"]);
    for pod in list.items {
        let state = match pod.state() {
            PodSandboxState::SandboxReady => "Ready",
            PodSandboxState::SandboxNotready => "NotReady",
        };
        let metadata = pod.metadata.unwrap_or_default();
        let handler = if pod.runtime_handler.is_empty() { "(default)" } else { &pod.runtime_handler };
        table.row(vec![
            shown_id(&pod.id, args.no_trunc),
            ago(pod.created_at),
            state.to_string(),
            metadata.name,
            metadata.namespace,
            metadata.attempt.to_string(),
            handler.to_string(),
        ]);
    }
    print(&table.render())
}

/// A state in the words of the tables.
pub fn state_word(state: ContainerState) -> &'static str {
    match state {
        ContainerState::ContainerCreated => "Created",
        ContainerState::ContainerRunning => "Running",
        ContainerState::ContainerExited => "Exited",
        ContainerState::ContainerUnknown => "Unknown",
    }
}

/// Lists containers.
pub async fn containers(context: &Context, args: &PsArgs) -> Result<()> {
    let mut client = context.connect().await?;
    let pods = find::pods(&mut client).await?;
    let running = ContainerStateValue { state: ContainerState::ContainerRunning.into() };
    let filter = ContainerFilter {
        state: (!args.all).then_some(running),
        pod_sandbox_id: match &args.pod {
            Some(given) => find::one(given, &pods)?.id.clone(),
            None => String::new(),
        },
        ..ContainerFilter::default()
    };
    let answer = client.runtime.list_containers(ListContainersRequest { filter: Some(filter) }).await;
    let mut list: ListContainersResponse = answer.answer(|| "list containers".to_string())?;
    list.containers.sort_by_key(|c| std::cmp::Reverse(c.created_at));
    if context.json() {
        return print_json(&to_json("runtime.v1.ListContainersResponse", &list)?);
    }
    if args.list.quiet {
        return print(&list.containers.iter().map(|c| format!("{}\n", c.id)).collect::<String>());
    }
    let names: HashMap<&str, &str> = pods.iter().map(|p| (p.id.as_str(), find::Named::name(p))).collect();
    let mut table = Table::new(&["CONTAINER", "IMAGE", "CREATED", "STATE", "NAME", "ATTEMPT", "POD ID", "POD"]);
    for container in list.containers {
        let full = args.list.no_trunc;
        let metadata = container.metadata.clone().unwrap_or_default();
        table.row(vec![
            shown_id(&container.id, full),
            image_of(&container, full),
            ago(container.created_at),
            state_word(container.state()).to_string(),
            metadata.name,
            metadata.attempt.to_string(),
            shown_id(&container.pod_sandbox_id, full),
            names.get(container.pod_sandbox_id.as_str()).unwrap_or(&"").to_string(),
        ]);
    }
    print(&table.render())
}

/// The image as the user named it, else what the runtime was told, shortened where
/// that is an id.
fn image_of(container: &Container, full: bool) -> String {
    let spec = container.image.clone().unwrap_or_default();
    let told = [spec.user_specified_image, spec.image, container.image_ref.clone()];
    let image = told.into_iter().find(|i| !i.is_empty()).unwrap_or_default();
    if image.starts_with("sha256:") { shown_id(&image, full) } else { image }
}
