//! From `run`'s flags to CRI's configurations. Nothing here asks the daemon.

use crate::cli::args::{Network, RunArgs};
use proto::cri::security_profile::ProfileType;
use proto::cri::{
    ContainerConfig, ContainerMetadata, ImageSpec, Int64Value, KeyValue, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, Mount, MountPropagation, NamespaceMode, NamespaceOption, PortMapping, Protocol,
    SecurityProfile,
};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use types::{Error, Result, ResultExt};

/// The period, in microseconds, in which a share of processor time is granted.
const CPU_PERIOD: i64 = 100_000;

/// The namespaces of a pod that `run` makes.
pub fn namespaces(network: Network) -> NamespaceOption {
    let network = match network {
        Network::Pod => NamespaceMode::Pod,
        Network::Host => NamespaceMode::Node,
    };
    NamespaceOption {
        network: network.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..NamespaceOption::default()
    }
}

/// The profile of pods and containers: the runtime's default, none for privileged ones.
pub fn seccomp(privileged: bool) -> SecurityProfile {
    let kind = if privileged { ProfileType::Unconfined } else { ProfileType::RuntimeDefault };
    SecurityProfile { profile_type: kind.into(), ..SecurityProfile::default() }
}

/// The container's configuration; its image and its namespaces are filled in once
/// image and pod are known.
///
/// # Errors
/// `InvalidArgument`, naming the flag.
pub fn container(args: &RunArgs, name: &str) -> Result<ContainerConfig> {
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    Ok(ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_string(), attempt: 0 }),
        image: Some(ImageSpec { user_specified_image: args.image.clone(), ..ImageSpec::default() }),
        command: args.entrypoint.iter().cloned().collect(),
        args: args.command.clone(),
        working_dir: args.workdir.clone().unwrap_or_default(),
        envs: args.env.iter().filter_map(|e| env(e).transpose()).collect::<Result<_>>()?,
        mounts: args.volume.iter().map(|v| volume(v, &here)).collect::<Result<_>>()?,
        labels: labels(&args.label)?,
        log_path: format!("{name}.log"),
        stdin: args.interactive,
        stdin_once: args.interactive,
        linux: Some(LinuxContainerConfig {
            resources: Some(resources(args)?),
            security_context: Some(security(args)?),
        }),
        ..ContainerConfig::default()
    })
}

fn security(args: &RunArgs) -> Result<LinuxContainerSecurityContext> {
    let paths = |list: &[&str]| -> Vec<String> {
        if args.privileged { Vec::new() } else { list.iter().map(ToString::to_string).collect() }
    };
    let mut context = LinuxContainerSecurityContext {
        privileged: args.privileged,
        readonly_rootfs: args.read_only,
        masked_paths: paths(&spec::DEFAULT_MASKED_PATHS),
        readonly_paths: paths(&spec::DEFAULT_READONLY_PATHS),
        seccomp: Some(seccomp(args.privileged)),
        ..LinuxContainerSecurityContext::default()
    };
    if let Some(text) = &args.user {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text.as_str(), None),
        };
        match user.parse::<u32>() {
            Ok(uid) => context.run_as_user = Some(Int64Value { value: uid.into() }),
            Err(_) if !user.is_empty() => context.run_as_username = user.to_string(),
            Err(_) => return Err(Error::invalid(format!("--user {text:?} names nobody"))),
        }
        if let Some(group) = group {
            let gid = group.parse::<u32>().map_err(|_| {
                Error::invalid(format!("--user {text:?}: the group {group:?} is no number"))
                    .hint("CRI knows groups by number only")
            })?;
            context.run_as_group = Some(Int64Value { value: gid.into() });
        }
    }
    Ok(context)
}

fn resources(args: &RunArgs) -> Result<LinuxContainerResources> {
    let mut resources = LinuxContainerResources::default();
    if let Some(text) = &args.memory {
        resources.memory_limit_in_bytes = bytes(text)?;
    }
    if let Some(cpus) = args.cpus {
        if !(cpus.is_finite() && (0.01..=8192.0).contains(&cpus)) {
            return Err(Error::invalid(format!("--cpus {cpus} is not between 0.01 and 8192")));
        }
        resources.cpu_period = CPU_PERIOD;
        #[allow(clippy::cast_possible_truncation, reason = "checked above: at most 8192 periods")]
        let quota = (cpus * 1e5).round() as i64;
        resources.cpu_quota = quota;
    }
    Ok(resources)
}

