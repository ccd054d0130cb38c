//! `monitored.json`: with what a container was begun, for the daemon that finds it
//! again.

use super::config::Handler;
use crate::api::TaskIo;
use crate::bundle::write_atomic;
use serde::{Deserialize, Serialize};
use std::path::Path;
use types::{ErrorKind, Result, ResultExt};

const FILE: &str = "monitored.json";

/// What a container was begun with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) handler: Handler,
    pub(crate) io: TaskIo,
    /// It has a pid namespace of its own: init's death is everybody's.
    pub(crate) private_pids: bool,
}

impl Record {
    pub(crate) fn store(&self, bundle: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).context_kind(ErrorKind::Internal, || format!("encode {FILE}"))?;
        write_atomic(&bundle.join(FILE), &text)
    }

    /// # Errors
    /// `NotFound` where the bundle has none; `Internal` where it is damaged.
    pub(crate) fn load(bundle: &Path) -> Result<Self> {
        let path = bundle.join(FILE);
        let text = std::fs::read(&path).context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text).context_kind(ErrorKind::Internal, || format!("{} is damaged", path.display()))
    }
}

/// Whether the container of this config.json has a pid namespace of its own.
pub(crate) fn private_pids(config_json: &str) -> bool {
    let config: serde_json::Value = serde_json::from_str(config_json).unwrap_or_default();
    let namespaces = config.pointer("/linux/namespaces").and_then(serde_json::Value::as_array);
    namespaces.into_iter().flatten().any(|n| {
        let path = n.get("path").and_then(serde_json::Value::as_str).unwrap_or_default();
        n.get("type").and_then(serde_json::Value::as_str) == Some("pid") && path.is_empty()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_pids_they_are_is_read_from_the_spec() {
        let spec = |pid: &str| format!(r#"{{"linux":{{"namespaces":[{{"type":"mount"}}{pid}]}}}}"#);
        assert!(private_pids(&spec(r#",{"type":"pid"}"#)));
        assert!(!private_pids(&spec(r#",{"type":"pid","path":"/proc/1/ns/pid"}"#)));
        assert!(!private_pids(&spec("")) && !private_pids("{"));
    }
}
