//! Admission: which namespaces a pod and its containers get. Pure.

use proto::cri::{NamespaceMode, NamespaceOption, PodSandboxConfig};
use serde::{Deserialize, Serialize};
use spec::IdMaps;
use types::{Error, Result};

/// The pid namespace that a pod's containers have unless they say otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PidPlan {
    /// Each container has its own.
    Private,
    /// All share one, whose init is a sandbox task.
    Pod,
    /// The node's.
    Node,
    /// That of a container of another pod.
    Target {
        /// The container's id.
        container: String,
        /// Its init's pid when the pod was admitted.
        pid: u32,
    },
}

/// Which namespaces a pod has of its own; what is false is the node's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespacePlan {
    /// The net namespace.
    pub net: bool,
    /// The ipc namespace, and with it /dev/shm.
    pub ipc: bool,
    /// The uts namespace; a pod in the node's network has the node's name too.
    pub uts: bool,
    /// The pid namespace.
    pub pid: PidPlan,
    /// The user namespace's maps.
    pub user: Option<IdMaps>,
    /// A task of the pod's own runs whatever its pid namespace: its handler asks for
    /// one.
    #[serde(default)]
    pub pause: bool,
}

impl NamespacePlan {
    /// The node's gid of the pod's root, for directories that it must pass through.
    pub fn mapped_root_gid(&self) -> Option<u32> {
        self.user.as_ref().and_then(IdMaps::root_gid)
    }

    /// The node's uid of the pod's root.
    pub fn mapped_root_uid(&self) -> Option<u32> {
        self.user.as_ref().and_then(IdMaps::root_uid)
    }

    /// True where the pod has a task of its own.
    pub fn has_init(&self) -> bool {
        self.pause || self.shares_pid()
    }

    /// True where a sandbox task must run as the init of a shared pid namespace.
    pub fn shares_pid(&self) -> bool {
        self.pid == PidPlan::Pod
    }
}

/// Decides on a pod's namespaces; `target_pid` gives the pid of a running container.
///
/// # Errors
/// `InvalidArgument` for what CRI or the kernel doesn't allow; those of `target_pid`.
pub fn plan(config: &PodSandboxConfig, target_pid: impl FnOnce(&str) -> Result<u32>) -> Result<NamespacePlan> {
    let options = config
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref())
        .and_then(|s| s.namespace_options.clone())
        .unwrap_or_default();
    let net = pod_or_node("network", options.network)?;
    let ipc = pod_or_node("ipc", options.ipc)?;
    let pid = match mode("pid", options.pid)? {
        NamespaceMode::Pod => PidPlan::Pod,
        NamespaceMode::Container => PidPlan::Private,
        NamespaceMode::Node => PidPlan::Node,
        NamespaceMode::Target => {
            let container = target_of(&options)?;
            PidPlan::Target { pid: target_pid(&container)?, container }
        }
    };
    let user = spec::user_namespace(&options)?;
    if user.is_some() {
        let of_node = [(!net, "network"), (!ipc, "ipc"), (pid == PidPlan::Node, "pid")]
            .into_iter()
            .find_map(|(n, s)| n.then_some(s));
        if let Some(namespace) = of_node {
            return Err(Error::invalid(format!(
                "a pod with a user namespace can't use the node's {namespace} namespace: its root has no rights there"
            )));
        }
    }
    Ok(NamespacePlan { net, ipc, uts: net, pid, user, pause: false })
}

/// The pid namespace of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerPid {
    /// A new one.
    Private,
    /// The node's.
    Node,
    /// The one that the pod's containers share.
    Pod,
    /// That of the container with this id.
    Target(String),
}

