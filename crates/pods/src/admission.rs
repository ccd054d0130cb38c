//! Who may do what in which state: decided purely, before anything is touched.

use crate::state::{ContainerInfo, ContainerState, PodInfo, PodPhase};
use types::{Error, Result};

fn ready(pod: &PodInfo, going: bool) -> Result<()> {
    if going {
        return Err(Error::precondition(format!("pod {} ({:.12}) is being stopped", pod.name(), pod.id)));
    }
    match pod.state.phase {
        PodPhase::Ready => Ok(()),
        PodPhase::NotReady => Err(Error::precondition(format!("pod {} ({:.12}) is not ready", pod.name(), pod.id))
            .hint("a stopped pod can't run containers again: make a new one")),
    }
}

/// May a container of this name be made? `holder` is the one that has it.
pub fn create(pod: &PodInfo, going: bool, key: &str, holder: Option<&str>) -> Result<()> {
    ready(pod, going)?;
    match holder {
        None => Ok(()),
        Some(id) => Err(Error::exists(format!("container {key} exists in pod {} already, as {id:.12}", pod.name()))
            .hint("remove it first, or use the next attempt number")),
    }
}

/// May this container be started?
pub fn start(pod: &PodInfo, going: bool, container: &ContainerInfo, removing: bool, busy: bool) -> Result<()> {
    let name = container.name_key();
    if removing {
        return Err(Error::precondition(format!("container {name} ({:.12}) is being removed", container.id)));
    }
    if *container.state() != ContainerState::Created {
        return Err(Error::precondition(format!(
            "container {name} ({:.12}) is in {} state; only a created one can be started, once",
            container.id,
            container.state().name()
        )));
    }
    if busy {
        return Err(Error::unavailable(format!(
            "container {name} ({:.12}) is being updated or cleaned up after a restart; try again",
            container.id
        )));
    }
    ready(pod, going)
}

/// May a command be run in this container? Gives its init's pid.
pub fn exec(container: &ContainerInfo) -> Result<u32> {
    match container.state() {
        ContainerState::Running { pid, .. } => Ok(*pid),
        other => Err(Error::precondition(format!(
            "container {} ({:.12}) is in {} state; a command needs a running one",
            container.name_key(),
            container.id,
            other.name()
        ))),
    }
}

/// May this container's limits be changed?
pub fn update(container: &ContainerInfo, starting: bool) -> Result<()> {
    let name = container.name_key();
    match container.state() {
        ContainerState::Created if starting => {
            Err(Error::unavailable(format!("container {name} ({:.12}) is being started; try again", container.id)))
        }
        ContainerState::Created | ContainerState::Running { .. } => Ok(()),
        other => Err(Error::precondition(format!(
            "container {name} ({:.12}) is in {} state; its limits can't change any more",
            container.id,
            other.name()
        ))),
    }
}
