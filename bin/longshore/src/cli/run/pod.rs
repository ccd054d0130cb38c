//! The pod of a `run`: made for it, or joined; and where its logs are.
//!
//! ```text
//! <root>/logs/<uid of the pod>/<container>.log
//! ```
//!
//! A kubelet makes and removes its pods' log folders itself, so we do it for ours.
//! The folder follows from the pod's uid alone: nothing that a label or annotation
//! of somebody else's pod says makes us remove anything.

use super::config;
use crate::cli::args::RunArgs;
use crate::cli::client::{Answer, Client, blocking, present};
use crate::cli::find;
use proto::cri::{
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption, PodSandbox, PodSandboxConfig,
    PodSandboxMetadata, PodSandboxState, PodSandboxStatusRequest, RunPodSandboxRequest, StatusRequest,
};
use std::collections::HashMap;
use std::path::PathBuf;
use types::{Error, Result, ResultExt, check_identifier, new_id};

/// The label of a pod that was made for one container and goes with it.
pub const OWN_POD: &str = "io.longshore.run/own-pod";

/// The CRI namespace of the pods that `run` makes.
const NAMESPACE: &str = "default";

/// The pod that the container is put in.
pub struct Joined {
    /// As lists have it.
    pub pod: PodSandbox,
    /// As it was made, as far as CRI tells.
    pub config: PodSandboxConfig,
    /// True when it was made just now.
    pub made: bool,
    /// True when it was made for this container alone.
    pub own: bool,
}

impl Joined {
    /// The namespaces that its containers share.
    pub fn namespaces(&self) -> NamespaceOption {
        let linux = self.config.linux.as_ref();
        linux.and_then(|l| l.security_context.as_ref()?.namespace_options.clone()).unwrap_or_default()
    }
}

/// Makes or joins the pod that the flags ask for; `name` is the container's.
///
/// # Errors
/// Those of the calls; `AlreadyExists` for a taken name, `FailedPrecondition` for a
/// stopped pod.
pub async fn join(client: &mut Client, args: &RunArgs, name: &str) -> Result<Joined> {
    match args.pod.as_deref() {
        None => make(client, args, name, true).await,
        Some(given) => match given.strip_prefix("new:") {
            Some(new) => make(client, args, new, false).await,
            None => existing(client, args, given, name).await,
        },
    }
}

async fn make(client: &mut Client, args: &RunArgs, name: &str, own: bool) -> Result<Joined> {
    check_identifier("the pod's name", name)?;
    let taken = |p: &PodSandbox| p.metadata.as_ref().is_some_and(|m| m.name == name && m.namespace == NAMESPACE);
    if find::pods(client).await?.iter().any(taken) {
        return Err(Error::exists(format!("a pod named {name} exists already"))
            .hint(format!("'longshore rm {name}' removes it; or choose another name")));
    }
    let port_mappings = args.publish.iter().map(|p| config::publish(p)).collect::<Result<_>>()?;
    let uid: String = new_id()?.chars().take(32).collect();
    let folder = log_folder(client, &uid).await?;
    std::fs::create_dir_all(&folder).context(|| format!("make the log folder {}", folder.display()))?;
    let labels = if own { HashMap::from([(OWN_POD.to_string(), "true".to_string())]) } else { HashMap::new() };
    let config = PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_string(),
            uid,
            namespace: NAMESPACE.to_string(),
            attempt: 0,
        }),
        hostname: args.hostname.clone().unwrap_or_else(|| hostname(name)),
        log_directory: folder.to_string_lossy().into_owned(),
        labels: labels.clone(),
        port_mappings,
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: args.cgroup_parent.clone(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(config::namespaces(args.network)),
                privileged: args.privileged,
                seccomp: Some(config::seccomp(args.privileged)),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    };
    let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: args.runtime_handler.clone() };
    match client.runtime.run_pod_sandbox(request).await.answer(|| format!("run pod {NAMESPACE}/{name}")) {
        Ok(answer) => {
            let pod = PodSandbox {
                id: answer.pod_sandbox_id,
                metadata: config.metadata.clone(),
                labels,
                ..Default::default()
            };
            Ok(Joined { pod, config, made: true, own })
        }
        Err(e) => {
            // Empty, and of no use to anybody; the pod's failure is what counts.
            let _ = std::fs::remove_dir(&folder);
            Err(e)
        }
    }
}

/// A host name holds letters, digits, '-' and '.', 64 bytes at most.
fn hostname(name: &str) -> String {
    name.chars().map(|c| if c == '_' { '-' } else { c }).take(63).collect()
}

async fn existing(client: &mut Client, args: &RunArgs, given: &str, name: &str) -> Result<Joined> {
    if !args.publish.is_empty() {
        return Err(Error::invalid(format!("--publish: pod {given} exists already, and its ports are what they are"))
            .hint("--pod new:NAME makes one with ports"));
    }
    let pod = find::pod(client, given).await?;
    if pod.state() != PodSandboxState::SandboxReady {
        return Err(Error::precondition(format!("pod {given} has been stopped"))
            .hint(format!("'longshore rm {given}' removes it; --pod new:NAME makes another")));
    }
    let same = |c: &proto::cri::Container| c.pod_sandbox_id == pod.id && find::Named::name(c) == name;
    if find::containers(client).await?.iter().any(same) {
        return Err(Error::exists(format!("pod {given} has a container named {name} already"))
            .hint("remove that one, or choose another --name"));
    }
    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
    let answer = client.runtime.pod_sandbox_status(request).await.answer(|| format!("ask for pod {given}"))?;
    let status = present(answer.status, || format!("status of pod {given}"))?;
    let uid = pod.metadata.as_ref().map_or("", |m| &m.uid);
    let folder = log_folder(client, uid).await?;
    std::fs::create_dir_all(&folder).context(|| format!("make the log folder {}", folder.display()))?;
    let options = status.linux.and_then(|l| l.namespaces).and_then(|n| n.options);
    let config = PodSandboxConfig {
        metadata: status.metadata,
        log_directory: folder.to_string_lossy().into_owned(),
        labels: status.labels,
        annotations: status.annotations,
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: options,
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    };
    Ok(Joined { pod, config, made: false, own: false })
}

/// Where the logs of the pod with this uid are, below the daemon's root.
async fn log_folder(client: &mut Client, uid: &str) -> Result<PathBuf> {
    check_identifier("the pod's uid", uid)?;
    let answer = client.runtime.status(StatusRequest { verbose: true }).await;
    let info = answer.answer(|| "ask for the daemon's root folder".to_string())?.info;
    let root = info
        .get("info")
        .and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok())
        .and_then(|info| info.get("root")?.as_str().map(PathBuf::from))
        .filter(|root| root.is_absolute())
        .unwrap_or_else(|| PathBuf::from("/var/lib/longshore"));
    Ok(root.join("logs").join(uid))
}

/// Removes the log folder that `run` made for a pod, if it did.
///
/// # Errors
/// Those of removing it; one that is not there is none.
pub async fn remove_logs(client: &mut Client, pod: &PodSandbox) -> Result<()> {
    let uid = pod.metadata.as_ref().map_or("", |m| &m.uid);
    if check_identifier("uid", uid).is_err() {
        return Ok(());
    }
    let folder = log_folder(client, uid).await?;
    blocking("remove logs", move || match std::fs::remove_dir_all(&folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).context(|| format!("remove the logs in {}", folder.display()))
        }
        _ => Ok(()),
    })
    .await
}
