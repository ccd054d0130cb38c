//! `longshore serve`: puts the daemon together, in the order in which its parts
//! need each other, and takes it apart on SIGTERM. Containers run on.

use crate::cli::ServeArgs;
use crate::config::{CgroupDriver, Config};
use crate::handlers;
use anyhow::{Context, Result, bail};
use cri::{Cri, Node};
use images::Images;
use pods::{Pods, PodsConfig, Shared};
use runtime::Runtimes;
use runtime::conmon::{ConmonConfig, ConmonManager, Handler as MonitorHandler};
use runtime::shim_v2::{Handler as ShimHandler, ShimConfig, ShimManager};
use rustix::io::Errno;
use serde_json::json;
use snapshots::{Overlay, Snapshotter};
use std::fs::{DirBuilder, File, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use store::Store;
use telemetry::{LogFormat, Timelines};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

/// containerd's CRI uses this namespace, and tools look there.
const NAMESPACE: &str = "k8s.io";
/// Where CNI plugins and `ip netns` look.
const NETNS_DIR: &str = "/run/netns";

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// What kept it from starting, by name.
pub fn run(args: ServeArgs) -> Result<()> {
    let mut config = Config::load(args.config.as_deref())?;
    config.socket = args.socket.unwrap_or(config.socket);
    config.root = args.root.unwrap_or(config.root);
    config.state = args.state.unwrap_or(config.state);
    config.log_level = args.log_level.unwrap_or(config.log_level);
    for (what, path) in [("--socket", &config.socket), ("--root", &config.root), ("--state", &config.state)] {
        if !path.is_absolute() {
            bail!("{what} {} is not an absolute path", path.display());
        }
    }
    if config.runtime.step_timeout < 10 {
        bail!("runtime.step_timeout is {} s: 10 at least", config.runtime.step_timeout);
    }
    if !(1..=90).contains(&config.network.cni.plugin_timeout) {
        bail!("network.cni.plugin_timeout is {} s: 1 to 90 are possible", config.network.cni.plugin_timeout);
    }
    // For the crash test alone (docs/decisions/0019-fault-points.md).
    if let Ok(point) = std::env::var("LONGSHORE_FAULT") {
        fault::arm(&point).map_err(|e| anyhow::anyhow!("LONGSHORE_FAULT: {e}"))?;
    }
    telemetry::init_logging(&config.log_level, LogFormat::default())?;
    sys::malloc::be_small();
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(64)
        .thread_keep_alive(Duration::from_secs(2))
        .build()
        .context("start the async runtime")?;
    let served = tokio.block_on(serve(config));
    // An unpack or a file system that hangs must not keep the daemon from ending.
    tokio.shutdown_timeout(Duration::from_secs(2));
    served
}

async fn serve(config: Config) -> Result<()> {
    // Signals are asked for first: one that comes during the start ends it tidily.
    let mut term = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    // The state directory must let a user-namespaced pod's root pass to its bundle
    // (CVE-2024-25621 asks for no more than that); the root nobody.
    make_dir(&config.root, 0o700, "--root")?;
    make_dir(&config.state, 0o711, "--state")?;
    let _locks = (lock(&config.root, "--root")?, lock(&config.state, "--state")?);

    let store =
        Store::open_with_copy(&config.root.join("db"), &config.state.join("db")).context("open the database")?;
    let snapshots = Overlay::open(&config.root.join("snapshots"), store.clone()).await?;
    let snapshots: Arc<dyn Snapshotter> = Arc::new(snapshots);
    let images = Images::open(images_config(&config), store.clone(), snapshots.clone()).await?;

    let built = handlers::build(&config).await?;
    let (events_tx, events) = tokio::sync::mpsc::unbounded_channel();
    let shims = ShimManager::new(shim_config(&config, built.shims.clone()), events_tx.clone()).await?;
    let runtime = Arc::new(backends(&config, &shims, &built, events_tx).await?);

    let shared = Shared {
        config: pods_config(&config)?,
        journal: pods::Journal::start(store.clone()),
        store: store.clone(),
        runtime,
        images: images.clone(),
        snapshots,
        sandboxes: pods::sandbox::Sandboxes::prepare(pods::sandbox::SandboxDirs {
            state: config.state.clone(),
            netns: PathBuf::from(NETNS_DIR),
        })?,
        network: network::Network::open(network_config(&config)?, store.clone()).await?,
        timelines: Timelines::new(),
        events: pods::Events::default(),
        registry: pods::Registry::default(),
        handlers: built.handlers,
        quarantine: pods::Quarantine::default(),
        health: pods::Health::default(),
    };
    // It may have much to find again; what it has not finished by then, the next one does.
    let pods = tokio::select! {
        pods = Pods::start(Arc::new(shared), events) => pods?,
        _ = term.recv() => return stopped_early(store),
        _ = int.recv() => return stopped_early(store),
    };
    let node = Node {
        version: env!("CARGO_PKG_VERSION").to_string(),
        systemd_cgroup: config.runtime.cgroup_driver == CgroupDriver::Systemd,
        runtime_ready: built.ready,
        info: json!({ "handlers": built.info, "root": config.root, "state": config.state }),
    };
    let listener = listen(&config.socket)?;
    tracing::info!("longshore {} serves CRI on {}", node.version, config.socket.display());
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let stop = async {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        tracing::info!("stopping; containers run on");
    };
    cri::serve(Cri { pods: pods.clone(), images, node: Arc::new(node) }, listener, stop).await?;
    pods.close().await;
    shims.release(spec::OWN_PARENT);
    let _ = std::fs::remove_file(&config.socket);
    drop(pods);
    store.close();
    Ok(())
}

fn stopped_early(store: Store) -> Result<()> {
    tracing::info!("stopping before what was there is found again; containers run on");
    store.close();
    Ok(())
}

fn make_dir(dir: &Path, mode: u32, flag: &str) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(mode).create(dir);
    made.and_then(|()| std::fs::set_permissions(dir, Permissions::from_mode(mode)))
        // It may have the mode already, and be closed to writing all the same.
        .and_then(|()| File::create(dir.join("lock")).map(drop))
        .with_context(|| match writable(dir) {
            true => format!("make {}", dir.display()),
            false => format!(
                "{} can't be written to: mount it for writing (mount -o remount,rw …), or choose another {flag}",
                dir.display()
            ),
        })
}

