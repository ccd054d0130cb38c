//! The handle to all images.
//!
//! What changes something runs on tasks of its own and goes on when a caller is
//! dropped. `list` and `get` answer from memory.

use crate::blobs::Blobs;
use crate::fs_info::{FsInfo, FsUsage};
use crate::image::Catalog;
use crate::import::ImportedImage;
use crate::install::install;
use crate::registry::{Auth, Session};
use crate::{Image, ImageId, ImagesConfig, Platform, Reference, import};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use snapshots::{KeyLocks, Snapshotter};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant, SystemTime};
use store::Store;
use types::{Error, Result};

/// The images of this node; clones share them.
#[derive(Debug, Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

type Pull = Shared<BoxFuture<'static, Result<ImageId, Arc<Error>>>>;
/// What is pulled, and with whose secret.
type PullKey = (Reference, Option<Auth>);

pub(crate) struct Inner {
    pub(crate) config: ImagesConfig,
    pub(crate) platform: Platform,
    pub(crate) store: Store,
    pub(crate) snapshots: Arc<dyn Snapshotter>,
    pub(crate) catalog: RwLock<Catalog>,
    /// Held while database, catalog and kept layers change together.
    pub(crate) changes: tokio::sync::Mutex<()>,
    /// One unpacking per chain id at a time.
    pub(crate) layers: KeyLocks,
    pub(crate) blobs: Blobs,
    /// Pulls under way, which further callers with the same name and secret join.
    pulls: Mutex<HashMap<PullKey, (Pull, Instant)>>,
    fs_info: FsInfo,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Images").field("root", &self.config.root).finish_non_exhaustive()
    }
}

