//! The pod itself: stop, remove, the death of its shim or init.

use super::{Done, Owner, Reply, answer};
use crate::events::EventKind;
use crate::journal::Write;
use crate::ops;
use crate::state::{PodInfo, PodPhase};
use runtime::PodProcess;
use std::sync::atomic::Ordering;
use std::time::Duration;
use types::{Error, Result};

impl Owner {
    /// The pod is being stopped or removed: nothing new may begin in it.
    pub(super) fn is_going(&self) -> bool {
        self.stop.is_some() || self.remove.is_some() || self.gone
    }

    pub(super) fn stop_pod(&mut self, reply: Reply<()>) {
        if self.stop.is_none() && self.pod.state.torn_down && self.slots.values().all(|s| s.is_quiet()) {
            if self.unsaved.load(Ordering::Acquire) {
                // Stopped, but a full disk may have kept that from being stored.
                self.set_pod(PodInfo::clone(&self.pod), move |saved| answer(vec![reply], &saved));
            } else {
                let _ = reply.send(Ok(()));
            }
            return;
        }
        self.begin_stop(Some(reply));
    }

    fn begin_stop(&mut self, reply: Option<Reply<()>>) {
        if let Some(waiters) = &mut self.stop {
            waiters.extend(reply);
            return;
        }
        self.stop = Some(reply.into_iter().collect());
        self.stop_errors.clear();
        let ids: Vec<String> = self.slots.keys().cloned().collect();
        for id in ids {
            self.stop_container(&id, Duration::ZERO, "StopPodSandbox", None);
        }
    }

    pub(super) fn remove_pod(&mut self, reply: Reply<()>) {
        self.remove.get_or_insert_default().push(reply);
    }

