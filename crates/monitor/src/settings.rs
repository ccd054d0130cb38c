//! What the flags mean together. Nothing is opened or changed here; the node is
//! only asked whether the runtime can be executed.

use crate::flags::Flags;
use crate::say::Level;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;
use types::{Error, Result, ResultExt};

/// Where CRI-O has its sockets, where nothing else is said.
const DEFAULT_SOCKETS: &str = "/var/run/crio";

/// What the monitor starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// A container, in this bundle.
    Create {
        /// The bundle.
        bundle: PathBuf,
    },
    /// A container, from a checkpoint.
    Restore {
        /// The bundle.
        bundle: PathBuf,
        /// The checkpoint's directory.
        image: PathBuf,
    },
    /// One more process in a container that runs.
    Exec {
        /// Its OCI process document.
        process: PathBuf,
        /// It begins only when the caller says so, with its client attached.
        attach: bool,
        /// The exec's own directory, where it has sockets.
        bundle: Option<PathBuf>,
    },
}

/// Which sync lines the caller expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// `pid` after create; of an exec its exit code alone.
    Legacy,
    /// Always `data`: the pid, and for an exec its exit code.
    Current,
}

/// Where the attach socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sockets {
    /// In the bundle, by its own path.
    Bundle,
    /// In the bundle, by a short link of the container's UUID in this directory.
    Link(PathBuf),
}

/// Run when the process has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// The time to wait before.
    pub delay: Duration,
}

/// Where output goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogSettings {
    /// The file of k8s-file.
    pub file: Option<PathBuf>,
    /// The journal too, or alone.
    pub journal: Option<JournalSettings>,
    /// The process keeps our own standard streams.
    pub passthrough: bool,
    /// Bytes of one file.
    pub size_max: Option<u64>,
    /// Bytes altogether; what comes after is not logged.
    pub total_max: Option<u64>,
    /// How many older files are kept; `None`: the full one is thrown away.
    pub rotate: Option<u32>,
    /// Where the file may be; anywhere if empty.
    pub allowed: Vec<PathBuf>,
}

/// The fields of the journal's entries that stay the same.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JournalSettings {
    /// `NAME=value` each.
    pub fields: Vec<String>,
    /// Pieces of long lines are marked.
    pub mark_partial: bool,
}

/// Everything the monitor needs to know.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line that others take up")]
pub struct Settings {
    /// The container's id.
    pub id: String,
    /// The UUID that names its sockets; absent for a legacy exec.
    pub uuid: Option<String>,
    /// The OCI runtime's binary.
    pub runtime: PathBuf,
    /// What is started.
    pub mode: Mode,
    /// How the caller is answered.
    pub api: Api,
    /// Where the runtime writes the process's pid.
    pub pid_file: PathBuf,
    /// Where our own pid is written.
    pub own_pid_file: Option<PathBuf>,
    /// The directory of `exit` and `oom` that outlives the bundle.
    pub persist_dir: Option<PathBuf>,
    /// The directory of all containers' exit files.
    pub exit_dir: Option<PathBuf>,
    /// The process has a terminal.
    pub terminal: bool,
    /// The process has a pipe as stdin.
    pub stdin: bool,
    /// Stdin stays open when a client goes.
    pub leave_stdin_open: bool,
    /// How long the process may run.
    pub timeout: Option<Duration>,
    /// Where the attach socket is.
    pub sockets: Sockets,
    /// Run at the end.
    pub exit_command: Option<ExitCommand>,
    /// Before the runtime's verb.
    pub runtime_args: Vec<OsString>,
    /// Behind it.
    pub runtime_opts: Vec<OsString>,
    /// Cgroups are systemd's.
    pub systemd_cgroup: bool,
    /// Passed to create.
    pub no_pivot: bool,
    /// Passed to create.
    pub no_new_keyring: bool,
    /// LISTEN_PID becomes the runtime's pid in any case.
    pub replace_listen_pid: bool,
    /// No double fork.
    pub sync: bool,
    /// The log is synced to disk at the end.
    pub sync_log: bool,
    /// The host's notify socket.
    pub notify: Option<PathBuf>,
    /// Where output goes.
    pub logs: LogSettings,
    /// Which messages of our own.
    pub level: Level,
    /// They go to syslog too.
    pub syslog: bool,
}

impl Mode {
    /// The directory of sockets, FIFOs and the file `oom`.
    pub fn bundle(&self) -> Option<&Path> {
        match self {
            Self::Create { bundle } | Self::Restore { bundle, .. } => Some(bundle),
            Self::Exec { bundle, .. } => bundle.as_deref(),
        }
    }

