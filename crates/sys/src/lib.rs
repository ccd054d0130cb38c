//! All unsafe code: descriptors, pidfds, namespaces, mounts, terminals.
pub mod clock;
pub mod fork;
pub mod malloc;
pub mod pidfd;
pub mod process;
pub mod pty;
pub mod signals;
pub mod spawn;

pub mod link;
pub mod loopdev;
pub mod mount;
pub mod namespace;
pub mod netlink;
pub mod ns_helper;
