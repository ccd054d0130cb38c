//! Which OCI runtime this node has.

use crate::{Children, Command, Config, Runtime};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use types::{Error, Result};

/// The order in which a node is searched.
const NAMES: [&str; 3] = ["runc", "crun", "youki"];
/// Searched after PATH, which is short under some service managers.
const USUAL: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The runtime that was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its binary.
    pub path: PathBuf,
    /// `runc`, `crun`, `youki` or the configured file's name.
    pub name: String,
    /// Its version, as it prints it.
    pub version: String,
    /// Its features document, where it has one.
    pub features: Option<serde_json::Value>,
    /// Those that are installed but can't run here, each with the reason.
    pub passed_over: Vec<(String, String)>,
}

/// How this node mounts its cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    Unified,
    Hybrid,
    Legacy,
}

fn layout() -> Layout {
    // Magic of cgroup2, linux/magic.h.
    let is_v2 = |path: &str| rustix::fs::statfs(path).is_ok_and(|s| s.f_type == 0x6367_7270);
    if is_v2("/sys/fs/cgroup") {
        Layout::Unified
    } else if is_v2("/sys/fs/cgroup/unified") {
        Layout::Hybrid
    } else {
        Layout::Legacy
    }
}

/// Why a runtime can't run on this layout; known for those that refuse one.
fn unfit(name: &str, layout: Layout) -> Option<&'static str> {
    match (name, layout) {
        ("crun", Layout::Hybrid) => {
            Some("it refuses the hybrid cgroup layout of this node (v1 controllers beside /sys/fs/cgroup/unified)")
        }
        _ => None,
    }
}

/// An executable by name (in PATH, then in the usual places) or path.
pub fn find_binary(name: &str) -> Option<PathBuf> {
    let executable = |p: &Path| p.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|p| executable(p));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(USUAL.iter().map(PathBuf::from))
        .filter(|d| d.is_absolute())
        .map(|d| d.join(name))
        .find(|p| executable(p))
}

/// Finds the OCI runtime: the configured one, else the first of runc, crun,
/// youki that is installed and can run on this node's cgroup layout.
///
/// # Errors
/// `NotFound` naming what was searched and why each candidate was passed over.
pub async fn detect(configured: Option<&Path>) -> Result<Found> {
    let layout = layout();
    let candidates: Vec<String> = match configured {
        Some(p) => vec![p.to_string_lossy().into_owned()],
        None => NAMES.map(String::from).to_vec(),
    };
    let mut passed_over = Vec::new();
    for candidate in candidates {
        let Some(path) = find_binary(&candidate) else {
            if configured.is_some() {
                passed_over.push((candidate, "it is no executable file".to_string()));
            }
            continue;
        };
        let name = path.file_name().map_or_else(|| candidate.clone(), |n| n.to_string_lossy().into_owned());
        if let Some(reason) = unfit(&name, layout) {
            passed_over.push((name, reason.to_string()));
            continue;
        }
        let runtime = Command::new(Config::new(&path, std::env::temp_dir()), Children::new());
        match runtime.version().await {
            Ok(version) => {
                let features = runtime.features().await?;
                return Ok(Found { path, name, version, features, passed_over });
            }
            Err(e) => passed_over.push((name, e.to_string())),
        }
    }
    let why: Vec<String> = passed_over.iter().map(|(n, r)| format!("{n}: {r}")).collect();
    let searched = configured.map_or_else(|| NAMES.join(", "), |p| p.display().to_string());
    Err(Error::not_found(format!("no OCI runtime can run here; searched for {searched}. {}", why.join("; ")))
        .hint("install runc, or name a runtime in the configuration"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crun_is_unfit_for_hybrid_only() {
        assert!(unfit("crun", Layout::Hybrid).is_some());
        assert!(unfit("crun", Layout::Unified).is_none() && unfit("crun", Layout::Legacy).is_none());
        assert!(unfit("runc", Layout::Hybrid).is_none());
    }

    #[tokio::test]
    async fn a_configured_file_that_is_missing_is_named() {
        let e = detect(Some(Path::new("/nonexistent/runc"))).await.unwrap_err();
        assert!(e.is_not_found() && e.to_string().contains("/nonexistent/runc"), "{e}");
    }

    #[tokio::test]
    async fn the_node_s_runtime_is_found_with_version_and_features() {
        let found = detect(None).await.unwrap();
        assert!(found.version.starts_with(|c: char| c.is_ascii_digit()), "{}", found.version);
        assert!(found.path.is_absolute());
        if found.name == "runc" {
            assert!(found.features.unwrap()["ociVersionMin"].is_string());
        }
    }
}
