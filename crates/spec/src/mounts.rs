//! What is mounted where.
//!
//! ```text
//! defaults: /proc /dev /dev/pts /dev/mqueue /sys /sys/fs/cgroup   (runtime's order)
//! then, by depth: CRI's mounts, image volumes, the pod's files and /dev/shm
//! ```
//! A mount of CRI's takes the place of any other at its path; one at /dev takes
//! the place of all defaults below it.

use crate::ContainerInput;
use crate::facts::{CgroupMode, IdMap, Propagation};
use crate::paths;
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, Mount, MountBuilder};
use proto::cri;
use std::path::{Path, PathBuf};
use types::{Error, ErrorKind, Result, ResultExt};

/// Options of CRI's `mount_options` that narrow what a mount allows.
const NARROWING: [&str; 5] = ["nosuid", "nodev", "noexec", "noatime", "nodiratime"];

/// What the kernel takes: a page, less what the runtime adds.
const LONGEST_OPTIONS: usize = 4000;

/// The mounts of one container and what goes with them.
#[derive(Debug, Default)]
pub(crate) struct Mounts {
    /// In the order in which the runtime makes them.
    pub list: Vec<Mount>,
    /// The rootfs's propagation, where a mount needs one.
    pub rootfs_propagation: Option<&'static str>,
    /// Host paths that are made as directories if they don't exist.
    pub ensure: Vec<PathBuf>,
}

pub(crate) fn mount(destination: &Path, typ: &str, source: &Path, options: &[&str]) -> Result<Mount> {
    MountBuilder::default()
        .destination(destination)
        .typ(typ)
        .source(source)
        .options(options.iter().map(ToString::to_string).collect::<Vec<_>>())
        .build()
        .context(|| format!("mount {}", destination.display()))
}

pub(crate) fn id_mappings(maps: &[IdMap]) -> Result<Vec<LinuxIdMapping>> {
    maps.iter()
        .map(|m| {
            LinuxIdMappingBuilder::default()
                .host_id(m.host)
                .container_id(m.container)
                .size(m.length)
                .build()
                .context(|| "id mapping".into())
        })
        .collect()
}

/// All mounts of a container.
pub(crate) fn mounts(
    input: &ContainerInput<'_>,
    sc: &cri::LinuxContainerSecurityContext,
    warnings: &mut Vec<String>,
) -> Result<Mounts> {
    let mut result = Mounts::default();
    let mut over: Vec<(PathBuf, Mount)> = Vec::new();
    for m in &input.config.mounts {
        over.push(bind(input, m, &mut result, warnings)?);
    }
    let asked: Vec<PathBuf> = over.iter().map(|(path, _)| path.clone()).collect();
    for (path, mount) in extras(input, sc.readonly_rootfs)? {
        if !asked.contains(&path) {
            over.push((path, mount));
        }
    }
    // Stable: two mounts at one path stay in CRI's order.
    over.sort_by_key(|(path, _)| paths::depth(path));

    let dev_is_taken = asked.iter().any(|p| p == Path::new("/dev"));
    for m in defaults(input, sc.privileged)? {
        let path = m.destination();
        let taken = asked.contains(path) || (dev_is_taken && path.starts_with("/dev"));
        if !taken {
            result.list.push(m);
        }
    }
    result.list.extend(over.into_iter().map(|(_, m)| m));
    Ok(result)
}

