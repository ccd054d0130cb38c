//! The making of a sandbox: a setup that consumes itself step by step, each step
//! with its own unwind.
//!
//! ```text
//! directories ─► namespaces ─► files ─► shm ─► (target) ─► (init rootfs)
//!      ◄────────────◄───────────◄────────◄─────────◄── unwind, from where it failed
//! ```

use super::layout::Layout;
use super::plan::{NamespacePlan, PidPlan};
use super::{SandboxState, Step, files, teardown};
use fault::Step as Fault;
use network::NetnsDir;
use spec::IdMap;
use std::fs::Permissions;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};
use sys::namespace::{Kind, Wanted};
use sys::ns_helper::{HelperCommand, IdRange};
use types::{Error, Result, ResultExt};

/// A pod's /dev/shm holds so much.
const SHM_SIZE: &str = "65536k";

/// All that the setup of one pod needs, owned, for it runs on a thread of its own.
pub(super) struct Order {
    pub layout: Layout,
    pub netns: NetnsDir,
    pub helper: HelperCommand,
    pub plan: NamespacePlan,
    pub contents: files::Contents,
    pub sysctls: Vec<(String, String)>,
}

/// What of a sandbox stands so far.
struct Setup {
    order: Order,
    undo: Vec<teardown::Undo>,
    steps: Vec<Step>,
}

/// Makes the sandbox; on failure nothing of it is left.
///
/// # Errors
/// That of the step that failed, and of the undoing where that failed too.
pub(super) fn run(order: Order) -> Result<SandboxState> {
    let own_init = order.plan.has_init();
    let own_shm = order.plan.ipc;
    let target = matches!(order.plan.pid, PidPlan::Target { .. });
    let mut setup = Setup { order, undo: Vec::new(), steps: Vec::new() }
        .step("directories", Some(Fault::SandboxDirectories), teardown::directories, |o, _| make_directories(o))?
        .step("namespaces", Some(Fault::SandboxNamespaces), teardown::namespaces, make_namespaces)?
        .step("files", Some(Fault::SandboxFiles), teardown::files, |o, _| write_files(o))?;
    if own_shm {
        setup = setup.step("shm", Some(Fault::SandboxShm), teardown::shm, |o, _| mount_shm(o))?;
    }
    if target {
        setup = setup.step("target", None, teardown::namespaces, |o, _| pin_pod_target(o))?;
    }
    if own_init {
        setup = setup
            .step("init rootfs", Some(Fault::SandboxInitRootfs), teardown::init_rootfs, |o, _| make_init_rootfs(o))?;
    }
    Ok(setup.finish())
}

impl Setup {
    /// One step. Its unwind also takes away what it had made before it failed.
    fn step(
        mut self,
        name: &'static str,
        point: Option<Fault>,
        undo: teardown::Undo,
        work: impl FnOnce(&Order, &mut Vec<Step>) -> Result<()>,
    ) -> Result<Self> {
        let (started_at, clock) = (SystemTime::now(), Instant::now());
        self.undo.push(undo);
        let work = || work(&self.order, &mut self.steps);
        let worked = match point {
            Some(point) => fault::during(point, work),
            None => work(),
        };
        match worked {
            Ok(()) => {
                self.steps.push(Step { name, started_at, took: clock.elapsed() });
                Ok(self)
            }
            Err(e) => {
                let mut errors = vec![e];
                for undo in self.undo.iter().rev() {
                    undo(&self.order.layout, &self.order.netns, &mut errors);
                }
                match Error::join(&format!("sandbox {:.12}: {name}", self.order.layout.id), errors) {
                    Err(e) => Err(e),
                    Ok(()) => Ok(self),
                }
            }
        }
    }

    fn finish(self) -> SandboxState {
        let Order { layout, netns, plan, contents, .. } = self.order;
        let own = |wanted: bool, path: PathBuf| wanted.then_some(path);
        SandboxState {
            net: own(plan.net, netns.path(&layout.id)),
            ipc: own(plan.ipc, layout.pin(Kind::Ipc)),
            uts: own(plan.uts, layout.pin(Kind::Uts)),
            user: own(plan.user.is_some(), layout.pin(Kind::User)),
            pid: own(matches!(plan.pid, PidPlan::Target { .. }), layout.pin(Kind::Pid)),
            hostname: contents.hostname,
            hostname_path: layout.hostname(),
            hosts_path: layout.hosts(),
            resolv_conf_path: layout.resolv_conf(),
            shm_path: if plan.ipc { layout.shm() } else { "/dev/shm".into() },
            plan,
            steps: self.steps,
        }
    }
}

/// The ids of the pod's root on the node, where it has a user namespace.
fn root_of(plan: &NamespacePlan) -> Option<(u32, u32)> {
    Some((plan.mapped_root_uid()?, plan.mapped_root_gid()?))
}

