//! Archives: OCI layouts (a directory or a tar of one) and `docker save`.
//!
//! A tar is not unpacked: one pass over its headers notes where each file lies,
//! and layers are then unpacked from there. What is read into memory is bounded
//! (CVE-2023-25153).

use crate::images::Inner;
use crate::install::{NewImage, Section, Source, install};
use crate::manifest::{CONFIG_MAX, Descriptor, Document, INDEX_DEPTH, MANIFEST_MAX, choose, parse, parse_config};
use crate::unpack::{Kind, Reader, decompress};
use crate::{Digest, ImageId, Reference, Selector};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::ManifestRecord;
use types::{Error, ErrorKind, Result, ResultExt};

/// How many bytes of names an archive may have.
const NAMES_MAX: usize = 16 << 20;
/// How many images one archive may have.
const IMAGES_MAX: usize = 1000;
/// How many links may lead from one name to the next (older `docker save`).
const LINKS_MAX: usize = 8;

/// What an import brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportedImage {
    /// The image's id.
    pub id: ImageId,
    /// The full names that it was given.
    pub references: Vec<String>,
}

/// Imports all images of `path`.
pub(crate) async fn import(
    inner: &Arc<Inner>,
    path: PathBuf,
    reference: Option<Reference>,
) -> Result<Vec<ImportedImage>> {
    let (scratch, platform) = (inner.blobs.scratch("import"), inner.platform.clone());
    let found = tokio::task::spawn_blocking(move || {
        let archive = Archive::open(&path, &scratch.path)?;
        let images =
            if archive.contains("index.json") { archive.oci_images(&platform)? } else { archive.docker_images()? };
        // The scratch file lives on through its descriptor.
        drop(scratch);
        Ok::<_, Error>(images)
    });
    let mut images = found.await.map_err(|e| Error::internal("read an archive").because(e))??;
    if let Some(reference) = reference {
        let [image] = images.as_mut_slice() else {
            return Err(Error::invalid(format!("the archive has {} images, one name is not enough", images.len())));
        };
        if matches!(reference.selector, Selector::Digest(_)) {
            return Err(Error::invalid(format!("{reference}: an import gets a name by tag, the digest is its own")));
        }
        let digests: Vec<String> = image.references.drain(..).filter_map(|r| rename(&reference, &r)).collect();
        image.references.push(reference.to_string());
        image.references.extend(digests);
    }
    let mut imported = Vec::new();
    for image in images {
        let references = image.references.clone();
        imported.push(ImportedImage { id: install(inner, image).await?, references });
    }
    Ok(imported)
}

/// The digest of `old` under the name of `new`.
fn rename(new: &Reference, old: &str) -> Option<String> {
    match (&new.selector, old.split_once('@')) {
        (Selector::Tag(_), Some((_, digest))) => Some(new.with_digest(&digest.parse().ok()?).to_string()),
        _ => None,
    }
}

/// Random access to the files of an archive.
enum Archive {
    Dir(PathBuf, rustix::fd::OwnedFd),
    Tar(Arc<File>, HashMap<String, Place>),
}

enum Place {
    File { offset: u64, size: u64 },
    Link(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// `a/./b` and `/a/b` as `a/b`; what leads outside has no name.
fn tidy(name: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            other => parts.push(other),
        }
    }
    Some(parts.join("/"))
}

impl Archive {
    /// Opens a directory or a tar; a compressed one is unpacked to `scratch` first.
    fn open(path: &Path, scratch: &Path) -> Result<Self> {
        // A FIFO without a writer would hold us for ever.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).context(|| "open the archive".into())?;
        let mut file = File::from(fd);
        let meta = file.metadata().context(|| "look at the archive".into())?;
        if meta.is_dir() {
            return Ok(Self::Dir(path.to_owned(), file.into()));
        }
        if !meta.is_file() {
            return Err(Error::invalid("the archive is neither a file nor a directory"));
        }
        let mut head = [0; 4];
        let n = file.read(&mut head).context(|| "read the archive".into())?;
        let whole = Section { file: Arc::new(file), offset: 0, left: meta.size() };
        let compressed = matches!(head[..n], [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd, ..]);
        let file = if compressed {
            let mut plain = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(scratch)
                .context(|| format!("make {}", scratch.display()))?;
            let mut source = decompress(Box::new(whole))?;
            std::io::copy(&mut source, &mut plain).context(|| "decompress the archive".into())?;
            Arc::new(plain)
        } else {
            whole.file
        };
        let places = places(&file)?;
        Ok(Self::Tar(file, places))
    }

