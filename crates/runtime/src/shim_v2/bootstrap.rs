//! How to reach a shim: what its `start` answered, kept in the bundle.

use crate::bundle::write_atomic;
use prost::Message;
use proto::containerd::runtime::bootstrap::v1::BootstrapResult;
use serde::{Deserialize, Serialize};
use std::path::Path;
use types::{Error, ErrorKind, Result, ResultExt};

/// What `start` answers, in containerd's JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bootstrap {
    #[serde(default)]
    pub(crate) version: u32,
    #[serde(default)]
    pub(crate) address: String,
    #[serde(default)]
    pub(crate) protocol: String,
}

impl Bootstrap {
    /// Reads any of the three dialects: JSON, a bare address (ttrpc, version 2),
    /// and protobuf.
    pub(crate) fn parse(raw: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(raw).map(str::trim).unwrap_or_default();
        if text.starts_with('{') {
            let parsed: Self = serde_json::from_str(text).context_kind(ErrorKind::Internal, || shown(raw))?;
            return parsed.check();
        }
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic()) {
            return Self { version: 2, address: text.into(), protocol: "ttrpc".into() }.check();
        }
        match BootstrapResult::decode(raw) {
            Ok(r) if !r.address.is_empty() => {
                Self { version: u32::try_from(r.version).unwrap_or(2), address: r.address, protocol: r.protocol }
                    .check()
            }
            _ => Err(Error::internal(shown(raw))),
        }
    }

    fn check(mut self) -> Result<Self> {
        self.version = self.version.max(2);
        if self.version > 3 {
            return Err(Error::unimplemented(format!("the shim speaks version {} of the task API", self.version))
                .hint("versions 2 and 3 are known"));
        }
        self.protocol = match self.protocol.to_ascii_lowercase().as_str() {
            "" | "ttrpc" => "ttrpc".into(),
            "grpc" => "grpc".into(),
            other => {
                return Err(Error::unimplemented(format!("the shim speaks {other:?}, which is no protocol of shims")));
            }
        };
        if !self.address.starts_with("unix://")
            && !self.address.starts_with('/')
            && !self.address.starts_with("vsock://")
        {
            return Err(Error::internal(format!("the shim's address {:?} is none", self.address)));
        }
        if self.address.starts_with('/') {
            self.address.insert_str(0, "unix://");
        }
        Ok(self)
    }

    pub(crate) fn store(&self, bundle: &Path) -> Result<()> {
        let text =
            serde_json::to_vec(self).context_kind(ErrorKind::Internal, || "encode bootstrap.json".to_string())?;
        write_atomic(&bundle.join("bootstrap.json"), &text)
    }

    /// What the bundle says, if it says anything. A bootstrap.json that can't be
    /// read is set aside, and the shim's own `address` file counts.
    pub(crate) fn load(bundle: &Path) -> Result<Option<Self>> {
        let path = bundle.join("bootstrap.json");
        if let Some(raw) = read(&path)? {
            match Self::parse(&raw) {
                Ok(b) => return Ok(Some(b)),
                Err(e) => {
                    tracing::warn!(path = %path.display(), error = %e, "set aside as bootstrap.json.bad");
                    std::fs::rename(&path, bundle.join("bootstrap.json.bad"))
                        .context(|| format!("set {} aside", path.display()))?;
                }
            }
        }
        let Some(raw) = read(&bundle.join("address"))? else { return Ok(None) };
        let found = Self::parse(&raw)?;
        found.store(bundle)?;
        Ok(Some(found))
    }

    /// Forgets a dead shim.
    pub(crate) fn forget(bundle: &Path) {
        for name in ["bootstrap.json", "address"] {
            let _ = std::fs::remove_file(bundle.join(name));
        }
    }

    /// True for a shim that speaks gRPC.
    pub(crate) fn is_grpc(&self) -> bool {
        self.protocol == "grpc"
    }

    /// The full name of the task service that this shim serves.
    pub(crate) fn task_service(&self) -> &'static str {
        if self.version >= 3 { "containerd.task.v3.Task" } else { "containerd.task.v2.Task" }
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(raw) => Ok(Some(raw)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).context(|| format!("read {}", path.display())),
    }
}

fn shown(raw: &[u8]) -> String {
    let start: String = String::from_utf8_lossy(raw).chars().take(200).collect();
    format!("the shim's answer {start:?} can't be read")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_three_dialects_are_read() {
        let json = Bootstrap::parse(br#"{"version":3,"address":"unix:///run/s","protocol":"TTRPC"}"#).unwrap();
        assert_eq!(json, Bootstrap { version: 3, address: "unix:///run/s".into(), protocol: "ttrpc".into() });
        assert_eq!(json.task_service(), "containerd.task.v3.Task");
        let grpc = Bootstrap::parse(br#"{"version":3,"address":"unix:///run/s","protocol":"gRPC"}"#).unwrap();
        assert!(grpc.is_grpc() && !json.is_grpc());
        let bare = Bootstrap::parse(b"unix:///run/s\n").unwrap();
        assert_eq!((bare.version, bare.protocol.as_str()), (2, "ttrpc"));
        let wire = BootstrapResult {
            version: 3,
            address: "unix:///run/s".into(),
            protocol: "ttrpc".into(),
            ..Default::default()
        };
        assert_eq!(Bootstrap::parse(&wire.encode_to_vec()).unwrap(), json);
    }

    #[test]
    fn what_is_unknown_is_named() {
        let newer = Bootstrap::parse(br#"{"version":4,"address":"unix:///s","protocol":"ttrpc"}"#).unwrap_err();
        assert_eq!(newer.kind(), ErrorKind::Unimplemented);
        let odd = Bootstrap::parse(br#"{"version":3,"address":"unix:///s","protocol":"carrier"}"#).unwrap_err();
        assert!(odd.to_string().contains("carrier"), "{odd}");
        for bad in [&b""[..], b"{", b"panic: no", b"\xff\xfe", br#"{"version":2}"#] {
            assert!(Bootstrap::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_broken_file_is_set_aside_and_the_address_counts() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("bootstrap.json"), "{\"ver").unwrap();
        std::fs::write(dir.path().join("address"), "unix:///run/x").unwrap();
        let found = Bootstrap::load(dir.path()).unwrap().unwrap();
        assert_eq!(found.address, "unix:///run/x");
        assert!(dir.path().join("bootstrap.json.bad").exists());
        assert_eq!(Bootstrap::load(dir.path()).unwrap().unwrap(), found);
    }
}
