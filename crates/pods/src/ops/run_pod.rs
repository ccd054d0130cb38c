//! RunPodSandbox: namespaces, files and then the network on one side, the shim on
//! the other, both at once; then the init, where the pod shares one pid namespace.
//!
//! Nothing is written before all of it stands: everything lies under paths made of
//! the pod's id, and what belongs to no stored pod is swept at the next start.

use super::pod_spec;
use crate::journal::Write;
use crate::sandbox::{NamespacePlan, PidPlan, SandboxRequest, SandboxState};
use crate::shared::Shared;
use crate::state::{PodInfo, PodPhase, PodState, pod_name};
use network::PodNetwork;
use proto::cri::PodSandboxConfig;
use runtime::{TaskIo, TaskSpec, TaskState};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;
use types::{Error, Result, ResultExt, Signal};

/// A pod to be made.
pub struct NewPod {
    /// Its id.
    pub id: String,
    /// Its unique name.
    pub key: String,
    /// As it came over CRI.
    pub config: Arc<PodSandboxConfig>,
    /// The runtime handler that was asked for.
    pub handler: String,
    /// Its name: that of the default one where none was asked for.
    pub runtime: String,
    /// Its namespaces, decided.
    pub plan: NamespacePlan,
}

/// Makes a pod; on failure nothing of it is left.
///
/// # Errors
/// That of the step that failed, and of the undoing where that failed too.
pub async fn run_pod(shared: &Arc<Shared>, new: NewPod) -> Result<PodInfo> {
    let created_at = SystemTime::now();
    let (id, name) = (new.id.clone(), pod_name(&new.config));
    match build(shared, &new, created_at).await {
        Ok(info) => Ok(info),
        Err(e) => {
            let mut errors = vec![e];
            errors.extend(undo(shared, &id).await);
            let context = format!("run pod {name}");
            Err(Error::join(&context, errors).err().unwrap_or_else(|| Error::internal(context)))
        }
    }
}

async fn build(shared: &Arc<Shared>, new: &NewPod, created_at: SystemTime) -> Result<PodInfo> {
    const OP: &str = "RunPodSandbox";
    let timelines = &shared.timelines;
    let request = SandboxRequest { pod_id: &new.id, config: &new.config, plan: &new.plan };
    let gid = new.plan.mapped_root_gid();
    let spec = pod_spec(shared, &new.id, &new.config, &new.runtime, gid);
    let sandbox = async {
        let setup = shared.bounded("making namespaces", shared.sandboxes.setup(request));
        let sandbox = timelines.timed(&new.id, OP, "namespaces", "", setup).await?;
        if let PidPlan::Target { container, pid } = &new.plan.pid {
            super::create::confirm_target(shared, container, *pid)?;
        }
        let network = match &sandbox.net {
            Some(netns) => timelines.timed(&new.id, OP, "network", "", attach(shared, new, &sandbox, netns)).await?,
            None => PodNetwork::default(),
        };
        Ok::<_, Error>((sandbox, network))
    };
    let process =
        timelines.timed(&new.id, OP, "shim", "", shared.bounded("starting the shim", shared.runtime.start_pod(&spec)));
    // Both run to their end even when one fails: a half-made side can't be undone.
    let (sandbox, process) = tokio::join!(sandbox, process);
    let ((mut sandbox, network), process) = (sandbox?, process?);
    let mut init_pid = 0;
    if new.plan.has_init() {
        init_pid = timelines.timed(&new.id, OP, "init", "", start_init(shared, new, &sandbox)).await?;
    }
    if new.plan.shares_pid() {
        if init_pid == 0 {
            return Err(Error::precondition("its handler's sandbox is no process whose pid namespace could be shared")
                .hint("set the pid mode to CONTAINER, or another handler"));
        }
        // Pinned, so that containers join this very namespace whoever has the pid later.
        let pin = shared.sandboxes.pin_target(&new.id, &new.id, init_pid);
        sandbox.pid = Some(fault::around(fault::Step::SandboxPinInit, pin).await?);
    }
    let info = PodInfo {
        id: new.id.clone(),
        config: new.config.clone(),
        created_at,
        state: PodState {
            phase: PodPhase::Ready,
            handler: new.handler.clone(),
            runtime: new.runtime.clone(),
            process: Some(process),
            sandbox,
            network,
            torn_down: false,
            init: new.plan.has_init(),
            init_pid,
        },
    };
    timelines.timed(&new.id, OP, "store", "", save(shared, &new.key, &info)).await?;
    Ok(info)
}

