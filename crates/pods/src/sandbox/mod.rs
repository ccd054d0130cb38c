//! What a pod has on the node without a process of its own: pinned namespaces,
//! its files, its /dev/shm.
//!
//! ```text
//! <state>/                          0711
//!   ns/                             0700, bound onto itself and private
//!     <pod>/ipc uts user            nsfs, bound; there as the plan says
//!     <pod>/pid                     of a pod in another container's pid namespace
//!     <pod>/pid-<container>         of a container in another one's
//!   pods/                           0711
//!     <pod>/                        0700; 0710 with the group of the pod's root
//!       hostname hosts resolv.conf  0644, owned by the pod's root
//!       shm/                        tmpfs, 64 MiB, 1777
//!       init-rootfs/                where the pod shares a pid namespace
//!   netns-mount-is-ours             see [`Sandboxes::release`]
//! /run/netns/longshore-<pod, 16>    nsfs, bound
//! ```
//!
//! All paths follow from the pod's id, so a sandbox can be taken down though no
//! record of it was ever written. `ns/<pod>` is made first and removed last.
//!
//! Nothing here blocks an async worker: setup and teardown run on blocking
//! threads, the namespaces are made on a thread that is then thrown away.

mod files;
mod layout;
mod plan;
mod setup;
mod teardown;
#[cfg(test)]
mod tests;

pub use plan::{ContainerPid, NamespacePlan, PidPlan, container_pid, plan};

use layout::Layout;
use network::NetnsDir;
use proto::cri::PodSandboxConfig;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use sys::ns_helper::HelperCommand;
use tokio::sync::oneshot;
use types::{Error, Result, ResultExt};

/// How long a sandbox's setup may keep its teardown waiting: more than each of its system
/// calls and the helper may take.
const TURN_BOUND: Duration = Duration::from_secs(60);

/// Where sandboxes lie.
#[derive(Debug, Clone)]
pub struct SandboxDirs {
    /// The daemon's state directory; empty after a reboot.
    pub state: PathBuf,
    /// Where CNI plugins look for network namespaces: `/run/netns`.
    pub netns: PathBuf,
}

/// A sandbox to be made.
#[derive(Debug, Clone, Copy)]
pub struct SandboxRequest<'a> {
    /// The pod's id.
    pub pod_id: &'a str,
    /// As it came over CRI, checked by [`plan`] and by `spec`.
    pub config: &'a PodSandboxConfig,
    /// What [`plan`] has decided.
    pub plan: &'a NamespacePlan,
}

/// One timed step of a setup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// "directories", "unshare", "furnish", "pin", "namespaces" (the three before
    /// it together), "files", "shm", …
    pub name: &'static str,
    /// When it began.
    pub started_at: SystemTime,
    /// How long it took.
    pub took: Duration,
}

/// A sandbox that stands, as it is stored with its pod. A path of `None` is the
/// node's namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxState {
    /// What was decided.
    pub plan: NamespacePlan,
    /// The net namespace's pin.
    pub net: Option<PathBuf>,
    /// The ipc namespace's pin.
    pub ipc: Option<PathBuf>,
    /// The uts namespace's pin.
    pub uts: Option<PathBuf>,
    /// The user namespace's pin; its maps are in the plan.
    pub user: Option<PathBuf>,
    /// The pin of another container's pid namespace, where the plan says TARGET.
    pub pid: Option<PathBuf>,
    /// The pod's host name, for `HOSTNAME`.
    pub hostname: String,
    /// Becomes /etc/hostname.
    pub hostname_path: PathBuf,
    /// Becomes /etc/hosts.
    pub hosts_path: PathBuf,
    /// Becomes /etc/resolv.conf.
    pub resolv_conf_path: PathBuf,
    /// Becomes /dev/shm: the pod's tmpfs, or the node's /dev/shm.
    pub shm_path: PathBuf,
    /// How long its making took, step by step; not stored.
    #[serde(skip)]
    pub steps: Vec<Step>,
}

impl SandboxState {
    /// The group that must be able to pass through bundles: the pod's mapped root.
    pub fn bundle_gid(&self) -> Option<u32> {
        self.plan.mapped_root_gid()
    }