    fn contains(&self, name: &str) -> bool {
        self.section(name).is_ok()
    }

    fn section(&self, name: &str) -> Result<Section> {
        let missing = || Error::invalid(format!("the archive has no file {name:?}"));
        match self {
            Self::Dir(path, dir) => {
                let fd = rustix::fs::openat2(
                    dir,
                    name,
                    OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
                    Mode::empty(),
                    ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
                )
                .context(|| format!("open {}", path.join(name).display()))?;
                let file = File::from(fd);
                let meta = file.metadata().context(|| format!("look at {name}"))?;
                if meta.is_file() {
                    Ok(Section { file: Arc::new(file), offset: 0, left: meta.size() })
                } else {
                    Err(missing())
                }
            }
            Self::Tar(file, places) => {
                let mut at = tidy(name).ok_or_else(missing)?;
                for _ in 0..LINKS_MAX {
                    match places.get(&at).ok_or_else(missing)? {
                        Place::File { offset, size } => {
                            return Ok(Section { file: file.clone(), offset: *offset, left: *size });
                        }
                        Place::Link(target) => at.clone_from(target),
                    }
                }
                Err(missing())
            }
        }
    }

    /// A file of at most `most` bytes.
    fn small(&self, name: &str, most: u64) -> Result<Vec<u8>> {
        let mut section = self.section(name)?;
        if section.left > most {
            return Err(Error::new(
                ErrorKind::ResourceExhausted,
                format!("{name} in the archive has {} bytes, over the bound of {most}", section.left),
            ));
        }
        let mut content = Vec::new();
        section.read_to_end(&mut content).context(|| format!("read {name} in the archive"))?;
        Ok(content)
    }

    fn blob_name(digest: &Digest) -> String {
        format!("blobs/{}/{}", digest.algorithm(), digest.hex())
    }

    /// A blob of JSON, verified.
    fn json(&self, descriptor: &Descriptor, most: u64) -> Result<Vec<u8>> {
        let name = Self::blob_name(&descriptor.digest);
        let body = self.small(&name, most)?;
        descriptor.digest.verify_bytes(&body, &name)?;
        Ok(body)
    }

    fn oci_images(&self, platform: &crate::Platform) -> Result<Vec<NewImage>> {
        let Document::Index(entries) = parse(&self.small("index.json", MANIFEST_MAX)?, None)? else {
            return Err(Error::invalid("index.json is no index"));
        };
        if entries.len() > IMAGES_MAX {
            return Err(Error::new(
                ErrorKind::ResourceExhausted,
                format!("the archive has {} images, over the bound of {IMAGES_MAX}", entries.len()),
            ));
        }
        let alone = entries.len() == 1;
        let mut images = Vec::new();
        for entry in &entries {
            let elsewhere = entry.platform.as_ref().is_some_and(|p| platform.rank(p).is_none());
            if elsewhere && !alone {
                continue;
            }
            images.push(self.oci_image(entry, platform)?);
        }
        if images.is_empty() {
            return Err(Error::not_found(format!("the archive has no image for {platform}")));
        }
        Ok(images)
    }

    fn oci_image(&self, entry: &Descriptor, platform: &crate::Platform) -> Result<NewImage> {
        let mut at = entry.clone();
        for _ in 0..INDEX_DEPTH {
            let body = self.json(&at, MANIFEST_MAX)?;
            let manifest = match parse(&body, Some(&at.media_type))? {
                Document::Index(entries) => {
                    at = choose(&entries, platform)?.clone();
                    continue;
                }
                Document::Image(manifest) => manifest,
            };
            let config_bytes = self.json(&manifest.config, CONFIG_MAX)?;
            let size = manifest.travels(config_bytes.len(), body.len());
            let layers = manifest
                .layers
                .iter()
                .map(|l| Ok(Source::Local(self.section(&Self::blob_name(&l.digest))?, Some(l.digest.clone()))))
                .collect::<Result<_>>()?;
            return Ok(NewImage {
                config: parse_config(&config_bytes)?,
                config_bytes,
                size,
                references: names_of(entry),
                manifest: Some(ManifestRecord { digest: at.digest.to_string(), media_type: manifest.media_type, body }),
                layers,
            });
        }
        Err(Error::invalid(format!("indexes lie more than {INDEX_DEPTH} deep")))
    }

