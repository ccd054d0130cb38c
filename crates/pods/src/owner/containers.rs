//! Containers: create, start, exit, stop, remove, update.

use super::{Creating, Done, Owner, Reply, Slot, StartOp, StopOp, answer};
use crate::admission;
use crate::events::EventKind;
use crate::journal::Write;
use crate::ops;
use crate::state::{ContainerInfo, ContainerState, container_key};
use proto::cri::{ContainerConfig, LinuxContainerResources};
use runtime::TaskState;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use types::{Certificate, Error, Result};

/// Before an exit that the database refused is offered to it once more.
const SAVE_AGAIN: Duration = Duration::from_secs(2);
/// The longest that is waited between two attempts.
const SAVE_AT_LEAST: Duration = Duration::from_secs(60);

impl Owner {
    pub(super) fn create(&mut self, config: ContainerConfig, reply: Reply<String>) {
        let key = container_key(&config);
        // A retry while the first attempt still runs joins it [containerd#10828].
        if let Some(running) = self.creating.get_mut(&key) {
            running.waiters.push(reply);
            return;
        }
        let holder = self.slots.values().find(|s| s.info.name_key() == key).map(|s| s.info.id.clone());
        if let Err(e) = admission::create(&self.pod, self.is_going(), &key, holder.as_deref()) {
            let _ = reply.send(Err(e));
            return;
        }
        let id = match types::new_id() {
            Ok(id) => id,
            Err(e) => {
                let _ = reply.send(Err(e));
                return;
            }
        };
        let _making = self.shared.registry.begin(&id);
        self.creating.insert(key.clone(), Creating { id: id.clone(), waiters: vec![reply], _making });
        let context = self.context();
        self.spawn(async move { Done::Created(key, ops::create(context, id, config).await) });
    }

    pub(super) fn created(&mut self, key: &str, result: Result<Box<ContainerInfo>>) {
        let Some(Creating { id, waiters, _making }) = self.creating.remove(key) else { return };
        let info = match result {
            Ok(info) => info,
            Err(e) => {
                for reply in waiters {
                    let _ = reply.send(Err(e.copy()));
                }
                return;
            }
        };
        let Some(handle) = self.handle.upgrade() else { return };
        self.shared.registry.add_container(&id, &handle);
        self.slots.insert(id.clone(), Slot::new(Arc::from(info)));
        self.announce(&id, EventKind::Created);
        for reply in waiters {
            let _ = reply.send(Ok(id.clone()));
        }
    }

    pub(super) fn start_container(&mut self, id: &str, reply: Reply<()>) {
        let going = self.is_going();
        let pod = self.pod.clone();
        let context = self.context();
        let Some(slot) = self.slots.get_mut(id) else {
            let _ = reply.send(Err(no_container(id)));
            return;
        };
        if let Some(op) = &mut slot.start {
            op.waiters.push(reply);
            return;
        }
        let busy = slot.deleting_task || !slot.updates.is_empty();
        if let Err(e) = admission::start(&pod, going, &slot.info, slot.remove.is_some(), busy) {
            let _ = reply.send(Err(e));
            return;
        }
        let (cancel, cancelled) = oneshot::channel();
        slot.start = Some(StartOp { cancel: Some(cancel), waiters: vec![reply], exit: None });
        let info = slot.info.clone();
        let id = id.to_string();
        self.spawn(async move {
            let result = ops::start(context, info, cancelled).await;
            Done::Started(id, result)
        });
    }

