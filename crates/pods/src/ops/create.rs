//! CreateContainer: the snapshot and the spec; the task comes with StartContainer.
//!
//! ```text
//! <root>/containers/<id>/config.json    the spec, as the task will get it
//! <root>/containers/<id>/process.json   its process, what ExecSync starts from
//! <state>/stdin/<id>                    the FIFO of stdin, where asked for
//! ```

use super::run_pod::nanos;
use super::{PodContext, image_mounts};
use crate::facts::{self, LayeredRoot};
use crate::journal::Write;
use crate::sandbox::{ContainerPid, container_pid};
use crate::shared::Shared;
use crate::state::{ContainerInfo, ContainerRecord, ContainerState, User};
use fault::Step as Fault;
use images::Image;
use proto::cri::ContainerConfig;
use spec::{ContainerInput, ContainerSpec, ImageDefaults, PidMode};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::oneshot;
use types::{Error, Result, ResultExt};

/// Makes a container; on failure nothing of it is left.
///
/// # Errors
/// `NotFound` for an unknown image, `InvalidArgument` for a configuration that
/// can't be, else that of the step that failed.
pub async fn create(ctx: PodContext, id: String, config: ContainerConfig) -> Result<Box<ContainerInfo>> {
    let name = config.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
    let config = Arc::new(config);
    let timelines = &ctx.shared.timelines;
    let built = timelines.timed(&ctx.pod.id, "CreateContainer", "", &name, build(&ctx, &id, config.clone())).await;
    match built {
        Ok(info) => Ok(Box::new(info)),
        Err(e) => {
            let mut errors = vec![e];
            errors.extend(undo(&ctx, &id, &config).await);
            let context = format!("create container {name} in pod {}", ctx.pod.name());
            Err(Error::join(&context, errors).err().unwrap_or_else(|| Error::internal(context)))
        }
    }
}

async fn undo(ctx: &PodContext, id: &str, config: &ContainerConfig) -> Vec<Error> {
    let mut errors = image_mounts::release(ctx, id, config).await;
    errors.extend(ctx.shared.bounded("removing the snapshot", ctx.shared.snapshots.remove(id)).await.err());
    for dir in [ctx.shared.container_dir(id), stdin_path(ctx, id)] {
        let removed = match tokio::fs::symlink_metadata(&dir).await {
            Ok(m) if m.is_dir() => tokio::fs::remove_dir_all(&dir).await,
            Ok(_) => tokio::fs::remove_file(&dir).await,
            Err(_) => continue,
        };
        errors.extend(removed.context(|| format!("remove {}", dir.display())).err());
    }
    let _ = ctx.shared.sandboxes.unpin_target(&ctx.pod.id, id).await;
    errors
}

fn stdin_path(ctx: &PodContext, id: &str) -> PathBuf {
    ctx.shared.config.state.join("stdin").join(id)
}

fn find_image(ctx: &PodContext, config: &ContainerConfig) -> Result<Arc<Image>> {
    let name = config.image.as_ref().map(|i| i.image.as_str()).unwrap_or_default();
    if name.is_empty() {
        return Err(Error::invalid("its configuration names no image"));
    }
    ctx.shared
        .images
        .get(name)
        .ok_or_else(|| Error::not_found(format!("image {name:?} is not on this node")).hint("pull or import it first"))
}

async fn build(ctx: &PodContext, id: &str, config: Arc<ContainerConfig>) -> Result<ContainerInfo> {
    const OP: &str = "CreateContainer";
    let (shared, pod) = (&ctx.shared, &ctx.pod);
    let name = config.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
    if name.is_empty() {
        return Err(Error::invalid("its metadata has no name"));
    }
    let log_path = spec::log_path(&pod.config.log_directory, &config.log_path)?;
    let image = find_image(ctx, &config)?;
    let idmap = pod.state.sandbox.plan.user.as_ref().map(snapshot_idmap);
    let parent = Some(image.chain_id.as_str()).filter(|c| !c.is_empty());
    let prepare = shared.snapshots.prepare(id, parent, idmap.as_ref());
    let mounts = shared
        .timelines
        .timed(
            &pod.id,
            OP,
            "snapshot",
            &name,
            shared.bounded("preparing the snapshot", fault::around(Fault::ContainerSnapshot, prepare)),
        )
        .await?;
    let spec = make_spec(ctx, id, &config, &image, layered(&mounts));
    let made = shared
        .timelines
        .timed(&pod.id, OP, "spec", &name, shared.bounded("making the spec", fault::around(Fault::ContainerSpec, spec)))
        .await?;
    let files = fault::around(Fault::ContainerFiles, write_files(ctx, id, &made, log_path.as_deref()));
    shared.bounded("writing its files", files).await?;
    let stdin =
        if config.stdin { Some(fault::around(Fault::ContainerStdin, make_stdin(ctx, id)).await?) } else { None };
    let info = ContainerInfo {
        id: id.to_string(),
        pod_id: pod.id.clone(),
        created_at: SystemTime::now(),
        record: ContainerRecord {
            state: ContainerState::Created,
            image_id: image.id.clone(),
            image_name: image.repo_tags.first().cloned().unwrap_or_default(),
            image_ref: image.repo_digests.first().cloned().unwrap_or_else(|| image.id.clone()),
            image_stop_signal: image.config.config().as_ref().and_then(|c| c.stop_signal().clone()).unwrap_or_default(),
            log_path,
            stdin,
            user: User { uid: made.user.uid, gid: made.user.gid, groups: made.user.groups },
            resources: config.linux.as_ref().and_then(|l| l.resources.clone()),
            warnings: made.warnings,
        },
        config,
    };
    shared.timelines.timed(&pod.id, OP, "store", &name, save(ctx, &info)).await?;
    Ok(info)
}