    fn docker_images(&self) -> Result<Vec<NewImage>> {
        if !self.contains("manifest.json") {
            return Err(Error::invalid("it is no image archive: neither index.json nor manifest.json is in it"));
        }
        let list: Vec<DockerImage> = serde_json::from_slice(&self.small("manifest.json", MANIFEST_MAX)?)
            .context_kind(ErrorKind::InvalidArgument, || "read manifest.json".into())?;
        if list.len() > IMAGES_MAX {
            return Err(Error::new(
                ErrorKind::ResourceExhausted,
                format!("the archive has {} images, over the bound of {IMAGES_MAX}", list.len()),
            ));
        }
        list.into_iter().map(|image| self.docker_image(image)).collect()
    }

    fn docker_image(&self, image: DockerImage) -> Result<NewImage> {
        let config_bytes = self.small(&image.config, CONFIG_MAX)?;
        let sections =
            image.layers.unwrap_or_default().iter().map(|name| self.section(name)).collect::<Result<Vec<_>>>()?;
        let size = sections.iter().map(|s| s.left).sum::<u64>() + config_bytes.len() as u64;
        let references = image
            .repo_tags
            .unwrap_or_default()
            .iter()
            .map(|tag| Reference::parse(tag).map(|r| r.to_string()))
            .collect::<Result<_>>()?;
        Ok(NewImage {
            config: parse_config(&config_bytes)?,
            config_bytes,
            size,
            references,
            manifest: None,
            // Only the diff ids vouch for these layers; they always do.
            layers: sections.into_iter().map(|s| Source::Local(s, None)).collect(),
        })
    }
}

/// The names that an index's entry gives an image. A bare word is only a tag,
/// which says nothing without the name that it belongs to.
fn names_of(entry: &Descriptor) -> Vec<String> {
    let annotation = |key: &str| entry.annotations.as_ref().and_then(|a| a.get(key));
    let full = annotation("io.containerd.image.name");
    let name = full.or_else(|| annotation("org.opencontainers.image.ref.name").filter(|n| n.contains(['/', ':'])));
    let Some(Ok(reference)) = name.map(|n| Reference::parse(n)) else { return Vec::new() };
    let by_digest = reference.with_digest(&entry.digest).to_string();
    let mut names = vec![reference.to_string()];
    if names[0] != by_digest {
        names.push(by_digest);
    }
    names
}

/// Where each file of a tar lies.
fn places(file: &Arc<File>) -> Result<HashMap<String, Place>> {
    let size = file.metadata().context(|| "look at the archive".into())?.size();
    let mut reader = Reader::new(Section { file: file.clone(), offset: 0, left: size });
    let mut places = HashMap::new();
    let mut names = 0;
    while let Some(entry) = reader.next()? {
        let text = |bytes: &[u8]| tidy(&String::from_utf8_lossy(bytes));
        names += entry.path.len() + entry.link.len() + size_of::<Place>();
        if names > NAMES_MAX {
            return Err(Error::new(
                ErrorKind::ResourceExhausted,
                format!("the archive's names take more than {NAMES_MAX} bytes"),
            ));
        }
        let path = text(&entry.path);
        let (section, skip) = reader.beneath();
        let offset = section.offset;
        if skip > section.left {
            return Err(Error::invalid("the archive ends in the middle of a file"));
        }
        section.offset += skip;
        section.left -= skip;
        let place = match entry.kind {
            Kind::File => Some(Place::File { offset, size: entry.size }),
            Kind::HardLink => text(&entry.link).map(Place::Link),
            Kind::Symlink => {
                let dir = entry.path.iter().rposition(|b| *b == b'/').map_or(&[][..], |i| &entry.path[..i]);
                text(&[dir, b"/", &entry.link].concat()).map(Place::Link)
            }
            _ => None,
        };
        if let (Some(path), Some(place)) = (path, place) {
            places.insert(path, place);
        }
    }
    Ok(places)
}
