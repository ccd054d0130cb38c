//! From CRI configuration, image configuration and node facts to an OCI runtime
//! specification.
//!
//! ```text
//! ContainerConfig, PodSandboxConfig ─┐
//! ImageDefaults ─────────────────────┤
//! NodeFacts, NodePolicy ─────────────┼─> container_spec ─> ContainerSpec { spec, warnings, user, ensure }
//! RootfsFacts, HostFacts ────────────┤
//! PodNamespaces, PodFiles ───────────┘
//! ```
//!
//! Everything here is pure: who calls it gathers the facts (`pods::facts`), writes
//! config.json and makes the host paths of `ensure`. What was asked for and can't be
//! had on this node is an error where it would matter to the container, and a
//! warning where containers run all the same.

mod annotations;
mod caps;
mod container;
mod devices;
mod facts;
mod mounts;
mod paths;
mod pod;
mod process;
mod resources;
mod seccomp;
mod security;
mod user;

pub use caps::from_mask as capabilities_from_mask;
pub use container::{ContainerInput, ContainerSpec, container_spec};
pub use facts::{
    CgroupDriver, CgroupMode, HostDevice, HostFacts, IdMap, IdMaps, ImageDefaults, NodeFacts, NodePolicy, PidMode,
    PodFiles, PodNamespaces, Propagation, Rlimit,
};
pub use oci_spec::runtime::{LinuxResources, Process, Spec};
pub use pod::{
    INIT, SysctlNamespace, check_hostname, check_pod, check_sysctls, log_path, pod_annotations, pod_bundle_spec,
    sandbox_init_spec, sysctl_namespace, user_namespace,
};
pub use process::{exec_process, exec_process_json};
pub use resources::{OWN_PARENT, apply_update, cgroups_path, linux_resources};
pub use seccomp::default_profile as default_seccomp_profile;
pub use security::{DEFAULT_MASKED_PATHS, DEFAULT_READONLY_PATHS, seccomp_profile_path};
pub use user::{IdOrName, LARGEST_FILE, PasswdEntry, ResolvedUser, RootfsFacts, UserRequest, resolve, user_request};