pub(super) fn snapshot_idmap(maps: &spec::IdMaps) -> snapshots::IdMap {
    let ranges = |map: &[spec::IdMap]| {
        map.iter().map(|m| snapshots::IdRange { container: m.container, host: m.host, size: m.length }).collect()
    };
    snapshots::IdMap { uids: ranges(&maps.uids), gids: ranges(&maps.gids) }
}

/// What a container's rootfs will be made of: its users and groups are looked up
/// there, before anything is mounted.
fn layered(mounts: &[snapshots::Mount]) -> LayeredRoot {
    let options: Vec<&String> = mounts.iter().flat_map(|m| m.options.iter()).collect();
    LayeredRoot::from_overlay(&options)
}

async fn make_spec(
    ctx: &PodContext,
    id: &str,
    config: &ContainerConfig,
    image: &Image,
    root: LayeredRoot,
) -> Result<ContainerSpec> {
    let (handler, pod) = (ctx.handler()?, &ctx.pod);
    let defaults = ImageDefaults::from(&image.config);
    let sc = config.linux.as_ref().and_then(|l| l.security_context.clone()).unwrap_or_default();
    let request = spec::user_request(&sc, &defaults)?;
    let profile = spec::seccomp_profile_path(&sc)?;
    let owned = config.clone();
    let rootfs = tokio::task::spawn_blocking(move || facts::rootfs_facts(&root, &request))
        .await
        .context(|| "look at the image's users".into())??;
    let (host, profile) = facts::looking(move |look| {
        let host = facts::host_facts(&owned, look)?;
        let read = |path: PathBuf| look.at(&path, || facts::read_profile(&path))?;
        Ok((host, profile.map(read).transpose()?))
    })
    .await?;
    let image_mounts = image_mounts::prepare(ctx, id, config).await?;
    let pid = container_pid(&pod.state.sandbox.plan, sc.namespace_options.as_ref())?;
    let pid = pid_mode(ctx, id, pid).await?;
    let image_name = config.image.as_ref().map(|i| i.image.as_str()).unwrap_or_default();
    let made = spec::container_spec(&ContainerInput {
        id,
        pod_id: &pod.id,
        config,
        pod: &pod.config,
        image: &defaults,
        image_name,
        node: &handler.node,
        policy: &handler.policy,
        rootfs: &rootfs,
        host: &host,
        namespaces: &pod.state.sandbox.namespaces_with(pid),
        files: &pod.state.sandbox.files(),
        image_mounts: &image_mounts,
        // A VOLUME is a directory of the container's own snapshot, as CRI-O's
        // `mkdir`: nothing is copied, so nothing can be copied from the host
        // (CVE-2022-23648).
        volumes: &BTreeMap::new(),
        seccomp_profile: profile.as_deref(),
    })?;
    for warning in &made.warnings {
        tracing::warn!("container {id:.12}: {warning}");
    }
    let missing = made.ensure.clone();
    facts::looking(move |look| facts::make_missing(&missing, look)).await?;
    warn_unlabelled(id, &made);
    Ok(made)
}

/// Once: that SELinux does not part containers here from each other.
fn warn_unlabelled(id: &str, made: &ContainerSpec) {
    static SAID: std::sync::Once = std::sync::Once::new();
    let labelled = made.spec.process().as_ref().is_some_and(|p| p.selinux_label().is_some());
    if !labelled && std::fs::read_to_string("/sys/fs/selinux/enforce").is_ok_and(|e| e.trim() == "1") {
        SAID.call_once(|| {
            tracing::warn!(
                "SELinux is enforcing, and container {id:.12} has no label: containers get none but those that the \
                 kubelet asks for, and files are never labelled"
            );
        });
    }
}

