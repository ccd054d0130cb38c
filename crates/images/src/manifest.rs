//! Manifests, indexes and image configurations, read with suspicion.

use crate::{Digest, Platform};
use oci_spec::image::ImageConfiguration;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use types::{Error, ErrorKind, Result, ResultExt};

/// The largest manifest or index, in bytes.
pub(crate) const MANIFEST_MAX: u64 = 4 << 20;
/// The largest configuration, in bytes.
pub(crate) const CONFIG_MAX: u64 = 8 << 20;
/// How deep indexes may lie in indexes.
pub(crate) const INDEX_DEPTH: usize = 3;

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// What points to a blob.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default)]
    pub urls: Option<Vec<String>>,
    #[serde(default)]
    pub platform: Option<Platform>,
    #[serde(default)]
    pub annotations: Option<BTreeMap<String, String>>,
}

/// What a manifest's address may answer with.
#[derive(Debug)]
pub(crate) enum Document {
    Image(Box<ImageManifest>),
    Index(Vec<Descriptor>),
}

#[derive(Debug)]
pub(crate) struct ImageManifest {
    pub media_type: String,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

impl ImageManifest {
    /// What travels for it in bytes, with a configuration and a manifest of these sizes.
    pub(crate) fn travels(&self, config: usize, manifest: usize) -> u64 {
        // Sizes come from outside: their sum may be beyond all numbers.
        let layers = self.layers.iter().fold(0u64, |sum, layer| sum.saturating_add(layer.size));
        layers.saturating_add((config + manifest) as u64)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    schema_version: Option<u64>,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    fs_layers: Option<Value>,
}

/// Reads a manifest or index; `declared` is the media type that its carrier
/// (header, descriptor) gave it, where it gave one.
///
/// A document that could be taken for both, or that is not what its carrier or
/// it itself says, is refused (CVE-2021-41190): two readers must never see two
/// images in the same bytes.
pub(crate) fn parse(body: &[u8], declared: Option<&str>) -> Result<Document> {
    let raw: Raw =
        serde_json::from_slice(body).context_kind(ErrorKind::InvalidArgument, || "read a manifest".into())?;
    let refuse = |why: String| Err(Error::invalid(format!("manifest refused: {why}")));
    if raw.fs_layers.is_some() || raw.schema_version == Some(1) {
        return refuse("it is of docker's schema 1, which nobody should serve any more".into());
    }
    let is_index = |t: &str| matches!(t, OCI_INDEX | DOCKER_LIST);
    let is_image = |t: &str| matches!(t, OCI_MANIFEST | DOCKER_MANIFEST);
    let declared = declared.filter(|t| is_index(t) || is_image(t));
    if let (Some(declared), Some(own)) = (declared, raw.media_type.as_deref())
        && declared != own
    {
        return refuse(format!("it was sent as {declared} but calls itself {own}"));
    }
    let kind = raw.media_type.as_deref().or(declared).unwrap_or("").to_owned();
    if !kind.is_empty() && !is_index(&kind) && !is_image(&kind) {
        return refuse(format!("media type {kind:?} is no image"));
    }
    let imagelike = raw.config.is_some() || raw.layers.is_some();
    match (raw.config, raw.manifests) {
        (_, Some(_)) if imagelike => refuse("it has the fields of a manifest and of an index".into()),
        (None, Some(manifests)) if !is_image(&kind) => Ok(Document::Index(manifests)),
        (Some(config), None) if !is_index(&kind) => Ok(Document::Image(Box::new(ImageManifest {
            media_type: if kind.is_empty() { OCI_MANIFEST.into() } else { kind },
            config,
            layers: raw.layers.unwrap_or_default(),
        }))),
        (None, None) => refuse("it has neither a configuration nor manifests".into()),
        _ => refuse(format!("its content is not what media type {kind} says")),
    }
}

/// The index's entry that runs best here.
pub(crate) fn choose<'a>(index: &'a [Descriptor], host: &Platform) -> Result<&'a Descriptor> {
    let rank = |d: &Descriptor| match &d.platform {
        Some(p) if p.os.is_empty() && p.architecture.is_empty() => Some(u32::MAX),
        Some(p) => host.rank(p),
        // Better than nothing, as long as it is an image at all.
        None => Some(u32::MAX),
    };
    index.iter().filter_map(|d| Some((rank(d)?, d))).min_by_key(|(rank, _)| *rank).map(|(_, d)| d).ok_or_else(|| {
        let mut offered: Vec<String> =
            index.iter().filter_map(|d| d.platform.as_ref()).map(ToString::to_string).collect();
        offered.dedup();
        offered.truncate(20);
        Error::not_found(format!("the image is not offered for {host}, only for: {}", offered.join(", ")))
    })
}

/// An image's configuration and its layers' uncompressed digests.
#[derive(Debug)]
pub(crate) struct Config {
    pub parsed: ImageConfiguration,
    pub diff_ids: Vec<Digest>,
}

