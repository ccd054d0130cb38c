//! A container is made: bundle, mounts, monitor, and through it the runtime's
//! create; all of it or nothing.
//!
//! ```text
//!  bundle ─► rootfs ─► monitor ─► its cgroup ─► the byte ─► {"pid":N} ─► watched
//!     │         │         │  too late, cancelled, -1, EOF ─► killed with its runtime call
//!     └─────────┴─────────┴────────────────────────────────► delete --force, all undone
//! ```

use super::Inner;
use super::config::Handler;
use super::monitor::{self, CreateArgs, Launch, Started, ended};
use super::persist::{Record, private_pids};
use super::process::{Process, arguments, kill_tree, parent, pid_file};
use super::stdin::Feed;
use super::task::{Live, Pod, Task, forget_mounts};
use crate::api::{PodSpec, TaskSpec};
use crate::bundle::{self, blocking};
use crate::cgroup;
use crate::ops::step;
use oci::Runtime as _;
use oci::cgroup::Cgroup;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::time::{Instant, timeout_at};
use types::{Error, ErrorKind, ExitStatus, Result, ResultExt};

/// Whether `pid` is the monitor of this bundle.
pub(crate) fn is_monitor_of(pid: u32, bundle: &Path) -> bool {
    let bundle = bundle.to_string_lossy();
    arguments(pid).iter().any(|a| *a == bundle)
}

/// The monitor of a bundle, by its pid file; `None` where it is dead, or the number
/// another's now.
///
/// # Errors
/// Where descriptors have run out.
pub(crate) fn monitor_of(bundle: &Path) -> Result<Option<Process>> {
    match pid_file(&monitor::monitor_pid_file(bundle)) {
        Some(pid) => Process::open(pid, || is_monitor_of(pid, bundle)),
        None => Ok(None),
    }
}

/// conmon takes a log path apart at colons.
fn check_log_path(path: &Path) -> Result<()> {
    if path.as_os_str().as_encoded_bytes().contains(&b':') {
        return Err(Error::invalid(format!("the log path {} has a colon, which no conmon can take", path.display())));
    }
    Ok(())
}

impl Inner {
    pub(super) async fn create_task(self: &Arc<Self>, spec: &PodSpec, task: TaskSpec) -> Result<u32> {
        let handler = self.cfg.handler(&spec.handler)?.clone();
        self.start_pod(spec).await?;
        let pod = self.find_or_insert(&spec.id);
        let private_pids = private_pids(&task.config_json);
        let entry = Arc::new(Task::new(&task.id, Record { handler, io: task.io.clone(), private_pids }));
        {
            let mut tasks = pod.tasks();
            if tasks.contains_key(&task.id) {
                return Err(Error::exists(format!("container {} has a task already", task.id)));
            }
            tasks.insert(task.id.clone(), entry.clone());
        }
        match self.make(&pod, spec, &task, &entry).await {
            Ok(pid) => {
                self.watch_task(&pod, &entry);
                Ok(pid)
            }
            Err(e) => {
                pod.tasks().remove(&task.id);
                Err(e)
            }
        }
    }

    async fn make(&self, pod: &Pod, spec: &PodSpec, task: &TaskSpec, entry: &Task) -> Result<u32> {
        let dir = self.bundle(&pod.id, &task.id);
        let had_log = task.io.log_path.as_ref().is_none_or(|p| p.exists());
        if let Err(e) = self.prepare(&dir, spec, task, &entry.record).await {
            return Err(self.unmake(&dir, entry, None, e).await);
        }
        let mut born = None;
        let made = match self.run_monitor(&dir, entry, &mut born).await {
            Ok(pid) => self.hold(&dir, entry, &mut born, pid).map(|live| (pid, live)),
            Err(e) => Err(e),
        };
        match made {
            Ok((pid, live)) => {
                entry.set_live(live);
                Ok(pid)
            }
            Err(e) => {
                let e = self.unmake(&dir, entry, Some(born), e).await;
                if !had_log && let Some(log) = &task.io.log_path {
                    let _ = std::fs::remove_file(log);
                }
                Err(e)
            }
        }
    }

