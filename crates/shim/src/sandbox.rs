//! The sandbox service, for callers that manage pods through it.
//!
//! A sandbox of ours is not a process: its namespaces are its caller's, as are
//! its containers, which are tasks of this shim. So its pid is 0, and what can be
//! told of it is whether it was started, when it was stopped, and what its
//! containers use together.
//!
//! ```text
//! (none) --create--> Created --start--> Ready --stop--> Stopped --shutdown--> the shim ends
//! ```

use crate::container::{Exited, Msg};
use crate::shared::{Shared, ask};
use crate::wire;
use async_trait::async_trait;
use prost::Message;
use proto::cgroups::{v1, v2};
use proto::containerd::runtime::sandbox::v1 as api;
use proto::containerd::types::{Metric, Platform};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{oneshot, watch};
use ttrpc::r#async::TtrpcContext;
use types::{Error, Result, Signal};

/// How long Stop waits for the containers where the caller sets no bound.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Life {
    Created,
    Ready { since: SystemTime },
    Stopped { since: Option<SystemTime>, at: SystemTime },
}

/// The one sandbox of this shim.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct State(Option<(String, Life)>);

impl State {
    fn create(&mut self, id: &str) -> Result<()> {
        match &self.0 {
            Some((other, _)) => Err(Error::exists(format!("sandbox {other} exists already in this shim"))),
            None => {
                self.0 = Some((id.to_string(), Life::Created));
                Ok(())
            }
        }
    }

    fn life(&self, id: &str) -> Result<&Life> {
        match &self.0 {
            Some((own, life)) if own == id => Ok(life),
            _ => Err(Error::not_found(format!("sandbox {id}"))),
        }
    }

    fn start(&mut self, id: &str, now: SystemTime) -> Result<SystemTime> {
        match self.life(id)? {
            Life::Created => {}
            Life::Ready { .. } => return Err(Error::precondition(format!("sandbox {id} is started already"))),
            Life::Stopped { .. } => return Err(Error::precondition(format!("sandbox {id} was stopped"))),
        }
        self.0 = Some((id.to_string(), Life::Ready { since: now }));
        Ok(now)
    }

    /// The first time counts.
    fn stop(&mut self, id: &str, now: SystemTime) -> Result<()> {
        let since = match self.life(id)? {
            Life::Created => None,
            Life::Ready { since } => Some(*since),
            Life::Stopped { .. } => return Ok(()),
        };
        self.0 = Some((id.to_string(), Life::Stopped { since, at: now }));
        Ok(())
    }

    fn stopped_at(&self) -> Option<SystemTime> {
        match &self.0 {
            Some((_, Life::Stopped { at, .. })) => Some(*at),
            _ => None,
        }
    }
}

/// Serves the sandbox of this shim.
pub(crate) struct Sandboxes {
    shared: Arc<Shared>,
    state: watch::Sender<State>,
}

impl Sandboxes {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, state: watch::channel(State::default()).0 }
    }

    fn change<T>(&self, how: impl FnOnce(&mut State) -> Result<T>) -> ttrpc::Result<T> {
        change(&self.state, how).map_err(wire::error)
    }

    fn known(&self, id: &str) -> ttrpc::Result<Life> {
        self.state.borrow().life(id).cloned().map_err(wire::error)
    }
}

/// Decides without awaiting anything, so that a call that is dropped has either
/// changed all or nothing.
fn change<T>(state: &watch::Sender<State>, how: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
    let mut result = Err(Error::internal("the sandbox was not asked"));
    state.send_modify(|s| result = how(s));
    result
}

/// Kills every container, those on their way up too, and waits for their ends, at most
/// for `patience`.
async fn end_containers(shared: &Shared, patience: Duration) -> Result<()> {
    let all = async {
        let mut exits = kill_containers(shared).await;
        shared.end_creations().await;
        // Those that were up before they could be ended.
        exits.extend(kill_containers(shared).await);
        for exit in &mut exits {
            let _ = exit.wait_for(Option::is_some).await;
        }
    };
    let bounded = tokio::time::timeout(patience, all).await;
    bounded.map_err(|_| Error::deadline(format!("the containers were killed and not all ended in {patience:?}")))
}

/// Kills every container that has an owner, and returns what tells of their ends.
async fn kill_containers(shared: &Shared) -> Vec<Exited> {
    let mut exits = Vec::new();
    for handle in shared.handles() {
        // The answer may come with the end only, which is waited for with all others'.
        let reply = oneshot::channel().0;
        let _ = handle.send(Msg::Kill { exec: None, signal: Signal::KILL, all: true, reply });
        // One that is gone by now needs no waiting.
        exits.extend(ask(&handle, "", |r| Msg::Wait(None, r)).await.ok());
    }
    exits
}

