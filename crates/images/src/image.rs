//! An image, and the images in memory.

use crate::manifest::parse_config;
use crate::{Reference, Selector};
use oci_spec::image::ImageConfiguration;
use std::collections::BTreeMap;
use std::sync::Arc;
use store::ImageRecord;
use types::Result;

/// The shortest prefix of an id that stands for it, in hex digits.
const SHORTEST_ID: usize = 3;

/// The digest of an image's configuration, `sha256:…`.
pub type ImageId = String;

/// An image on this node.
#[derive(Debug, Clone)]
pub struct Image {
    /// The digest of its configuration.
    pub id: ImageId,
    /// Full names by tag.
    pub repo_tags: Vec<String>,
    /// Full names by the digest of what they were pulled as.
    pub repo_digests: Vec<String>,
    /// Bytes that were to download: layers, configuration, manifest.
    pub size: u64,
    /// What it says about running it. Reserved labels and history are left out.
    pub config: ImageConfiguration,
    /// The chain id of its top layer, the parent of containers' snapshots;
    /// "" for an image without layers.
    pub chain_id: String,
    /// The kubelet may not collect it.
    pub pinned: bool,
    /// When it came to this node, in nanoseconds since the epoch.
    pub pulled_at_ns: i64,
}

impl Image {
    /// Reads a record; a broken one is its own error only.
    pub(crate) fn from_record(record: ImageRecord, pinned: &[String]) -> Result<Self> {
        let config = parse_config(&record.config).map_err(|e| e.within(format!("image {}", record.id)))?;
        let mut image = Self {
            id: record.id,
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
            size: record.size,
            config: config.parsed,
            chain_id: record.chain_id,
            pinned: false,
            pulled_at_ns: record.created_at_ns,
        };
        image.set_references(record.references, pinned);
        Ok(image)
    }

    fn set_references(&mut self, references: Vec<String>, pinned: &[String]) {
        let is_pinned = |r: &String| pinned.iter().any(|p| p == r);
        self.pinned = references.iter().any(is_pinned) || is_pinned(&self.id);
        (self.repo_digests, self.repo_tags) = references.into_iter().partition(|r| r.contains('@'));
    }

    /// All names.
    pub fn references(&self) -> impl Iterator<Item = &String> {
        self.repo_tags.iter().chain(&self.repo_digests)
    }
}

/// All images, as the database has them.
#[derive(Debug, Default)]
pub(crate) struct Catalog {
    by_id: BTreeMap<ImageId, Arc<Image>>,
    by_reference: BTreeMap<String, ImageId>,
    pinned: Vec<String>,
}

impl Catalog {
    pub(crate) fn new(pinned: &[String]) -> Self {
        let full = |p: &String| Reference::parse(p).map_or_else(|_| p.clone(), |r| r.to_string());
        Self { pinned: pinned.iter().map(full).collect(), ..Self::default() }
    }

    /// Adds an image or more names of a known one; names move to it.
    pub(crate) fn put(&mut self, record: ImageRecord) -> Result<()> {
        let mut image = Image::from_record(record, &self.pinned)?;
        let mut references: Vec<String> = image.references().cloned().collect();
        for reference in &references {
            if let Some(other) = self.by_reference.insert(reference.clone(), image.id.clone())
                && other != image.id
                && let Some(other) = self.by_id.get_mut(&other)
            {
                let left = other.references().filter(|r| *r != reference).cloned().collect();
                Arc::make_mut(other).set_references(left, &self.pinned);
            }
        }
        if let Some(old) = self.by_id.get(&image.id) {
            references.extend(old.references().cloned());
            references.sort_unstable();
            references.dedup();
            image.pulled_at_ns = old.pulled_at_ns;
            image.set_references(references, &self.pinned);
        }
        self.by_id.insert(image.id.clone(), Arc::new(image));
        Ok(())
    }

    pub(crate) fn remove(&mut self, id: &str) {
        self.by_id.remove(id);
        self.by_reference.retain(|_, i| i != id);
    }

    pub(crate) fn all(&self) -> Vec<Arc<Image>> {
        self.by_id.values().cloned().collect()
    }

    /// The topmost layers of all images.
    pub(crate) fn chains(&self) -> Vec<String> {
        self.by_id.values().map(|i| i.chain_id.clone()).filter(|c| !c.is_empty()).collect()
    }

