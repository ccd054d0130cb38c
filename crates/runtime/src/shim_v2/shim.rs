//! A shim that runs: its connection, its process, what it can.

use super::bootstrap::Bootstrap;
use super::config::{Handler, Timeouts};
use super::connection::Connection;
use super::rpc::{Fault, call};
use crate::api::SandboxKind;
use proto::containerd::runtime::sandbox::v1::SandboxClient;
use proto::containerd::task::v3::{ConnectRequest, TaskClient};
use proto::longshore_shim::{FeaturesRequest, LongshoreClient};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use types::{Error, Result, ResultExt};

/// How long a process may still be ending once its connection is closed.
const DYING: Duration = Duration::from_millis(500);

/// A connected shim.
pub(crate) struct Shim {
    pub(crate) pod: String,
    pub(crate) pid: u32,
    /// What our private service says it can; empty for a foreign shim.
    features: Vec<String>,
    pub(crate) bootstrap: Bootstrap,
    /// With what it was begun.
    pub(crate) handler: Handler,
    process: AsyncFd<OwnedFd>,
    connection: Mutex<Connection>,
}

impl Shim {
    /// Connects, asks for the pid and for what the shim can, and takes a pidfd.
    pub(crate) async fn connect(pod: &str, bootstrap: Bootstrap, handler: Handler) -> Result<Self> {
        let bound = handler.timeouts.load;
        let client = Connection::dial(&bootstrap).await?;
        let what = || format!("connect to the shim of pod {pod} at {}", bootstrap.address);
        let task = TaskClient::new(client.clone(), bootstrap.task_service());
        let own = LongshoreClient::new(client.clone(), LongshoreClient::SERVICE);
        let (connected, features) = tokio::join!(
            call(bound, task.connect(bound, ConnectRequest { id: pod.to_string() })),
            call(bound, own.features(bound, FeaturesRequest {}))
        );
        let pid = connected.map_err(|e| e.within(&what(), bound))?.shim_pid;
        let features = match features {
            Ok(f) => f.features,
            Err(Fault::Status(..)) => Vec::new(),
            Err(e) => return Err(e.within(&what(), bound)),
        };
        let raw = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        let Some(raw) = raw else {
            return Err(Error::internal(format!("{}: it says that its pid is {pid}", what())));
        };
        let fd = match pidfd_open(raw, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => {
                return Err(Error::unavailable(format!("{}: its process {pid} is gone", what())));
            }
            other => other.context(|| format!("{}: hold its process {pid}", what()))?,
        };
        let process = stdio::watch(fd, Interest::READABLE).context(|| format!("{}: watch process {pid}", what()))?;
        Ok(Self { pod: pod.to_string(), pid, features, bootstrap, handler, process, connection: Mutex::new(client) })
    }

    /// True where the shim has our private service.
    pub(crate) fn own(&self) -> bool {
        !self.features.is_empty()
    }

    /// True where the shim has this feature of our private service.
    pub(crate) fn can(&self, feature: &str) -> bool {
        self.features.iter().any(|f| f == feature)
    }

    /// How long it is waited for what.
    pub(crate) fn timeouts(&self) -> &Timeouts {
        &self.handler.timeouts
    }

    fn client(&self) -> Connection {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The task service.
    pub(crate) fn task(&self) -> TaskClient<Connection> {
        TaskClient::new(self.client(), self.bootstrap.task_service())
    }

    /// True where `id` is the pod's own and the shim itself is its sandbox.
    pub(crate) fn is_sandbox(&self, id: &str) -> bool {
        self.handler.sandbox == SandboxKind::Shim && id == self.pod
    }

    /// The sandbox service.
    pub(crate) fn sandbox(&self) -> SandboxClient<Connection> {
        SandboxClient::new(self.client(), SandboxClient::SERVICE)
    }

    /// Our private service.
    pub(crate) fn longshore(&self) -> LongshoreClient<Connection> {
        LongshoreClient::new(self.client(), LongshoreClient::SERVICE)
    }

    /// Dials again after the connection broke while the process lives.
    pub(crate) async fn reconnect(&self) -> Result<()> {
        let fresh = Connection::dial(&self.bootstrap).await?;
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// Whether the process lives though its connection broke: one that dies closes it a
    /// moment before its end.
    pub(crate) async fn outlives_connection(&self) -> bool {
        tokio::time::timeout(DYING, self.exited()).await.is_err()
    }

    /// Ends when the process has ended; any number may wait.
    pub(crate) async fn exited(&self) {
        // A pidfd stays readable for ever, so the readiness is never cleared.
        if let Err(e) = self.process.readable().await {
            tracing::error!(pod = self.pod, pid = self.pid, error = %e, "the shim's process can't be watched");
            std::future::pending::<()>().await;
        }
    }

    /// Whether the process has ended, asked of the kernel now.
    pub(crate) fn is_dead(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(self.process.get_ref(), PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
    }

    /// SIGKILL to the very process that the pidfd means.
    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(self.process.get_ref(), Signal::KILL);
    }
}