    /// The bundle and the root file system.
    async fn prepare(&self, dir: &Path, spec: &PodSpec, task: &TaskSpec, record: &Record) -> Result<()> {
        if let Some(log) = &task.io.log_path {
            check_log_path(log)?;
        }
        self.exits.forget(&task.id)?;
        let (dir, gid, config, record) = (dir.to_path_buf(), spec.bundle_gid, task.config_json.clone(), record.clone());
        let one = |m: &crate::RootfsMount| oci::mounts::Mount {
            kind: m.kind.clone(),
            source: m.source.clone(),
            target: String::new(),
            options: m.options.clone(),
        };
        let mounts: Vec<oci::mounts::Mount> = task.rootfs.iter().map(one).collect();
        let log = task.io.log_path.clone();
        blocking(move || {
            bundle::make_task(&dir, gid, &config)?;
            record.store(&dir)?;
            if let Some(parent) = log.as_deref().and_then(Path::parent) {
                std::fs::create_dir_all(parent).context(|| format!("create {}", parent.display()))?;
            }
            oci::mounts::mount_rootfs(&dir.join("rootfs"), &mounts)
        })
        .await
    }

    /// Starts the monitor and waits until the container has been created; `born`
    /// holds the monitor as soon as it is known.
    async fn run_monitor(&self, dir: &Path, entry: &Task, born: &mut Option<Process>) -> Result<u32> {
        let (handler, io) = (&entry.record.handler, &entry.record.io);
        let bound = handler.timeouts.create;
        let deadline = Instant::now() + bound;
        let runtime_root = self.runtime_root(handler);
        let args = CreateArgs {
            id: &entry.id,
            bundle: dir,
            exits: self.exits.dir(),
            runtime_root: &runtime_root,
            terminal: io.terminal,
            stdin: io.stdin.is_some(),
            log: io.log_path.as_deref(),
        };
        let launch = Launch {
            binary: &handler.monitor,
            arguments: args.arguments(handler),
            directory: dir,
            streams: None,
            start_pipe: true,
        };
        let mut started = launch.start(&self.children)?;
        let late = || Error::deadline(format!("create container {}: it took longer than {bound:?}", entry.id));
        let work = async {
            let parent = self.cfg.monitor_cgroup.as_deref();
            monitor::place(parent, handler.systemd_cgroup, &entry.id, started.pid()).await;
            started.release();
            let forked = started.child.wait().await.status;
            *born = monitor_of(dir)?;
            if forked != ExitStatus::Code(0) {
                let words = started.words().unwrap_or_else(|| "it said nothing".into());
                return Err(Error::internal(format!("the monitor failed: {}: {words}", ended(forked))));
            }
            step("the monitor's word of the container", self.created(dir, &mut started)).await
        };
        let done = tokio::select! {
            biased;
            done = timeout_at(deadline, work) => done.unwrap_or_else(|_| Err(late())),
            () = entry.cancel.notified() => {
                Err(Error::new(ErrorKind::Cancelled, format!("create container {}: it was killed meanwhile", entry.id)))
            }
        };
        if done.is_err() {
            self.end_first_fork(started).await;
            if born.is_none() {
                *born = monitor_of(dir)?;
            }
        }
        done
    }

    /// What the sync pipe says of the create.
    async fn created(&self, dir: &Path, started: &mut Started) -> Result<u32> {
        let said = match started.sync.next().await {
            Ok(Some(line)) => match u32::try_from(line.number) {
                Ok(pid) if pid > 0 => return Ok(pid),
                _ => line.message,
            },
            Ok(None) => None,
            Err(e) => return Err(e),
        };
        let dir = dir.to_path_buf();
        let log = blocking(move || Ok(std::fs::read_to_string(monitor::runtime_log(&dir)).unwrap_or_default()));
        Err(runtime_error("create", &log.await?, said.or_else(|| started.words())))
    }

    /// The process that we bore is gone, one way or the other.
    async fn end_first_fork(&self, started: Started) {
        if !started.child.has_ended()
            && let Ok(Some(process)) = Process::open(started.pid(), || true)
        {
            kill_tree(&process, super::Timeouts::default().cleanup).await;
        }
        started.child.wait().await;
    }

    /// Holds what was created by its pidfds; where init can't be held, the monitor stays
    /// the caller's.
    fn hold(&self, dir: &Path, entry: &Task, born: &mut Option<Process>, pid: u32) -> Result<Live> {
        // The monitor is the subreaper of its container: another's child with this
        // number is another process.
        let of_monitor = born.as_ref().map(Process::pid);
        let init = Process::open(pid, || of_monitor.is_none() || parent(pid) == of_monitor)?;
        Ok(self.live(dir, entry, born.take().map(Arc::new), init))
    }

