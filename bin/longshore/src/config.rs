//! The configuration: one documented file of defaults, over which the operator's
//! files are laid key by key.

use anyhow::{Context, bail};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Every key with its default and its meaning: also what `longshore config` prints.
const DEFAULTS: &str = include_str!("config.toml");
/// Read where it exists and no other file is named.
const USUAL_FILE: &str = "/etc/longshore/config.toml";
/// Tables whose keys are the operator's own names.
const FREE_TABLES: [&str; 2] = ["images.registries", "runtimes"];

/// The whole configuration; config.toml documents each key.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where CRI is served.
    pub socket: PathBuf,
    /// What survives a restart of the node.
    pub root: PathBuf,
    /// What does not.
    pub state: PathBuf,
    /// A level or directives.
    pub log_level: String,
    /// Shims and the OCI runtime.
    pub runtime: RuntimeConfig,
    /// Handlers by name; what one does not set it takes from `runtime`.
    pub runtimes: BTreeMap<String, HandlerConfig>,
    /// What containers get.
    pub containers: ContainersConfig,
    /// Images and registries.
    pub images: ImagesConfig,
    /// Pods' networks.
    pub network: NetworkConfig,
}

/// `[runtime]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuntimeConfig {
    /// The default handler's name.
    pub handler: String,
    /// The OCI runtime; empty to look for one.
    pub binary: PathBuf,
    /// The OCI runtime's state; empty for a place below `state`.
    pub root: PathBuf,
    /// The shim; empty to look for it.
    pub shim: PathBuf,
    /// The static init; empty to look for it.
    pub pod_init: PathBuf,
    /// Who makes cgroups.
    pub cgroup_driver: CgroupDriver,
    /// Where shims live; empty for the daemon's own cgroup.
    pub shim_cgroup: String,
    /// Seconds; 0 is for ever.
    pub drain_exec_sync_io_timeout: u64,
    /// Bytes.
    pub log_line_limit: u32,
    /// Seconds.
    pub step_timeout: u64,
    /// How far a pod is trusted that doesn't say.
    pub default_workload_trust: WorkloadTrust,
    /// Of what is asked of shims.
    pub timeouts: TimeoutsConfig,
}

/// How far a pod is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkloadTrust {
    /// As the node's own.
    Trusted,
    /// Not at all.
    Untrusted,
}

/// `[runtimes.NAME]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HandlerConfig {
    /// The shim: a path, a name on PATH, or a type such as `io.containerd.kata.v2`.
    pub shim: String,
    /// A conmon instead of a shim: a path, or a name on PATH.
    pub monitor: String,
    /// The OCI runtime.
    pub binary: PathBuf,
    /// The OCI runtime's state.
    pub root: PathBuf,
    /// What a pod's own process is.
    pub sandbox: runtime::SandboxKind,
    /// What the shim is told with each container.
    pub options: OptionsConfig,
    /// Annotations that reach this handler's shim and OCI runtime, besides those of
    /// `containers.annotations`.
    pub annotations: Vec<String>,
    /// Bounds that differ from `runtime.timeouts`.
    pub timeouts: TimeoutsConfig,
}

/// `[runtimes.NAME.options]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptionsConfig {
    /// `runc`, `generic`, `none`; `auto` goes by the shim's name.
    pub kind: OptionsKind,
    /// runc: no pivot_root(2).
    pub no_pivot_root: bool,
    /// runc: no new session keyring.
    pub no_new_keyring: bool,
    /// generic: what the shim calls its configuration's type.
    pub type_url: String,
    /// generic: the shim's configuration file.
    pub config_path: String,
    /// generic: the shim's configuration itself.
    pub config_body: String,
}

/// Which options message a shim understands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptionsKind {
    /// By the shim's name and by the keys that are set.
    #[default]
    Auto,
    /// `containerd.runc.v1.Options`.
    Runc,
    /// `runtimeoptions.v1.Options`.
    Generic,
    /// No message.
    None,
}

