//! Image names, read with docker's habits: `busybox` is
//! `docker.io/library/busybox:latest`.

use crate::Digest;
use std::fmt;
use types::{Error, Result};

const DEFAULT_REGISTRY: &str = "docker.io";
/// The longest name without tag and digest, in bytes.
const LONGEST_NAME: usize = 255;
const LONGEST_TAG: usize = 128;

/// A full image name. With a digest the tag counts for nothing and is dropped,
/// as the peers do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Host, with a port where one was given.
    pub registry: String,
    /// Path within the registry.
    pub repository: String,
    /// By what the image is chosen.
    pub selector: Selector,
}

/// What follows the name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Selector {
    /// `:tag`.
    Tag(String),
    /// `@digest`.
    Digest(Digest),
}

impl Reference {
    /// Reads `[registry/]repository[:tag][@digest]`.
    ///
    /// # Errors
    /// `InvalidArgument`, saying which part is wrong.
    pub fn parse(text: &str) -> Result<Self> {
        let shown: String = text.chars().take(LONGEST_NAME + 200).collect();
        let wrong = |why: &str| Error::invalid(format!("image name {shown:?}: {why}"));
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                (rest, Some(digest.parse::<Digest>().map_err(|e| e.within(format!("image name {shown:?}")))?))
            }
            None => (text, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            // A colon before the last slash belongs to a port.
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if name.is_empty() {
            return Err(wrong("there is no name"));
        }
        if name.len() > LONGEST_NAME {
            return Err(wrong("the name is longer than 255 bytes"));
        }
        if tag.is_some_and(|t| !is_tag(t)) {
            return Err(wrong("a tag is up to 128 letters, digits, '_', '.' and '-', not beginning with '.' or '-'"));
        }
        let (registry, path) = match name.split_once('/') {
            Some((host, path)) if is_host(host) => (host, path),
            _ => (DEFAULT_REGISTRY, name),
        };
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
        if !is_host_name(registry) {
            return Err(wrong("the registry is no host name"));
        }
        let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if !repository.split('/').all(is_component) {
            return Err(wrong("a repository is lower-case letters and digits, joined by '.', '_', '__', '-' or '/'"));
        }
        if tag.is_none() && digest.is_none() && name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong("64 hex digits are an image's id, not a name"));
        }
        let selector = match (digest, tag) {
            (Some(digest), _) => Selector::Digest(digest),
            (None, Some(tag)) => Selector::Tag(tag.to_owned()),
            (None, None) => Selector::Tag("latest".to_owned()),
        };
        Ok(Self { registry: registry.to_owned(), repository, selector })
    }

    /// `registry/repository`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The same name by digest.
    pub fn with_digest(&self, digest: &Digest) -> Self {
        Self { selector: Selector::Digest(digest.clone()), ..self.clone() }
    }

    /// The tag or digest as it stands in a manifest's address.
    pub(crate) fn selector_text(&self) -> &str {
        match &self.selector {
            Selector::Tag(tag) => tag,
            Selector::Digest(digest) => digest.as_str(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = if matches!(self.selector, Selector::Tag(_)) { ':' } else { '@' };
        write!(f, "{}/{}{separator}{}", self.registry, self.repository, self.selector_text())
    }
}

/// A first component that means a registry and not a path on Docker Hub.
fn is_host(text: &str) -> bool {
    text == "localhost" || text.contains(['.', ':']) || text.bytes().any(|b| b.is_ascii_uppercase())
}

fn is_host_name(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let port_ok = port.is_none_or(|p| p.parse::<u16>().is_ok_and(|n| n > 0));
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    let v6 = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    port_ok && v6.map_or_else(|| host.split('.').all(label), |h| h.parse::<std::net::Ipv6Addr>().is_ok())
}

fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    !text.is_empty()
        && text.len() <= LONGEST_TAG
        && word(text.as_bytes()[0])
        && text.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// `[a-z0-9]+`, joined by `.`, `_`, `__` or any number of `-`.
fn is_component(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    if !plain(*first) || !plain(*last) {
        return false;
    }
    bytes.split(|b| plain(*b)).all(|run| matches!(run, b"" | b"." | b"_" | b"__") || run.iter().all(|b| *b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_docker_does() {
        let hex = "a".repeat(64);
        for (text, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("team/app", "docker.io/team/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:v1", "localhost:5000/app:v1"),
            ("127.0.0.1:5000/a/b__c/d--e", "127.0.0.1:5000/a/b__c/d--e:latest"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            (&format!("q.io/a:tag@sha256:{hex}"), &format!("q.io/a@sha256:{hex}")),
        ] {
            assert_eq!(Reference::parse(text).unwrap().to_string(), full);
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let hex = "a".repeat(64);
        for bad in [
            "",
            ":tag",
            "UPPER",
            "a//b",
            "a/",
            "/a",
            "a:",
            "a:.x",
            "a@sha256:12",
            "-a",
            "a..b",
            "a___b",
            "a b",
            "é",
            "../../etc",
            "q.io/../x",
            "q.io:99999/a",
            "q..io/a",
            &hex,
            &"a".repeat(300),
            &format!("a:{}", "t".repeat(129)),
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad}");
        }
    }
}