    pub(super) fn live(&self, dir: &Path, entry: &Task, monitor: Option<Arc<Process>>, init: Option<Process>) -> Live {
        let cgroup = init.as_ref().and_then(|i| Cgroup::of(i32::try_from(i.pid()).ok()?).ok()).unwrap_or_default();
        let fifo = entry.record.io.stdin.as_ref().filter(|_| monitor.is_some());
        let stdin = fifo.map(|fifo| Feed::start(fifo.clone(), dir.to_path_buf()));
        Live { init, monitor, cgroup, stdin }
    }

    /// Undoes a failed create: the monitor and its runtime call, so that none of them
    /// brings the container back; the container; mounts and bundle. Returns the
    /// error, with what else failed.
    async fn unmake(&self, dir: &Path, entry: &Task, born: Option<Option<Process>>, e: Error) -> Error {
        let (id, handler) = (&entry.id, &entry.record.handler);
        let mut e = e;
        if let Some(monitor) = born {
            if let Some(monitor) = monitor
                && !kill_tree(&monitor, handler.timeouts.cleanup).await
            {
                e = e.hint(format!("its monitor, process {}, does not die of SIGKILL", monitor.pid()));
            }
            match self.runtime(handler, dir).delete(id, true).await {
                Err(more) if !more.is_not_found() => e = e.hint(more.to_string()),
                _ => {}
            }
            if !handler.systemd_cgroup {
                monitor::remove_cgroup(self.cfg.monitor_cgroup.as_deref(), id).await;
            }
            self.remove_stray_cgroup(dir, id).await;
        }
        let _ = self.exits.forget(id);
        let d: PathBuf = dir.to_path_buf();
        match blocking(move || forget_mounts(&d)).await {
            Ok(()) => e,
            Err(more) => e.hint(more.to_string()),
        }
    }

    /// Ends what of a container lies there without being in the table.
    pub(super) async fn remove_leftovers(&self, pod: &str, id: &str) -> Result<()> {
        let dir = self.bundle(pod, id);
        if let Some(monitor) = monitor_of(&dir)? {
            kill_tree(&monitor, super::Timeouts::default().cleanup).await;
        }
        if let Some(handler) = self.handler_of(&dir) {
            match self.runtime(&handler, &dir).delete(id, true).await {
                Err(e) if !e.is_not_found() => return Err(e),
                _ => {}
            }
        }
        monitor::remove_cgroup(self.cfg.monitor_cgroup.as_deref(), id).await;
        self.remove_stray_cgroup(&dir, id).await;
        self.exits.forget(id)?;
        blocking(move || forget_mounts(&dir)).await
    }

    /// A runtime's create that was killed may have made the container's cgroup and not
    /// yet noted that there is a container: its delete then knows of nothing.
    async fn remove_stray_cgroup(&self, dir: &Path, id: &str) {
        let d = dir.to_path_buf();
        let scrubbed = blocking(move || {
            cgroup::scrub(&d);
            Ok(())
        });
        if let Err(e) = scrubbed.await {
            tracing::warn!(container = id, error = %e, "its cgroup may stay");
        }
    }

    /// The handler that began what lies there, else today's default one.
    pub(super) fn handler_of(&self, dir: &Path) -> Option<Handler> {
        Record::load(dir).map(|r| self.cfg.today(r.handler)).ok().or_else(|| self.cfg.handlers.first().cloned())
    }
}

/// The error of a runtime call behind a monitor: the runtime's own last words where
/// it has logged some, else what the monitor passes on.
pub(crate) fn runtime_error(call: &str, log: &str, said: Option<String>) -> Error {
    let words = oci::last_error(log).or_else(|| said.as_deref().and_then(oci::last_error));
    match words {
        Some(words) => Error::new(oci::kind_of(&words), format!("{call}: {words}")),
        None => Error::internal(format!("{call}: the monitor has gone without a word")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_the_runtimes_own_words_where_there_are_any() {
        let log = r#"{"level":"error","msg":"exec: \"nope\": executable file not found in $PATH","time":"t"}"#;
        let e = runtime_error("create", log, Some("something else".into()));
        assert_eq!(e.kind(), ErrorKind::InvalidArgument);
        assert!(e.to_string().contains("nope"), "{e}");
        let e = runtime_error("create", "", Some("a\nno space left on device\n".into()));
        assert_eq!(e.kind(), ErrorKind::ResourceExhausted);
        assert!(runtime_error("create", "", None).to_string().contains("without a word"));
    }

    #[test]
    fn a_colon_in_a_log_path_is_refused_by_name() {
        assert!(check_log_path(Path::new("/var/log/pods/a_b/c/0.log")).is_ok());
        assert!(check_log_path(Path::new("/a:b")).unwrap_err().to_string().contains("/a:b"));
    }
}
