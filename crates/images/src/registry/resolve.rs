//! From a name to a manifest and a configuration.

use super::http::{self, Asked};
use super::{Attempts, Session};
use crate::install::{NewImage, Source};
use crate::manifest::{
    CONFIG_MAX, DOCKER_LIST, DOCKER_MANIFEST, Descriptor, Document, INDEX_DEPTH, MANIFEST_MAX, OCI_INDEX, OCI_MANIFEST,
    choose, parse, parse_config,
};
use crate::{Digest, Platform, Selector};
use ::http::header::CONTENT_TYPE;
use std::sync::Arc;
use store::ManifestRecord;
use types::{Error, ErrorKind, Result};

impl Session {
    /// Finds the image for `platform`, with everything but its layers.
    pub(crate) async fn resolve(self: &Arc<Self>, platform: &Platform) -> Result<NewImage> {
        let wanted = match &self.reference.selector {
            Selector::Digest(digest) => Some(digest.clone()),
            Selector::Tag(_) => None,
        };
        let (mut body, media_type) = self.manifest(self.reference.selector_text(), wanted.as_ref()).await?;
        let top = wanted.unwrap_or_else(|| Digest::of(&body));
        let mut document = parse(&body, media_type.as_deref())?;
        let mut digest = top.clone();
        for _ in 0..INDEX_DEPTH {
            let Document::Index(entries) = &document else { break };
            let chosen = choose(entries, platform)?.clone();
            digest = chosen.digest.clone();
            body = self.manifest(digest.as_str(), Some(&digest)).await?.0;
            document = parse(&body, Some(&chosen.media_type))?;
        }
        let Document::Image(manifest) = document else {
            return Err(Error::invalid(format!("indexes lie more than {INDEX_DEPTH} deep")));
        };
        let config_bytes = self.config(&manifest.config).await?;
        let mut references = vec![self.reference.to_string(), self.reference.with_digest(&top).to_string()];
        references.dedup();
        Ok(NewImage {
            config: parse_config(&config_bytes)?,
            size: manifest.travels(config_bytes.len(), body.len()),
            config_bytes,
            references,
            manifest: Some(ManifestRecord { digest: digest.to_string(), media_type: manifest.media_type, body }),
            layers: manifest.layers.into_iter().map(|l| Source::Remote(self.clone(), l)).collect(),
        })
    }

    /// A manifest or index by tag or digest, with the media type it was sent as.
    async fn manifest(&self, selector: &str, digest: Option<&Digest>) -> Result<(Vec<u8>, Option<String>)> {
        let accept = [OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST].join(", ");
        let path = format!("manifests/{selector}");
        let mut attempts = Attempts::new(self);
        loop {
            let done = async {
                let response = self.get(attempts.endpoint, &path, &accept, 0).await?;
                let media_type = response.headers().get(CONTENT_TYPE).and_then(|t| t.to_str().ok());
                let media_type = media_type.map(|t| t.split(';').next().unwrap_or(t).trim().to_owned());
                let body = self.bounded(response, MANIFEST_MAX).await?;
                if let Some(digest) = digest {
                    digest.verify_bytes(&body, &format!("manifest {selector}"))?;
                }
                Ok((body, media_type))
            };
            match done.await {
                Ok(found) => return Ok(found),
                Err(error) => attempts.failed(error, false).await?,
            }
        }
    }

    /// The configuration's bytes, verified.
    async fn config(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        if descriptor.size > CONFIG_MAX {
            return Err(Error::new(
                ErrorKind::ResourceExhausted,
                format!("a configuration of {} bytes is over the bound of {CONFIG_MAX}", descriptor.size),
            ));
        }
        let path = format!("blobs/{}", descriptor.digest);
        let mut attempts = Attempts::new(self);
        loop {
            let done = async {
                let response = self.get(attempts.endpoint, &path, "", 0).await?;
                let body = self.bounded(response, descriptor.size).await?;
                descriptor.digest.verify_bytes(&body, "the configuration")?;
                Ok(body)
            };
            match done.await {
                Ok(found) => return Ok(found),
                Err(error) => attempts.failed(error, false).await?,
            }
        }
    }

    async fn bounded(&self, response: reqwest::Response, most: u64) -> Result<Vec<u8>> {
        tokio::time::timeout_at(self.deadline, http::body(response, most)).await.map_err(|_| self.too_late())?
    }

    /// Asks an address that a manifest names for a foreign layer: as a stranger.
    pub(super) async fn foreign(&self, url: reqwest::Url, from: u64) -> Result<reqwest::Response> {
        let asked = Asked { url, accept: "", from, authorization: None };
        http::check(self.send(&asked, &http::Trust::default()).await?.response).await
    }
}
