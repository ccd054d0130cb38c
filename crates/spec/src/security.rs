//! Seccomp, AppArmor and SELinux: which profile, and whether the node has it.

use crate::facts::{NodeFacts, NodePolicy};
use crate::{paths, seccomp};
use oci_spec::runtime::{Capabilities, LinuxSeccomp};
use proto::cri::{self, security_profile::ProfileType};
use std::path::PathBuf;
use types::{Error, ErrorKind, Result, ResultExt};

/// Masked unless a pod says otherwise; a kubelet sends the list itself, other
/// clients can send this one.
pub const DEFAULT_MASKED_PATHS: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

/// Read-only unless a pod says otherwise, as with [`DEFAULT_MASKED_PATHS`].
pub const DEFAULT_READONLY_PATHS: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

#[derive(Debug, PartialEq, Eq)]
enum Profile {
    Unset,
    Unconfined,
    RuntimeDefault,
    Localhost(String),
}

/// The new field, or the deprecated one where the new one is unset.
fn profile(field: &str, new: Option<&cri::SecurityProfile>, old: &str) -> Result<Profile> {
    let localhost = |reference: &str| {
        let name = reference.strip_prefix("localhost/").unwrap_or(reference);
        if name.is_empty() {
            // CVE-2023-2431: an empty name once meant no filter at all.
            return Err(Error::invalid(format!("{field}: localhost_ref is empty")));
        }
        Ok(Profile::Localhost(name.to_string()))
    };
    if let Some(new) = new {
        return match ProfileType::try_from(new.profile_type) {
            Ok(ProfileType::RuntimeDefault) => Ok(Profile::RuntimeDefault),
            Ok(ProfileType::Unconfined) => Ok(Profile::Unconfined),
            Ok(ProfileType::Localhost) => localhost(&new.localhost_ref),
            Err(_) => Err(Error::invalid(format!("{field}: profile_type {} is unknown", new.profile_type))),
        };
    }
    match old {
        "" => Ok(Profile::Unset),
        "unconfined" => Ok(Profile::Unconfined),
        "runtime/default" | "docker/default" => Ok(Profile::RuntimeDefault),
        other if other.starts_with("localhost/") => localhost(other),
        other => Err(Error::invalid(format!("{field}: {other:?} is no profile"))
            .hint("runtime/default, unconfined or localhost/NAME")),
    }
}

/// The file whose content the caller reads for the container's localhost seccomp
/// profile, if there is one.
///
/// # Errors
/// `InvalidArgument`: an empty reference (CVE-2023-2431), or one that is no
/// absolute path.
#[allow(deprecated)]
pub fn seccomp_profile_path(sc: &cri::LinuxContainerSecurityContext) -> Result<Option<PathBuf>> {
    match profile("seccomp", sc.seccomp.as_ref(), &sc.seccomp_profile_path)? {
        Profile::Localhost(_) if sc.privileged => Ok(None),
        Profile::Localhost(path) => Ok(Some(paths::host_path("seccomp: localhost_ref", &path)?)),
        _ => Ok(None),
    }
}

/// The container's filter. `content` is the localhost profile's text.
#[allow(deprecated)]
pub(crate) fn seccomp(
    sc: &cri::LinuxContainerSecurityContext,
    content: Option<&str>,
    bounding: &Capabilities,
    node: &NodeFacts,
    policy: &NodePolicy,
) -> Result<Option<LinuxSeccomp>> {
    let profile = match profile("seccomp", sc.seccomp.as_ref(), &sc.seccomp_profile_path)? {
        // A privileged container has no filter, whatever is asked for.
        _ if sc.privileged => return Ok(None),
        Profile::Unset if policy.default_seccomp => Profile::RuntimeDefault,
        other => other,
    };
    if !node.seccomp && matches!(profile, Profile::RuntimeDefault | Profile::Localhost(_)) {
        return Err(Error::new(ErrorKind::FailedPrecondition, "seccomp: this kernel has no system call filters")
            .hint("use the profile Unconfined"));
    }
    match profile {
        Profile::Unset | Profile::Unconfined => Ok(None),
        Profile::RuntimeDefault => seccomp::default_profile(bounding, &node.arch).map(Some),
        Profile::Localhost(path) => {
            let content = content.ok_or_else(|| Error::internal(format!("seccomp: profile {path:?} was not read")))?;
            let parsed = serde_json::from_str(content).context_kind(ErrorKind::InvalidArgument, || {
                format!("seccomp: profile {path:?} is no seccomp profile")
            })?;
            Ok(Some(parsed))
        }
    }
}

