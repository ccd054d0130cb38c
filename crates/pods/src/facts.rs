//! What a container's spec depends on and only the node or the image's files know.
//!
//! ```text
//! facts/node.rs     the kernel, the cgroups, the daemon's own rights: once, at start
//! facts/host.rs     the devices and mounts that one configuration names
//! facts/layered.rs  files of an image by its unpacked layers, before anything is mounted
//! facts/look.rs     how host paths are looked at that may never answer
//! facts/mountinfo.rs  /proc/self/mountinfo
//! ```
//!
//! All of it is blocking IO, mostly on local files in memory; `spec` decides.

mod host;
mod layered;
mod look;
mod mountinfo;
mod node;

pub use host::{host_facts, make_missing, read_profile};
pub use layered::LayeredRoot;
pub use look::{Look, looking};
pub use node::node_facts;
pub use spec::NodeFacts;

use spec::{RootfsFacts, UserRequest};
use std::io::BufReader;
use types::Result;

/// What the image's /etc/passwd and /etc/group say of the requested user. Files
/// that aren't there, or aren't files, say nothing.
///
/// # Errors
/// What can't be read, or is larger than `spec` reads (CVE-2026-47262); an image that leads
/// the runtime's own mounts elsewhere.
pub fn rootfs_facts(root: &LayeredRoot, request: &UserRequest) -> Result<RootfsFacts> {
    root.check_mount_points()?;
    let passwd = root.open("etc/passwd")?.map(BufReader::new);
    let group = root.open("etc/group")?.map(BufReader::new);
    RootfsFacts::scan(request, passwd, group)
}