/// Fails where a pid target has ended since its pid was looked up: the pid may be
/// somebody else's by now, and what was pinned by it too.
pub(super) fn confirm_target(shared: &Shared, target: &str, pid: u32) -> Result<()> {
    let (id, pod) = shared.registry.container(target)?;
    let lives = pod.view().containers.iter().any(|c| c.id == id && crate::running_pid(c) == Some(pid));
    if lives { Ok(()) } else { Err(Error::precondition(format!("its pid target {id:.12} has just ended"))) }
}

async fn pid_mode(ctx: &PodContext, id: &str, pid: ContainerPid) -> Result<PidMode> {
    let state = &ctx.pod.state;
    Ok(match pid {
        ContainerPid::Private => PidMode::Private,
        ContainerPid::Node => PidMode::Host,
        ContainerPid::Pod => match &state.sandbox.pid {
            Some(pin) => PidMode::Path(pin.clone()),
            None => return Err(Error::precondition(format!("pod {} has no pid namespace to share", ctx.pod.name()))),
        },
        ContainerPid::Target(target) => {
            let handle = ctx.shared.registry.container(&target)?;
            let view = handle.1.view();
            let target = view.containers.iter().find(|c| c.id == handle.0);
            let Some(target) = target else {
                return Err(Error::not_found(format!("no container {:?} exists", handle.0)));
            };
            if target.pod_id != ctx.pod.id {
                return Err(Error::invalid(format!("its pid target {:.12} is in another pod", target.id)));
            }
            let target_pid = crate::admission::exec(target)?;
            let pin = ctx.shared.sandboxes.pin_target(&ctx.pod.id, id, target_pid).await?;
            confirm_target(&ctx.shared, &handle.0, target_pid)?;
            PidMode::Path(pin)
        }
    })
}

async fn write_files(ctx: &PodContext, id: &str, made: &ContainerSpec, log: Option<&Path>) -> Result<()> {
    let dir = ctx.shared.container_dir(id);
    let mut builder = tokio::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(&dir).await.context(|| format!("make {}", dir.display()))?;
    let config = serde_json::to_string(&made.spec).context(|| "encode the spec".into())?;
    let process = serde_json::to_string(&made.spec.process()).context(|| "encode the process".into())?;
    write_file(&dir.join("config.json"), config).await?;
    write_file(&dir.join("process.json"), process).await?;
    if let Some(parent) = log.and_then(Path::parent).map(Path::to_path_buf) {
        let what = format!("make the log directory {}", parent.display());
        facts::looking(move |look| look.at(&parent, || std::fs::create_dir_all(&parent))?.context(|| what)).await?;
    }
    Ok(())
}

/// Writes a whole file or, where that fails, leaves the old one.
pub(super) async fn write_file(path: &Path, text: String) -> Result<()> {
    let new = path.with_extension("new");
    let written = async {
        tokio::fs::write(&new, text).await?;
        tokio::fs::rename(&new, path).await
    };
    match written.await {
        Ok(()) => Ok(()),
        Err(e) => {
            let _ = tokio::fs::remove_file(&new).await;
            Err(e).context(|| format!("write {}", path.display()))
        }
    }
}

async fn make_stdin(ctx: &PodContext, id: &str) -> Result<PathBuf> {
    let path = stdin_path(ctx, id);
    if let Some(dir) = path.parent() {
        let mut builder = tokio::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(dir).await.context(|| format!("make {}", dir.display()))?;
    }
    stdio::fifo::make(&path)?;
    Ok(path)
}

async fn save(ctx: &PodContext, info: &ContainerInfo) -> Result<()> {
    let record = store::ContainerRecord {
        id: info.id.clone(),
        pod_id: info.pod_id.clone(),
        name_key: format!("{}/{}", info.pod_id, info.name_key()),
        created_at_ns: nanos(info.created_at),
        config_json: serde_json::to_string(&*info.config).context(|| format!("encode container {}", info.id))?,
        state_json: serde_json::to_string(&info.record).context(|| format!("encode container {}", info.id))?,
    };
    let (tx, rx) = oneshot::channel();
    ctx.shared.journal.submit(Write::Container(record), move |saved| {
        let _ = tx.send(saved);
    });
    rx.await.map_err(|_| Error::unavailable("the database is closed: the daemon is stopping"))?
}
