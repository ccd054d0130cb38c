//! The OCI runtime seam: the trait, and a runc-compatible binary behind it.
