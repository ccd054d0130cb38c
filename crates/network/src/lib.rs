//! A pod's network namespace and what is in it.
//!
//! So far: where the namespaces are pinned ([`NetnsDir`]). A new one has `lo` up
//! (`sys::namespace` does that while it makes it) and nothing else.

mod netns;

pub use netns::NetnsDir;
