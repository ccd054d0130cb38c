//! Images: references, registries, the content store, unpacking, garbage collection.
//!
//! ```text
//! pull   ── registry/ ──┐
//!                       ├─▶ install ─▶ unpack/ ─▶ snapshots (a layer each)
//! import ── archive ────┘          └─▶ database (configuration, names, manifest)
//! ```
//!
//! Everything from outside is verified against its digest before it is used,
//! and bounded before it is read. Compressed layers are dropped once unpacked.

mod blobs;
mod config;
mod digest;
mod fs_info;
mod image;
mod images;
mod import;
mod install;
mod manifest;
mod platform;
mod reference;
mod registry;
mod unpack;

pub use config::{ImagesConfig, RegistryConfig};
pub use digest::{Digest, Hasher};
pub use fs_info::FsUsage;
pub use image::{Image, ImageId};
pub use images::Images;
pub use import::ImportedImage;
pub use platform::Platform;
pub use reference::{Reference, Selector};
pub use registry::Auth;