    /// The namespaces of a container whose pid namespace is its own.
    pub fn namespaces(&self) -> spec::PodNamespaces {
        self.namespaces_with(spec::PidMode::Private)
    }

    /// The namespaces of a container with this pid namespace.
    pub fn namespaces_with(&self, pid: spec::PidMode) -> spec::PodNamespaces {
        spec::PodNamespaces {
            net: self.net.clone(),
            ipc: self.ipc.clone(),
            uts: self.uts.clone(),
            user: self.user.clone().zip(self.plan.user.clone()),
            pid,
        }
    }

    /// The files of every container.
    pub fn files(&self) -> spec::PodFiles {
        spec::PodFiles {
            hostname: self.hostname.clone(),
            hostname_path: Some(self.hostname_path.clone()),
            hosts_path: Some(self.hosts_path.clone()),
            resolv_conf_path: Some(self.resolv_conf_path.clone()),
            shm_path: Some(self.shm_path.clone()),
        }
    }

    /// Looks whether every pin still holds a namespace.
    ///
    /// # Errors
    /// Names the first that doesn't.
    pub fn check(&self) -> Result<()> {
        let pins = [&self.user, &self.net, &self.ipc, &self.uts, &self.pid];
        pins.into_iter().flatten().try_for_each(|pin| sys::namespace::inode(pin).map(|_| ()))
    }
}

/// All sandboxes of this daemon. Clones share them.
#[derive(Debug, Clone)]
pub struct Sandboxes {
    dirs: SandboxDirs,
    netns: NetnsDir,
    helper: HelperCommand,
    busy: Arc<Busy>,
}

/// The pods whose setup or teardown runs, so that a teardown waits for a setup
/// that nobody awaits any more.
#[derive(Debug, Default)]
struct Busy {
    pods: Mutex<HashSet<String>>,
    less: Condvar,
}

/// Leaves [`Busy`] when it is dropped.
struct Turn {
    busy: Arc<Busy>,
    id: String,
}

impl Busy {
    /// Waits for its turn on a blocking thread, of which there are not many.
    ///
    /// # Errors
    /// `Unavailable` where the one before hangs in a system call.
    fn turn(self: &Arc<Self>, id: &str) -> Result<Turn> {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.less.wait_timeout_while(pods, TURN_BOUND, |pods| pods.contains(id));
        let (mut pods, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            let what = format!("sandbox {id:.12} is still being made or taken down after {} s", TURN_BOUND.as_secs());
            return Err(Error::unavailable(what).hint("a file system or a mount may hang"));
        }
        pods.insert(id.to_owned());
        Ok(Turn { busy: self.clone(), id: id.to_owned() })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.busy.pods.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
        self.busy.less.notify_all();
    }
}

impl Sandboxes {
    /// Prepares the node, once at each start; what is prepared already stays.
    ///
    /// # Errors
    /// Names the directory that can't be made or mounted.
    pub fn prepare(dirs: SandboxDirs) -> Result<Self> {
        Self::prepare_with(dirs, HelperCommand::this_binary())
    }