    /// Whether it is one more process of a container that runs.
    pub fn is_exec(&self) -> bool {
        matches!(self, Self::Exec { .. })
    }

    /// Whether a client is waited for.
    pub fn waits_for_client(&self) -> bool {
        matches!(self, Self::Exec { attach: true, .. })
    }
}

fn missing(what: &str, flag: &str) -> Error {
    Error::invalid(format!("{what} not provided. Use --{flag}"))
}

impl Settings {
    /// Checks the flags; `cwd` is where the caller started us.
    ///
    /// # Errors
    /// `InvalidArgument` naming the flag, in conmon's own words and order.
    pub fn new(f: Flags, cwd: &Path) -> Result<Self> {
        let id = f.cid.clone().ok_or_else(|| missing("Container ID", "cid"))?;
        // It names files in directories of the caller's.
        if id.is_empty() || id.contains('/') || id == "." || id == ".." {
            return Err(Error::invalid(format!("Container ID {id:?} can't name a file")));
        }
        let level = f.log_level.as_deref().map_or(Ok(Level::Warn), Level::parse)?;
        let api = if f.api_version { Api::Current } else { Api::Legacy };
        check_combination(&f, api)?;
        let runtime = f.runtime.clone().ok_or_else(|| missing("Runtime path", "runtime"))?;
        rustix::fs::access(&runtime, rustix::fs::Access::EXEC_OK)
            .context(|| format!("Runtime path {} is not valid", runtime.display()))?;
        let mode = mode(&f, cwd)?;
        let seconds = |n: i64| u64::try_from(n).ok().filter(|n| *n > 0).map(Duration::from_secs);
        let delay = u64::try_from(f.exit_delay)
            .map_err(|_| Error::invalid("Delay before invoking exit command must be greater than or equal to 0"))?;
        let logs = logs(&f, &id)?;
        let sockets = if f.full_attach {
            Sockets::Bundle
        } else {
            Sockets::Link(f.socket_dir_path.unwrap_or_else(|| DEFAULT_SOCKETS.into()))
        };
        let args = f.exit_command_arg;
        let exit_command =
            f.exit_command.map(|program| ExitCommand { program, args, delay: Duration::from_secs(delay) });
        Ok(Self {
            pid_file: f.container_pidfile.unwrap_or_else(|| cwd.join(format!("pidfile-{id}"))),
            id,
            uuid: f.cuuid,
            runtime,
            mode,
            api,
            own_pid_file: f.conmon_pidfile,
            persist_dir: f.persist_dir,
            exit_dir: f.exit_dir,
            terminal: f.terminal,
            stdin: f.stdin,
            leave_stdin_open: f.leave_stdin_open,
            timeout: seconds(f.timeout),
            sockets,
            exit_command,
            runtime_args: f.runtime_arg,
            runtime_opts: f.runtime_opt,
            systemd_cgroup: f.systemd_cgroup,
            no_pivot: f.no_pivot,
            no_new_keyring: f.no_new_keyring,
            replace_listen_pid: f.replace_listen_pid,
            sync: f.sync,
            sync_log: !f.no_sync_log,
            notify: f.sdnotify_socket,
            logs,
            level,
            syslog: f.syslog,
        })
    }
}

fn check_combination(f: &Flags, api: Api) -> Result<()> {
    let files = f.log_max_files.unwrap_or(1);
    if files < 0 {
        return Err(Error::invalid(format!("log-max-files must be non-negative, got {files}")));
    }
    if f.log_rotate && files == 0 {
        return Err(Error::invalid("log-max-files must be at least 1 when log-rotate is enabled, got 0"));
    }
    if f.restore.is_some() && f.exec {
        return Err(Error::invalid("Cannot use 'exec' and 'restore' at the same time"));
    }
    if f.exec_attach && !f.exec {
        return Err(Error::invalid("Attach can only be specified with exec"));
    }
    if f.exec_attach && api == Api::Legacy {
        return Err(Error::invalid("Attach can only be specified for a non-legacy exec session"));
    }
    // A legacy exec has no sockets to be named.
    if f.cuuid.is_none() && (!f.exec || api == Api::Current) {
        return Err(missing("Container UUID", "cuuid"));
    }
    Ok(())
}

