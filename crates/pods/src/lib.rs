//! Pods, containers and execs: states, admission, recovery, events.
//!
//! ```text
//! manager.rs    the door: what the CRI surface calls
//! registry.rs   who is there, by id, prefix and name
//! owner/        the one task that owns a pod's state, a file per half
//! admission.rs  who may do what in which state, purely
//! ops/          the operations: all the IO, none of the state
//! exec.rs       ExecSync
//! handlers.rs   the runtime handlers
//! state.rs      what pods and containers are
//! journal.rs    writes to the database, in order
//! recovery.rs   what a new daemon finds
//! reconcile.rs  what exists against what should, now and then
//! quarantine.rs what can't be read, and how it is removed
//! health.rs     what an operator should know
//! sandbox/      namespaces, files and mounts of a pod on the node
//! network.rs    what a pod's network is asked for, purely
//! facts.rs      what the node and an image's rootfs say
//! ```

mod admission;
mod events;
mod exec;
pub mod facts;
mod handlers;
mod health;
mod journal;
mod manager;
mod network;
mod ops;
mod owner;
mod quarantine;
mod reconcile;
mod recovery;
mod registry;
pub mod sandbox;
mod shared;
mod signals;
mod state;

pub use events::{EventKind, Events, PodEvent};
pub use handlers::{Handler, Handlers};
pub use health::{Check, Health, Rounds, Trouble};
pub use journal::Journal;
pub use manager::{ContainerFilter, PodFilter, Pods, running_pid};
pub use quarantine::Quarantine;
pub use registry::Registry;
pub use runtime::Operation;
pub use shared::{PodsConfig, Shared};
pub use state::{ContainerInfo, ContainerRecord, ContainerState, ExitReason, PodInfo, PodPhase, PodState, PodView};

/// CRI's name of the signal that stops a container: its own, else its image's.
pub fn stop_signal_of(container: &ContainerInfo) -> proto::cri::Signal {
    match proto::cri::Signal::try_from(container.config.stop_signal).unwrap_or_default() {
        proto::cri::Signal::RuntimeDefault => signals::to_cri(&container.record.image_stop_signal),
        asked => asked,
    }
}