    /// The same with another binary as the helper, for a process whose `main` is
    /// not ours.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub fn prepare_with(mut dirs: SandboxDirs, helper: HelperCommand) -> Result<Self> {
        let state = &dirs.state;
        make_dir(state, 0o711)?;
        // Mounts are found by their real paths.
        dirs.state = state.canonicalize().context(|| format!("resolve {}", state.display()))?;
        let pins = layout::pins(&dirs.state);
        make_dir(&pins, 0o700)?;
        make_dir(&layout::dirs(&dirs.state), 0o711)?;
        if !sys::mount::mounts()?.iter().any(|m| m.target == pins) {
            sys::mount::bind_onto_itself(&pins)?;
        }
        sys::mount::make_private(&pins)?;
        let netns = NetnsDir::at(&dirs.netns);
        if netns.prepare()? {
            let marker = layout::netns_marker(&dirs.state);
            std::fs::write(&marker, "").context(|| format!("write {}", marker.display()))?;
        }
        Ok(Self { dirs, netns, helper, busy: Arc::default() })
    }

    /// Makes a pod's sandbox. On failure nothing of it is left, nor when the
    /// caller is gone before it stands.
    ///
    /// # Errors
    /// `InvalidArgument` for a host name, a sysctl or a DNS field that can't be;
    /// `AlreadyExists` when the pod has a sandbox; else the step that failed.
    pub async fn setup(&self, request: SandboxRequest<'_>) -> Result<SandboxState> {
        let layout = Layout::of(&self.dirs.state, request.pod_id)?;
        let contents = files::contents(request.config, request.plan, &sys::namespace::hostname())?;
        let sysctls = sysctls(request.config);
        let (netns, helper, plan) = (self.netns.clone(), self.helper.clone(), request.plan.clone());
        let order = setup::Order { layout: layout.clone(), netns, helper, plan, contents, sysctls };
        let (tx, rx) = oneshot::channel();
        let this = self.clone();
        // Taken here and not on the thread: a teardown that comes later must wait.
        let begun = this.begin(&layout.id)?;
        tokio::task::spawn_blocking(move || {
            let state = setup::run(order);
            drop(begun);
            if let Err(Ok(_)) = tx.send(state) {
                let torn_down = this.busy.turn(&layout.id).and_then(|_turn| teardown::all(&layout, &this.netns));
                if let Err(e) = torn_down {
                    tracing::warn!("nobody awaits this sandbox any more: {e}");
                }
            }
        });
        rx.await.map_err(|_| Error::internal(format!("the setup of sandbox {:.12} was lost", request.pod_id)))?
    }

    /// Puts a pod's addresses into its /etc/hosts, before a container has it; none
    /// changes nothing.
    ///
    /// # Errors
    /// Names the file.
    pub async fn note_addresses(&self, sandbox: &SandboxState, addresses: &[IpAddr]) -> Result<()> {
        if addresses.is_empty() {
            return Ok(());
        }
        let (path, text) = (sandbox.hosts_path.clone(), files::hosts(&sandbox.hostname, addresses));
        blocking(move || files::overwrite(&path, text.as_bytes())).await
    }

    /// Sets the pod's network sysctls once more, now that it has its interfaces: those of
    /// interfaces could not be set before, and others are to hold whatever its network did.
    ///
    /// # Errors
    /// `InvalidArgument` for one that can't be.
    pub async fn set_network_sysctls(&self, netns: &Path, config: &PodSandboxConfig) -> Result<()> {
        let (netns, sysctls) = (netns.to_owned(), sysctls(config));
        if sysctls.is_empty() {
            return Ok(());
        }
        blocking(move || sys::namespace::write_net_sysctls(&netns, &sysctls)).await
    }

    /// The turn of a setup, which must be the pod's only one.
    fn begin(&self, id: &str) -> Result<Turn> {
        let mut pods = self.busy.pods.lock().unwrap_or_else(PoisonError::into_inner);
        if pods.insert(id.to_owned()) {
            Ok(Turn { busy: self.busy.clone(), id: id.to_owned() })
        } else {
            Err(Error::exists(format!("sandbox {id:.12} is being made or taken down")))
        }
    }

    /// Takes a pod's sandbox down, whatever there is of it; none is success. Waits
    /// for a setup that still runs. It ends also when the caller has gone.
    ///
    /// # Errors
    /// All failures, joined; it may be called again.
    pub async fn teardown(&self, pod_id: &str) -> Result<()> {
        let layout = Layout::of(&self.dirs.state, pod_id)?;
        let this = self.clone();
        blocking(move || {
            let _turn = this.busy.turn(&layout.id)?;
            teardown::all(&layout, &this.netns)
        })
        .await
    }

    /// The pods of which anything lies in the state directory. Nothing outside it is
    /// looked for: a network namespace without a pod in it may be another daemon's.
    ///
    /// # Errors
    /// Names the directory that can't be read.
    pub async fn found(&self) -> Result<BTreeSet<String>> {
        let state = self.dirs.state.clone();
        blocking(move || teardown::found(&state)).await
    }

    /// Takes down what lies there of a pod that nobody knows, files of whomever too.
    ///
    /// # Errors
    /// All failures, joined; it may be called again.
    pub async fn clear(&self, pod_id: &str) -> Result<()> {
        let layout = Layout::of(&self.dirs.state, pod_id)?;
        let this = self.clone();
        blocking(move || {
            let _turn = this.busy.turn(&layout.id)?;
            teardown::clear(&layout, &this.netns)
        })
        .await
    }

    /// The empty root file system of the init of a pod-shared pid namespace, made
    /// by [`Self::setup`].
    ///
    /// # Errors
    /// `NotFound` where the pod has none.
    pub async fn init_rootfs(&self, pod_id: &str) -> Result<runtime::RootfsMount> {
        let path = Layout::of(&self.dirs.state, pod_id)?.init_rootfs();
        if !path.is_dir() {
            return Err(Error::not_found(format!("pod {pod_id:.12} shares no pid namespace: no {}", path.display())));
        }
        let source = path.to_string_lossy().into_owned();
        Ok(runtime::RootfsMount { kind: "bind".into(), source, options: vec!["rbind".into(), "rw".into()] })
    }

    /// Pins the pid namespace of the running process `pid` for the container that
    /// shares it, and gives the pin's path. Ask for the target's pid again
    /// afterwards: unless it is still the same, the number may have been another's.
    ///
    /// # Errors
    /// `FailedPrecondition` when the process has ended.
    pub async fn pin_target(&self, pod_id: &str, container_id: &str, pid: u32) -> Result<PathBuf> {
        let path = Layout::of(&self.dirs.state, pod_id)?.target_pin(container_id)?;
        blocking(move || {
            let mut errors = Vec::new();
            if let Err(e) = setup::pin_pid(pid, &path) {
                errors.push(e);
                teardown::unpin(&path, &mut errors);
            }
            Error::join("pin a target's pid namespace", errors).map(|()| path)
        })
        .await
    }

    /// Takes such a pin away; none is success. The pod's teardown does it too.
    ///
    /// # Errors
    /// Names the pin.
    pub async fn unpin_target(&self, pod_id: &str, container_id: &str) -> Result<()> {
        let path = Layout::of(&self.dirs.state, pod_id)?.target_pin(container_id)?;
        blocking(move || {
            let mut errors = Vec::new();
            teardown::unpin(&path, &mut errors);
            Error::join("unpin a target's pid namespace", errors)
        })
        .await
    }

    /// Takes back what [`Self::prepare`] did to the node, if no pod is left: for a
    /// daemon that ends for good. A later `prepare` does it again.
    ///
    /// # Errors
    /// All failures, joined.
    pub fn release(&self) -> Result<()> {
        let (pins, dirs) = (layout::pins(&self.dirs.state), layout::dirs(&self.dirs.state));
        let in_use = |dir: &Path| std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
        if in_use(&pins) || in_use(&dirs) {
            return Ok(());
        }
        let mut errors: Vec<Error> = sys::mount::detach_all(&pins).err().into_iter().collect();
        let marker = layout::netns_marker(&self.dirs.state);
        if marker.exists() {
            errors.extend(self.netns.release().err());
            errors.extend(std::fs::remove_file(&marker).context(|| format!("remove {}", marker.display())).err());
        }
        for dir in [pins, dirs] {
            errors.extend(std::fs::remove_dir(&dir).context(|| format!("remove {}", dir.display())).err());
        }
        Error::join("release the node", errors)
    }
}

/// A directory with this mode if it is new; one that is there keeps its own.
fn make_dir(path: &Path, mode: u32) -> Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(path).context(|| format!("make {}", path.display()))
}

/// Those that the pod asks for. The map has no order; the same one must fail each time.
fn sysctls(config: &PodSandboxConfig) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = config.linux.iter().flat_map(|l| l.sysctls.clone()).collect();
    all.sort();
    all
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::internal("work on sandboxes was lost").because(e))
        .and_then(|outcome| outcome)
}
