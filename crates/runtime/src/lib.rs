//! The runtime seam: how the daemon runs containers without knowing what runs
//! them.
//!
//! ```text
//!  pods ──► trait Runtime ◄── router: by the pod's handler
//!               │                ├──► shim_v2/  one shim per pod, over ttrpc
//!               │                └──► conmon/   one monitor per container
//!               └─────────────► fake      in memory, feature `test-util`
//!  pods ◄── RuntimeEvent ◄──── exits come back only as events
//! ```
//!
//! A process boundary lies behind the trait; the fake stands beside it.

mod api;
mod bundle;
mod cgroup;
pub mod conmon;
mod detach;
#[cfg(feature = "test-util")]
pub mod fake;
mod holders;
mod holdings;
mod ops;
mod router;
pub mod shim_v2;
pub mod trust;

pub use api::*;
pub use router::Runtimes;
