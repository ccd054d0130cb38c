//! Cleaning up after a shim that is gone: what the `delete` command does.

use crate::persist::{self, TaskRecord};
use crate::{log, undo, wire};
use oci::{Children, Command, Config, Runtime, mounts};
use prost::Message;
use proto::containerd::task::v3::DeleteResponse;
use std::path::Path;
use std::time::SystemTime;
use types::{Certificate, Error, ErrorKind, ExitStatus, Result};

/// Kills the container `id`, takes off its root file system, and returns the
/// DeleteResponse to print: the exit that the shim had written, else 137.
///
/// A bundle that never held a container (a pod's, or one that was cleaned up
/// before) is no failure.
///
/// # Errors
/// Everything that could not be cleaned up; it goes on to the end first.
pub async fn delete(id: &str, bundle: &Path) -> Result<Vec<u8>> {
    let mut errors = Vec::new();
    match persist::read_task(bundle) {
        Ok(record) => clean(id, bundle, &record, &mut errors).await,
        Err(e) if e.is_not_found() => {}
        Err(e) => errors.push(e),
    }
    Error::join(&format!("clean up container {id}"), errors)?;
    let pid = persist::read_pid(bundle);
    let exit = match persist::read_exit(bundle) {
        Ok(exit) => exit,
        Err(e) => {
            if e.kind() != ErrorKind::NotFound {
                log::warn(&e);
            }
            let exit = Certificate {
                killed_by: Some("the death of the pod's shim".into()),
                ..crate::state::plain(ExitStatus::Signal(9), SystemTime::now())
            };
            // Who asks once more, its first answer being lost, hears of the same time. What
            // was never made has no end.
            if pid.is_some()
                && let Err(e) = persist::write_exit(bundle, &exit)
            {
                log::warn(format_args!("container {id}: {e}"));
            }
            exit
        }
    };
    let response = DeleteResponse {
        pid: pid.map_or(0, wire::pid),
        exit_status: wire::exit_status(exit.status),
        exited_at: Some(wire::timestamp(exit.exited_at)),
    };
    Ok(response.encode_to_vec())
}

async fn clean(id: &str, bundle: &Path, record: &TaskRecord, errors: &mut Vec<Error>) {
    let mut config = Config::new(&record.binary, bundle);
    config.root = Some(record.root.clone());
    config.systemd_cgroup = record.systemd_cgroup;
    let runtime = Command::new(config, Children::new());
    // One that is under way would bring the container back.
    let cgroups = undo::end_calls(bundle);
    match runtime.delete(id, true).await {
        Err(e) if !e.is_not_found() => errors.push(e),
        _ => {}
    }
    errors.extend(undo::empty(bundle, cgroups).await);
    errors.extend(oci::idmap::forget(bundle).err());
    errors.extend(mounts::unmount_rootfs(&bundle.join("rootfs"), record.rootfs_mounts).err());
}