/// What every container has.
fn defaults(input: &ContainerInput<'_>, privileged: bool) -> Result<Vec<Mount>> {
    let mode = if privileged { "rw" } else { "ro" };
    let plain = ["nosuid", "noexec", "nodev"];
    let with = |more: &[&str]| plain.iter().chain(more).copied().map(String::from).collect::<Vec<_>>();
    let user_namespace = input.namespaces.user.is_some();
    let p = Path::new;

    let mut list = vec![
        mount(p("/proc"), "proc", p("proc"), &plain)?,
        mount(p("/dev"), "tmpfs", p("tmpfs"), &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            p("/dev/pts"),
            "devpts",
            p("devpts"),
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
    ];
    // The kernel lets only the owner of a namespace mount its file systems: a user
    // namespace over the host's ipc or net namespace gets the host's own instead.
    if user_namespace && input.namespaces.ipc.is_none() {
        list.push(mount(p("/dev/mqueue"), "bind", p("/dev/mqueue"), &["rbind", "nosuid", "nodev", "noexec"])?);
    } else {
        list.push(mount(p("/dev/mqueue"), "mqueue", p("mqueue"), &plain)?);
    }
    if user_namespace && input.namespaces.net.is_none() {
        let read_only = if input.node.recursive_read_only { "rro" } else { "ro" };
        list.push(mount(p("/sys"), "bind", p("/sys"), &["rbind", read_only, "nosuid", "nodev", "noexec"])?);
    } else {
        let options = with(&[mode]);
        list.push(mount(p("/sys"), "sysfs", p("sysfs"), &options.iter().map(String::as_str).collect::<Vec<_>>())?);
    }
    let mut options = with(&["relatime", mode]);
    if privileged && input.node.cgroup_mode == CgroupMode::Unified {
        options.extend(input.node.cgroup2_options.iter().cloned());
    }
    list.push(mount(
        p("/sys/fs/cgroup"),
        "cgroup",
        p("cgroup"),
        &options.iter().map(String::as_str).collect::<Vec<_>>(),
    )?);
    Ok(list)
}

/// The pod's files, its /dev/shm, and the image's volumes.
fn extras(input: &ContainerInput<'_>, read_only: bool) -> Result<Vec<(PathBuf, Mount)>> {
    let files = [
        ("/etc/hostname", &input.files.hostname_path, read_only),
        ("/etc/hosts", &input.files.hosts_path, read_only),
        ("/etc/resolv.conf", &input.files.resolv_conf_path, read_only),
        ("/dev/shm", &input.files.shm_path, false),
    ];
    let mut list = Vec::new();
    for (destination, source, read_only) in files {
        if let Some(source) = source {
            let mode = if read_only { "ro" } else { "rw" };
            let destination = PathBuf::from(destination);
            let m = mount(&destination, "bind", source, &["rbind", "rprivate", mode])?;
            list.push((destination, m));
        }
    }
    for (volume, source) in input.volumes {
        let destination = paths::clean(volume);
        if destination != Path::new("/") {
            let m = mount(&destination, "bind", source, &["rbind", "rprivate", "rw"])?;
            list.push((destination, m));
        }
    }
    Ok(list)
}

/// One mount of CRI's.
fn bind(
    input: &ContainerInput<'_>,
    m: &cri::Mount,
    result: &mut Mounts,
    warnings: &mut Vec<String>,
) -> Result<(PathBuf, Mount)> {
    let at = || format!("mount at {:?}", m.container_path);
    paths::check_text("mounts: container_path", &m.container_path)?;
    let destination = paths::clean(&m.container_path);
    if destination == Path::new("/") {
        return Err(Error::invalid(format!("mounts: container_path {:?} is the root", m.container_path)));
    }
    let name = m.image.as_ref().map_or("", |i| i.image.as_str());
    if !name.is_empty() {
        let mounted = image(input, m, name, &destination).map_err(|e| e.within(at()))?;
        return Ok((destination, mounted));
    }
    if !m.image_sub_path.is_empty() {
        return Err(Error::invalid(format!("{}: image_sub_path is set without an image", at())));
    }
    let source = paths::host_path("host_path", &m.host_path).map_err(|e| e.within(at()))?;
    result.ensure.push(source.clone());
    let mut options = vec!["rbind"];
    options.push(propagation(input, m, result).map_err(|e| e.within(at()))?);
    options.push(access(input, m).map_err(|e| e.within(at()))?);
    options.extend(narrowing(m).map_err(|e| e.within(at()))?);
    if m.selinux_relabel && input.node.selinux {
        warnings.push(format!("{}: SELinux relabelling is not done; the host path keeps its label", at()));
    }
    let mut mounted = mount(&destination, "bind", &source, &options)?;
    if !m.uid_mappings.is_empty() || !m.gid_mappings.is_empty() {
        if !input.node.idmap_mounts {
            return Err(Error::new(ErrorKind::FailedPrecondition, format!("{}: its owners can't be mapped", at()))
                .hint("the kernel or the OCI runtime knows no idmapped mounts; runc does from 1.2 on"));
        }
        mounted.set_uid_mappings(Some(id_mappings(&id_maps(&m.uid_mappings))?));
        mounted.set_gid_mappings(Some(id_mappings(&id_maps(&m.gid_mappings))?));
    }
    Ok((destination, mounted))
}

pub(crate) fn id_maps(maps: &[cri::IdMapping]) -> Vec<IdMap> {
    maps.iter().map(|m| IdMap { host: m.host_id, container: m.container_id, length: m.length }).collect()
}

/// A mount of an image: an overlay of its layers that only the container's mount
/// namespace has, so that nothing of it is left on the host; of one layer, a bind.
fn image(input: &ContainerInput<'_>, m: &cri::Mount, name: &str, destination: &Path) -> Result<Mount> {
    if !m.host_path.is_empty() {
        return Err(Error::invalid(format!("both host_path {:?} and image {name:?} are set", m.host_path)));
    }
    if !m.readonly {
        return Err(Error::invalid(format!("image {name:?} must be mounted read-only")).hint("set readonly"));
    }
    let layers = match input.image_mounts.get(&m.container_path).map(Vec::as_slice) {
        Some([]) | None => {
            return Err(Error::new(ErrorKind::NotFound, format!("image {name:?} is not on this node")));
        }
        Some([one]) => {
            let mut options = vec!["rbind", "rprivate", "ro"];
            options.extend(narrowing(m)?);
            return mount(destination, "bind", one, &options);
        }
        Some(layers) => layers,
    };
    if input.namespaces.user.is_some() {
        return Err(Error::new(
            ErrorKind::FailedPrecondition,
            format!("image {name:?} can't be mounted in a pod with a user namespace"),
        ));
    }
    let names: Vec<&str> = layers.iter().filter_map(|l| l.to_str()).collect();
    if names.len() != layers.len() || names.iter().any(|n| n.contains([':', ',', '\\'])) {
        return Err(Error::internal(format!(
            "image {name:?}: a layer's path has a character that overlayfs splits at"
        )));
    }
    let lower = format!("lowerdir={}", names.join(":"));
    if lower.len() > LONGEST_OPTIONS {
        return Err(Error::new(
            ErrorKind::FailedPrecondition,
            format!("image {name:?} has too many layers to be mounted: {} bytes of options", lower.len()),
        ));
    }
    let mut options = vec!["ro"];
    options.extend(narrowing(m)?);
    options.push(&lower);
    mount(destination, "overlay", Path::new("overlay"), &options)
}

fn narrowing(m: &cri::Mount) -> Result<Vec<&str>> {
    match m.mount_options.iter().find(|o| !NARROWING.contains(&o.as_str())) {
        Some(bad) => Err(Error::invalid(format!("mount_options {bad:?} is not one of {NARROWING:?}"))),
        None => Ok(m.mount_options.iter().map(String::as_str).collect()),
    }
}

fn propagation(input: &ContainerInput<'_>, m: &cri::Mount, result: &mut Mounts) -> Result<&'static str> {
    let carrier = input.host.propagation.get(&m.host_path);
    let needs = |what: &str| {
        Error::invalid(format!("host_path {:?} is not on a {what} mount", m.host_path))
            .hint("make it so with mount --make-rshared")
    };
    match cri::MountPropagation::try_from(m.propagation) {
        Ok(cri::MountPropagation::PropagationPrivate) => Ok("rprivate"),
        Ok(cri::MountPropagation::PropagationHostToContainer) => {
            if carrier == Some(&Propagation::Private) {
                return Err(needs("shared or slave"));
            }
            result.rootfs_propagation = result.rootfs_propagation.or(Some("rslave"));
            Ok("rslave")
        }
        Ok(cri::MountPropagation::PropagationBidirectional) => {
            if carrier.is_some_and(|c| *c != Propagation::Shared) {
                return Err(needs("shared"));
            }
            result.rootfs_propagation = Some("rshared");
            Ok("rshared")
        }
        Err(_) => Err(Error::invalid(format!("propagation {} is unknown", m.propagation))),
    }
}

fn access(input: &ContainerInput<'_>, m: &cri::Mount) -> Result<&'static str> {
    match (m.readonly, m.recursive_read_only) {
        (false, false) => Ok("rw"),
        (true, false) => Ok("ro"),
        (false, true) => Err(Error::invalid("recursive_read_only is set on a writable mount").hint("set readonly")),
        (true, true) if m.propagation != cri::MountPropagation::PropagationPrivate as i32 => {
            Err(Error::invalid("recursive_read_only needs private propagation"))
        }
        (true, true) if !input.node.recursive_read_only => Err(Error::new(
            ErrorKind::FailedPrecondition,
            "this node's OCI runtime knows no recursive read-only mounts",
        )),
        (true, true) => Ok("rro"),
    }
}
