//! Create: from a request to a container with an owner, or to nothing at all.

use crate::container::{Owner, Process};
use crate::events::Event;
use crate::persist::{self, TaskRecord};
use crate::restore::Restoring;
use crate::shared::Shared;
use crate::streams::{self, Habits, Io, Wanted};
use crate::{log, options, restore, rootfs, undo, wire};
use oci::cgroup::Cgroup;
use oci::{Child, Command, Config, Launch, Runtime, mounts};
use proto::containerd::events::{TaskCreate, TaskIo};
use proto::containerd::runc::v1::Options;
use proto::containerd::task::v3::CreateTaskRequest;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;
use types::{Error, ErrorKind, Result, ResultExt};

/// The runtime's state directory where the caller names none.
const DEFAULT_ROOT: &str = "/run/longshore/runc";

/// What must be known of a process's OCI document.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ProcessPeek {
    #[serde(default)]
    pub terminal: bool,
    #[serde(default)]
    apparmor_profile: String,
    #[serde(default)]
    selinux_label: String,
}

impl ProcessPeek {
    pub fn labelled(&self) -> bool {
        !self.selinux_label.is_empty() || !matches!(self.apparmor_profile.as_str(), "" | "unconfined")
    }
}

#[derive(Debug, Default, Deserialize)]
struct ConfigPeek {
    #[serde(default)]
    process: ProcessPeek,
    #[serde(default)]
    linux: LinuxPeek,
}

#[derive(Debug, Default, Deserialize)]
struct LinuxPeek {
    #[serde(default)]
    namespaces: Vec<NamespacePeek>,
}

#[derive(Debug, Deserialize)]
struct NamespacePeek {
    r#type: String,
    #[serde(default)]
    path: String,
}

impl ConfigPeek {
    fn read(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        let bytes = std::fs::read(&path).context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Error::invalid(format!("{} is no OCI configuration", path.display())).because(e))
    }

    fn private_pids(&self) -> bool {
        self.linux.namespaces.iter().any(|n| n.r#type == "pid" && n.path.is_empty())
    }
}

/// How the runtime is called for this container.
fn runtime_config(shared: &Shared, o: &Options, bundle: &Path) -> Result<Config> {
    let binary = options::runtime_binary(o)?;
    let root = if o.root.is_empty() { Path::new(DEFAULT_ROOT) } else { Path::new(&o.root) };
    let mut config = Config::new(binary, bundle);
    config.root = Some(root.join(&shared.settings.namespace));
    config.systemd_cgroup = o.systemd_cgroup;
    config.no_pivot = o.no_pivot_root;
    config.no_new_keyring = o.no_new_keyring;
    Ok(config)
}

/// Creates a container; returns its init's pid. The name is taken before the first
/// await, so that a Kill that comes later finds the creation; the work is a task of
/// its own: once begun, a creation ends or is undone.
pub(crate) async fn create(shared: &Arc<Shared>, req: CreateTaskRequest) -> Result<i32> {
    types::check_identifier("container id", &req.id)?;
    if !Path::new(&req.bundle).is_absolute() {
        return Err(Error::invalid(format!("bundle {:?} is not an absolute path", req.bundle)));
    }
    let creation = shared.reserve(&req.id)?;
    let shared = shared.clone();
    let made = tokio::spawn(async move {
        let id = req.id.clone();
        let made = make(&shared, req, creation.aborted()).await;
        if made.is_err() {
            shared.release(&id);
        }
        made
    });
    made.await.unwrap_or_else(|e| Err(Error::internal("create").because(e)))
}

