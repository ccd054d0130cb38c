//! Checkpoint: a container's processes written to disk by criu, through the
//! runtime. Its reverse is restore.rs.

use crate::container::{Owner, Reply};
use crate::events::Event;
use oci::{Checkpoint, Runtime};
use prost::Message;
use proto::containerd::events::TaskCheckpointed;
use proto::containerd::runc::v1::CheckpointOptions;
use proto::containerd::task::v3::CheckpointTaskRequest;
use std::path::Path;
use types::{Error, Result, ResultExt};

/// Understands a request.
///
/// # Errors
/// `InvalidArgument` where its options can't be read or its path is not absolute.
pub(crate) fn wanted(req: &CheckpointTaskRequest) -> Result<Checkpoint> {
    let any = req.options.as_ref().map(|o| o.value.as_slice()).unwrap_or_default();
    let o = CheckpointOptions::decode(any)
        .map_err(|e| Error::invalid(format!("the checkpoint options of {} can't be read", req.id)).because(e))?;
    let image = if req.path.is_empty() { &o.image_path } else { &req.path };
    if !Path::new(image).is_absolute() {
        return Err(Error::invalid(format!("checkpoint of {}: {image:?} is not an absolute path", req.id)));
    }
    Ok(Checkpoint {
        image: image.into(),
        work: o.work_path.into(),
        parent: Some(o.parent_path).filter(|p| !p.is_empty()).map(Into::into),
        exit: o.exit,
        open_tcp: o.open_tcp,
        external_unix_sockets: o.external_unix_sockets,
        terminal: o.terminal,
        file_locks: o.file_locks,
        empty_namespaces: o.empty_namespaces,
        cgroups_mode: o.cgroups_mode,
    })
}

impl Owner {
    /// Lets the runtime write the checkpoint; the container goes on unless it is
    /// to exit, and then its exit is like any other.
    pub(crate) fn checkpoint(&self, mut wanted: Checkpoint, reply: Reply<()>) {
        if let Err(e) = self.machine.may_pause().and_then(|()| criu()) {
            let _ = reply.send(Err(e.within(format!("checkpoint of container {}", self.id))));
            return;
        }
        let (runtime, id, events, shared) =
            (self.runtime.clone(), self.id.clone(), self.shared.events.clone(), self.shared.clone());
        // criu's files are of interest where the caller wants them, or it failed.
        let own_work = wanted.work.as_os_str().is_empty().then(|| self.bundle.join("criu-work"));
        if let Some(work) = &own_work {
            wanted.work.clone_from(work);
        }
        tokio::spawn(async move {
            let result = async {
                for dir in [&wanted.image, &wanted.work] {
                    std::fs::create_dir_all(dir).context(|| format!("make {}", dir.display()))?;
                }
                let _turn = shared.turn().await?;
                runtime.checkpoint(&id, &wanted).await
            };
            let result = result.await;
            if result.is_ok() {
                if let Some(work) = own_work {
                    let _ = std::fs::remove_dir_all(work);
                }
                let checkpoint = wanted.image.display().to_string();
                events.publish(&Event::Checkpointed(TaskCheckpointed { container_id: id, checkpoint }));
            }
            let _ = reply.send(result);
        });
    }
}

pub(crate) fn criu() -> Result<()> {
    match oci::find_binary("criu") {
        Some(_) => Ok(()),
        None => Err(Error::precondition("criu is not installed").hint("install it on the node")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read() {
        let o = CheckpointOptions { exit: true, image_path: "/b".into(), ..Default::default() };
        let any = proto::pack("containerd.runc.v1.CheckpointOptions", &o);
        let req = CheckpointTaskRequest { id: "c".into(), path: "/a".into(), options: Some(any.clone()) };
        let c = wanted(&req).unwrap();
        assert_eq!((c.image.as_path(), c.exit), (Path::new("/a"), true));
        assert_eq!(
            wanted(&CheckpointTaskRequest { path: String::new(), ..req.clone() }).unwrap().image,
            Path::new("/b")
        );
        for bad in ["rel", ""] {
            let req = CheckpointTaskRequest { path: bad.into(), options: None, ..req.clone() };
            assert_eq!(wanted(&req).unwrap_err().kind(), types::ErrorKind::InvalidArgument);
        }
    }
}