    /// The image of this name, id, or unique prefix of an id. A name wins over a prefix.
    pub(crate) fn find(&self, text: &str) -> Option<Arc<Image>> {
        if let Some(image) = self.by_id.get(text) {
            return Some(image.clone());
        }
        if let Ok(reference) = Reference::parse(text)
            && let Some(image) = self.by_full_name(&reference)
        {
            return Some(image);
        }
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        if hex.len() < SHORTEST_ID || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let prefix = format!("sha256:{}", hex.to_ascii_lowercase());
        let mut matches = self.by_id.range(prefix.clone()..).take_while(|(id, _)| id.starts_with(&prefix));
        let first = matches.next()?;
        matches.next().is_none().then(|| first.1.clone())
    }

    fn by_full_name(&self, reference: &Reference) -> Option<Arc<Image>> {
        if let Some(id) = self.by_reference.get(&reference.to_string()) {
            return self.by_id.get(id).cloned();
        }
        // `name@digest` where the digest is the image's own id, as some tools write it.
        let Selector::Digest(digest) = &reference.selector else { return None };
        let image = self.by_id.get(digest.as_str())?;
        let prefix = reference.name();
        image
            .references()
            .any(|r| r.strip_prefix(&prefix).is_some_and(|rest| rest.starts_with([':', '@'])))
            .then(|| image.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: char, references: &[&str]) -> ImageRecord {
        ImageRecord {
            id: format!("sha256:{}", id.to_string().repeat(64)),
            chain_id: format!("chain {id}"),
            size: 1,
            created_at_ns: 0,
            config: b"{}".to_vec(),
            references: references.iter().map(|r| (*r).to_owned()).collect(),
        }
    }

    #[test]
    fn images_are_found_by_name_digest_id_and_prefix() {
        let by_digest = format!("docker.io/library/a@sha256:{}", "1".repeat(64));
        let mut catalog = Catalog::new(&["a".into()]);
        catalog.put(record('a', &["docker.io/library/a:latest", &by_digest])).unwrap();
        catalog.put(record('b', &["q.io/abc:1"])).unwrap();
        let id = |text: &str| catalog.find(text).map(|i| i.id.chars().nth(8).unwrap());
        assert_eq!(id("a"), Some('a'));
        assert_eq!(id(&format!("a@sha256:{}", "1".repeat(64))), Some('a'));
        assert_eq!(id(&format!("a:x@sha256:{}", "1".repeat(64))), Some('a'));
        assert_eq!(id(&format!("sha256:{}", "b".repeat(64))), Some('b'));
        assert_eq!(id(&"b".repeat(64)), Some('b'));
        assert_eq!(id("bbb"), Some('b'));
        assert_eq!(id("sha256:bbbb"), Some('b'));
        assert_eq!(id("bb"), None);
        assert_eq!(id("nope"), None);
        assert!(catalog.find("a").unwrap().pinned && !catalog.find("bbb").unwrap().pinned);
    }

    #[test]
    fn an_ambiguous_prefix_stands_for_nothing() {
        let mut catalog = Catalog::default();
        for last in ["1", "2"] {
            let mut r = record('c', &[]);
            r.id = format!("sha256:{}{last}", "c".repeat(63));
            catalog.put(r).unwrap();
        }
        assert!(catalog.find("cccc").is_none());
    }

    #[test]
    fn a_tag_moves_to_the_new_image() {
        let old = format!("q.io/a@sha256:{}", "1".repeat(64));
        let mut catalog = Catalog::default();
        catalog.put(record('a', &["q.io/a:1", &old])).unwrap();
        catalog.put(record('b', &["q.io/a:1"])).unwrap();
        assert!(catalog.find("q.io/a:1").unwrap().id.contains("bbb"));
        let moved = catalog.find("aaa").unwrap();
        assert!(moved.repo_tags.is_empty());
        assert_eq!(moved.repo_digests, [old]);
        catalog.put(record('a', &["q.io/a:2"])).unwrap();
        assert_eq!(catalog.find("aaa").unwrap().references().count(), 2);
        catalog.remove(&moved.id);
        assert!(catalog.find("q.io/a:2").is_none());
        assert_eq!(catalog.chains(), ["chain b"]);
    }
}
