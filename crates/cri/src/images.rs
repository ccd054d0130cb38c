//! The image service.

use crate::errors::status;
use crate::map;
use crate::server::{Cri, Streamed, in_chunks};
use ::images::Auth;
use proto::cri::image_service_server::ImageService;
use proto::cri::*;
use serde_json::json;
use tonic::{Request, Response, Status};
use types::{Error, Result};

type Answer<T> = Result<Response<T>, Status>;

fn asked(spec: Option<ImageSpec>) -> Result<String> {
    let image = spec.map(|s| s.image).unwrap_or_default();
    if image.is_empty() { Err(Error::invalid("the request names no image")) } else { Ok(image) }
}

impl Cri {
    fn images_matching(&self, filter: Option<ImageFilter>) -> Vec<Image> {
        let name = filter.and_then(|f| f.image).map(|i| i.image).filter(|i| !i.is_empty());
        self.images.list(name.as_deref()).iter().map(|i| map::image(i)).collect()
    }

    fn one_image(&self, r: ImageStatusRequest) -> Result<ImageStatusResponse> {
        let name = asked(r.image)?;
        // Unknown is no error here: the kubelet asks so whether it must pull.
        let Some(image) = self.images.get(&name) else { return Ok(ImageStatusResponse::default()) };
        let info = if r.verbose {
            map::info(&json!({ "chainID": image.chain_id, "imageSpec": image.config }))
        } else {
            Default::default()
        };
        Ok(ImageStatusResponse { image: Some(map::image(&image)), info })
    }

    async fn pull(&self, r: PullImageRequest) -> Result<PullImageResponse> {
        let name = asked(r.image)?;
        let auth = match r.auth {
            Some(a) => Auth::from_cri(
                &a.username,
                &a.password,
                &a.auth,
                &a.server_address,
                &a.identity_token,
                &a.registry_token,
            )?,
            None => None,
        };
        Ok(PullImageResponse { image_ref: self.images.pull(&name, auth).await? })
    }

    async fn fs_info(&self) -> Result<ImageFsInfoResponse> {
        let usage = self.images.fs_info().await?;
        let filesystem = FilesystemUsage {
            timestamp: map::nanos(usage.timestamp),
            fs_id: Some(FilesystemIdentifier { mountpoint: usage.mountpoint.to_string_lossy().into_owned() }),
            used_bytes: Some(UInt64Value { value: usage.used_bytes }),
            inodes_used: Some(UInt64Value { value: usage.inodes_used }),
        };
        Ok(ImageFsInfoResponse { image_filesystems: vec![filesystem.clone()], container_filesystems: vec![filesystem] })
    }
}

#[tonic::async_trait]
impl ImageService for Cri {
    async fn list_images(&self, r: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        Ok(Response::new(ListImagesResponse { images: self.images_matching(r.into_inner().filter) }))
    }
    type StreamImagesStream = Streamed<StreamImagesResponse>;
    async fn stream_images(&self, r: Request<StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        let items = self.images_matching(r.into_inner().filter);
        Ok(Response::new(in_chunks(items, |images| StreamImagesResponse { images })))
    }
    async fn image_status(&self, r: Request<ImageStatusRequest>) -> Answer<ImageStatusResponse> {
        self.one_image(r.into_inner()).map(Response::new).map_err(status("ImageStatus"))
    }
    async fn pull_image(&self, r: Request<PullImageRequest>) -> Answer<PullImageResponse> {
        self.pull(r.into_inner()).await.map(Response::new).map_err(status("PullImage"))
    }
    async fn remove_image(&self, r: Request<RemoveImageRequest>) -> Answer<RemoveImageResponse> {
        let name = asked(r.into_inner().image).map_err(status("RemoveImage"))?;
        self.images.remove(&name).await.map_err(status("RemoveImage"))?;
        Ok(Response::new(RemoveImageResponse {}))
    }
    async fn image_fs_info(&self, _: Request<ImageFsInfoRequest>) -> Answer<ImageFsInfoResponse> {
        self.fs_info().await.map(Response::new).map_err(status("ImageFsInfo"))
    }
}