/// Bounds in seconds; what is not set is as in the table above it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TimeoutsConfig {
    /// `start` of a shim.
    pub launch: Option<u64>,
    /// Finding a shim again.
    pub load: Option<u64>,
    /// One `delete`, or the undoing of one failed step.
    pub cleanup: Option<u64>,
    /// Shutdown, and then the shim's end.
    pub shutdown: Option<u64>,
    /// State.
    pub state: Option<u64>,
    /// Create, Start, Exec, Delete; 0 is `runtime.step_timeout` less two seconds.
    pub create: Option<u64>,
    /// Every other call.
    pub call: Option<u64>,
}

/// Who makes cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// The OCI runtime, in the file system.
    Cgroupfs,
    /// systemd, over D-Bus.
    Systemd,
}

/// `[containers]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainersConfig {
    /// The profile of a container that names none.
    pub seccomp: Seccomp,
    /// 0 is no limit.
    pub pids_limit: i64,
    /// As docker's `--ulimit` has them.
    pub ulimits: Vec<Ulimit>,
    /// Exact keys, or prefixes that end in `*`.
    pub annotations: Vec<String>,
}

/// A resource limit, read from `nofile=1024:524288`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Ulimit(pub spec::Rlimit);

/// Those that Linux has, without their prefix.
const ULIMITS: [&str; 16] = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

impl TryFrom<String> for Ulimit {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let form = || format!("the ulimit {text:?} is not NAME=SOFT:HARD");
        let (name, limits) = text.split_once('=').ok_or_else(form)?;
        if !ULIMITS.contains(&name) {
            return Err(format!("{name:?} of the ulimit {text:?} is none of {}", ULIMITS.join(", ")));
        }
        let number = |limit: &str| match limit {
            "unlimited" | "-1" => Ok(u64::MAX),
            other => other.parse::<u64>().map_err(|_| form()),
        };
        let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            return Err(format!(
                "the ulimit {text:?} is softer than hard: its first number must not be the larger one"
            ));
        }
        Ok(Self(spec::Rlimit { name: format!("RLIMIT_{}", name.to_uppercase()), soft, hard }))
    }
}

/// A seccomp profile for those that name none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Seccomp {
    /// The default profile.
    Default,
    /// None.
    Unconfined,
}

/// `[images]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImagesConfig {
    /// Layers at once.
    pub max_downloads: usize,
    /// References.
    pub pinned: Vec<String>,
    /// By host, or "*".
    pub registries: BTreeMap<String, Registry>,
}

/// `[network]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// Who attaches pods.
    pub mode: network::Mode,
    /// CNI plugins.
    pub cni: CniConfig,
    /// The built-in network.
    pub builtin: BuiltinConfig,
}

/// `[network.builtin]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuiltinConfig {
    /// The bridge's name.
    pub bridge: String,
    /// Where pods' addresses are from.
    pub ranges: Vec<String>,
    /// Bytes; 0 for that of the node's default route.
    pub mtu: u32,
    /// Whether pods' packets to elsewhere get the node's address.
    pub masquerade: bool,
    /// The nftables table's name.
    pub table: String,
}

/// `[network.cni]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CniConfig {
    /// Network configurations.
    pub conf_dir: PathBuf,
    /// Plugins.
    pub bin_dirs: Vec<PathBuf>,
    /// By name; empty for the first.
    pub networks: Vec<String>,
    /// Seconds.
    pub plugin_timeout: u64,
    /// Whether GC is asked for.
    pub gc: bool,
}

/// One registry.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// Base URLs, asked first, in order.
    pub mirrors: Vec<String>,
    /// Never the registry itself.
    pub mirror_only: bool,
    /// http instead of https.
    pub plain_http: bool,
    /// https without a look at the certificate.
    pub insecure_skip_verify: bool,
    /// Certificate authorities beside the node's own, as PEM.
    pub ca_file: Option<PathBuf>,
}

impl Config {
    /// The defaults with the operator's file and its drop-ins laid over them. A
    /// `file` that is named must exist; the usual one need not.
    ///
    /// # Errors
    /// Names the file, the line or the key, and the nearest known key.
    pub fn load(file: Option<&Path>) -> anyhow::Result<Self> {
        let mut all: Table = DEFAULTS.parse().context("the built-in defaults")?;
        let known = all.clone();
        let main = file.map_or_else(|| PathBuf::from(USUAL_FILE), Path::to_path_buf);
        let mut files = Vec::new();
        if file.is_some() || main.exists() {
            files.push(main.clone());
        }
        files.extend(drop_ins(&main)?);
        for path in files {
            let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            let table: Table = text.parse().with_context(|| format!("{} is no TOML", path.display()))?;
            check_keys(&table, &known, "").with_context(|| path.display().to_string())?;
            overlay(&mut all, table);
        }
        Value::Table(all).try_into().context("the configuration")
    }
}

