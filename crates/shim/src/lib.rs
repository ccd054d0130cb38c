//! The shim: ttrpc services, task states, exit ordering.
//!
//! ```text
//! service.rs, sandbox.rs, private.rs  ttrpc: validate, ask the owner, answer
//! setup.rs, rootfs.rs      Create, from request to owner
//! container.rs             the owner: carries out what is decided
//! exec.rs, exit.rs, control.rs, checkpoint.rs, restore.rs  the rest of what is asked of it
//! state.rs                 what may be done and what follows (pure)
//! streams.rs               URIs to descriptors, through `stdio`
//! oom.rs stats.rs          the container's cgroups
//! events.rs                to the caller, in order
//! persist.rs               what outlives the shim, in the bundle
//! options.rs info.rs       the caller's options; what this runtime can
//! bootstrap.rs             what `start` is told and answers; groups
//! serve.rs, delete.rs, undo.rs  a shim's life; cleaning up after its death
//! ```

pub mod bootstrap;
mod checkpoint;
mod container;
mod control;
mod delete;
mod events;
mod exec;
mod exit;
mod info;
pub mod log;
mod oom;
mod options;
pub mod persist;
mod private;
mod restore;
mod rootfs;
mod sandbox;
mod serve;
mod service;
mod setup;
mod shared;
mod shim_cgroup;
mod state;
mod stats;
mod streams;
mod undo;
mod wire;

pub use delete::delete;
pub use info::runtime_info;
pub use oci::idmap::short_name;
pub use serve::serve;
pub use service::decode_delete;
pub use shared::Settings;
pub use shim_cgroup::join as join_cgroup;
