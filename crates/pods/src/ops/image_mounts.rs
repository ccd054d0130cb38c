//! Images as volumes: the layers of each image that a mount names, kept by a
//! snapshot of its own for as long as the container exists.
//!
//! ```text
//! <container>            the snapshot that is the container's root
//! <container>.image-0    keeps the layers of its first image mount; never written to
//! ```

use super::PodContext;
use crate::facts::LayeredRoot;
use proto::cri::{ContainerConfig, Mount};
use std::collections::BTreeMap;
use std::path::PathBuf;
use types::{Error, Result, ResultExt};

const INFIX: &str = ".image-";

/// The image that a mount names, where it is one of an image.
fn image_of(mount: &Mount) -> Option<&str> {
    mount.image.as_ref().map(|i| i.image.as_str()).filter(|name| !name.is_empty())
}

/// The keys of a container's snapshots beside its root's.
fn keys(id: &str, config: &ContainerConfig) -> impl Iterator<Item = String> {
    let count = config.mounts.iter().filter(|m| image_of(m).is_some()).count();
    (0..count).map(move |n| format!("{id}{INFIX}{n}"))
}

/// The container that a snapshot belongs to, its root's or an image mount's.
pub fn container_of(key: &str) -> &str {
    key.split_once(INFIX).map_or(key, |(id, _)| id)
}

/// For each image mount, by its `container_path`: the layers of what it shows, the
/// top one first, as [`spec::ContainerInput::image_mounts`] takes them.
///
/// # Errors
/// `NotFound` for an image that is not on this node, `InvalidArgument` for a
/// sub-path that leads nowhere; what stands by then, [`release`] removes.
pub async fn prepare(ctx: &PodContext, id: &str, config: &ContainerConfig) -> Result<BTreeMap<String, Vec<PathBuf>>> {
    let shared = &ctx.shared;
    let mut found = BTreeMap::new();
    let mounts = config.mounts.iter().filter_map(|m| Some((m, image_of(m)?)));
    for ((mount, name), key) in mounts.zip(keys(id, config)) {
        let within = || format!("mount at {:?}", mount.container_path);
        let image = shared.images.get(name).ok_or_else(|| {
            Error::not_found(format!("{}: image {name:?} is not on this node", within()))
                .hint("pull or import it first")
        })?;
        if image.chain_id.is_empty() {
            return Err(Error::invalid(format!("{}: image {name:?} has no layers", within())));
        }
        let idmap = ctx.pod.state.sandbox.plan.user.as_ref().map(super::create::snapshot_idmap);
        let prepare = shared.snapshots.prepare(&key, Some(&image.chain_id), idmap.as_ref());
        let made = shared.bounded("keeping an image's layers", prepare).await.map_err(|e| e.within(within()))?;
        // The snapshot's own top is no part of the image.
        let (lower, own): (Vec<String>, Vec<String>) =
            made.into_iter().flat_map(|m| m.options).partition(|o| o.starts_with("lowerdir="));
        let own = own.iter().find_map(|o| o.strip_prefix("upperdir=")).map(PathBuf::from);
        // Overlayfs, which hides an image's whiteouts, is not to be had in a user namespace.
        let own = own.filter(|_| idmap.is_none());
        let sub_path = mount.image_sub_path.clone();
        let layers = tokio::task::spawn_blocking(move || whole(&LayeredRoot::from_overlay(&lower), &sub_path, own))
            .await
            .context(within)?
            .map_err(|e| e.within(within()))?;
        found.insert(mount.container_path.clone(), layers);
    }
    Ok(found)
}

/// The layers of what a sub-path shows. A directory that an upper layer has cut from all
/// below it is in one layer alone and may have whiteouts in it still, which only
/// overlayfs hides; that takes two, so the snapshot's empty directory comes below.
fn whole(image: &LayeredRoot, sub_path: &str, empty: Option<PathBuf>) -> Result<Vec<PathBuf>> {
    let mut layers = image.at(sub_path)?;
    if let [one] = &layers[..]
        && image.0.len() > 1
        && one.is_dir()
    {
        layers.extend(empty);
    }
    Ok(layers)
}

/// Lets the images' layers go; goes on whatever fails.
pub async fn release(ctx: &PodContext, id: &str, config: &ContainerConfig) -> Vec<Error> {
    let mut errors = Vec::new();
    for key in keys(id, config) {
        let removal = ctx.shared.snapshots.remove(&key);
        errors.extend(ctx.shared.bounded("letting an image's layers go", removal).await.err());
    }
    errors
}
