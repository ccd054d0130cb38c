//! End to end: the real binaries, real peers.
//!
//! A [`Daemon`] is a private one of ours, with directories, socket and cgroups of
//! its own, which leaves nothing behind when it is dropped, also when a test
//! panics. [`Cri`] speaks to any CRI socket.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that lacks its fixtures has to stop")]

mod client;
mod daemon;
mod handler;
mod net;
mod node;
mod peer;

pub use client::{Cri, container, pod};
pub use daemon::{Daemon, IMAGE, bin_dir, busybox, signal};
pub use handler::{Handler, handler, not_with, not_with_monitors};
pub use net::NodeNet;
pub use node::{
    Footprint, Leftovers, children, command_line, in_pid_namespace, namespace, netns, open_fds, own_memory_kib,
    pss_kib, wait_for,
};
pub use peer::Containerd;