/// Reads a configuration as builders write it: nulls and missing fields count
/// as absent. History is dropped, and so are labels under the names that
/// runtimes use for themselves (CVE-2026-53488).
pub(crate) fn parse_config(body: &[u8]) -> Result<Config> {
    let what = || "read the image's configuration".to_owned();
    let mut value: Value = serde_json::from_slice(body).context_kind(ErrorKind::InvalidArgument, what)?;
    drop_nulls(&mut value);
    let Some(map) = value.as_object_mut() else {
        return Err(Error::invalid("the image's configuration is no JSON object"));
    };
    map.remove("history");
    map.entry("os").or_insert_with(|| "linux".into());
    map.entry("architecture").or_insert_with(|| Platform::host().architecture.into());
    let diff_ids = match map.get("rootfs").and_then(|r| r.get("diff_ids")) {
        Some(list) => Vec::<Digest>::deserialize(list).context_kind(ErrorKind::InvalidArgument, what)?,
        None => Vec::new(),
    };
    map.insert("rootfs".into(), serde_json::json!({"type": "layers", "diff_ids": diff_ids}));
    if let Some(labels) = map.get_mut("config").and_then(|c| c.get_mut("Labels")).and_then(Value::as_object_mut) {
        labels.retain(|key, _| !is_reserved(key));
    }
    let parsed = serde_json::from_value(value).context_kind(ErrorKind::InvalidArgument, what)?;
    Ok(Config { parsed, diff_ids })
}

fn is_reserved(label: &str) -> bool {
    ["containerd.io/", "io.containerd.", "io.cri-containerd", "io.kubernetes.cri", "io.kubernetes.cri-o", "longshore."]
        .iter()
        .any(|prefix| label.starts_with(prefix))
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn descriptor(kind: &str) -> Value {
        json!({"mediaType": kind, "digest": format!("sha256:{}", "a".repeat(64)), "size": 3})
    }

    #[test]
    fn cve_2021_41190_a_manifest_that_is_also_an_index_is_refused() {
        let d = descriptor("x");
        for (body, declared) in [
            (json!({"schemaVersion": 2, "config": d, "layers": [d], "manifests": [d]}), None),
            (json!({"schemaVersion": 2, "layers": [d], "manifests": [d]}), None),
            (json!({"schemaVersion": 2, "config": d, "layers": [], "mediaType": OCI_INDEX}), None),
            (json!({"schemaVersion": 2, "manifests": [d], "mediaType": OCI_MANIFEST}), None),
            (json!({"schemaVersion": 2, "config": d, "layers": []}), Some(OCI_INDEX)),
            (json!({"schemaVersion": 2, "manifests": [d]}), Some(DOCKER_MANIFEST)),
            (json!({"schemaVersion": 2, "config": d, "mediaType": OCI_MANIFEST}), Some(DOCKER_MANIFEST)),
            (json!({"schemaVersion": 1, "fsLayers": []}), None),
            (json!({"schemaVersion": 2}), None),
        ] {
            assert!(parse(&serde_json::to_vec(&body).unwrap(), declared).is_err(), "{body} as {declared:?}");
        }
        let good = json!({"schemaVersion": 2, "config": d, "layers": [d]});
        let parsed = parse(&serde_json::to_vec(&good).unwrap(), Some("application/json"));
        assert!(matches!(parsed, Ok(Document::Image(_))));
    }

    #[test]
    fn cve_2026_53488_reserved_labels_from_outside_are_dropped() {
        let config = json!({"config": {"Labels": {
            "io.cri-containerd.kind": "container", "containerd.io/gc.root": "x", "maintainer": "me", "longshore.x": "y"
        }}});
        let config = parse_config(&serde_json::to_vec(&config).unwrap()).unwrap();
        let labels = config.parsed.config().as_ref().unwrap().labels().clone().unwrap();
        assert_eq!(labels.into_keys().collect::<Vec<_>>(), ["maintainer"]);
    }

    #[test]
    fn a_configuration_full_of_nulls_is_read() {
        let config = json!({"architecture": null, "history": [{"created": "nonsense"}], "rootfs": {"diff_ids": null},
            "config": {"Cmd": null, "Env": ["A=b"], "Volumes": {"/data": {}}, "User": "1000:x"}});
        let config = parse_config(&serde_json::to_vec(&config).unwrap()).unwrap();
        assert_eq!(config.parsed.config().as_ref().unwrap().user().as_deref(), Some("1000:x"));
        assert!(config.diff_ids.is_empty());
    }

    #[test]
    fn attestations_are_never_chosen() {
        let mut attestation: Descriptor = serde_json::from_value(descriptor(OCI_MANIFEST)).unwrap();
        attestation.platform =
            Some(Platform { os: "unknown".into(), architecture: "unknown".into(), variant: String::new() });
        assert!(choose(&[attestation.clone()], &Platform::host()).is_err());
        let ours = Descriptor { platform: Some(Platform::host()), ..attestation.clone() };
        assert!(choose(&[attestation, ours], &Platform::host()).is_ok());
    }
}
