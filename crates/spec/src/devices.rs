//! Device nodes and the device rules of the cgroup.

use crate::ContainerInput;
use crate::facts::HostDevice;
use crate::paths;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use types::{Error, ErrorKind, Result, ResultExt};

/// The nodes and the cgroup rules of one container.
pub(crate) struct Devices {
    pub nodes: Vec<LinuxDevice>,
    pub rules: Vec<LinuxDeviceCgroup>,
}

/// CRI's devices, or all of the host's in a privileged container. The OCI runtime
/// adds /dev/null and its like by itself.
pub(crate) fn devices(input: &ContainerInput<'_>, privileged: bool) -> Result<Devices> {
    if let Some(cdi) = input.config.cdi_devices.first() {
        return Err(Error::unimplemented(format!("CDI_devices: {:?}: CDI devices are not served", cdi.name)));
    }
    let mut nodes: BTreeMap<PathBuf, LinuxDevice> = BTreeMap::new();
    let mut rules = vec![rule(None, privileged, "rwm")?];
    if privileged {
        for device in &input.host.all_devices {
            nodes.insert(device.path.clone(), node(device, &device.path)?);
        }
    }
    for asked in &input.config.devices {
        let access = access(&asked.permissions)?;
        let at_host = paths::host_path("devices: host_path", &asked.host_path)?;
        let at = if asked.container_path.is_empty() { &asked.host_path } else { &asked.container_path };
        paths::check_text("devices: container_path", at)?;
        let at = paths::clean(at);
        let found = input.host.devices.get(&asked.host_path).filter(|list| !list.is_empty()).ok_or_else(|| {
            Error::new(ErrorKind::InvalidArgument, format!("devices: no device at host_path {:?}", asked.host_path))
        })?;
        for device in found {
            // A directory stands for all devices below it, under the same names. A
            // symlink's target is elsewhere and takes the asked name.
            let path = match device.path.strip_prefix(&at_host) {
                Ok(below) if below != Path::new("") => at.join(below),
                _ => at.clone(),
            };
            nodes.insert(path.clone(), node(device, &path)?);
            if !privileged {
                rules.push(rule(Some(device), true, &access)?);
            }
        }
    }
    Ok(Devices { nodes: nodes.into_values().collect(), rules })
}

/// `permissions`: some of r, w and m; nothing means all three.
fn access(text: &str) -> Result<String> {
    if text.is_empty() {
        return Ok("rwm".into());
    }
    if text.chars().any(|c| !"rwm".contains(c)) {
        return Err(Error::invalid(format!("devices: permissions {text:?} has letters beside r, w and m")));
    }
    Ok("rwm".chars().filter(|c| text.contains(*c)).collect())
}

fn kind(device: &HostDevice) -> LinuxDeviceType {
    if device.block { LinuxDeviceType::B } else { LinuxDeviceType::C }
}

fn node(device: &HostDevice, path: &Path) -> Result<LinuxDevice> {
    LinuxDeviceBuilder::default()
        .path(path)
        .typ(kind(device))
        .major(i64::from(device.major))
        .minor(i64::from(device.minor))
        .file_mode(device.mode & 0o7777)
        .uid(device.uid)
        .gid(device.gid)
        .build()
        .context(|| format!("device {}", path.display()))
}

fn rule(device: Option<&HostDevice>, allow: bool, access: &str) -> Result<LinuxDeviceCgroup> {
    let mut builder = LinuxDeviceCgroupBuilder::default().allow(allow).access(access);
    if let Some(device) = device {
        builder = builder.typ(kind(device)).major(i64::from(device.major)).minor(i64::from(device.minor));
    }
    builder.build().context(|| "device rule".into())
}