    /// Takes the next step of whatever was asked for, as soon as what it waits for
    /// has ended. Called after every message.
    pub(super) fn progress(&mut self) {
        let ready: Vec<String> = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.remove.is_some() && !slot.removing && slot.is_quiet())
            .map(|(id, _)| id.clone())
            .collect();
        for id in ready {
            self.begin_removal(&id);
        }
        // Before the stop, which a removal may ask for.
        if self.remove.is_some() && !self.removing && self.stop.is_none() {
            self.progress_removal();
        }
        if self.stop.is_some() && !self.stopping && self.creating.is_empty() && self.all_ended() {
            self.stopping = true;
            let context = self.context();
            self.spawn(async move { Done::PodStopped(ops::stop_pod(&context).await) });
        }
    }

    /// Every container is quiet, or could not even be killed.
    fn all_ended(&self) -> bool {
        self.slots.values().all(|slot| slot.is_quiet() || (slot.unkillable && slot.stop.is_none()))
    }

    fn progress_removal(&mut self) {
        if !self.pod.state.torn_down || self.slots.values().any(|s| s.is_running() || s.start.is_some()) {
            self.begin_stop(None);
            return;
        }
        if !self.creating.is_empty() {
            return;
        }
        if self.slots.is_empty() {
            self.removing = true;
            let context = self.context();
            self.spawn(async move { Done::PodRemoved(ops::remove_pod(&context).await) });
            return;
        }
        let idle: Vec<String> =
            self.slots.iter().filter(|(_, s)| s.is_quiet() && !s.removing).map(|(id, _)| id.clone()).collect();
        for id in idle {
            if let Some(slot) = self.slots.get_mut(&id) {
                slot.remove.get_or_insert_default();
            }
            self.begin_removal(&id);
        }
    }

    pub(super) fn pod_stopped(&mut self, result: Result<()>) {
        self.stopping = false;
        let waiters = self.stop.take().unwrap_or_default();
        let mut errors = std::mem::take(&mut self.stop_errors);
        errors.extend(result.err());
        let outcome = Error::join(&format!("stop pod {}", self.pod.name()), errors);
        if let Err(e) = &outcome {
            answer(self.remove.take().unwrap_or_default(), &Err(e.copy()));
            // Still READY: the kubelet asks again, and what is left is tried again.
            answer(waiters, &outcome);
            return;
        }
        let mut next = PodInfo::clone(&self.pod);
        let was_ready = next.state.phase == PodPhase::Ready;
        next.state.phase = PodPhase::NotReady;
        next.state.torn_down = true;
        next.state.process = None;
        next.state.init_pid = 0;
        next.state.network = network::PodNetwork::default();
        self.set_pod(next, move |saved| answer(waiters, &saved));
        if was_ready {
            let id = self.pod.id.clone();
            self.announce(&id, EventKind::Stopped);
        }
    }

    /// Nothing of it is left on the node: its record goes, and only then its name,
    /// so that a retry after a full disk finds it again.
    pub(super) fn pod_removed(&mut self, result: Result<()>) {
        if result.is_err() {
            self.removing = false;
            answer(self.remove.take().unwrap_or_default(), &result);
            return;
        }
        let mailbox = self.mailbox.clone();
        self.shared.journal.submit(Write::DeletePod(self.pod.id.clone()), move |saved| {
            let _ = mailbox.send(super::Msg::Done(Done::PodForgotten(saved)));
        });
    }

    pub(super) fn pod_forgotten(&mut self, saved: Result<()>) {
        self.removing = false;
        let waiters = self.remove.take().unwrap_or_default();
        if saved.is_ok() {
            self.gone = true;
            let id = self.pod.id.clone();
            self.shared.timelines.remove(&id);
            // The record of a container that could not be read went with the pod's.
            self.shared.quarantine.release_pod(&id);
            self.shared.registry.remove_pod(&self.key, &id);
            self.shared.events.send(&id, EventKind::Deleted, None);
        }
        answer(waiters, &saved);
    }

    /// The shim's containers have been reported before. The pod's namespaces are
    /// pinned by the daemon, so that it stays READY, but not where its init died too.
    pub(super) fn shim_gone(&mut self) {
        self.init_ended.send_replace(true);
        if self.pod.state.phase == PodPhase::NotReady {
            return;
        }
        let mut next = PodInfo::clone(&self.pod);
        next.state.process = None;
        let lost_init = next.state.init;
        if lost_init {
            next.state.phase = PodPhase::NotReady;
            next.state.init_pid = 0;
        }
        tracing::warn!(
            "the shim of pod {} ({:.12}) has died; {}",
            self.pod.name(),
            self.pod.id,
            if lost_init { "its init died with it: the pod is NOTREADY" } else { "the next start begins a new one" }
        );
        self.set_pod(next, log_failure);
        if lost_init {
            let id = self.pod.id.clone();
            self.announce(&id, EventKind::Stopped);
        }
    }

    pub(super) fn shim_started(&mut self, process: PodProcess) {
        if self.pod.state.process.as_ref() != Some(&process) {
            let mut next = PodInfo::clone(&self.pod);
            next.state.process = Some(process);
            self.set_pod(next, log_failure);
        }
    }

    /// The init of a pod-shared pid namespace has ended, and with it every
    /// container in that namespace, whose exits are reported on their own.
    pub(super) fn init_gone(&mut self) {
        self.init_ended.send_replace(true);
        if self.pod.state.phase == PodPhase::NotReady || self.stop.is_some() {
            return;
        }
        tracing::warn!("the init of pod {} ({:.12}) has ended: the pod is NOTREADY", self.pod.name(), self.pod.id);
        let mut next = PodInfo::clone(&self.pod);
        next.state.phase = PodPhase::NotReady;
        next.state.init_pid = 0;
        self.set_pod(next, log_failure);
        let id = self.pod.id.clone();
        self.announce(&id, EventKind::Stopped);
    }
}

pub(super) fn log_failure(saved: Result<()>) {
    if let Err(e) = saved {
        tracing::warn!("a pod's change is not in the database yet: {e}");
    }
}