fn mode(f: &Flags, cwd: &Path) -> Result<Mode> {
    if f.exec {
        let process =
            f.exec_process_spec.clone().ok_or_else(|| missing("Exec process spec path", "exec-process-spec"))?;
        return Ok(Mode::Exec { process, attach: f.exec_attach, bundle: f.bundle.clone() });
    }
    let bundle = f.bundle.clone().unwrap_or_else(|| cwd.to_path_buf());
    Ok(match f.restore.clone() {
        Some(image) => Mode::Restore { bundle, image },
        None => Mode::Create { bundle },
    })
}

/// One `--log-path`.
#[derive(Debug, PartialEq, Eq)]
enum Driver {
    None,
    Passthrough,
    Journal,
    File(PathBuf),
}

impl Driver {
    /// `DRIVER`, `DRIVER:PATH`, `:PATH` or `PATH`; what follows a second colon is
    /// dropped, as conmon does.
    fn parse(text: &str) -> Result<Self> {
        let mut words = text.split(':').filter(|w| !w.is_empty());
        let (first, second) = (words.next(), words.next());
        let Some(first) = first else { return Err(Error::invalid("log-path must not be empty")) };
        if text.starts_with(':') && second.is_none() {
            return Ok(Self::File(first.into()));
        }
        match (first, second) {
            ("off" | "null" | "none", _) => Ok(Self::None),
            ("passthrough", _) => Ok(Self::Passthrough),
            ("journald", _) => Ok(Self::Journal),
            ("k8s-file", Some(path)) => Ok(Self::File(path.into())),
            ("k8s-file", None) => Err(Error::invalid("k8s-file requires a filename")),
            (path, None) if !text.contains(':') => Ok(Self::File(path.into())),
            (driver, _) => Err(Error::invalid(format!("No such log driver {driver}"))),
        }
    }
}

fn logs(f: &Flags, id: &str) -> Result<LogSettings> {
    if f.log_path.is_empty() {
        return Err(missing("Log driver", "log-path"));
    }
    let positive = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0);
    let keep = u32::try_from(f.log_max_files.unwrap_or(1)).unwrap_or(1);
    let mut logs = LogSettings {
        size_max: positive(f.log_size_max),
        total_max: positive(f.log_global_size_max),
        rotate: f.log_rotate.then_some(keep),
        allowed: f.log_allowlist_dir.iter().filter(|d| !d.as_os_str().is_empty()).cloned().collect(),
        ..LogSettings::default()
    };
    let mut journal = false;
    for path in &f.log_path {
        match Driver::parse(path)? {
            Driver::None => {}
            Driver::Passthrough => logs.passthrough = true,
            Driver::Journal => journal = true,
            Driver::File(path) => logs.file = Some(path),
        }
    }
    if journal {
        logs.journal = Some(journal_settings(f, id)?);
    } else if logs.file.is_some() {
        if f.log_tag.is_some() {
            return Err(Error::invalid("k8s-file doesn't support --log-tag"));
        }
        if !f.log_label.is_empty() {
            return Err(Error::invalid("k8s-file doesn't support --log-label"));
        }
    }
    Ok(logs)
}