async fn make(shared: &Arc<Shared>, req: CreateTaskRequest, abort: watch::Receiver<bool>) -> Result<i32> {
    let bundle = PathBuf::from(&req.bundle);
    let o = options::read(req.options.as_ref())?;
    let peek = ConfigPeek::read(&bundle)?;
    let config = runtime_config(shared, &o, &bundle)?;
    let rootfs_mounts: Vec<mounts::Mount> = req.rootfs.iter().map(rootfs::asked).collect();
    let record = TaskRecord {
        binary: config.binary.clone(),
        root: config.root.clone().unwrap_or_default(),
        systemd_cgroup: config.systemd_cgroup,
        rootfs_mounts: mounts::stacked(&rootfs_mounts),
    };
    persist::forget(&bundle);
    persist::write_task(&bundle, &record)?;
    let deadline = config.deadline;
    let runtime = Arc::new(Command::new(config, shared.children.clone()));
    let rootfs = bundle.join("rootfs");
    rootfs::mount(shared, &rootfs, rootfs_mounts, deadline, abort.clone()).await?;
    let wanted = Wanted {
        stdin: req.stdin.clone(),
        stdout: req.stdout.clone(),
        stderr: req.stderr.clone(),
        terminal: req.terminal,
    };
    let habits = Habits { labelled: peek.process.labelled(), owner: (o.io_uid, o.io_gid) };
    let restore = match restore::wanted(&req, &o, &bundle) {
        Ok(restore) => restore,
        Err(e) => return Err(rootfs::unmounted(rootfs, record.rootfs_mounts, e).await),
    };
    let made = match restore {
        None => launch(shared, &runtime, &req.id, &bundle, &wanted, habits, abort).await.map(Made::Created),
        Some(from) => {
            let prepared = streams::prepare(&wanted, habits, &shared.place(&req.id)).await;
            prepared.map(|prepared| Made::ToRestore(Box::new(Restoring { prepared, from })))
        }
    };
    let (process, restoring) = match made {
        Ok(Made::Created((child, io))) => (Process::launched(wanted, io, child), None),
        Ok(Made::ToRestore(restoring)) => (Process::planned(wanted), Some(*restoring)),
        Err(e) => return Err(rootfs::unmounted(rootfs, record.rootfs_mounts, e).await),
    };
    let pid = process.child.as_ref().map_or(0, |c| c.pid());
    let cgroup = if pid == 0 { Ok(Cgroup::default()) } else { Cgroup::of(pid) };
    let cgroup = cgroup.unwrap_or_else(|e| {
        log::warn(format_args!("container {}: its cgroup is unknown: {e}", req.id));
        Cgroup::default()
    });
    if pid != 0
        && let Err(e) = persist::write_pid(&bundle, pid)
    {
        log::warn(format_args!("container {}: {e}", req.id));
    }
    shared.events.publish(&Event::Create(TaskCreate {
        container_id: req.id.clone(),
        bundle: req.bundle.clone(),
        rootfs: req.rootfs,
        io: Some(TaskIo { stdin: req.stdin, stdout: req.stdout, stderr: req.stderr, terminal: req.terminal }),
        checkpoint: req.checkpoint,
        pid: wire::pid(pid),
    }));
    let private = peek.private_pids();
    Owner::spawn(shared.clone(), &req.id, bundle, process, runtime, cgroup, habits, private, record, restoring);
    Ok(pid)
}

/// What has become of a request.
enum Made {
    Created((Child, Io)),
    ToRestore(Box<Restoring>),
}

/// Opens the streams and lets the runtime create the container; early to its end
/// once `abort` is true. A failure leaves nothing of it.
async fn launch(
    shared: &Arc<Shared>,
    runtime: &Command,
    id: &str,
    bundle: &Path,
    wanted: &Wanted,
    habits: Habits,
    mut abort: watch::Receiver<bool>,
) -> Result<(Child, Io)> {
    let (calls, made) = undo::until(runtime, abort.clone());
    let ready = async {
        let prepared = streams::prepare(wanted, habits, &shared.place(id)).await?;
        Ok((prepared, shared.turn().await?))
    };
    let (mut prepared, _turn) = tokio::select! {
        ready = ready => ready?,
        Ok(_) = abort.wait_for(|a| *a) => {
            return Err(Error::new(ErrorKind::Cancelled, "it was killed before the OCI runtime was called"));
        }
    };
    let launch = Launch {
        stdio: std::mem::take(&mut prepared.stdio),
        console_socket: prepared.console.as_ref().map(|c| c.path.clone()),
        pid_file: bundle.join(persist::PID),
    };
    let up = async {
        let child = calls.create(id, bundle, launch).await?;
        match prepared.attach(&shared.writer).await {
            Ok(io) => Ok((child, io)),
            Err(e) => Err(e),
        }
    };
    match up.await {
        Ok(up) => Ok(up),
        // The name may be somebody else's: that container is not ours to delete.
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Err(e),
        Err(e) => {
            undo::undo(runtime, id, bundle, made.take()).await;
            Err(e)
        }
    }
}
