//! A container's task is made: bundle, streams, Create; all of it or nothing.

use super::Inner;
use super::config::{Handler, TaskOptions};
use super::foreign::{Logger, fifos};
use super::pod::{Phase, Pod};
use super::rpc::call;
use super::shim::Shim;
use super::task::Task;
use crate::api::{PodSpec, RootfsMount, TaskIo, TaskSpec};
use crate::bundle::{self, blocking};
use fault::Step;
use proto::containerd::runc::v1::Options;
use proto::containerd::task::v3 as wire;
use proto::containerd::types::Mount;
use std::path::Path;
use std::sync::Arc;
use types::{Error, ErrorKind, Result, Signal};

const OPTIONS_URL: &str = "containerd.runc.v1.Options";
const GENERIC_URL: &str = "runtimeoptions.v1.Options";

/// The private URI of our own shim: it writes the CRI log itself.
fn log_uri(path: &Path, limit: u32) -> String {
    use std::fmt::Write;
    use std::os::unix::ffi::OsStrExt;
    let mut uri = String::from("cri://");
    for &b in path.as_os_str().as_bytes() {
        if b.is_ascii_alphanumeric() || b"/-._~".contains(&b) {
            uri.push(char::from(b));
        } else {
            let _ = write!(uri, "%{b:02X}");
        }
    }
    let _ = write!(uri, "?limit={limit}");
    uri
}

/// The host's uid and gid of a user-namespaced container's root: who owns its pipes.
fn mapped_root(config_json: &str) -> Option<(u32, u32)> {
    let config: serde_json::Value = serde_json::from_str(config_json).ok()?;
    let of = |key: &str| {
        let maps = config.get("linux")?.get(key)?.as_array()?;
        let root = maps.iter().find(|m| m.get("containerID").and_then(serde_json::Value::as_u64) == Some(0))?;
        u32::try_from(root.get("hostID")?.as_u64()?).ok()
    };
    Some((of("uidMappings")?, of("gidMappings")?))
}

fn mounts(rootfs: &[RootfsMount]) -> Vec<Mount> {
    let one = |m: &RootfsMount| Mount {
        r#type: m.kind.clone(),
        source: m.source.clone(),
        target: String::new(),
        options: m.options.clone(),
    };
    rootfs.iter().map(one).collect()
}

/// What Create gets of the handler's options.
fn options(handler: &Handler, config_json: &str, user_namespaced: bool) -> Option<prost_types::Any> {
    match &handler.options {
        TaskOptions::None => None,
        TaskOptions::Runc { no_pivot_root, no_new_keyring } => {
            let (io_uid, io_gid) = if user_namespaced { mapped_root(config_json).unwrap_or_default() } else { (0, 0) };
            let options = Options {
                binary_name: handler.runtime_binary.to_string_lossy().into_owned(),
                root: handler.runtime_root.to_string_lossy().into_owned(),
                systemd_cgroup: handler.systemd_cgroup,
                no_pivot_root: *no_pivot_root,
                no_new_keyring: *no_new_keyring,
                io_uid,
                io_gid,
                ..Options::default()
            };
            Some(proto::pack(OPTIONS_URL, &options))
        }
        TaskOptions::Generic { type_url, config_path, config_body } => {
            let options = proto::runtimeoptions::Options {
                type_url: type_url.clone(),
                config_path: config_path.clone(),
                config_body: config_body.clone().into_bytes(),
            };
            Some(proto::pack(GENERIC_URL, &options))
        }
    }
}

struct Streams {
    stdin: String,
    stdout: String,
    stderr: String,
    logger: Option<Logger>,
}

impl Inner {
    /// Where the task's streams go: a URI for a shim that writes CRI logs, FIFOs
    /// that we log from for any other.
    async fn streams(&self, shim: &Shim, dir: &Path, io: &TaskIo) -> Result<Streams> {
        let stdin = io.stdin.as_ref().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
        let mut streams = Streams { stdin, stdout: String::new(), stderr: String::new(), logger: None };
        let mut io = io.clone();
        if io.log_path.is_none() && io.terminal && !shim.can("cri-log") {
            // Go's shim refuses a terminal whose output goes nowhere.
            io.log_path = Some("/dev/null".into());
        }
        let Some(log) = &io.log_path else { return Ok(streams) };
        let err = if shim.can("cri-log") {
            streams.stdout = log_uri(log, io.log_limit);
            streams.stdout.clone()
        } else {
            streams.logger = self.logs.start(dir, &io).await?;
            let (out, err) = fifos(dir);
            streams.stdout = out.to_string_lossy().into_owned();
            err.to_string_lossy().into_owned()
        };
        if !io.terminal {
            streams.stderr = err;
        }
        Ok(streams)
    }