/// `[IP:]PORT:PODPORT[/PROTO]`, an address of IPv6 in brackets.
///
/// # Errors
/// `InvalidArgument`, quoting it.
pub fn publish(text: &str) -> Result<PortMapping> {
    let refuse = |why: &str| {
        Error::invalid(format!("--publish {text:?}: {why}")).hint("write [IP:]PORT:PODPORT[/PROTO], e.g. 8080:80")
    };
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return Err(refuse("the protocol is neither tcp, udp nor sctp")),
    };
    let port = |p: &str| p.parse::<u16>().ok().filter(|p| *p > 0).map(i32::from);
    let (rest, inside) = ports.rsplit_once(':').ok_or_else(|| refuse("it has one port only"))?;
    let (ip, outside) = rest.rsplit_once(':').unwrap_or(("", rest));
    let ip = ip.trim_start_matches('[').trim_end_matches(']');
    if !ip.is_empty() && ip.parse::<std::net::IpAddr>().is_err() {
        return Err(refuse("the node's address is none"));
    }
    Ok(PortMapping {
        protocol: protocol.into(),
        container_port: port(inside).ok_or_else(|| refuse("the pod's port is not between 1 and 65535"))?,
        host_port: port(outside).ok_or_else(|| refuse("the node's port is not between 1 and 65535"))?,
        host_ip: ip.to_string(),
    })
}

/// `NAME=VALUE`, or `NAME` for our own value of it; `None` where we have none.
fn env(text: &str) -> Result<Option<KeyValue>> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key.to_string(), Some(value.as_bytes().to_vec())),
        None => {
            use std::os::unix::ffi::OsStringExt;
            (text.to_string(), std::env::var_os(text).map(OsStringExt::into_vec))
        }
    };
    if key.is_empty() {
        return Err(Error::invalid(format!("--env {text:?} has no name")).hint("write NAME=VALUE"));
    }
    Ok(value.map(|value| KeyValue { key, value }))
}

/// `HOST:CONTAINER[:OPTIONS]`; a relative HOST counts from `here`.
fn volume(text: &str, here: &Path) -> Result<Mount> {
    let refuse = |why: &str| {
        Error::invalid(format!("--volume {text:?}: {why}"))
            .hint("write HOST:CONTAINER[:OPTIONS], e.g. /srv/data:/data:ro")
    };
    let parts: Vec<&str> = text.split(':').collect();
    let (host, inside, options) = match parts.as_slice() {
        [host, inside] => (*host, *inside, ""),
        [host, inside, options] => (*host, *inside, *options),
        _ => return Err(refuse("it does not have two or three parts")),
    };
    if host.is_empty() {
        return Err(refuse("the node's side is empty"));
    }
    if !host.starts_with(['/', '.']) {
        return Err(refuse("there are no named volumes: the node's side is a path, from / or ./ on"));
    }
    if !inside.starts_with('/') {
        return Err(refuse("the container's side is no absolute path"));
    }
    let host = if host.starts_with('/') {
        PathBuf::from(host)
    } else {
        here.canonicalize().context(|| format!("--volume {text:?}"))?.join(host)
    };
    let mut mount = Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.to_string(),
        ..Mount::default()
    };
    for option in options.split(',').filter(|o| !o.is_empty()) {
        match option {
            "ro" => mount.readonly = true,
            "rw" => mount.readonly = false,
            "rro" => (mount.readonly, mount.recursive_read_only) = (true, true),
            "rprivate" => mount.propagation = MountPropagation::PropagationPrivate.into(),
            "rslave" => mount.propagation = MountPropagation::PropagationHostToContainer.into(),
            "rshared" => mount.propagation = MountPropagation::PropagationBidirectional.into(),
            other => return Err(refuse(&format!("{other:?} is no option"))),
        }
    }
    Ok(mount)
}

fn labels(given: &[String]) -> Result<HashMap<String, String>> {
    let split = |text: &String| {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        match key {
            "" => Err(Error::invalid(format!("--label {text:?} has no name")).hint("write NAME=VALUE")),
            key => Ok((key.to_string(), value.to_string())),
        }
    };
    given.iter().map(split).collect()
}

