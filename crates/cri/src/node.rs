//! Version, Status, RuntimeConfig: what the node is and can do.

use crate::map;
use ::pods::{Handler, Pods};
use proto::cri::*;
use serde_json::json;

/// A condition of Status.
#[derive(Debug, Clone)]
pub struct Condition {
    /// Whether it holds.
    pub holds: bool,
    /// One word, where it does not, or something is to be said.
    pub reason: String,
    /// A sentence then.
    pub message: String,
}

impl Condition {
    /// It holds.
    pub fn good() -> Self {
        Self { holds: true, reason: String::new(), message: String::new() }
    }

    /// It does not hold, and why.
    pub fn bad(reason: &str, message: impl Into<String>) -> Self {
        Self { holds: false, reason: reason.to_string(), message: message.into() }
    }

    fn message(&self, kind: &str) -> RuntimeCondition {
        RuntimeCondition {
            r#type: kind.to_string(),
            status: self.holds,
            reason: self.reason.clone(),
            message: self.message.clone(),
        }
    }
}

/// What the composition root has found out about the node.
pub struct Node {
    /// Our version.
    pub version: String,
    /// Whether cgroups are made by systemd.
    pub systemd_cgroup: bool,
    /// RuntimeReady.
    pub runtime_ready: Condition,
    /// For `crictl info`: runtimes found and passed over, paths, configuration.
    pub info: serde_json::Value,
}

impl Node {
    pub(crate) fn version(&self) -> VersionResponse {
        VersionResponse {
            version: "0.1.0".to_string(), // of the kubelet's API, as both peers say
            runtime_name: "longshore".to_string(),
            runtime_version: self.version.clone(),
            runtime_api_version: "v1".to_string(),
        }
    }

    pub(crate) async fn status(&self, pods: &Pods, verbose: bool) -> StatusResponse {
        let network = pods.network_status().await;
        let network_ready = Condition { holds: network.ready, reason: network.reason, message: network.message };
        let described = |name: &str, handler: &Handler| RuntimeHandler {
            name: name.to_string(),
            features: Some(RuntimeHandlerFeatures {
                recursive_read_only_mounts: handler.node.recursive_read_only,
                user_namespaces: handler.node.idmap_mounts,
            }),
        };
        // The empty name is the default handler.
        let default = std::iter::once(described("", pods.handlers().default_one()));
        // One that can't run pods is not offered.
        let able = pods.handlers().iter().filter(|h| h.broken.is_none());
        StatusResponse {
            status: Some(RuntimeStatus {
                conditions: vec![self.runtime_ready.message("RuntimeReady"), network_ready.message("NetworkReady")],
            }),
            info: if verbose { map::info(&self.verbose(pods)) } else { Default::default() },
            runtime_handlers: default.chain(able.map(|h| described(&h.name, h))).collect(),
            features: Some(RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: false,
                mount_options: false,
            }),
        }
    }

    fn verbose(&self, pods: &Pods) -> serde_json::Value {
        let mut info = self.info.clone();
        if let Some(map) = info.as_object_mut() {
            map.insert("version".into(), json!(self.version));
            map.insert("systemdCgroup".into(), json!(self.systemd_cgroup));
            map.insert("network".into(), pods.network_info());
            map.insert("health".into(), pods.health_json());
        }
        info
    }

    pub(crate) fn runtime_config(&self) -> RuntimeConfigResponse {
        let driver = if self.systemd_cgroup { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs };
        RuntimeConfigResponse { linux: Some(LinuxRuntimeConfiguration { cgroup_driver: driver.into() }) }
    }
}
