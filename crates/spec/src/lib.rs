//! From CRI configuration, image configuration and node defaults to an OCI runtime specification.
