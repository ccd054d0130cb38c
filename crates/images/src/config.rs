//! What the images' part of the daemon is told.

use crate::Platform;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Settings of [`crate::Images`].
#[derive(Debug, Clone)]
pub struct ImagesConfig {
    /// Where downloads are kept while they last; made 0700.
    pub root: PathBuf,
    /// By registry host (`docker.io`, `127.0.0.1:5000`), or `*` for all others.
    pub registries: BTreeMap<String, RegistryConfig>,
    /// How many layers of one image are downloaded at a time.
    pub max_downloads: usize,
    /// Which of an index's images is taken; the host's where `None`.
    pub platform: Option<Platform>,
    /// Names or ids of images that the kubelet may not collect.
    pub pinned: Vec<String>,
    /// Without a byte for so long a transfer is broken and is resumed.
    pub idle_timeout: Duration,
    /// A whole pull ends in an error after so long.
    pub pull_timeout: Duration,
    /// How often a transfer is tried again without having got any further.
    pub retries: u32,
}

impl ImagesConfig {
    /// The defaults, with downloads in `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            registries: BTreeMap::new(),
            max_downloads: 3,
            platform: None,
            pinned: Vec::new(),
            idle_timeout: Duration::from_secs(60),
            pull_timeout: Duration::from_secs(3600),
            retries: 5,
        }
    }

    /// What is said of `registry`.
    pub(crate) fn registry(&self, registry: &str) -> RegistryConfig {
        self.registries.get(registry).or_else(|| self.registries.get("*")).cloned().unwrap_or_default()
    }
}

/// How a registry is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Base addresses that are asked first, in order: `http://127.0.0.1:5000`.
    pub mirrors: Vec<String>,
    /// Never ask the registry itself.
    pub mirror_only: bool,
    /// The registry itself speaks http. Loopback registries do unless they have port 443.
    pub plain_http: bool,
    /// Accept any certificate.
    pub insecure_skip_verify: bool,
    /// A PEM file of further certificate authorities.
    pub ca_file: Option<PathBuf>,
}
