//! From the configuration to the handlers: which binaries each is, and what the node
//! can do with it.

use crate::config::{
    CgroupDriver, Config, HandlerConfig, OptionsConfig, OptionsKind, Seccomp, TimeoutsConfig, WorkloadTrust,
};
use crate::serve::find_binary;
use anyhow::{Context, Result, bail};
use cri::Condition;
use pods::{Handler, Handlers};
use runtime::conmon::Handler as MonitorHandler;
use runtime::shim_v2::{Handler as ShimHandler, TaskOptions, Timeouts};
use runtime::trust::Trust;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Our own shim.
const OUR_SHIM: &str = "containerd-shim-longshore-v2";

/// All handlers, made ready.
pub struct Built {
    /// As pods know them.
    pub handlers: Handlers,
    /// Those that shims run; the default one first, if it is one of them.
    pub shims: Vec<ShimHandler>,
    /// Those that monitors run; the default one first, if it is one of them.
    pub monitors: Vec<MonitorHandler>,
    /// RuntimeReady: whether the default handler can run pods.
    pub ready: Condition,
    /// For Status, by handler.
    pub info: Value,
}

/// One handler, and what was found out about it.
struct One {
    handler: Handler,
    shim: Option<ShimHandler>,
    monitor: Option<MonitorHandler>,
    info: Value,
}

/// Finds the binaries of every handler, and asks each OCI runtime for its features.
///
/// # Errors
/// What the configuration says wrong, and a missing shim of the default handler. What
/// is missing of another handler breaks that one alone.
pub async fn build(config: &Config) -> Result<Built> {
    let name = &config.runtime.handler;
    if name.is_empty() {
        bail!("runtime.handler is empty: the default handler needs a name");
    }
    let own = config.runtimes.get(name).cloned().unwrap_or_default();
    let default = one(config, name, &own).await?;
    let ready = match &default.handler.broken {
        None => Condition::good(),
        Some(why) => {
            tracing::error!("no OCI runtime: {why}");
            Condition::bad("OciRuntimeMissing", why.clone())
        }
    };
    let mut shims: Vec<ShimHandler> = default.shim.into_iter().collect();
    let mut monitors: Vec<MonitorHandler> = default.monitor.into_iter().collect();
    let mut info = serde_json::Map::from_iter([(name.clone(), default.info)]);
    // The node's own condition says why, and pods are tried all the same.
    let default = Handler { broken: None, ..default.handler };
    let mut others = Vec::new();
    for (name, own) in config.runtimes.iter().filter(|(n, _)| *n != name) {
        let made = one(config, name, own).await?;
        if let Some(why) = &made.handler.broken {
            tracing::error!("the runtime handler {name:?} can't run pods: {why}");
        }
        shims.extend(made.shim);
        monitors.extend(made.monitor);
        info.insert(name.clone(), made.info);
        others.push(made.handler);
    }
    let trust = match config.runtime.default_workload_trust {
        WorkloadTrust::Trusted => Trust::Trusted,
        WorkloadTrust::Untrusted => Trust::Untrusted,
    };
    let handlers = Handlers::new(default, others).with_default_trust(trust);
    Ok(Built { handlers, shims, monitors, ready, info: info.into() })
}

