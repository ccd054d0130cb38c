//! The CRI surface over gRPC: validate, call, map; a file per group of RPCs.
//!
//! ```text
//! socket ─► authority (filter) ─► tonic ─► server ─► pods.rs       ─► crates pods,
//!                                             │      containers.rs     images
//!                                             │      exec_sync.rs
//!                                             │      images.rs
//!                                             │      node.rs
//!                                             └────► admin.rs (our own service)
//! ```
//!
//! Nothing here keeps state or changes it: a handler may be dropped at any await.

mod admin;
mod authority;
mod containers;
mod errors;
mod exec_sync;
mod images;
mod map;
mod node;
mod pods;
mod server;

pub use authority::LenientAuthority;
pub use node::{Condition, Node};
pub use server::{Cri, serve};
