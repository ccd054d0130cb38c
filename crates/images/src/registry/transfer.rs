//! A blob's way into a file: resumed where it breaks off, hashed as it comes.

use super::http::broken;
use super::{Attempts, Session};
use crate::manifest::Descriptor;
use crate::{Digest, Hasher};
use ::http::header::CONTENT_RANGE;
use reqwest::{Response, StatusCode, Url};
use std::path::Path;
use tokio::fs::File;
use tokio::io::{AsyncSeekExt, AsyncWriteExt};
use types::{Error, ErrorKind, Result, ResultExt};

/// What has come so far.
struct Partial<'a> {
    descriptor: &'a Descriptor,
    path: &'a Path,
    file: File,
    hasher: Hasher,
    received: u64,
}

impl<'a> Partial<'a> {
    async fn new(descriptor: &'a Descriptor, path: &'a Path) -> Result<Self> {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .await
            .context(|| format!("make the download {}", path.display()))?;
        Ok(Self { descriptor, path, file, hasher: descriptor.digest.hasher(), received: 0 })
    }

    /// Begins anew.
    async fn restart(&mut self) -> Result<()> {
        let what = || format!("empty the download {}", self.path.display());
        self.file.set_len(0).await.context(what)?;
        self.file.rewind().await.context(what)?;
        self.hasher = self.descriptor.digest.hasher();
        self.received = 0;
        Ok(())
    }

    /// Takes an answer to a request for what is missing.
    async fn take(&mut self, mut response: Response) -> Result<()> {
        if self.received > 0 {
            let range = response.headers().get(CONTENT_RANGE).and_then(|r| r.to_str().ok()).unwrap_or("");
            let continues = response.status() == StatusCode::PARTIAL_CONTENT
                && range.trim_start_matches("bytes").trim_start().starts_with(&format!("{}-", self.received));
            if !continues {
                self.restart().await?;
                if response.status() == StatusCode::PARTIAL_CONTENT {
                    return Err(Error::unavailable(format!("another range than asked for came: {range:?}")));
                }
            }
        }
        let size = self.descriptor.size;
        let what = || format!("write the download {}", self.path.display());
        while let Some(chunk) = response.chunk().await.map_err(|e| broken(e, "read the layer"))? {
            if self.received + chunk.len() as u64 > size {
                return Err(Error::internal(format!("more than the {size} bytes that the manifest gives came")));
            }
            self.file.write_all(&chunk).await.context(what)?;
            self.hasher.update(&chunk);
            self.received += chunk.len() as u64;
        }
        self.file.flush().await.context(what)?;
        if self.received < size {
            return Err(Error::unavailable(format!("only {} of {size} bytes came", self.received)));
        }
        Ok(())
    }

    fn computed(&self) -> Digest {
        self.hasher.clone().finish()
    }
}

impl Session {
    /// Downloads a layer to `path`, in full and verified.
    ///
    /// # Errors
    /// What went wrong at each place that was asked. The file is the caller's
    /// to remove.
    pub(crate) async fn download(&self, descriptor: &Descriptor, path: &Path) -> Result<()> {
        let what = || format!("download layer {}", descriptor.digest);
        let mut partial = Partial::new(descriptor, path).await.map_err(|e| e.within(what()))?;
        let all = self.ask_endpoints(&mut partial);
        let done = tokio::time::timeout_at(self.deadline, all).await.map_err(|_| self.too_late())?;
        match done {
            Err(e) if e.kind() == ErrorKind::NotFound && is_foreign(descriptor) => {
                self.ask_urls(&mut partial, e).await.map_err(|e| e.within(what()))
            }
            other => other.map_err(|e| e.within(what())),
        }
    }

    async fn ask_endpoints(&self, partial: &mut Partial<'_>) -> Result<()> {
        let address = format!("blobs/{}", partial.descriptor.digest);
        let mut attempts = Attempts::new(self);
        let mut mismatches = 0;
        loop {
            let before = partial.received;
            let done = match self.get(attempts.endpoint, &address, "", partial.received).await {
                Ok(response) => partial.take(response).await,
                Err(e) => Err(e),
            };
            let error = match done {
                Ok(()) => match partial.descriptor.digest.verify(&partial.computed(), "the layer") {
                    Ok(()) => return Ok(()),
                    Err(e) => {
                        partial.restart().await?;
                        mismatches += 1;
                        // Once may be an accident, such as a resumption that met another copy.
                        if mismatches == 1 { e.with_kind(ErrorKind::Unavailable) } else { e }
                    }
                },
                Err(e) => e,
            };
            attempts.failed(error, partial.received > before).await?;
        }
    }

    /// The addresses that the manifest itself gives.
    async fn ask_urls(&self, partial: &mut Partial<'_>, first: Error) -> Result<()> {
        let mut errors = vec![first];
        for text in partial.descriptor.urls.iter().flatten() {
            let url =
                Url::parse(text).ok().filter(|u| matches!(u.scheme(), "http" | "https") && u.username().is_empty());
            let Some(url) = url else {
                errors.push(Error::invalid(format!("{text:?} is no address of a layer")));
                continue;
            };
            let work = async {
                partial.restart().await?;
                let response = self.foreign(url, 0).await?;
                partial.take(response).await?;
                partial.descriptor.digest.verify(&partial.computed(), "the layer")
            };
            match tokio::time::timeout_at(self.deadline, work).await.map_err(|_| self.too_late())? {
                Ok(()) => return Ok(()),
                Err(e) => errors.push(e),
            }
        }
        Err(super::summary(errors))
    }
}

/// Layers that may not be redistributed lie elsewhere.
fn is_foreign(descriptor: &Descriptor) -> bool {
    descriptor.urls.as_ref().is_some_and(|u| !u.is_empty())
        && (descriptor.media_type.contains("foreign") || descriptor.media_type.contains("nondistributable"))
}