/// A size in bytes: `64m`, `1.5g`, `1048576`; units count in powers of 1024.
fn bytes(text: &str) -> Result<i64> {
    let refuse = || Error::invalid(format!("--memory {text:?} is no size")).hint("write e.g. 64m or 1g");
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let lower = lower.strip_suffix('i').unwrap_or(lower);
    let (digits, shift) = match lower.as_bytes().last() {
        Some(b'k') => (&lower[..lower.len() - 1], 10),
        Some(b'm') => (&lower[..lower.len() - 1], 20),
        Some(b'g') => (&lower[..lower.len() - 1], 30),
        Some(b't') => (&lower[..lower.len() - 1], 40),
        _ => (lower, 0),
    };
    let number: f64 = digits.parse().map_err(|_| refuse())?;
    #[allow(clippy::cast_precision_loss, reason = "a power of two is exact")]
    let value = number * (1i64 << shift) as f64;
    if !value.is_finite() || !(1.0..9e18).contains(&value) {
        return Err(refuse());
    }
    #[allow(clippy::cast_possible_truncation, reason = "checked just above")]
    Ok(value as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Command};
    use clap::Parser;

    fn args(words: &[&str]) -> RunArgs {
        let all = ["longshore", "run"].iter().chain(words);
        match Cli::parse_from(all).command {
            Command::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn volumes_are_read() {
        let here = Path::new("/");
        let mount = volume("/a:/b", here).unwrap();
        assert_eq!((mount.host_path.as_str(), mount.container_path.as_str(), mount.readonly), ("/a", "/b", false));
        assert!(volume("/a:/b:ro", here).unwrap().readonly);
        let mount = volume("./x:/b:rro,rslave", here).unwrap();
        assert!(mount.host_path == "/./x" && mount.readonly && mount.recursive_read_only);
        assert_eq!(mount.propagation(), MountPropagation::PropagationHostToContainer);
        for bad in ["", "/a", "a:/b", "/a:b", ":/b", "/a:/b:nope", "/a:/b:ro:x"] {
            let e = volume(bad, here).unwrap_err().to_string();
            assert!(e.contains("--volume") && e.contains("HOST:CONTAINER"), "{bad}: {e}");
        }
    }

    #[test]
    fn ports_are_read() {
        let mapping = |text: &str| publish(text).map(|m| (m.host_ip, m.host_port, m.container_port, m.protocol));
        assert_eq!(mapping("8080:80").unwrap(), (String::new(), 8080, 80, Protocol::Tcp.into()));
        assert_eq!(mapping("127.0.0.1:53:5353/udp").unwrap(), ("127.0.0.1".into(), 53, 5353, Protocol::Udp.into()));
        assert_eq!(mapping("[::1]:1:2/sctp").unwrap(), ("::1".into(), 1, 2, Protocol::Sctp.into()));
        for bad in ["", "80", "0:80", "80:", "80:70000", "a:80:80", "80:80/icmp"] {
            assert!(publish(bad).unwrap_err().to_string().contains("--publish"), "{bad}");
        }
    }

    #[test]
    fn variables_without_a_value_are_ours_or_left_out() {
        let pair = env("A=b=c").unwrap().unwrap();
        assert_eq!((pair.key.as_str(), pair.value.as_slice()), ("A", b"b=c".as_slice()));
        assert!(env("PATH").unwrap().is_some());
        assert!(env("LONGSHORE_NO_SUCH_VARIABLE").unwrap().is_none());
        assert!(env("=x").is_err());
    }

    #[test]
    fn sizes_are_read() {
        for (text, n) in [("1", 1), ("64m", 64 << 20), ("1.5G", 3 << 29), ("2KiB", 2048), ("10b", 10)] {
            assert_eq!(bytes(text).unwrap(), n, "{text}");
        }
        for bad in ["", "m", "-1", "0", "1x", "nan", "inf", "1e300"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn users_are_numbers_or_names_and_groups_numbers() {
        let user = |u: &str| security(&args(&["-u", u, "img"]));
        let context = user("1000:50").unwrap();
        assert_eq!(context.run_as_user.map(|v| v.value), Some(1000));
        assert_eq!(context.run_as_group.map(|v| v.value), Some(50));
        assert_eq!(user("www").unwrap().run_as_username, "www");
        assert!(user("www:staff").is_err() && user(":5").is_err());
    }

    #[test]
    fn the_command_is_cris_args_and_the_entrypoint_its_command() {
        let config = container(&args(&["--entrypoint", "/e", "-l", "a=b", "--cpus", "0.5", "img", "x", "-y"]), "n");
        let config = config.unwrap();
        assert_eq!((config.command, config.args), (vec!["/e".to_string()], vec!["x".to_string(), "-y".into()]));
        assert_eq!(config.labels["a"], "b");
        assert_eq!(config.linux.unwrap().resources.unwrap().cpu_quota, 50_000);
        let privileged = security(&args(&["--privileged", "img"])).unwrap();
        assert!(privileged.masked_paths.is_empty() && privileged.privileged);
        assert!(container(&args(&["--cpus", "0", "img"]), "n").is_err());
    }
}