/// The AppArmor profile, if one applies.
#[allow(deprecated)]
pub(crate) fn apparmor(
    sc: &cri::LinuxContainerSecurityContext,
    node: &NodeFacts,
    policy: &NodePolicy,
    warnings: &mut Vec<String>,
) -> Result<Option<String>> {
    match profile("apparmor", sc.apparmor.as_ref(), &sc.apparmor_profile)? {
        // What was asked for by name holds for a privileged container, too.
        Profile::Unset | Profile::RuntimeDefault | Profile::Unconfined if sc.privileged => Ok(None),
        Profile::Unset | Profile::RuntimeDefault if !node.apparmor => Ok(None),
        Profile::Unset => Ok(policy.default_apparmor.clone()),
        Profile::RuntimeDefault => {
            if policy.default_apparmor.is_none() {
                warnings.push("no AppArmor profile is configured as the default: the container has none".into());
            }
            Ok(policy.default_apparmor.clone())
        }
        Profile::Unconfined => Ok(node.apparmor.then(|| "unconfined".to_string())),
        Profile::Localhost(name) if node.apparmor => Ok(Some(name)),
        Profile::Localhost(name) => Err(Error::new(
            ErrorKind::FailedPrecondition,
            format!("apparmor: profile {name:?} is asked for, and AppArmor is not enabled on this node"),
        )),
    }
}

