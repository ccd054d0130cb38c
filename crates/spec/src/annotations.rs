//! Annotations of the spec: those by which VM runtimes and tools know pod and
//! container, and those of CRI that the operator lets through.

use proto::cri;
use std::collections::HashMap;

/// Domains whose annotations make some OCI runtime do something: a pattern must
/// name them, or a pod could give itself systemd properties or hooks
/// (CVE-2023-6476, CVE-2024-3154).
const ACTIVE: [&str; 10] = [
    "org.systemd.property.",
    "run.oci.",
    "module.wasm.",
    "org.criu.",
    "io.katacontainers.",
    "dev.gvisor.",
    "io.containerd.",
    "io.kubernetes.cri-o.",
    "io.kubernetes.cri.",
    "cdi.k8s.io/",
];

/// What `config`'s annotations leave of themselves under the patterns of `allowed`.
pub(crate) fn allowed(
    annotations: impl IntoIterator<Item = (String, String)>,
    allowed: &[String],
) -> HashMap<String, String> {
    annotations.into_iter().filter(|(key, _)| allowed.iter().any(|pattern| passes(key, pattern))).collect()
}

fn passes(key: &str, pattern: &str) -> bool {
    let Some(prefix) = pattern.strip_suffix('*') else { return key == pattern };
    let named = ACTIVE.iter().all(|domain| !key.starts_with(domain) || prefix.starts_with(domain));
    // Ours say who the pod is; nobody else writes them.
    key.starts_with(prefix) && named && !key.starts_with("io.kubernetes.cri.")
}

/// The annotations that say which pod it is: containerd's, which runsc and kata
/// read. `container` is the container's and its image's name, `None` in the spec of
/// the pod itself.
pub(crate) fn identity(
    pod_id: &str,
    pod: &cri::PodSandboxConfig,
    container: Option<(&str, &str)>,
) -> HashMap<String, String> {
    let metadata = pod.metadata.clone().unwrap_or_default();
    let kind = if container.is_some() { "container" } else { "sandbox" };
    let mut map = HashMap::from([
        ("io.kubernetes.cri.container-type".to_string(), kind.to_string()),
        ("io.kubernetes.cri.sandbox-id".to_string(), pod_id.to_string()),
        ("io.kubernetes.cri.sandbox-namespace".to_string(), metadata.namespace),
        ("io.kubernetes.cri.sandbox-uid".to_string(), metadata.uid),
        ("io.kubernetes.cri.sandbox-name".to_string(), metadata.name),
    ]);
    match container {
        Some((name, image)) => {
            map.insert("io.kubernetes.cri.container-name".to_string(), name.to_string());
            map.insert("io.kubernetes.cri.image-name".to_string(), image.to_string());
        }
        None => {
            map.insert("io.kubernetes.cri.sandbox-log-directory".to_string(), pod.log_directory.clone());
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(patterns: &[&str]) -> Vec<String> {
        let all = [
            "a.b/c",
            "org.systemd.property.X",
            "run.oci.hooks",
            "io.kubernetes.cri.sandbox-id",
            "io.kubernetes.container.hash",
        ];
        let patterns: Vec<String> = patterns.iter().map(ToString::to_string).collect();
        let mut kept: Vec<String> =
            allowed(all.map(|k| (k.to_string(), "v".to_string())), &patterns).into_keys().collect();
        kept.sort();
        kept
    }

    #[test]
    fn cve_2023_6476_cve_2024_3154_annotations_act_only_if_allow_listed() {
        assert!(keys(&[]).is_empty());
        assert_eq!(keys(&["*"]), ["a.b/c", "io.kubernetes.container.hash"]);
        assert_eq!(keys(&["io.*"]), ["io.kubernetes.container.hash"]);
        assert_eq!(keys(&["run.oci.*"]), ["run.oci.hooks"]);
        assert_eq!(keys(&["org.systemd.property.X"]), ["org.systemd.property.X"]);
    }
}
