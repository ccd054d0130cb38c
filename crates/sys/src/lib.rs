//! All unsafe code: descriptors, pidfds, namespaces, mounts, terminals.