/// Process and mount label from CRI's options. Where SELinux is off they mean
/// nothing, as pods carry them to every node alike.
pub(crate) fn selinux(
    options: Option<&cri::SeLinuxOption>,
    privileged: bool,
    node: &NodeFacts,
    warnings: &mut Vec<String>,
) -> Result<Option<(String, String)>> {
    let Some(options) = options.filter(|o| **o != cri::SeLinuxOption::default()) else { return Ok(None) };
    for (field, text) in
        [("user", &options.user), ("role", &options.role), ("type", &options.r#type), ("level", &options.level)]
    {
        if text.contains(['\0', '\n', ' ']) || (field != "level" && text.contains(':')) {
            return Err(Error::invalid(format!("selinux_options.{field} {text:?} is no part of a label")));
        }
    }
    if !node.selinux || privileged {
        if !node.selinux {
            warnings.push("selinux_options are without effect: SELinux is not enabled on this node".into());
        }
        return Ok(None);
    }
    let or = |text: &String, default: &str| if text.is_empty() { default.to_string() } else { text.clone() };
    let (user, level) = (or(&options.user, "system_u"), or(&options.level, "s0"));
    let process = format!("{user}:{}:{}:{level}", or(&options.role, "system_r"), or(&options.r#type, "container_t"));
    Ok(Some((process, format!("{user}:object_r:container_file_t:{level}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> NodeFacts {
        NodeFacts { seccomp: true, arch: "x86_64".into(), ..Default::default() }
    }

    fn context(kind: ProfileType, reference: &str) -> cri::LinuxContainerSecurityContext {
        let profile = cri::SecurityProfile { profile_type: kind as i32, localhost_ref: reference.into() };
        cri::LinuxContainerSecurityContext {
            seccomp: Some(profile.clone()),
            apparmor: Some(profile),
            ..Default::default()
        }
    }

    fn filter(sc: &cri::LinuxContainerSecurityContext, content: Option<&str>) -> Result<Option<LinuxSeccomp>> {
        seccomp(sc, content, &Capabilities::new(), &node(), &NodePolicy::default())
    }

    #[test]
    fn cve_2023_2431_an_empty_localhost_profile_is_refused() {
        for reference in ["", "localhost/"] {
            let sc = context(ProfileType::Localhost, reference);
            assert_eq!(seccomp_profile_path(&sc).unwrap_err().kind(), ErrorKind::InvalidArgument);
            assert!(filter(&sc, Some("{}")).is_err());
        }
        #[allow(deprecated)]
        let old =
            cri::LinuxContainerSecurityContext { seccomp_profile_path: "localhost/".into(), ..Default::default() };
        assert!(seccomp_profile_path(&old).is_err());
        assert!(seccomp_profile_path(&context(ProfileType::Localhost, "relative.json")).is_err());
        assert!(filter(&context(ProfileType::Localhost, "/p"), Some("")).is_err(), "an empty file is no profile");
    }

    #[test]
    fn every_kind_of_seccomp_profile() {
        assert!(filter(&Default::default(), None).unwrap().is_none(), "nothing asked for, nothing set");
        assert!(filter(&context(ProfileType::Unconfined, ""), None).unwrap().is_none());
        assert!(filter(&context(ProfileType::RuntimeDefault, ""), None).unwrap().is_some());
        let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod"],"action":"SCMP_ACT_ERRNO"}]}"#;
        let sc = context(ProfileType::Localhost, "localhost//tmp/p.json");
        assert_eq!(seccomp_profile_path(&sc).unwrap(), Some(PathBuf::from("/tmp/p.json")));
        assert_eq!(filter(&sc, Some(text)).unwrap().unwrap().syscalls().as_ref().unwrap().len(), 1);
        let privileged = cri::LinuxContainerSecurityContext { privileged: true, ..sc };
        assert!(filter(&privileged, None).unwrap().is_none());
        assert_eq!(seccomp_profile_path(&privileged).unwrap(), None);
        let policy = NodePolicy { default_seccomp: true, ..Default::default() };
        let sc = Default::default();
        assert!(seccomp(&sc, None, &Capabilities::new(), &node(), &policy).unwrap().is_some());
    }

    #[test]
    fn the_deprecated_names_still_count() {
        #[allow(deprecated)]
        let old = |p: &str| cri::LinuxContainerSecurityContext { seccomp_profile_path: p.into(), ..Default::default() };
        assert!(filter(&old("runtime/default"), None).unwrap().is_some());
        assert!(filter(&old("unconfined"), None).unwrap().is_none());
        assert!(filter(&old("nonsense"), None).is_err());
    }

    #[test]
    fn apparmor_and_selinux_follow_the_node() {
        let mut warnings = Vec::new();
        let policy = NodePolicy { default_apparmor: Some("d".into()), ..Default::default() };
        let on = NodeFacts { apparmor: true, selinux: true, ..node() };
        let sc = context(ProfileType::Localhost, "localhost/mine");
        assert_eq!(apparmor(&sc, &on, &policy, &mut warnings).unwrap().as_deref(), Some("mine"));
        let e = apparmor(&sc, &node(), &policy, &mut warnings).unwrap_err();
        assert!(e.to_string().contains("\"mine\""), "{e}");
        assert_eq!(apparmor(&Default::default(), &on, &policy, &mut warnings).unwrap().as_deref(), Some("d"));
        assert_eq!(apparmor(&context(ProfileType::RuntimeDefault, ""), &node(), &policy, &mut warnings).unwrap(), None);
        let options = cri::SeLinuxOption { level: "s0:c1,c2".into(), ..Default::default() };
        let (process, mount) = selinux(Some(&options), false, &on, &mut warnings).unwrap().unwrap();
        assert_eq!(process, "system_u:system_r:container_t:s0:c1,c2");
        assert_eq!(mount, "system_u:object_r:container_file_t:s0:c1,c2");
        assert!(warnings.is_empty());
        assert_eq!(selinux(Some(&options), false, &node(), &mut warnings).unwrap(), None);
        assert_eq!(warnings.len(), 1);
    }
}