    pub(super) fn started(&mut self, id: &str, result: Result<u32>) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        let Some(op) = slot.start.take() else { return };
        let stops = std::mem::take(&mut slot.stop_after_start);
        let info = slot.info.clone();
        match result {
            Ok(pid) => {
                let state = ContainerState::Running { pid, started_at: SystemTime::now() };
                self.set_container(id, info.in_state(state), move |saved| answer(op.waiters, &saved));
                self.announce(id, EventKind::Started);
                if let Some(certificate) = op.exit {
                    self.exited(id, certificate);
                }
                for reply in stops {
                    self.stop_container(id, Duration::ZERO, "StopContainer", Some(reply));
                }
                // A stop or removal of the pod cancelled a start that was over already.
                let removed = self.slots.get(id).is_some_and(|slot| slot.remove.is_some());
                if op.cancel.is_none() || self.stop.is_some() || removed {
                    self.stop_container(id, Duration::ZERO, "StopPodSandbox", None);
                }
            }
            Err(e) => {
                let next = info.in_state(ContainerState::start_error(info.created_at, e.to_string()));
                if let Some(slot) = self.slots.get(id) {
                    slot.ended.send_replace(true);
                }
                let failed: Result<()> = Err(e);
                self.set_container(id, next, move |_| answer(op.waiters, &failed));
                self.announce(id, EventKind::Stopped);
                answer(stops, &Ok(()));
            }
        }
        self.shared.save_timeline(&self.pod.id);
    }

    /// An exit is recorded once, however often it is reported; its code and time
    /// never change afterwards (behaviours.md section 5).
    pub(super) fn exited(&mut self, id: &str, certificate: Certificate) {
        if self.pod.state.init && id == self.pod.id {
            self.init_gone();
            return;
        }
        let Some(slot) = self.slots.get_mut(id) else { return };
        if let Some(op) = &mut slot.start {
            op.exit.get_or_insert(certificate);
            return;
        }
        let ContainerState::Running { started_at, .. } = *slot.info.state() else { return };
        // The shim reaped it before the answer to its start was here.
        let started_at = started_at.min(certificate.exited_at);
        slot.deleting_task = true;
        let next = slot.info.in_state(ContainerState::exited(Some(started_at), certificate));
        self.save_exit(id, next, 0);
        self.announce(id, EventKind::Stopped);
    }

    fn save_exit(&mut self, id: &str, next: ContainerInfo, tries: u32) {
        let (owned, mailbox) = (id.to_string(), self.mailbox.clone());
        self.set_container(id, next, move |saved| {
            let _ = mailbox.send(super::Msg::Done(Done::ExitSaved(owned, saved, tries)));
        });
    }

    /// Only now may the bundle go, which knows the exit too. A database that can't take
    /// it is asked again and again; until it does, the bundle stays, for the next daemon.
    /// A container can be removed meanwhile: that can't wait for a full disk for ever.
    pub(super) fn exit_saved(&mut self, id: &str, saved: Result<()>, tries: u32) {
        let context = self.context();
        let Some(slot) = self.slots.get_mut(id) else { return };
        slot.ended.send_replace(true);
        if let Err(e) = saved {
            tracing::warn!("the exit of container {id:.12} is not in the database yet: {e}");
            slot.deleting_task = tries == 0;
            return self.offer_exit_again(id, tries);
        }
        if slot.removing {
            return;
        }
        slot.deleting_task = true;
        let id = id.to_string();
        self.spawn(async move {
            let result = ops::delete_task(&context, &id).await;
            Done::TaskDeleted(id, result)
        });
    }

    fn offer_exit_again(&self, id: &str, tries: u32) {
        let (id, mailbox) = (id.to_string(), self.mailbox.clone());
        tokio::spawn(async move {
            tokio::time::sleep((SAVE_AGAIN * 2u32.saturating_pow(tries)).min(SAVE_AT_LEAST)).await;
            let _ = mailbox.send(super::Msg::Done(Done::SaveExitAgain(id, tries + 1)));
        });
    }

    pub(super) fn save_exit_again(&mut self, id: &str, tries: u32) {
        match self.slots.get(id) {
            // Its record goes now, and must not come back; or it doesn't go.
            Some(slot) if slot.removing => self.offer_exit_again(id, tries),
            Some(slot) => {
                let info = ContainerInfo::clone(&slot.info);
                self.save_exit(id, info, tries);
            }
            None => {}
        }
    }

    /// Brings a container that an earlier daemon left in line with its task.
    pub(super) fn examined(&mut self, id: &str, was: &ContainerState, task: Option<TaskState>) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        // What this daemon has done meanwhile counts, and not what was found before it.
        if slot.info.state() != was || slot.start.is_some() || slot.deleting_task || slot.removing {
            return;
        }
        let (next, delete) = crate::recovery::reconcile(was, task);
        match next {
            None if delete => self.delete_old_task(id),
            None => {}
            Some(state @ ContainerState::Exited { .. }) => {
                slot.deleting_task = true;
                let next = slot.info.in_state(state);
                self.save_exit(id, next, 0);
                self.announce(id, EventKind::Stopped);
            }
            Some(state) => {
                let (next, removed) = (slot.info.in_state(state), slot.remove.is_some());
                self.set_container(id, next, super::pod::log_failure);
                self.announce(id, EventKind::Started);
                if removed || self.stop.is_some() {
                    self.stop_container(id, Duration::ZERO, "StopPodSandbox", None);
                }
            }
        }
    }

    /// Deletes what an earlier daemon left of a container's task.
    pub(super) fn delete_old_task(&mut self, id: &str) {
        let context = self.context();
        let Some(slot) = self.slots.get_mut(id) else { return };
        slot.deleting_task = true;
        let id = id.to_string();
        self.spawn(async move {
            let result = ops::end_task(&context, &id, "the daemon's restart").await;
            Done::TaskDeleted(id, result)
        });
    }

    pub(super) fn task_deleted(&mut self, id: &str, result: Result<()>) {
        if let Err(e) = result {
            tracing::warn!("cleaning up after the end of container {id}: {e}");
        }
        if let Some(slot) = self.slots.get_mut(id) {
            slot.deleting_task = false;
        }
    }

    /// Begins or hastens a stop; a container that is not there or does not run is
    /// stopped already.
    pub(super) fn stop_container(&mut self, id: &str, grace: Duration, why: &'static str, reply: Option<Reply<()>>) {
        let context = self.context();
        let Some(slot) = self.slots.get_mut(id) else {
            answer(reply.into_iter().collect(), &Ok(()));
            return;
        };
        if let Some(op) = &mut slot.start {
            if let Some(cancel) = op.cancel.take() {
                let _ = cancel.send(format!("{why} came before the container had started"));
            }
            slot.stop_after_start.extend(reply);
            return;
        }
        let wanted = Instant::now() + grace;
        if let Some(op) = &mut slot.stop {
            op.deadline.send_if_modified(|deadline| {
                let nearer = wanted < *deadline;
                if nearer {
                    *deadline = wanted;
                }
                nearer
            });
            op.waiters.extend(reply);
            return;
        }
        if !slot.is_running() {
            // Its exit may still be on its way to the database; whoever asks then
            // must find it there.
            let mut ended = slot.ended.subscribe();
            let created = matches!(slot.info.state(), ContainerState::Created);
            tokio::spawn(async move {
                if !created {
                    let _ = ended.wait_for(|e| *e).await;
                }
                answer(reply.into_iter().collect(), &Ok(()));
            });
            return;
        }
        let (deadline, deadline_rx) = watch::channel(wanted);
        slot.stop = Some(StopOp { deadline, waiters: reply.into_iter().collect() });
        let (info, ended) = (slot.info.clone(), slot.ended.subscribe());
        let id = id.to_string();
        self.spawn(async move {
            let result = ops::stop(&context, &info, deadline_rx, ended, why).await;
            Done::StopEnded(id, result)
        });
    }

    pub(super) fn stop_ended(&mut self, id: &str, result: Result<()>) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        slot.unkillable = result.is_err();
        if let Some(op) = slot.stop.take() {
            answer(op.waiters, &result);
        }
        if let Err(e) = result {
            if self.stop.is_some() {
                self.stop_errors.push(e.copy());
            }
            if let Some(waiters) = self.slots.get_mut(id).and_then(|s| s.remove.take()) {
                answer(waiters, &Err(e));
            }
        }
    }

    pub(super) fn remove_container(&mut self, id: &str, reply: Reply<()>) {
        let Some(slot) = self.slots.get_mut(id) else {
            let _ = reply.send(Ok(()));
            return;
        };
        slot.remove.get_or_insert_default().push(reply);
        if slot.start.is_some() || slot.is_running() {
            self.stop_container(id, Duration::ZERO, "RemoveContainer", None);
        }
    }

    pub(super) fn begin_removal(&mut self, id: &str) {
        let context = self.context();
        let Some(slot) = self.slots.get_mut(id) else { return };
        slot.removing = true;
        let info = slot.info.clone();
        self.spawn(async move {
            let result = ops::remove(&context, &info).await;
            Done::Removed(info.id.clone(), result)
        });
    }

    pub(super) fn removed(&mut self, id: &str, result: Result<()>) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        slot.removing = false;
        let waiters = slot.remove.take().unwrap_or_default();
        if result.is_err() {
            answer(waiters, &result);
            if let (Some(pod_waiters), Err(e)) = (self.remove.take(), &result) {
                answer(pod_waiters, &Err(e.copy()));
            }
            return;
        }
        slot.removing = true;
        slot.remove = Some(waiters);
        let (owned, mailbox) = (id.to_string(), self.mailbox.clone());
        self.shared.journal.submit(Write::DeleteContainer(id.to_string()), move |saved| {
            let _ = mailbox.send(super::Msg::Done(Done::Forgotten(owned, saved)));
        });
    }

    /// Its record is gone, and with it the container; or it is not, and a retry
    /// finds it again.
    pub(super) fn forgotten(&mut self, id: &str, saved: Result<()>) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        slot.removing = false;
        let waiters = slot.remove.take().unwrap_or_default();
        if saved.is_ok() {
            self.slots.remove(id);
            self.shared.registry.remove_container(id);
            self.announce(id, EventKind::Deleted);
        } else if let (Some(pod_waiters), Err(e)) = (self.remove.take(), &saved) {
            answer(pod_waiters, &Err(e.copy()));
        }
        answer(waiters, &saved);
    }

    pub(super) fn update(&mut self, id: &str, resources: Box<LinuxContainerResources>, reply: Reply<()>) {
        let Some(slot) = self.slots.get_mut(id) else {
            let _ = reply.send(Err(no_container(id)));
            return;
        };
        if let Err(e) = admission::update(&slot.info, slot.start.is_some()) {
            let _ = reply.send(Err(e));
            return;
        }
        slot.updates.push_back((resources, reply));
        if slot.updates.len() == 1 {
            self.next_update(id);
        }
    }

    /// One update at a time: the next one is merged into what this one leaves.
    fn next_update(&mut self, id: &str) {
        let context = self.context();
        let Some(slot) = self.slots.get(id) else { return };
        let Some((resources, _)) = slot.updates.front() else { return };
        let info = slot.info.clone();
        let merged = ops::merge_resources(info.record.resources.as_ref(), resources);
        self.spawn(async move {
            let result = ops::update(&context, &info, &merged).await;
            Done::Updated(info.id.clone(), Box::new(merged), result)
        });
    }

    pub(super) fn updated(&mut self, id: &str, merged: LinuxContainerResources, result: Result<()>) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        let Some((_, reply)) = slot.updates.pop_front() else { return };
        if result.is_err() {
            let _ = reply.send(result);
            self.next_update(id);
            return;
        }
        let mut next = ContainerInfo::clone(&slot.info);
        next.record.resources = Some(merged);
        self.set_container(id, next, move |saved| {
            let _ = reply.send(saved);
        });
        self.next_update(id);
    }
}

fn no_container(id: &str) -> Error {
    Error::not_found(format!("no container {id:?} exists"))
}
