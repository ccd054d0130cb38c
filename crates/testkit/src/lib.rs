//! For tests only: temporary roots, test images, peers' daemons.
//!
//! Everything here cleans up after itself when dropped, also when a test panics,
//! and panics itself where it can't do what it was asked: a test can't go on then.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

mod image;
mod registry;
mod root;

pub use image::{Entry, ImageBuilder, Layer, LayerCompression, sha256};
pub use registry::{Registry, registry, registry_tls};
pub use root::TempRoot;
