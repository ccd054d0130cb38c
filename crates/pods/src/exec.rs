//! ExecSync: admit or refuse (behaviours.md section 1); the work is the runtime's.

use crate::admission;
use crate::shared::Shared;
use crate::state::ContainerInfo;
use runtime::{ExecOutput, ExecSyncSpec};
use std::time::Duration;
use types::{Error, Result, ResultExt};

/// How much is kept of each stream, in bytes (CVE-2022-1708, CVE-2022-31030).
const KEEP: usize = 16 << 20;

/// Runs a command in a container to its end. Dropping the future kills it.
///
/// # Errors
/// `InvalidArgument` without a command, `FailedPrecondition` unless the container
/// runs, `DeadlineExceeded` after `timeout`; a non-zero exit code is no error.
pub async fn exec_sync(
    shared: &Shared,
    container: &ContainerInfo,
    cmd: Vec<String>,
    timeout: Option<Duration>,
) -> Result<ExecOutput> {
    if cmd.is_empty() {
        return Err(Error::invalid(format!("the command to run in container {:.12} is empty", container.id)));
    }
    admission::exec(container)?;
    let path = shared.container_dir(&container.id).join("process.json");
    let own = tokio::fs::read_to_string(&path).await.context(|| format!("read {}", path.display()))?;
    let process_json = spec::exec_process_json(&own, cmd, false)?;
    let exec =
        ExecSyncSpec { process_json, timeout, drain_timeout: shared.config.drain_exec_sync_io_timeout, keep: KEEP };
    shared.runtime.exec_sync(&container.pod_id, &container.id, exec).await
}
