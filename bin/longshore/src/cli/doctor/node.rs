//! The node itself: kernel, cgroups, runtimes, network configuration, disks.

use super::{Findings, LITTLE};
use crate::config::Config;
use rustix::fs::StatVfsMountFlags;
use std::path::Path;

pub(super) fn kernel(all: &mut Findings) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    all.ok("kernel", release.trim());
    let missing: Vec<&str> = ["net", "ipc", "uts", "pid", "mnt", "user"]
        .into_iter()
        .filter(|ns| !Path::new("/proc/self/ns").join(ns).exists())
        .collect();
    if missing.is_empty() {
        all.ok("namespaces", "all kinds");
    } else {
        all.broken("namespaces", format!("missing: {}", missing.join(", ")), "use a kernel that is built with them");
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if filesystems.lines().any(|l| l.trim_start_matches("nodev").trim() == "overlay") {
        all.ok("overlayfs", "known to the kernel");
    } else {
        all.broken("overlayfs", "not known to the kernel", "load it: modprobe overlay");
    }
    if Path::new("/proc/sys/kernel/seccomp/actions_avail").exists() {
        all.ok("seccomp", "known to the kernel");
    } else {
        all.warn("seccomp", "not known to the kernel", "use a kernel with CONFIG_SECCOMP_FILTER");
    }
}

pub(super) fn cgroups(all: &mut Findings) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let of = |kind: &str| mounts.lines().filter(|l| l.split(' ').nth(2) == Some(kind)).count();
    match (of("cgroup"), of("cgroup2")) {
        (0, 0) => all.broken("cgroups", "none are mounted", "mount -t cgroup2 cgroup2 /sys/fs/cgroup"),
        (0, _) => all.ok("cgroups", "version 2"),
        (_, 0) => all.ok("cgroups", "version 1"),
        (..) => all.ok("cgroups", "hybrid: version 1 controllers beside version 2"),
    }
}

pub(super) async fn runtimes(all: &mut Findings, config: &Config) {
    match crate::handlers::build(config).await {
        Ok(built) if built.ready.holds => all.ok("runtimes", built.info.to_string()),
        Ok(built) => {
            all.broken("runtimes", built.ready.message, "install runc, or name an OCI runtime in runtime.binary");
        }
        Err(e) => all.broken("runtimes", format!("{e:#}"), "set the handler right in the configuration"),
    }
    if let Err(e) = crate::serve::find_binary(&config.runtime.pod_init, "longshore-pod-init") {
        all.broken("pod init", format!("{e:#}"), "install it beside longshore, or name it in runtime.pod_init");
    }
}

pub(super) fn directory(all: &mut Findings, check: &'static str, dir: &Path) {
    let shown = dir.display();
    match rustix::fs::statvfs(dir) {
        Err(e) => all.warn(check, format!("{shown}: {e}"), "the daemon makes it at its first start"),
        Ok(s) if s.f_flag.contains(StatVfsMountFlags::RDONLY) => {
            all.broken(check, format!("{shown} is mounted read-only"), "mount it for writing: mount -o remount,rw");
        }
        Ok(s) if s.f_bavail.saturating_mul(s.f_frsize) == 0 => {
            all.broken(check, format!("{shown}: its disk is full"), "free some space, for example by removing images");
        }
        Ok(s) if s.f_bavail.saturating_mul(s.f_frsize) < LITTLE => {
            let free = s.f_bavail.saturating_mul(s.f_frsize) >> 20;
            all.warn(check, format!("{shown}: {free} MiB are free"), "free some space before it is full");
        }
        Ok(_) => all.ok(check, shown.to_string()),
    }
}

/// The CNI configurations, where they are or may be used.
pub(super) fn cni(all: &mut Findings, config: &Config) {
    let (mode, cni) = (config.network.mode, &config.network.cni);
    for bad in network::cni::given_up(&crate::serve::cni_records(config)) {
        all.warn(
            "cni",
            format!("the record {} of an attachment could not be read, and was given up", bad.display()),
            "look whether its network still holds an address of the pod that its name tells, and remove the file",
        );
    }
    if !matches!(mode, network::Mode::Cni | network::Mode::Auto) {
        return all.ok("cni", format!("not in use: network.mode is {mode:?}"));
    }
    let found = network::cni::examine(&cni.conf_dir, &cni.bin_dirs, &cni.networks);
    for amiss in found.amiss {
        all.warn("cni", amiss, "mend or remove the file, or install the plugin into one of network.cni.bin_dirs");
    }
    match (found.whole.is_empty(), mode) {
        (false, _) => all.ok("cni", format!("{}: {}", cni.conf_dir.display(), found.whole.join(", "))),
        (true, network::Mode::Auto) => all.ok("cni", "nothing is configured: the built-in network is used"),
        (true, _) => all.broken(
            "cni",
            format!("no usable network is configured in {}", cni.conf_dir.display()),
            "install the cluster's network plugin, or set network.mode to \"builtin\"",
        ),
    }
}