async fn one(config: &Config, name: &str, own: &HandlerConfig) -> Result<One> {
    let at = || format!("the runtime handler {name:?}");
    types::check_identifier("runtime handler", name).with_context(at)?;
    if !own.monitor.is_empty() && !own.shim.is_empty() {
        bail!("runtimes.{name} sets both shim and monitor: one of them runs its containers");
    }
    let is_default = *name == config.runtime.handler;
    let monitored = !own.monitor.is_empty();
    let mut broken = None;
    let found = if monitored { find_monitor(&own.monitor) } else { find_shim(config, own) };
    let runner = match found {
        Ok(runner) => runner,
        Err(e) if is_default => return Err(e).with_context(at),
        Err(e) => {
            broken = Some(format!("{e:#}"));
            PathBuf::from(if monitored { &own.monitor } else { &own.shim })
        }
    };
    // A monitor knows what runc's options say, by flags.
    let options_for = if monitored { Path::new(OUR_SHIM) } else { &runner };
    let options = options(options_for, &own.options).with_context(|| format!("runtimes.{name}.options"))?;
    let runs_oci = matches!(options, TaskOptions::Runc { .. });
    if monitored && own.sandbox != runtime::SandboxKind::Pinned {
        bail!("runtimes.{name} sets sandbox: behind a monitor a pod has no process of its own");
    }
    if monitored && !runs_oci {
        bail!("runtimes.{name}.options: a monitor takes no options but no_pivot_root and no_new_keyring");
    }
    let mut info = if monitored { json!({ "monitor": runner }) } else { json!({ "shim": runner }) };
    let (mut features, mut runtime_binary) = (None, PathBuf::new());
    if runs_oci {
        let wanted = [&own.binary, &config.runtime.binary].into_iter().find(|p| !p.as_os_str().is_empty());
        match oci::detect(wanted.map(PathBuf::as_path)).await {
            Ok(found) => {
                info["runtime"] = info_of(name, &found);
                (features, runtime_binary) = (found.features, found.path);
            }
            Err(e) => {
                runtime_binary = wanted.cloned().unwrap_or_else(|| "runc".into());
                broken.get_or_insert(e.to_string());
            }
        }
    }
    let mut node = pods::facts::node_facts(features.as_ref())?;
    node.cgroup_driver = match config.runtime.cgroup_driver {
        CgroupDriver::Cgroupfs => spec::CgroupDriver::Cgroupfs,
        CgroupDriver::Systemd => spec::CgroupDriver::Systemd,
    };
    if let Some(why) = &broken {
        info["broken"] = json!(why);
    }
    let handler = Handler { name: name.to_string(), node, policy: policy(config, own), sandbox: own.sandbox, broken };
    let root = [&own.root, &config.runtime.root].into_iter().find(|p| !p.as_os_str().is_empty());
    let runtime_root = root.cloned().unwrap_or_else(|| config.state.join("oci"));
    let systemd_cgroup = config.runtime.cgroup_driver == CgroupDriver::Systemd;
    let (name, timeouts) = (name.to_string(), timeouts(config, &own.timeouts));
    if monitored {
        let monitor = MonitorHandler {
            name,
            monitor: runner,
            runtime_binary,
            runtime_root,
            systemd_cgroup,
            no_pivot_root: own.options.no_pivot_root,
            no_new_keyring: own.options.no_new_keyring,
            exec_by_log: false,
            timeouts: runtime::conmon::Timeouts {
                create: timeouts.create,
                call: timeouts.call,
                cleanup: timeouts.cleanup,
            },
        };
        return Ok(One { handler, shim: None, monitor: Some(monitor), info });
    }
    let shim = ShimHandler {
        name,
        shim: runner,
        runtime_binary,
        runtime_root,
        systemd_cgroup,
        options,
        sandbox: own.sandbox,
        timeouts,
    };
    Ok(One { handler, shim: Some(shim), monitor: None, info })
}

/// A conmon: a path, or a name beside our own binary or on PATH.
fn find_monitor(name: &str) -> Result<PathBuf> {
    if !name.contains('/') {
        let own = std::env::current_exe().context("find our own binary")?;
        if let Some(beside) = own.parent().map(|d| d.join(name)).filter(|p| p.is_file()) {
            return Ok(beside);
        }
    }
    oci::find_binary(name).with_context(|| {
        let hint = if name.contains('/') { "" } else { " on PATH" };
        format!("the monitor {name:?} is no executable{hint}: install it, or name its path")
    })
}

fn find_shim(config: &Config, own: &HandlerConfig) -> Result<PathBuf> {
    if own.shim.is_empty() {
        return find_binary(&config.runtime.shim, OUR_SHIM);
    }
    let name = shim_name(&own.shim)?;
    oci::find_binary(&name).with_context(|| {
        let hint = if name.contains('/') { "" } else { " on PATH" };
        format!("the shim {:?} is no executable{hint} ({name}): install it, or name its path", own.shim)
    })
}