    pub(super) async fn create_task(self: &Arc<Self>, spec: &PodSpec, task: TaskSpec) -> Result<u32> {
        let pod = self.find_or_insert(&spec.id);
        let shim = pod.ensure(self, Some(spec)).await?;
        if shim.is_sandbox(&task.id) {
            let options = options(&shim.handler, &task.config_json, spec.bundle_gid.is_some());
            return self.create_sandbox(&pod, &shim, spec, &task, options).await;
        }
        // What could not be undone before, for it still had something to do; or what a
        // recovery did not come to: the shim may still create it for a daemon that died.
        let undone = match pod.task(&task.id) {
            Some(old) => !old.is_condemned() && !old.is_found(),
            None => !self.layout.task(&pod.id, &task.id).exists(),
        };
        if !undone {
            self.undo(&pod, &shim, &task.id).await?;
        }
        let entry = Arc::new(Task::new(&task.id));
        pod.update(|s| {
            if s.tasks.contains_key(&task.id) {
                return Err(Error::exists(format!("container {} has a task already", task.id)));
            }
            s.tasks.insert(task.id.clone(), entry.clone());
            Ok(())
        })?;
        let made = self.make(&pod, &shim, spec, task, &entry).await;
        if made.is_err() {
            pod.update(|s| s.tasks.remove(&entry.id));
        }
        let pid = made?;
        self.watch_task(&pod, &shim, &entry);
        Ok(pid)
    }

    async fn make(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        shim: &Arc<Shim>,
        spec: &PodSpec,
        task: TaskSpec,
        entry: &Arc<Task>,
    ) -> Result<u32> {
        let dir = self.layout.task(&pod.id, &task.id);
        let options = options(&shim.handler, &task.config_json, spec.bundle_gid.is_some());
        let rootfs = mounts(&task.rootfs);
        let (d, gid) = (dir.clone(), spec.bundle_gid);
        let task = match blocking(move || {
            fault::during(Step::TaskBundle, || bundle::make_task(&d, gid, &task.config_json).map(|()| task))
        })
        .await
        {
            Ok(task) => task,
            Err(e) => return Err(self.unmake(&dir, None, &entry.id, e).await),
        };
        let streams = match self.streams(shim, &dir, &task.io).await {
            Ok(streams) => streams,
            Err(e) => return Err(self.unmake(&dir, None, &entry.id, e).await),
        };
        let bound = shim.timeouts().create;
        let request = wire::CreateTaskRequest {
            id: entry.id.clone(),
            bundle: dir.to_string_lossy().into_owned(),
            rootfs,
            terminal: task.io.terminal,
            stdin: streams.stdin,
            stdout: streams.stdout,
            stderr: streams.stderr,
            options,
            ..wire::CreateTaskRequest::default()
        };
        entry.set_logger(streams.logger);
        let created = fault::around(Step::TaskCreate, call(bound, shim.task().create(bound, request))).await;
        let created = created.map_err(|e| e.within(&format!("create container {}", entry.id), bound));
        // Only while this very shim is up does its watcher know of the task;
        // otherwise it has died meanwhile, and the task is ours to undo.
        let known = pod.update(|s| match &s.phase {
            Phase::Up(up) if Arc::ptr_eq(up, shim) && created.is_ok() => {
                entry.set_made();
                true
            }
            _ => false,
        });
        match created {
            Ok(answer) if known => Ok(answer.pid),
            Ok(_) => {
                let e = Error::unavailable(format!("create container {}: the pod's shim ended meanwhile", entry.id));
                Err(self.unmake(&dir, Some(shim), &entry.id, e).await)
            }
            Err(e) => Err(self.unmake(&dir, Some(shim), &entry.id, e).await),
        }
    }

    /// Undoes a failed create: the task in the shim, or by way of `delete` where
    /// the shim can't; then the bundle. Returns the error, with what else failed.
    async fn unmake(self: &Arc<Self>, dir: &Path, shim: Option<&Arc<Shim>>, id: &str, e: Error) -> Error {
        if let Some(shim) = shim {
            let bound = shim.timeouts().cleanup;
            if e.kind() == ErrorKind::DeadlineExceeded {
                // Our shim ends a creation that hangs; for any other it is no more
                // than a Kill.
                let _ = super::task::kill(shim, id, "", Signal::KILL, false, bound).await;
            }
            let request = wire::DeleteRequest { id: id.to_string(), exec_id: String::new() };
            match call(bound, shim.task().delete(bound, request)).await {
                Ok(_) => {}
                // The shim has undone its own failure.
                Err(f) if f.is_not_found() && e.kind() != ErrorKind::DeadlineExceeded => {}
                // What a foreign shim had begun ends first: its call of the OCI runtime may
                // outlive it, or have been killed half-way with it.
                Err(_) => {
                    if let Some(left) = self.bury_task(&shim.pod, id).await.left {
                        // The bundle leads the pod's end to it.
                        return e.hint(left.to_string());
                    }
                }
            }
        }
        let d = dir.to_path_buf();
        match blocking(move || bundle::remove_task(&d)).await {
            Ok(()) => e,
            Err(more) => e.hint(more.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_paths_survive_the_uri() {
        let uri = log_uri(Path::new("/var/log/pods/a b_c%/é?x/0.log"), 16384);
        assert_eq!(uri, "cri:///var/log/pods/a%20b_c%25/%C3%A9%3Fx/0.log?limit=16384");
    }

    #[test]
    fn the_mapped_root_owns_the_pipes() {
        let json = r#"{"linux":{"uidMappings":[{"containerID":0,"hostID":65536,"size":9}],
            "gidMappings":[{"containerID":0,"hostID":70000,"size":9}]}}"#;
        assert_eq!(mapped_root(json), Some((65536, 70000)));
        assert_eq!(mapped_root("{}"), None);
    }
}
