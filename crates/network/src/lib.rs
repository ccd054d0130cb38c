//! A pod's network namespace and what is in it.
//!
//! ```text
//! netns.rs   where the namespaces are pinned
//! types.rs   what a pod asks of its network and what it gets
//! ```
//!
//! A new namespace has `lo` up (`sys::namespace` does that while it makes it) and
//! nothing else.

mod netns;
mod types;

pub use self::types::{AttachRequest, Attachment, Bandwidth, Dns, INTERFACE, Mac, Net, PortMapping, Protocol};
pub use netns::NetnsDir;
