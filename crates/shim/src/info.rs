//! `-info`: what this runtime is and what the OCI runtime beneath it can.
//!
//! containerd asks it once per handler, and tells kubelets by it whether user
//! namespaces and recursive read-only mounts can be had.

use crate::{log, options};
use oci::{Children, Command, Config, Runtime};
use prost::Message;
use prost_types::Any;
use proto::containerd::types::{RuntimeInfo, RuntimeVersion};
use types::{Error, Result};

/// Under which name the features document travels, as JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// What `-info` prints: a RuntimeInfo with name, version, the options that were
/// given (`input`: an Any, or nothing) and the features of the OCI runtime that
/// they name. A runtime that has no features document leaves them out.
///
/// # Errors
/// `InvalidArgument` where `input` can't be read, `NotFound` where no OCI runtime
/// is installed.
pub async fn runtime_info(name: &str, input: &[u8]) -> Result<Vec<u8>> {
    let given = match input {
        [] => None,
        bytes => {
            Some(Any::decode(bytes).map_err(|e| Error::invalid("standard input is no Any with options").because(e))?)
        }
    };
    let o = options::read(given.as_ref())?;
    let runtime = Command::new(Config::new(options::runtime_binary(&o)?, std::env::temp_dir()), Children::new());
    let features = runtime.features().await.unwrap_or_else(|e| {
        log::warn(e);
        None
    });
    let info = RuntimeInfo {
        name: name.into(),
        version: Some(RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), revision: String::new() }),
        options: given.map(|_| proto::pack(options::TYPE, &o)),
        features: features.map(|f| Any { type_url: FEATURES.into(), value: f.to_string().into_bytes() }),
        ..Default::default()
    };
    Ok(info.encode_to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_features_are_those_of_the_runtime_that_is_named() {
        if oci::find_binary("runc").is_none() {
            eprintln!("skipped: runc is not installed");
            return;
        }
        let o = proto::containerd::runc::v1::Options { binary_name: "runc".into(), ..Default::default() };
        let input = proto::pack(options::TYPE, &o).encode_to_vec();
        let info = RuntimeInfo::decode(runtime_info("n", &input).await.unwrap().as_slice()).unwrap();
        assert_eq!(info.name, "n");
        assert_eq!(info.options.unwrap().type_url, options::TYPE);
        let features = info.features.unwrap();
        assert_eq!(features.type_url, FEATURES);
        let document: serde_json::Value = serde_json::from_slice(&features.value).unwrap();
        assert!(document["mountOptions"].is_array());
        let none = RuntimeInfo::decode(runtime_info("n", &[]).await.unwrap().as_slice()).unwrap();
        assert!(none.options.is_none() && none.features.is_some());
        assert!(runtime_info("n", &[0xff, 1]).await.is_err());
    }
}