pub(super) fn new_directory(path: &Path, mode: u32) -> Result<()> {
    let what = || format!("make {}", path.display());
    std::fs::DirBuilder::new().mode(mode).create(path).context(what)?;
    // The umask may have taken bits away.
    std::fs::set_permissions(path, Permissions::from_mode(mode)).context(what)
}

fn make_directories(order: &Order) -> Result<()> {
    new_directory(&order.layout.pins, 0o700)?;
    let dir = &order.layout.dir;
    match root_of(&order.plan) {
        None => new_directory(dir, 0o700),
        // The runtime opens mount sources as the pod's root.
        Some((_, gid)) => {
            new_directory(dir, 0o710)?;
            std::os::unix::fs::chown(dir, None, Some(gid)).context(|| format!("give {} its group", dir.display()))
        }
    }
}

fn make_namespaces(order: &Order, steps: &mut Vec<Step>) -> Result<()> {
    let plan = &order.plan;
    let wanted = Wanted {
        net: plan.net,
        ipc: plan.ipc,
        uts: plan.uts,
        hostname: plan.uts.then(|| order.contents.hostname.clone()),
        sysctls: order.sysctls.clone(),
    };
    let mut kinds = wanted.kinds();
    let (mut last_at, mut last) = (SystemTime::now(), Instant::now());
    let mut mark = |name: &'static str| {
        steps.push(Step { name, started_at: last_at, took: last.elapsed() });
        (last_at, last) = (SystemTime::now(), Instant::now());
    };
    let pin = |kinds: &[Kind], links: &Path| kinds.iter().try_for_each(|kind| pin(order, *kind, links));
    match &plan.user {
        Some(maps) => {
            kinds.push(Kind::User);
            let (uids, gids) = (ranges(&maps.uids), ranges(&maps.gids));
            sys::ns_helper::make_in_user_namespace(&order.helper, &uids, &gids, &wanted, &mut mark, |links| {
                pin(&kinds, links)
            })
        }
        None if kinds.is_empty() => wanted.check(),
        None => sys::namespace::make(&wanted, &mut mark, |links| pin(&kinds, links)),
    }
}

fn ranges(maps: &[IdMap]) -> Vec<IdRange> {
    maps.iter().map(|m| IdRange { inside: m.container, outside: m.host, length: m.length }).collect()
}

fn pin(order: &Order, kind: Kind, links: &Path) -> Result<()> {
    let link = links.join(kind.name());
    if kind == Kind::Net {
        return order.netns.pin(&order.layout.id, &link).map(|_| ());
    }
    pin_at(&link, &order.layout.pin(kind))
}

fn pin_at(link: &Path, path: &Path) -> Result<()> {
    std::fs::File::create_new(path).context(|| format!("make {}", path.display()))?;
    fault::during(Fault::SandboxBind, || sys::mount::bind(link, path))
}

/// Pins the pid namespace of the running process `pid`.
pub(super) fn pin_pid(pid: u32, path: &Path) -> Result<()> {
    use std::os::fd::AsRawFd;
    let fd = sys::namespace::open_of(pid, Kind::Pid)?;
    pin_at(Path::new(&format!("/proc/thread-self/fd/{}", fd.as_raw_fd())), path)
}

fn pin_pod_target(order: &Order) -> Result<()> {
    match &order.plan.pid {
        PidPlan::Target { container, pid } => {
            pin_pid(*pid, &order.layout.pin(Kind::Pid)).map_err(|e| e.within(format!("container {container}")))
        }
        _ => Ok(()),
    }
}

fn write_files(order: &Order) -> Result<()> {
    let Order { layout, contents, plan, .. } = order;
    let owner = root_of(plan);
    files::write(&layout.hostname(), format!("{}\n", contents.hostname).as_bytes(), owner)?;
    let hosts = match &contents.hosts {
        Some(text) => text.clone().into_bytes(),
        None => files::of_node(Path::new("/etc/hosts"))?,
    };
    files::write(&layout.hosts(), &hosts, owner)?;
    let resolv_conf = match &contents.resolv_conf {
        Some(text) => text.clone().into_bytes(),
        None => files::resolv_conf_of_node(plan.net)?,
    };
    files::write(&layout.resolv_conf(), &resolv_conf, owner)
}

fn mount_shm(order: &Order) -> Result<()> {
    let path = order.layout.shm();
    new_directory(&path, 0o700)?;
    let owner = root_of(&order.plan).map(|(uid, gid)| format!(",uid={uid},gid={gid}")).unwrap_or_default();
    sys::mount::tmpfs(&path, &format!("mode=1777,size={SHM_SIZE}{owner}"))
}

/// The runtime makes the mount points in it, as the pod's root.
fn make_init_rootfs(order: &Order) -> Result<()> {
    let path = order.layout.init_rootfs();
    new_directory(&path, 0o755)?;
    match root_of(&order.plan) {
        None => Ok(()),
        Some((uid, gid)) => std::os::unix::fs::chown(&path, Some(uid), Some(gid))
            .context(|| format!("give {} to the pod's root", path.display())),
    }
}
