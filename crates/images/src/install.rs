//! From a configuration and blobs to an image: unpack what is missing, layer by
//! layer, then record it.
//!
//! The layers are held from before we look for them until the record stands, so
//! that no removal of another image takes them away. A failure leaves nothing:
//! the draft is aborted, layers that no image names are swept.

use crate::blobs::Blob;
use crate::digest::chain_ids;
use crate::images::Inner;
use crate::manifest::{Config, Descriptor};
use crate::registry::Session;
use crate::unpack::unpack;
use crate::{Digest, ImageId};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use store::{ImageRecord, ManifestRecord};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use types::{Error, Result, ResultExt};

/// overlayfs takes no more lower directories.
const LAYERS_MAX: usize = 500;

/// An image whose layers are yet to come.
pub(crate) struct NewImage {
    pub(crate) config_bytes: Vec<u8>,
    pub(crate) config: Config,
    /// Of everything that travels, in bytes.
    pub(crate) size: u64,
    pub(crate) references: Vec<String>,
    pub(crate) manifest: Option<ManifestRecord>,
    /// The lowest first, one per diff id.
    pub(crate) layers: Vec<Source>,
}

/// Where a layer comes from.
#[derive(Clone)]
pub(crate) enum Source {
    /// A registry.
    Remote(Arc<Session>, Descriptor),
    /// A part of a file; its digest, where it has one of its own.
    Local(Section, Option<Digest>),
}

/// A part of a file.
#[derive(Debug, Clone)]
pub(crate) struct Section {
    pub(crate) file: Arc<File>,
    pub(crate) offset: u64,
    pub(crate) left: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.file.read_at(&mut buffer[..most], self.offset)?;
        if n == 0 && most > 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// A download that ends with whoever waits for it.
struct Download(JoinHandle<Result<Arc<Blob>>>);

impl Drop for Download {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Makes `new` an image of this node and returns its id.
pub(crate) async fn install(inner: &Arc<Inner>, new: NewImage) -> Result<ImageId> {
    let diff_ids = &new.config.diff_ids;
    if diff_ids.len() != new.layers.len() {
        return Err(Error::invalid(format!(
            "the image has {} layers but its configuration lists {}",
            new.layers.len(),
            diff_ids.len()
        )));
    }
    if diff_ids.len() > LAYERS_MAX {
        return Err(Error::invalid(format!("the image has {} layers, over the bound of {LAYERS_MAX}", diff_ids.len())));
    }
    let chain = chain_ids(diff_ids);
    let hold = inner.snapshots.hold(chain.clone());
    let done = match unpack_missing(inner, &new, &chain).await {
        Ok(()) => record(inner, new, &chain).await,
        Err(e) => Err(e),
    };
    drop(hold);
    if let Err(error) = done {
        let _turn = inner.changes.lock().await;
        let chains = inner.catalog().chains();
        return match inner.snapshots.keep(chains).await {
            Ok(()) => Err(error),
            Err(second) => Err(Error::new(error.kind(), format!("{error}; and cleaning up after it failed: {second}"))),
        };
    }
    done
}

async fn unpack_missing(inner: &Arc<Inner>, new: &NewImage, chain: &[String]) -> Result<()> {
    let mut missing = Vec::new();
    let turns = Arc::new(Semaphore::new(inner.config.max_downloads.max(1)));
    for (index, source) in new.layers.iter().enumerate() {
        if inner.snapshots.layer(&chain[index]).await?.is_none() {
            missing.push((index, start(inner, source.clone(), turns.clone())));
        }
    }
    for (index, ready) in missing {
        let (source, digest): (Box<dyn Read + Send>, _) = match ready {
            Ready::Now(section, digest) => (Box::new(section), digest),
            Ready::Later(mut download) => {
                let blob = (&mut download.0).await.map_err(|e| Error::internal("download a layer").because(e))??;
                let file = File::open(&blob.path).context(|| format!("open the download {}", blob.path.display()))?;
                // The blob's digest was checked when it came; its name may go as soon as it is open.
                (Box::new(file), None)
            }
        };
        let below = index.checked_sub(1).map(|i| chain[i].as_str());
        one_layer(inner, source, digest, &new.config.diff_ids[index], &chain[index], below).await?;
    }
    Ok(())
}

enum Ready {
    Now(Section, Option<Digest>),
    Later(Download),
}

fn start(inner: &Arc<Inner>, source: Source, turns: Arc<Semaphore>) -> Ready {
    match source {
        Source::Local(section, digest) => Ready::Now(section, digest),
        Source::Remote(session, descriptor) => {
            let inner = inner.clone();
            Ready::Later(Download(tokio::spawn(async move {
                let _turn = turns.acquire_owned().await;
                let blob = inner.blobs.get(&descriptor.digest);
                let mut ready = blob.ready.lock().await;
                if !*ready {
                    session.download(&descriptor, &blob.path).await?;
                    *ready = true;
                }
                drop(ready);
                Ok(blob)
            })))
        }
    }
}

async fn one_layer(
    inner: &Arc<Inner>,
    source: Box<dyn Read + Send>,
    digest: Option<Digest>,
    diff_id: &Digest,
    chain_id: &str,
    below: Option<&str>,
) -> Result<()> {
    // Another pull may be unpacking the same layer: once is enough.
    let _turn = inner.layers.lock(chain_id).await;
    if inner.snapshots.layer(chain_id).await?.is_some() {
        return Ok(());
    }
    let draft = inner.snapshots.begin_layer(chain_id, below).await?;
    let diff_id = diff_id.clone();
    let (draft, unpacked) = tokio::task::spawn_blocking(move || {
        let unpacked = unpack(source, digest.as_ref(), &diff_id, &draft);
        (draft, unpacked)
    })
    .await
    .map_err(|e| Error::internal("unpack a layer").because(e))?;
    match unpacked {
        Ok(()) => inner.snapshots.commit_layer(draft).await.map(drop),
        Err(error) => {
            let aborted = inner.snapshots.abort_layer(draft).await;
            let errors = std::iter::once(error).chain(aborted.err()).collect();
            Error::join("pull a layer", errors)
        }
    }
}

async fn record(inner: &Arc<Inner>, new: NewImage, chain: &[String]) -> Result<ImageId> {
    let id = Digest::of(&new.config_bytes).to_string();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let record = ImageRecord {
        id: id.clone(),
        chain_id: chain.last().cloned().unwrap_or_default(),
        size: new.size,
        created_at_ns: i64::try_from(now).unwrap_or(i64::MAX),
        config: new.config_bytes,
        references: new.references,
    };
    inner.snapshots.sync().await?;
    let _turn = inner.changes.lock().await;
    // Kept before it is recorded: a record whose layers may be swept would be worse
    // than layers without a record, which a failure sweeps.
    let mut chains = inner.catalog().chains();
    chains.extend(chain.last().cloned());
    inner.snapshots.keep(chains).await?;
    inner.store.put_image(record.clone(), new.manifest).await?;
    inner.catalog.write().unwrap_or_else(PoisonError::into_inner).put(record)?;
    Ok(id)
}