/// Decides on a container's pid namespace; the others are the pod's, whatever it
/// says of them.
///
/// # Errors
/// `InvalidArgument` where the modes contradict the pod's, `FailedPrecondition`
/// where the pod has no pid namespace to share.
pub fn container_pid(pod: &NamespacePlan, options: Option<&NamespaceOption>) -> Result<ContainerPid> {
    let Some(options) = options else {
        return Ok(match &pod.pid {
            PidPlan::Private => ContainerPid::Private,
            PidPlan::Node => ContainerPid::Node,
            PidPlan::Pod | PidPlan::Target { .. } => ContainerPid::Pod,
        });
    };
    for (name, wanted, own) in [("network", options.network, pod.net), ("ipc", options.ipc, pod.ipc)] {
        // POD is what an option that was never set reads as: the pod's, of whatever sort.
        if mode(name, wanted)? == NamespaceMode::Node && own {
            return Err(Error::invalid(format!(
                "the container wants the node's {name} namespace, its pod has one of its own"
            )));
        }
    }
    match mode("pid", options.pid)? {
        NamespaceMode::Container => Ok(ContainerPid::Private),
        NamespaceMode::Node if pod.user.is_some() => {
            Err(Error::invalid("a container with a user namespace can't use the node's pid namespace"))
        }
        NamespaceMode::Node => Ok(ContainerPid::Node),
        NamespaceMode::Target => Ok(ContainerPid::Target(target_of(options)?)),
        NamespaceMode::Pod => match &pod.pid {
            PidPlan::Pod | PidPlan::Target { .. } => Ok(ContainerPid::Pod),
            PidPlan::Node => Ok(ContainerPid::Node),
            PidPlan::Private => {
                Err(Error::precondition("the container wants its pod's pid namespace, the pod was made without one")
                    .hint("set the pid mode to CONTAINER here, or to POD in the pod's namespace options"))
            }
        },
    }
}

fn mode(name: &str, value: i32) -> Result<NamespaceMode> {
    NamespaceMode::try_from(value)
        .map_err(|_| Error::invalid(format!("{name} namespace mode {value} is unknown")).hint("0 to 3 are known"))
}

fn pod_or_node(name: &str, value: i32) -> Result<bool> {
    match mode(name, value)? {
        NamespaceMode::Pod => Ok(true),
        NamespaceMode::Node => Ok(false),
        other => Err(Error::invalid(format!(
            "{name} namespace mode {} is not possible: containers of a pod share this namespace",
            other.as_str_name()
        ))
        .hint("use POD or NODE")),
    }
}