#[async_trait]
impl api::Sandbox for Sandboxes {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        req: api::CreateSandboxRequest,
    ) -> ttrpc::Result<api::CreateSandboxResponse> {
        types::check_identifier("sandbox id", &req.sandbox_id).map_err(wire::error)?;
        if !req.rootfs.is_empty() {
            let text = format!("sandbox {} has no process and so no root file system", req.sandbox_id);
            return Err(wire::error(Error::unimplemented(text)));
        }
        self.change(|s| s.create(&req.sandbox_id))?;
        Ok(api::CreateSandboxResponse {})
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        req: api::StartSandboxRequest,
    ) -> ttrpc::Result<api::StartSandboxResponse> {
        let since = self.change(|s| s.start(&req.sandbox_id, SystemTime::now()))?;
        Ok(api::StartSandboxResponse { pid: 0, created_at: Some(wire::timestamp(since)), spec: None })
    }

    async fn platform(&self, _: &TtrpcContext, _: api::PlatformRequest) -> ttrpc::Result<api::PlatformResponse> {
        let (architecture, variant) = architecture(std::env::consts::ARCH);
        let platform = Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: variant.into(),
            ..Default::default()
        };
        Ok(api::PlatformResponse { platform: Some(platform) })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        req: api::StopSandboxRequest,
    ) -> ttrpc::Result<api::StopSandboxResponse> {
        self.known(&req.sandbox_id)?;
        let patience = match req.timeout_secs {
            0 => PATIENCE,
            n => Duration::from_secs(n.into()),
        };
        // A task of its own: a stop, once begun, ends though its caller goes away.
        let (shared, state, id) = (self.shared.clone(), self.state.clone(), req.sandbox_id);
        let stopping = tokio::spawn(async move {
            end_containers(&shared, patience).await?;
            change(&state, |s| s.stop(&id, SystemTime::now()))
        });
        let stopped = stopping.await.unwrap_or_else(|e| Err(Error::internal("stop the sandbox").because(e)));
        stopped.map_err(wire::error)?;
        Ok(api::StopSandboxResponse {})
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        req: api::WaitSandboxRequest,
    ) -> ttrpc::Result<api::WaitSandboxResponse> {
        self.known(&req.sandbox_id)?;
        let mut watch = self.state.subscribe();
        let stopped = watch.wait_for(|s| s.stopped_at().is_some()).await.ok().and_then(|s| s.stopped_at());
        Ok(api::WaitSandboxResponse { exit_status: 0, exited_at: stopped.map(wire::timestamp) })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        req: api::SandboxStatusRequest,
    ) -> ttrpc::Result<api::SandboxStatusResponse> {
        let (ready, since, ended) = match self.known(&req.sandbox_id)? {
            Life::Created => (false, None, None),
            Life::Ready { since } => (true, Some(since), None),
            Life::Stopped { since, at } => (false, since, Some(at)),
        };
        let mut info = HashMap::new();
        if req.verbose {
            info.insert("shimPid".to_string(), std::process::id().to_string());
            info.insert("containers".to_string(), self.shared.handles().len().to_string());
        }
        Ok(api::SandboxStatusResponse {
            sandbox_id: req.sandbox_id,
            pid: 0,
            state: if ready { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" }.into(),
            info,
            created_at: since.map(wire::timestamp),
            exited_at: ended.map(wire::timestamp),
            extra: None,
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, req: api::PingRequest) -> ttrpc::Result<api::PingResponse> {
        self.known(&req.sandbox_id)?;
        Ok(api::PingResponse {})
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        req: api::ShutdownSandboxRequest,
    ) -> ttrpc::Result<api::ShutdownSandboxResponse> {
        self.known(&req.sandbox_id)?;
        if !self.shared.close() {
            let text = format!("sandbox {} still has containers", req.sandbox_id);
            return Err(wire::error(Error::precondition(text).hint("delete them first")));
        }
        // Whoever waits for it is answered before the shim is gone.
        self.change(|s| s.stop(&req.sandbox_id, SystemTime::now()))?;
        Ok(api::ShutdownSandboxResponse {})
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        req: api::SandboxMetricsRequest,
    ) -> ttrpc::Result<api::SandboxMetricsResponse> {
        self.known(&req.sandbox_id)?;
        let mut sum = Sum::default();
        for handle in self.shared.handles() {
            if let Ok(stats) = ask(&handle, "", Msg::Stats).await {
                sum.add(&stats);
            }
        }
        let metrics =
            Metric { timestamp: Some(wire::timestamp(SystemTime::now())), id: req.sandbox_id, data: sum.packed() };
        Ok(api::SandboxMetricsResponse { metrics: Some(metrics) })
    }
}

/// The name of an architecture as images and callers use it, and its variant.
fn architecture(rust: &str) -> (&str, &str) {
    match rust {
        "x86_64" => ("amd64", ""),
        "aarch64" => ("arm64", "v8"),
        "arm" => ("arm", "v7"),
        "x86" => ("386", ""),
        "powerpc64" => ("ppc64le", ""),
        "loongarch64" => ("loong64", ""),
        other => (other, ""),
    }
}

/// What the containers use together: CPU time, memory, processes. A node has
/// cgroups of one version, so only one of the two ever counts.
#[derive(Debug, Default)]
struct Sum {
    v1: Option<v1::Metrics>,
    v2: Option<v2::Metrics>,
}

impl Sum {
    fn add(&mut self, stats: &prost_types::Any) {
        if let Some(m) = decode::<v1::Metrics>(stats, "io.containerd.cgroups.v1.Metrics") {
            let sum = self.v1.get_or_insert_with(Default::default);
            let usage = sum.cpu.get_or_insert_with(Default::default).usage.get_or_insert_with(Default::default);
            let one = m.cpu.and_then(|c| c.usage).unwrap_or_default();
            usage.total += one.total;
            usage.kernel += one.kernel;
            usage.user += one.user;
            let (memory, one) = (sum.memory.get_or_insert_with(Default::default), m.memory.unwrap_or_default());
            memory.usage.get_or_insert_with(Default::default).usage += one.usage.unwrap_or_default().usage;
            memory.total_inactive_file += one.total_inactive_file;
            memory.rss += one.rss;
            sum.pids.get_or_insert_with(Default::default).current += m.pids.unwrap_or_default().current;
        } else if let Some(m) = decode::<v2::Metrics>(stats, "io.containerd.cgroups.v2.Metrics") {
            let sum = self.v2.get_or_insert_with(Default::default);
            let (cpu, one) = (sum.cpu.get_or_insert_with(Default::default), m.cpu.unwrap_or_default());
            cpu.usage_usec += one.usage_usec;
            cpu.user_usec += one.user_usec;
            cpu.system_usec += one.system_usec;
            let (memory, one) = (sum.memory.get_or_insert_with(Default::default), m.memory.unwrap_or_default());
            memory.usage += one.usage;
            memory.inactive_file += one.inactive_file;
            memory.anon += one.anon;
            sum.pids.get_or_insert_with(Default::default).current += m.pids.unwrap_or_default().current;
        }
    }

    /// Nothing where there is no container.
    fn packed(self) -> Option<prost_types::Any> {
        let one = self.v1.map(|m| proto::pack("io.containerd.cgroups.v1.Metrics", &m));
        one.or_else(|| self.v2.map(|m| proto::pack("io.containerd.cgroups.v2.Metrics", &m)))
    }
}

fn decode<M: Message + Default>(any: &prost_types::Any, name: &str) -> Option<M> {
    (any.type_url == name).then(|| M::decode(any.value.as_slice()).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::ErrorKind;

    #[test]
    fn a_sandbox_has_one_life() {
        let t = |n| SystemTime::UNIX_EPOCH + Duration::from_secs(n);
        let mut s = State::default();
        assert!(s.start("p", t(1)).unwrap_err().is_not_found());
        s.create("p").unwrap();
        assert_eq!(s.create("q").unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert!(s.stop("q", t(1)).unwrap_err().is_not_found());
        s.start("p", t(2)).unwrap();
        assert_eq!(s.start("p", t(3)).unwrap_err().kind(), ErrorKind::FailedPrecondition);
        s.stop("p", t(4)).unwrap();
        s.stop("p", t(5)).unwrap();
        assert_eq!(s.stopped_at(), Some(t(4)));
        assert_eq!(s.start("p", t(6)).unwrap_err().kind(), ErrorKind::FailedPrecondition);
    }

    #[test]
    fn figures_add_up() {
        let one = v2::Metrics {
            pids: Some(v2::PidsStat { current: 2, limit: 0 }),
            memory: Some(v2::MemoryStat { usage: 10, ..Default::default() }),
            ..Default::default()
        };
        let mut sum = Sum::default();
        for _ in 0..3 {
            sum.add(&proto::pack("io.containerd.cgroups.v2.Metrics", &one));
        }
        let all = decode::<v2::Metrics>(&sum.packed().unwrap(), "io.containerd.cgroups.v2.Metrics").unwrap();
        assert_eq!((all.pids.unwrap().current, all.memory.unwrap().usage), (6, 30));
        assert!(Sum::default().packed().is_none());
    }
}