/// Whether the file system that a directory lies on, or will lie on, takes changes.
fn writable(dir: &Path) -> bool {
    let there = dir.ancestors().find(|d| d.exists()).unwrap_or(dir);
    rustix::fs::statvfs(there).is_ok_and(|s| !s.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// Two daemons on one directory would each remove what the other made. The lock is the
/// process's: what it has just forked when it is killed does not keep the next one out.
fn lock(dir: &Path, flag: &str) -> Result<File> {
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
    match rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::AGAIN | Errno::ACCESS) => {
            bail!("another longshore serves from {}: stop it, or give this one another {flag}", dir.display())
        }
        Err(e) => Err(e).with_context(|| format!("lock {}", path.display())),
    }
}

fn listen(socket: &Path) -> Result<UnixListener> {
    if let Some(dir) = socket.parent() {
        DirBuilder::new().recursive(true).mode(0o711).create(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    if std::os::unix::net::UnixStream::connect(socket).is_ok_and(|s| listener_lives(&s)) {
        bail!("somebody serves on {} already: stop it, or give this one another --socket", socket.display());
    }
    match std::fs::remove_file(socket) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("remove the old {}", socket.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(socket).with_context(|| format!("listen on {}", socket.display()))?;
    std::fs::set_permissions(socket, Permissions::from_mode(0o660))
        .with_context(|| format!("chmod {}", socket.display()))?;
    Ok(listener)
}

/// Whether who listened at the other end still runs: what a daemon has just forked when
/// it is killed holds its socket for a moment longer, and serves nobody.
fn listener_lives(stream: &std::os::unix::net::UnixStream) -> bool {
    match rustix::net::sockopt::socket_peercred(stream) {
        Ok(peer) => rustix::process::test_kill_process(peer.pid) != Err(Errno::SRCH),
        Err(_) => true,
    }
}

/// A binary that comes with us: as configured, beside our own, or on PATH.
pub(crate) fn find_binary(configured: &Path, name: &str) -> Result<PathBuf> {
    if !configured.as_os_str().is_empty() {
        return Ok(configured.to_path_buf());
    }
    let own = std::env::current_exe().context("find our own binary")?;
    if let Some(beside) = own.parent().map(|d| d.join(name)).filter(|p| p.is_file()) {
        return Ok(beside);
    }
    oci::find_binary(name).with_context(|| format!("{name} is neither beside {} nor on PATH", own.display()))
}

fn images_config(config: &Config) -> images::ImagesConfig {
    let registries = config.images.registries.iter().map(|(host, r)| {
        let registry = images::RegistryConfig {
            mirrors: r.mirrors.clone(),
            mirror_only: r.mirror_only,
            plain_http: r.plain_http,
            insecure_skip_verify: r.insecure_skip_verify,
            ca_file: r.ca_file.clone(),
        };
        (host.clone(), registry)
    });
    images::ImagesConfig {
        registries: registries.collect(),
        max_downloads: config.images.max_downloads,
        pinned: config.images.pinned.clone(),
        ..images::ImagesConfig::new(config.root.join("images"))
    }
}

/// The backends behind the handlers; the one that runs the default handler first.
async fn backends(
    config: &Config,
    shims: &Arc<ShimManager>,
    built: &handlers::Built,
    events: tokio::sync::mpsc::UnboundedSender<runtime::RuntimeEvent>,
) -> Result<Runtimes> {
    let of_shims: Vec<String> = built.shims.iter().map(|h| h.name.clone()).collect();
    // Containers of a handler that is gone are still to be ended.
    if built.monitors.is_empty() && !config.state.join("conmon").exists() {
        return Ok(Runtimes::new(shims.clone(), of_shims));
    }
    let of_monitors: Vec<String> = built.monitors.iter().map(|h| h.name.clone()).collect();
    let monitors = ConmonManager::new(conmon_config(config, built.monitors.clone()), events).await?;
    Ok(if of_monitors.contains(&config.runtime.handler) {
        Runtimes::new(monitors, of_monitors).with(shims.clone(), of_shims)
    } else {
        Runtimes::new(shims.clone(), of_shims).with(monitors, of_monitors)
    })
}

fn conmon_config(config: &Config, handlers: Vec<MonitorHandler>) -> ConmonConfig {
    ConmonConfig {
        handlers,
        state: config.state.clone(),
        namespace: NAMESPACE.to_string(),
        monitor_cgroup: shim_cgroup(&config.runtime.shim_cgroup),
    }
}

fn shim_config(config: &Config, handlers: Vec<ShimHandler>) -> ShimConfig {
    ShimConfig {
        handlers,
        state: config.state.clone(),
        namespace: NAMESPACE.to_string(),
        shim_cgroup: shim_cgroup(&config.runtime.shim_cgroup),
    }
}

/// `auto` is the daemon's own unit's under systemd, so that stopping the unit finds
/// its shims there and pods' figures stay the pods'; elsewhere a place of our own.
fn shim_cgroup(configured: &str) -> Option<String> {
    match configured {
        "" => None,
        "auto" => {
            let unit = std::env::var_os("INVOCATION_ID").and_then(|_| {
                let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
                own_unit(&own).map(str::to_string)
            });
            Some(unit.map_or_else(|| "/longshore/shims".to_string(), |unit| format!("{unit}/shims")))
        }
        other => Some(other.to_string()),
    }
}

/// The service's cgroup in a /proc/self/cgroup: that of the unified hierarchy, or of
/// systemd's own in the older layouts.
fn own_unit(cgroup: &str) -> Option<&str> {
    let path = |prefix: &str| cgroup.lines().find_map(|l| l.strip_prefix(prefix));
    let found = path("0::").filter(|p| p.ends_with(".service"));
    found
        .or_else(|| cgroup.lines().find_map(|l| l.split_once(":name=systemd:").map(|(_, p)| p)))
        .filter(|p| p.ends_with(".service"))
}

/// Where attachments by CNI plugins are recorded.
pub(crate) fn cni_records(config: &Config) -> PathBuf {
    config.root.join("cni/results")
}

/// Ranges of IPv6 are left out where the node has none.
fn network_config(config: &Config) -> Result<network::NetworkConfig> {
    let (cni, builtin) = (&config.network.cni, &config.network.builtin);
    let six = Path::new("/proc/sys/net/ipv6").exists();
    let mut ranges = Vec::new();
    for range in builtin.ranges.iter().filter(|r| six || !r.contains(':')) {
        ranges.push(range.parse::<network::IpRange>().context("network.builtin.ranges")?);
    }
    Ok(network::NetworkConfig {
        mode: config.network.mode,
        cni: network::cni::CniConfig {
            conf_dir: cni.conf_dir.clone(),
            bin_dirs: cni.bin_dirs.clone(),
            networks: cni.networks.clone(),
            plugin_timeout: Duration::from_secs(cni.plugin_timeout),
            gc: cni.gc,
            cache_dir: cni_records(config),
        },
        builtin: network::BuiltinConfig {
            bridge: builtin.bridge.clone(),
            ranges: if builtin.ranges.is_empty() { network::BuiltinConfig::default_ranges() } else { ranges },
            mtu: (builtin.mtu > 0).then_some(builtin.mtu),
            table: builtin.table.clone(),
            masquerade: builtin.masquerade,
        },
        ranges_of_pod_cidr: builtin.ranges.is_empty(),
    })
}

fn pods_config(config: &Config) -> Result<PodsConfig> {
    let drain = config.runtime.drain_exec_sync_io_timeout;
    Ok(PodsConfig {
        root: config.root.clone(),
        state: config.state.clone(),
        drain_exec_sync_io_timeout: (drain > 0).then(|| Duration::from_secs(drain)),
        log_line_limit: config.runtime.log_line_limit,
        pod_init: find_binary(&config.runtime.pod_init, "longshore-pod-init")?,
        operation_timeout: Duration::from_secs(config.runtime.step_timeout),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shims_live_in_the_units_own_cgroup_under_systemd() {
        let unit = "/system.slice/longshore.service";
        for text in [
            "0::/system.slice/longshore.service\n",
            "9:name=systemd:/system.slice/longshore.service\n4:memory:/x\n0::/system.slice/longshore.service\n",
            "1:name=systemd:/system.slice/longshore.service\n0::/\n",
        ] {
            assert_eq!(own_unit(text), Some(unit), "{text}");
        }
        assert_eq!(own_unit("9:name=systemd:/\n0::/\n"), None);
        assert_eq!(shim_cgroup(""), None);
        assert_eq!(shim_cgroup("/x/y"), Some("/x/y".into()));
    }
}