/// A shim's type as containerd resolves it: `io.containerd.kata.v2` is
/// `containerd-shim-kata-v2`. Other names and paths stay.
fn shim_name(shim: &str) -> Result<String> {
    if shim.contains('/') || !shim.contains('.') {
        return Ok(shim.to_string());
    }
    let parts: Vec<&str> = shim.split('.').collect();
    match parts.as_slice() {
        [_, .., name, version] if parts.len() >= 3 && version.starts_with('v') && !name.is_empty() => {
            Ok(format!("containerd-shim-{name}-{version}"))
        }
        _ => bail!("{shim:?} is no type of a shim: those look like io.containerd.NAME.v2"),
    }
}

/// Which options the shim gets with each container.
fn options(shim: &Path, own: &OptionsConfig) -> Result<TaskOptions> {
    let generic = [&own.type_url, &own.config_path, &own.config_body].into_iter().any(|v| !v.is_empty());
    let runc = own.no_pivot_root || own.no_new_keyring;
    let name = shim.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let kind = match own.kind {
        OptionsKind::Auto if generic => OptionsKind::Generic,
        OptionsKind::Auto if runc => OptionsKind::Runc,
        OptionsKind::Auto if name.contains("-runc-") || name.contains("-longshore-") => OptionsKind::Runc,
        OptionsKind::Auto => OptionsKind::None,
        kind => kind,
    };
    if (generic && kind != OptionsKind::Generic) || (runc && kind != OptionsKind::Runc) {
        bail!("it has keys of another kind: no_pivot_root and no_new_keyring are runc's, the rest generic");
    }
    Ok(match kind {
        OptionsKind::Runc => TaskOptions::Runc { no_pivot_root: own.no_pivot_root, no_new_keyring: own.no_new_keyring },
        OptionsKind::Generic => TaskOptions::Generic {
            type_url: own.type_url.clone(),
            config_path: own.config_path.clone(),
            config_body: own.config_body.clone(),
        },
        OptionsKind::None | OptionsKind::Auto => TaskOptions::None,
    })
}

fn timeouts(config: &Config, own: &TimeoutsConfig) -> Timeouts {
    let (usual, all) = (Timeouts::default(), &config.runtime.timeouts);
    let pick = |own: Option<u64>, all: Option<u64>, usual: Duration| {
        own.or(all).filter(|s| *s > 0).map_or(usual, Duration::from_secs)
    };
    Timeouts {
        launch: pick(own.launch, all.launch, usual.launch),
        load: pick(own.load, all.load, usual.load),
        cleanup: pick(own.cleanup, all.cleanup, usual.cleanup),
        shutdown: pick(own.shutdown, all.shutdown, usual.shutdown),
        state: pick(own.state, all.state, usual.state),
        // The seam's own bound passes first, so that its error is the one that is told.
        create: pick(own.create, all.create, Duration::from_secs(config.runtime.step_timeout - 2)),
        call: pick(own.call, all.call, usual.call),
    }
}

fn policy(config: &Config, own: &HandlerConfig) -> spec::NodePolicy {
    let mut policy = spec::NodePolicy {
        default_seccomp: config.containers.seccomp == Seccomp::Default,
        pids_limit: Some(config.containers.pids_limit).filter(|n| *n > 0),
        rlimits: config.containers.ulimits.iter().map(|limit| limit.0.clone()).collect(),
        ..Default::default()
    };
    policy.annotations.extend(config.containers.annotations.iter().chain(&own.annotations).cloned());
    policy
}