/// Prints every key with its default and comment.
pub fn print_default() {
    // A reader that has seen enough (`| head`) is no failure.
    let _ = std::io::stdout().write_all(DEFAULTS.as_bytes());
}

/// `config.toml.d/*.toml`, in the order of their names.
fn drop_ins(main: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut dir = main.as_os_str().to_owned();
    dir.push(".d");
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("read {}", dir.to_string_lossy())),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn overlay(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => overlay(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

fn check_keys(table: &Table, known: &Table, at: &str) -> anyhow::Result<()> {
    for (key, value) in table {
        let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
        let Some(default) = known.get(key) else {
            let nearest =
                known.keys().max_by(|a, b| strsim::jaro_winkler(a, key).total_cmp(&strsim::jaro_winkler(b, key)));
            match nearest {
                Some(n) if at.is_empty() => bail!("the key {path:?} is not known; did you mean {n:?}?"),
                Some(n) => bail!("the key {path:?} is not known; did you mean {:?}?", format!("{at}.{n}")),
                None => bail!("the key {path:?} is not known"),
            }
        };
        if let (Value::Table(inner), Value::Table(default)) = (value, default)
            && !FREE_TABLES.contains(&path.as_str())
        {
            check_keys(inner, default, &path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> anyhow::Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, text).unwrap();
        Config::load(Some(&file))
    }

    #[test]
    fn the_defaults_are_complete_and_readable() {
        let config = load("").unwrap();
        assert_eq!(config.socket, Path::new("/run/longshore/longshore.sock"));
        assert_eq!(config.runtime.drain_exec_sync_io_timeout, 15);
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_one() {
        let e = load("[runtime]\ncgroup_drver = \"systemd\"\n").unwrap_err();
        assert!(format!("{e:#}").contains("did you mean \"runtime.cgroup_driver\"?"), "{e:#}");
        let e = load("sockt = \"/x\"\n").unwrap_err();
        assert!(format!("{e:#}").contains("did you mean \"socket\"?"), "{e:#}");
    }

    #[test]
    fn ulimits_are_read_as_people_write_them() {
        let of = |text: &str| load(&format!("[containers]\nulimits = [{text:?}]\n")).map(|c| c.containers.ulimits);
        let limit = |soft, hard| vec![Ulimit(spec::Rlimit { name: "RLIMIT_NOFILE".into(), soft, hard })];
        assert_eq!(of("nofile=1024:4096").unwrap(), limit(1024, 4096));
        assert_eq!(of("nofile=1024").unwrap(), limit(1024, 1024));
        assert_eq!(of("nofile=1:unlimited").unwrap(), limit(1, u64::MAX));
        for (bad, reason) in [
            ("nofiles=1", "is none of as, core"),
            ("nofile", "NAME=SOFT:HARD"),
            ("nofile=many", "NAME=SOFT:HARD"),
            ("nofile=2:1", "larger"),
        ] {
            let e = format!("{:#}", of(bad).unwrap_err());
            assert!(e.contains(reason) && e.contains(bad), "{e}");
        }
    }

    #[test]
    fn drop_ins_win_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, "log_level = \"a\"\n[images]\nmax_downloads = 9\n").unwrap();
        std::fs::create_dir(dir.path().join("c.toml.d")).unwrap();
        std::fs::write(dir.path().join("c.toml.d/2.toml"), "log_level = \"c\"\n").unwrap();
        std::fs::write(
            dir.path().join("c.toml.d/1.toml"),
            "log_level = \"b\"\n[images.registries.\"x.io\"]\nmirrors=[\"http://m\"]\n",
        )
        .unwrap();
        let config = Config::load(Some(&file)).unwrap();
        assert_eq!(config.log_level, "c");
        assert_eq!(config.images.max_downloads, 9);
        assert_eq!(config.images.registries["x.io"].mirrors, ["http://m"]);
    }
}