/// Attaches the pod, and tells its /etc/hosts of the address.
async fn attach(shared: &Arc<Shared>, new: &NewPod, sandbox: &SandboxState, netns: &Path) -> Result<PodNetwork> {
    let request = crate::network::request(&new.id, &new.config, netns)?;
    let network = shared.network.attach(&request).await?;
    let addresses: Vec<IpAddr> = network.addresses().collect();
    shared.sandboxes.note_addresses(sandbox, &addresses).await?;
    shared.sandboxes.set_network_sysctls(netns, &new.config).await?;
    Ok(network)
}

async fn start_init(shared: &Arc<Shared>, new: &NewPod, sandbox: &SandboxState) -> Result<u32> {
    let rootfs = shared.sandboxes.init_rootfs(&new.id).await?;
    let binary = &shared.config.pod_init;
    let handler = shared.handlers.of_pod(&new.runtime)?;
    let spec =
        spec::sandbox_init_spec(&new.id, &new.config, &sandbox.namespaces(), binary, &handler.node, &handler.policy)?;
    let config_json = serde_json::to_string(&spec).context(|| format!("encode the init of pod {}", new.id))?;
    let task = TaskSpec {
        id: new.id.clone(),
        config_json,
        rootfs: vec![rootfs],
        io: TaskIo { log_path: None, log_limit: 0, terminal: false, stdin: None },
    };
    let pod = pod_spec(shared, &new.id, &new.config, &new.runtime, new.plan.mapped_root_gid());
    let pid = shared.bounded("creating the pod's init", shared.runtime.create_task(&pod, &task)).await?;
    shared.bounded("starting the pod's init", shared.runtime.start_task(&new.id, &new.id)).await?;
    if pid != 0 {
        return Ok(pid);
    }
    // A sandbox by the sandbox API has its pid, if it has one, once it has started.
    match shared.runtime.task_state(&new.id, &new.id).await? {
        TaskState::Running { pid } => Ok(pid),
        other => Err(Error::internal(format!("its sandbox has started and is {other:?}"))),
    }
}

async fn save(shared: &Arc<Shared>, key: &str, info: &PodInfo) -> Result<()> {
    let record = store::PodRecord {
        id: info.id.clone(),
        name_key: key.to_string(),
        created_at_ns: nanos(info.created_at),
        config_json: serde_json::to_string(&*info.config).context(|| format!("encode pod {}", info.id))?,
        state_json: serde_json::to_string(&info.state).context(|| format!("encode pod {}", info.id))?,
    };
    let (tx, rx) = oneshot::channel();
    shared.journal.submit(Write::Pod(record), move |saved| {
        let _ = tx.send(saved);
    });
    rx.await.map_err(|_| Error::unavailable("the database is closed: the daemon is stopping"))?
}

async fn undo(shared: &Arc<Shared>, id: &str) -> Vec<Error> {
    let mut errors = Vec::new();
    let _ = shared.runtime.kill_task(id, id, Signal::KILL, true, "a failed RunPodSandbox").await;
    errors.extend(shared.bounded("stopping the shim", shared.runtime.stop_pod(id)).await.err());
    if let Err(e) = shared.network.detach(id).await {
        errors.push(e);
        // Nobody will ask for this pod again.
        shared.network.detach_later(id);
    }
    errors.extend(shared.bounded("removing the sandbox", shared.sandboxes.teardown(id)).await.err());
    shared.timelines.remove(id);
    errors
}

/// Nanoseconds since the epoch, as the database and CRI count.
pub fn nanos(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}
