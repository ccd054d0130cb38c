//! Which of an index's images runs here.

use serde::Deserialize;
use std::fmt;

/// A platform in Go's words, as indexes give it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Platform {
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// `amd64`, `arm64`, …
    #[serde(default)]
    pub architecture: String,
    /// `v7`, `v8`, …, or "".
    #[serde(default)]
    pub variant: String,
}

impl Platform {
    /// The platform that we were built for.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", ""),
            "x86" => ("386", ""),
            "aarch64" => ("arm64", "v8"),
            "arm" => ("arm", "v7"),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", ""),
            "loongarch64" => ("loong64", ""),
            other => (other, ""),
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: variant.into() }
    }

    /// How well an image for `offered` runs here: the lower the better, `None` not at all.
    pub(crate) fn rank(&self, offered: &Platform) -> Option<u32> {
        if offered.os != self.os || offered.architecture != self.architecture {
            return None;
        }
        let level = |p: &Platform| match (p.architecture.as_str(), p.variant.as_str()) {
            ("arm64", "") => Some(8),
            ("arm", "") => Some(7),
            // The base level runs on every such processor; higher ones need a look at it first.
            ("amd64", "") => Some(1),
            (_, "") => Some(0),
            (_, v) => v.strip_prefix('v').and_then(|v| v.parse().ok()),
        };
        let (own, theirs) = (level(self)?, level(offered)?);
        u32::checked_sub(own, theirs)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p(architecture: &str, variant: &str) -> Platform {
        Platform { os: "linux".into(), architecture: architecture.into(), variant: variant.into() }
    }

    #[test]
    fn lower_variants_run_on_higher_ones_only() {
        assert_eq!(p("amd64", "").rank(&p("amd64", "")), Some(0));
        assert_eq!(p("amd64", "").rank(&p("amd64", "v3")), None);
        assert_eq!(p("arm64", "v8").rank(&p("arm64", "")), Some(0));
        assert_eq!(p("arm", "v7").rank(&p("arm", "v6")), Some(1));
        assert_eq!(p("arm", "v6").rank(&p("arm", "v7")), None);
        assert_eq!(p("amd64", "").rank(&p("arm64", "")), None);
        assert_eq!(p("amd64", "").rank(&Platform { os: "windows".into(), ..p("amd64", "") }), None);
    }
}