fn journal_settings(f: &Flags, id: &str) -> Result<JournalSettings> {
    let short = id.get(..12).filter(|_| id.len() > 12);
    let short = short.ok_or_else(|| Error::invalid("Container ID must be longer than 12 characters"))?;
    let mut fields = vec![format!("CONTAINER_ID_FULL={id}"), format!("CONTAINER_ID={short}")];
    fields.extend(f.log_tag.as_ref().map(|tag| format!("CONTAINER_TAG={tag}")));
    fields.extend(f.name.as_ref().map(|name| format!("CONTAINER_NAME={name}")));
    let identifier = f.log_tag.as_deref().or(f.name.as_deref()).unwrap_or(short);
    fields.push(format!("SYSLOG_IDENTIFIER={identifier}"));
    for label in &f.log_label {
        let refuse = |why: &str| Err(Error::invalid(format!("{why} '{label}')")));
        match label.split_once('=') {
            Some(("", _)) => return refuse("Container labels must be in format LABEL=VALUE (no LABEL present in"),
            Some((_, value)) if value.contains('=') => {
                return refuse("Container labels must be in format LABEL=VALUE (none or more than one '=' present in");
            }
            None => {
                return refuse("Container labels must be in format LABEL=VALUE (none or more than one '=' present in");
            }
            Some((name, _)) if !name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_') => {
                return refuse("Container label names must contain only uppercase letters, numbers and underscore (in");
            }
            Some(_) => fields.push(label.clone()),
        }
    }
    Ok(JournalSettings { fields, mark_partial: !f.no_container_partial_message })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        Flags {
            cid: Some("0123456789abcdef".into()),
            cuuid: Some("u".into()),
            runtime: Some("/bin/sh".into()),
            log_path: vec!["none".into()],
            ..Flags::default()
        }
    }

    fn error(f: Flags) -> String {
        Settings::new(f, Path::new("/cwd")).unwrap_err().to_string()
    }

    #[test]
    fn what_is_missing_is_named_in_conmon_s_words() {
        assert_eq!(error(Flags::default()), "Container ID not provided. Use --cid");
        assert_eq!(error(Flags { cuuid: None, ..flags() }), "Container UUID not provided. Use --cuuid");
        assert_eq!(error(Flags { runtime: None, ..flags() }), "Runtime path not provided. Use --runtime");
        let e = error(Flags { runtime: Some("/not/a/path".into()), ..flags() });
        assert!(e.starts_with("Runtime path /not/a/path is not valid"), "{e}");
        assert_eq!(error(Flags { log_path: vec![], ..flags() }), "Log driver not provided. Use --log-path");
        assert!(error(Flags { exec: true, ..flags() }).contains("--exec-process-spec"));
        assert!(error(Flags { exec_attach: true, ..flags() }).contains("only be specified with exec"));
        let legacy = Flags { exec: true, exec_attach: true, ..flags() };
        assert!(error(legacy).contains("non-legacy exec session"));
        assert!(error(Flags { exit_delay: -1, ..flags() }).contains("Delay"));
        assert!(error(Flags { log_rotate: true, log_max_files: Some(0), ..flags() }).contains("at least 1"));
        assert!(error(Flags { log_level: Some("loud".into()), ..flags() }).contains("No such log level loud"));
    }

    #[test]
    fn defaults_are_conmon_s() {
        let s = Settings::new(flags(), Path::new("/cwd")).unwrap();
        assert_eq!(s.mode, Mode::Create { bundle: "/cwd".into() });
        assert_eq!(s.pid_file, Path::new("/cwd/pidfile-0123456789abcdef"));
        assert_eq!(s.sockets, Sockets::Link(DEFAULT_SOCKETS.into()));
        let exec = Flags { exec: true, cuuid: None, exec_process_spec: Some("/p".into()), timeout: 3, ..flags() };
        let s = Settings::new(exec, Path::new("/cwd")).unwrap();
        assert_eq!((s.mode.bundle(), s.timeout), (None, Some(Duration::from_secs(3))));
    }

    #[test]
    fn log_paths_name_their_driver() {
        let file = |p: &str| Driver::File(p.into());
        for (text, want) in [
            ("/a/b", file("/a/b")),
            ("k8s-file:/a/b", file("/a/b")),
            (":/a/b", file("/a/b")),
            (":journald", file("journald")),
            ("journald", Driver::Journal),
            ("journald:", Driver::Journal),
            ("passthrough", Driver::Passthrough),
            ("none:", Driver::None),
            ("null", Driver::None),
            ("off", Driver::None),
        ] {
            assert_eq!(Driver::parse(text).unwrap(), want, "{text}");
        }
        for (text, want) in [
            ("", "must not be empty"),
            (":", "must not be empty"),
            ("k8s-file", "requires a filename"),
            ("k8s-file:", "requires a filename"),
            ("json-file:/a", "No such log driver json-file"),
            ("invalid:", "No such log driver invalid"),
        ] {
            assert!(Driver::parse(text).unwrap_err().to_string().contains(want), "{text}");
        }
    }

    #[test]
    fn labels_and_tags_are_the_journal_s_alone() {
        let journal = Flags { log_path: vec!["journald".into()], name: Some("n".into()), ..flags() };
        let fields = |f: Flags| Settings::new(f, Path::new("/")).unwrap().logs.journal.unwrap().fields;
        assert!(fields(journal.clone()).contains(&"SYSLOG_IDENTIFIER=n".into()));
        let tagged = Flags { log_tag: Some("t".into()), log_label: vec!["A_1=b".into()], ..journal.clone() };
        let all = fields(tagged);
        assert!(all.contains(&"SYSLOG_IDENTIFIER=t".into()) && all.contains(&"A_1=b".into()));
        for bad in ["=b", "a=b", "A", "A=b=c"] {
            error(Flags { log_label: vec![bad.into()], ..journal.clone() });
        }
        let file = Flags { log_path: vec!["/x".into()], log_tag: Some("t".into()), ..flags() };
        assert!(error(file).contains("--log-tag"));
        assert!(error(Flags { cid: Some("short".into()), ..journal }).contains("longer than 12"));
    }
}
