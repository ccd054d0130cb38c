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

/// Whether the kernel is of this release or later.
///
/// # Panics
/// Where /proc is not mounted.
pub fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|n| n.trim().parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(major), Some(minor))
}

/// Makes a program of `text`, a script with its `#!`.
///
/// A process of its own writes it: what another test forks at that moment would keep our
/// descriptor until its exec, and a file that somebody has open for writing can't be
/// executed (ETXTBSY).
///
/// # Panics
/// Where it can't be written.
pub fn script(path: &std::path::Path, text: impl AsRef<std::ffi::OsStr>) {
    let write = r#"printf %s "$1" >"$0" && chmod 755 "$0""#;
    let status = std::process::Command::new("/bin/sh").args(["-c", write]).arg(path).arg(text).status().unwrap();
    assert!(status.success(), "{} can't be written", path.display());
}
