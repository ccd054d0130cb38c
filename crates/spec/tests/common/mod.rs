//! One container's inputs, owned, with defaults that make a valid spec.

use longshore_spec::*;
use proto::cri;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What a [`ContainerInput`] borrows.
#[derive(Debug, Default)]
pub struct Inputs {
    pub config: cri::ContainerConfig,
    pub pod: cri::PodSandboxConfig,
    pub image: ImageDefaults,
    pub node: NodeFacts,
    pub policy: NodePolicy,
    pub rootfs: RootfsFacts,
    pub host: HostFacts,
    pub namespaces: PodNamespaces,
    pub files: PodFiles,
    pub image_mounts: BTreeMap<String, Vec<PathBuf>>,
    pub volumes: BTreeMap<String, PathBuf>,
    pub seccomp_profile: Option<String>,
}

impl Inputs {
    /// A container `c` that runs `true`, in a pod with namespaces of its own on a
    /// node like this one.
    pub fn new() -> Self {
        let metadata = cri::ContainerMetadata { name: "c".into(), attempt: 0 };
        Self {
            config: cri::ContainerConfig {
                metadata: Some(metadata),
                command: vec!["true".into()],
                linux: Some(Default::default()),
                ..Default::default()
            },
            node: NodeFacts {
                bounding: capabilities_from_mask(u64::MAX),
                seccomp: true,
                arch: std::env::consts::ARCH.into(),
                ..Default::default()
            },
            namespaces: PodNamespaces {
                net: Some("/ns/net".into()),
                ipc: Some("/ns/ipc".into()),
                uts: Some("/ns/uts".into()),
                ..Default::default()
            },
            files: PodFiles {
                hostname: "pod".into(),
                hostname_path: Some("/pod/hostname".into()),
                hosts_path: Some("/pod/hosts".into()),
                resolv_conf_path: Some("/pod/resolv.conf".into()),
                shm_path: Some("/pod/shm".into()),
            },
            ..Default::default()
        }
    }

    /// The container's security context.
    pub fn sc(&mut self) -> &mut cri::LinuxContainerSecurityContext {
        self.config.linux.get_or_insert_default().security_context.get_or_insert_default()
    }

    /// Makes pod and container privileged.
    pub fn privileged(&mut self) {
        self.sc().privileged = true;
        self.pod.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    }

    /// The spec.
    pub fn make(&self) -> types::Result<ContainerSpec> {
        container_spec(&ContainerInput {
            id: "id",
            pod_id: "pod-id",
            config: &self.config,
            pod: &self.pod,
            image: &self.image,
            image_name: "image",
            node: &self.node,
            policy: &self.policy,
            rootfs: &self.rootfs,
            host: &self.host,
            namespaces: &self.namespaces,
            files: &self.files,
            image_mounts: &self.image_mounts,
            volumes: &self.volumes,
            seccomp_profile: self.seccomp_profile.as_deref(),
        })
    }
}