impl Inner {
    pub(crate) fn catalog(&self) -> RwLockReadGuard<'_, Catalog> {
        self.catalog.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Images {
    /// Opens the images, and removes what a crash left: unfinished downloads,
    /// layers that no image names, records whose layers are gone.
    ///
    /// # Errors
    /// When directories can't be made or the database not be read; a single bad
    /// record is logged and dropped.
    pub async fn open(config: ImagesConfig, store: Store, snapshots: Arc<dyn Snapshotter>) -> Result<Images> {
        let blobs = Blobs::open(&config.root)?;
        let mut catalog = Catalog::new(&config.pinned);
        for record in store.images().await? {
            let id = record.id.clone();
            let whole = record.chain_id.is_empty() || snapshots.layer(&record.chain_id).await?.is_some();
            let loaded = if whole {
                catalog.put(record)
            } else {
                Err(Error::not_found(format!("image {id}: its layers are gone")).hint("pull it again"))
            };
            if let Err(error) = loaded {
                tracing::error!(image = id, %error, "dropping an image that can't be used");
                store.delete_image(&id).await?;
            }
        }
        snapshots.keep(catalog.chains()).await?;
        let platform = config.platform.clone().unwrap_or_else(Platform::host);
        let inner = Inner {
            config,
            platform,
            store,
            snapshots,
            catalog: RwLock::new(catalog),
            changes: tokio::sync::Mutex::new(()),
            layers: KeyLocks::default(),
            blobs,
            pulls: Mutex::default(),
            fs_info: FsInfo::default(),
        };
        Ok(Images { inner: Arc::new(inner) })
    }

    /// Pulls an image and returns its id. A pull of the same name with the same
    /// secret that is under way is joined; it goes on if its callers leave.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad name, `NotFound` for an image that no source
    /// has, `PermissionDenied`, `Unavailable` when nobody could be reached.
    pub async fn pull(&self, reference: &str, auth: Option<Auth>) -> Result<ImageId> {
        let reference = Reference::parse(reference)?;
        let pull = {
            let mut pulls = self.inner.pulls.lock().unwrap_or_else(PoisonError::into_inner);
            let key = (reference, auth);
            match pulls.get(&key) {
                Some((pull, _)) => pull.clone(),
                None => {
                    let pull = start_pull(&self.inner, key.clone());
                    pulls.insert(key, (pull.clone(), Instant::now()));
                    pull
                }
            }
        };
        // Several callers may get the same error, which can't be cloned.
        pull.await.map_err(|e| Error::new(e.kind(), e.to_string()))
    }

    /// The pulls that are under way: what is pulled, and for how long now.
    pub fn pulls(&self) -> Vec<(String, Duration)> {
        let pulls = self.inner.pulls.lock().unwrap_or_else(PoisonError::into_inner);
        pulls.iter().map(|((reference, _), (_, since))| (reference.to_string(), since.elapsed())).collect()
    }

    /// Imports the images of an OCI archive, a docker archive, or an OCI layout
    /// directory. `reference` names the image where the archive has only one.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no such archive, `NotFound` when it has
    /// nothing for this platform.
    pub async fn import(&self, path: &Path, reference: Option<&str>) -> Result<Vec<ImportedImage>> {
        let reference = reference.map(Reference::parse).transpose()?;
        let (inner, path) = (self.inner.clone(), path.to_owned());
        let task = tokio::spawn(async move {
            let what = format!("import {}", path.display());
            import::import(&inner, path, reference).await.map_err(|e| e.within(what))
        });
        task.await.map_err(|e| Error::internal("import an image").because(e))?
    }

    /// All images, or the one that `filter` names.
    pub fn list(&self, filter: Option<&str>) -> Vec<Arc<Image>> {
        match filter {
            None | Some("") => self.inner.catalog().all(),
            Some(name) => self.get(name).into_iter().collect(),
        }
    }

    /// The image of this name (by tag or digest), id, or unique prefix of an id.
    pub fn get(&self, reference_or_id: &str) -> Option<Arc<Image>> {
        self.inner.catalog().find(reference_or_id)
    }

    /// Removes an image with all its names, whichever it was called by, and the
    /// layers that nothing else needs: those under a container go with that
    /// container. An unknown name is no error.
    ///
    /// # Errors
    /// When the record can't be deleted; or a layer's directory, which the next
    /// opening tries again.
    pub async fn remove(&self, reference_or_id: &str) -> Result<()> {
        let (inner, name) = (self.inner.clone(), reference_or_id.to_owned());
        let task = tokio::spawn(async move {
            let _turn = inner.changes.lock().await;
            let Some(image) = inner.catalog().find(&name) else { return Ok(()) };
            inner.store.delete_image(&image.id).await?;
            let chains = {
                let mut catalog = inner.catalog.write().unwrap_or_else(PoisonError::into_inner);
                catalog.remove(&image.id);
                catalog.chains()
            };
            inner.snapshots.keep(chains).await
        });
        let removed = task.await.map_err(|e| Error::internal("remove an image").because(e))?;
        removed.map_err(|e| e.within(format!("remove image {reference_or_id}")))
    }

    /// What images and containers use of the disk: at most ten seconds old, or what the
    /// last walk over the containers' files has found while the next one takes long.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn fs_info(&self) -> Result<FsUsage> {
        let snapshots = self.inner.snapshots.clone();
        let walk = async move {
            let total = snapshots.total_usage().await?;
            Ok(FsUsage {
                mountpoint: snapshots.root().to_owned(),
                used_bytes: total.layers.bytes + total.active.bytes,
                inodes_used: total.layers.inodes + total.active.inodes,
                timestamp: SystemTime::now(),
            })
        };
        self.inner.fs_info.ask(walk).await
    }
}

/// Starts a pull on a task of its own; the lock on `pulls` is held meanwhile, so
/// that it can't end before it is listed there.
fn start_pull(inner: &Arc<Inner>, key: PullKey) -> Pull {
    let inner = inner.clone();
    let task = tokio::spawn(async move {
        let pulled = pull(&inner, &key.0, key.1.clone()).await;
        inner.pulls.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        pulled.map_err(|e| Arc::new(e.within(format!("pull {}", key.0))))
    });
    async move { task.await.unwrap_or_else(|e| Err(Arc::new(Error::internal("pull an image").because(e)))) }
        .boxed()
        .shared()
}

async fn pull(inner: &Arc<Inner>, reference: &Reference, auth: Option<Auth>) -> Result<ImageId> {
    let session = Arc::new(Session::new(&inner.config, reference, auth)?);
    let new = session.resolve(&inner.platform).await?;
    install(inner, new).await
}