fn target_of(options: &NamespaceOption) -> Result<String> {
    if options.target_id.is_empty() {
        return Err(Error::invalid("pid namespace mode TARGET without a target_id"));
    }
    Ok(options.target_id.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::cri::{IdMapping, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, UserNamespace};
    use types::ErrorKind;

    const POD: i32 = NamespaceMode::Pod as i32;
    const CONTAINER: i32 = NamespaceMode::Container as i32;
    const NODE: i32 = NamespaceMode::Node as i32;
    const TARGET: i32 = NamespaceMode::Target as i32;

    fn options(network: i32, pid: i32, ipc: i32) -> NamespaceOption {
        NamespaceOption { network, pid, ipc, ..Default::default() }
    }

    fn planned(options: NamespaceOption) -> Result<NamespacePlan> {
        let security_context =
            Some(LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
        let linux = Some(LinuxPodSandboxConfig { security_context, ..Default::default() });
        plan(&PodSandboxConfig { linux, ..Default::default() }, |id| {
            if id == "known" { Ok(7) } else { Err(Error::not_found(id)) }
        })
    }

    fn userns(ranges: &[(u32, u32, u32)]) -> NamespaceOption {
        let map: Vec<_> =
            ranges.iter().map(|&(c, h, l)| IdMapping { container_id: c, host_id: h, length: l }).collect();
        let user = UserNamespace { mode: POD, uids: map.clone(), gids: map };
        NamespaceOption { userns_options: Some(user), ..options(POD, CONTAINER, POD) }
    }

    #[test]
    fn each_mode_of_each_namespace_is_decided() {
        for network in -1..=4 {
            for pid in -1..=4 {
                for ipc in -1..=4 {
                    let outcome = planned(NamespaceOption { target_id: "known".into(), ..options(network, pid, ipc) });
                    let possible =
                        [POD, NODE].contains(&network) && [POD, NODE].contains(&ipc) && (0..=3).contains(&pid);
                    match outcome {
                        Err(e) => {
                            assert!(!possible && e.kind() == ErrorKind::InvalidArgument, "{network} {pid} {ipc}: {e}")
                        }
                        Ok(p) => {
                            assert!(possible, "{network} {pid} {ipc}");
                            assert_eq!((p.net, p.uts, p.ipc), (network == POD, network == POD, ipc == POD));
                            assert_eq!(p.shares_pid(), pid == POD);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn without_options_all_is_the_pods() {
        let plan = plan(&PodSandboxConfig::default(), |_| Err(Error::internal("not asked"))).unwrap();
        assert_eq!(
            plan,
            NamespacePlan { net: true, ipc: true, uts: true, pid: PidPlan::Pod, user: None, pause: false }
        );
    }

    #[test]
    fn a_target_must_be_named_and_run() {
        let target = |id: &str| planned(NamespaceOption { target_id: id.into(), ..options(POD, TARGET, POD) });
        assert_eq!(target("known").unwrap().pid, PidPlan::Target { container: "known".into(), pid: 7 });
        assert_eq!(target("").unwrap_err().kind(), ErrorKind::InvalidArgument);
        assert_eq!(target("gone").unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn the_maps_of_a_user_namespace_are_checked_and_kept() {
        let plan = planned(userns(&[(0, 100_000, 65_536)])).unwrap();
        assert_eq!((plan.mapped_root_uid(), plan.mapped_root_gid()), (Some(100_000), Some(100_000)));
        for bad in [&[][..], &[(0, 100_000, 0)], &[(1, 100_000, 10)], &[(0, u32::MAX - 5, 10)]] {
            assert_eq!(planned(userns(bad)).unwrap_err().kind(), ErrorKind::InvalidArgument, "{bad:?}");
        }
        let none = UserNamespace { mode: NODE, ..Default::default() };
        let plan = planned(NamespaceOption { userns_options: Some(none), ..options(POD, POD, POD) }).unwrap();
        assert_eq!(plan.user, None);
    }

    #[test]
    fn a_user_namespace_and_the_nodes_namespaces_exclude_each_other() {
        for (network, pid, ipc) in [(NODE, CONTAINER, POD), (POD, NODE, POD), (POD, CONTAINER, NODE)] {
            let o = NamespaceOption { network, pid, ipc, ..userns(&[(0, 100_000, 65_536)]) };
            assert_eq!(planned(o).unwrap_err().kind(), ErrorKind::InvalidArgument);
        }
    }

    #[test]
    fn a_container_follows_its_pod() {
        let shared = planned(options(POD, POD, POD)).unwrap();
        let private = planned(options(POD, CONTAINER, POD)).unwrap();
        let host = planned(options(NODE, NODE, NODE)).unwrap();
        let ask = |pod: &NamespacePlan, pid: i32| container_pid(pod, Some(&options(POD, pid, POD)));
        assert_eq!(ask(&shared, POD).unwrap(), ContainerPid::Pod);
        assert_eq!(ask(&shared, CONTAINER).unwrap(), ContainerPid::Private);
        assert_eq!(ask(&private, CONTAINER).unwrap(), ContainerPid::Private);
        assert_eq!(ask(&private, POD).unwrap_err().kind(), ErrorKind::FailedPrecondition);
        assert_eq!(ask(&host, NODE).unwrap(), ContainerPid::Node);
        assert_eq!(container_pid(&private, None).unwrap(), ContainerPid::Private);
        let target = NamespaceOption { target_id: "x".into(), ..options(POD, TARGET, POD) };
        assert_eq!(container_pid(&private, Some(&target)).unwrap(), ContainerPid::Target("x".into()));
        let e = container_pid(&private, Some(&options(NODE, CONTAINER, POD))).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArgument);
    }
}