fn info_of(handler: &str, found: &oci::Found) -> Value {
    let passed_over: Vec<_> =
        found.passed_over.iter().map(|(name, reason)| json!({ "name": name, "reason": reason })).collect();
    for (name, reason) in &found.passed_over {
        tracing::warn!("handler {handler}: the OCI runtime {name} is passed over: {reason}");
    }
    tracing::info!("handler {handler}: the OCI runtime is {} {} ({})", found.name, found.version, found.path.display());
    json!({
        "name": found.name,
        "version": found.version,
        "path": found.path,
        "passedOver": passed_over,
        "features": found.features,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, text).unwrap();
        Config::load(Some(&file)).unwrap()
    }

    #[test]
    fn a_type_is_a_binary_as_containerd_says() {
        assert_eq!(shim_name("io.containerd.runc.v2").unwrap(), "containerd-shim-runc-v2");
        assert_eq!(shim_name("io.containerd.kata-qemu.v2").unwrap(), "containerd-shim-kata-qemu-v2");
        assert_eq!(shim_name("/opt/x.y.v1").unwrap(), "/opt/x.y.v1");
        assert_eq!(shim_name("containerd-shim-kata-v2").unwrap(), "containerd-shim-kata-v2");
        assert!(shim_name("runc.v2").is_err() && shim_name("io.containerd.runc.2").is_err());
    }

    #[test]
    fn options_go_by_the_shims_name_unless_told() {
        let by_name = |name: &str| options(Path::new(name), &OptionsConfig::default()).unwrap();
        assert_eq!(by_name("/usr/bin/containerd-shim-runc-v2"), TaskOptions::runc());
        assert_eq!(by_name("/x/containerd-shim-longshore-v2"), TaskOptions::runc());
        assert_eq!(by_name("/x/containerd-shim-kata-v2"), TaskOptions::None);
        let kata = OptionsConfig { config_path: "/etc/kata.toml".into(), ..Default::default() };
        let TaskOptions::Generic { config_path, .. } = options(Path::new("/x/kata"), &kata).unwrap() else {
            panic!("a configuration file is a generic option");
        };
        assert_eq!(config_path, "/etc/kata.toml");
        let both = OptionsConfig { no_pivot_root: true, ..kata };
        assert!(options(Path::new("/x/kata"), &both).is_err());
    }

    #[tokio::test]
    async fn a_handler_takes_what_it_does_not_set_from_the_default_one() {
        let config = config(
            "state = \"/run/l\"\n[runtime]\nshim = \"/bin/true\"\nbinary = \"/no/such\"\n[runtime.timeouts]\nstate = 9\n\
             [runtimes.fast]\nroot = \"/run/fast\"\nannotations = [\"a/*\"]\ntimeouts = { call = 3 }\n\
             [runtimes.fast.options]\nkind = \"runc\"\n\
             [runtimes.vm]\nshim = \"io.containerd.nosuch.v2\"\n\
             [runtimes.watched]\nmonitor = \"true\"\n[runtimes.watched.options]\nno_new_keyring = true\n",
        );
        let built = build(&config).await.unwrap();
        let names: Vec<_> = built.handlers.iter().map(|h| h.name.as_str()).collect();
        assert_eq!(names, ["runc", "fast", "vm", "watched"]);
        let fast = built.shims.iter().find(|h| h.name == "fast").unwrap();
        assert_eq!(
            (fast.shim.as_path(), fast.runtime_root.as_path()),
            (Path::new("/bin/true"), Path::new("/run/fast"))
        );
        assert_eq!((fast.timeouts.state.as_secs(), fast.timeouts.call.as_secs()), (9, 3));
        assert_eq!(fast.timeouts.create.as_secs(), 28);
        assert_eq!(built.shims[0].runtime_root, Path::new("/run/l/oci"));
        let broken = |name: &str| built.handlers.find(name).unwrap().broken.clone().unwrap_or_default();
        assert!(broken("fast").contains("/no/such"), "{}", broken("fast"));
        assert!(broken("vm").contains("containerd-shim-nosuch-v2"), "{}", broken("vm"));
        let watched = &built.monitors[0];
        assert_eq!((watched.name.as_str(), watched.no_new_keyring), ("watched", true));
        assert_eq!(
            (watched.monitor.file_name().unwrap().to_str(), watched.timeouts.create.as_secs()),
            (Some("true"), 28)
        );
        assert!(built.shims.iter().all(|h| h.name != "watched"));
        let policy = &built.handlers.find("fast").unwrap().policy;
        assert!(policy.annotations.iter().any(|a| a == "a/*"));
    }

    #[tokio::test]
    async fn what_is_wrong_names_the_handler() {
        let wrong = config("[runtime]\nshim = \"/bin/true\"\n[runtimes.x]\nshim = \"/s\"\nmonitor = \"conmon\"\n");
        let e = build(&wrong).await.err().unwrap();
        assert!(format!("{e:#}").contains("runtimes.x sets both shim and monitor"), "{e:#}");
    }
}
