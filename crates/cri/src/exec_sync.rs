//! ExecSync (behaviours.md section 1).

use crate::server::Cri;
use proto::cri::{ExecSyncRequest, ExecSyncResponse};
use std::time::Duration;
use types::Result;

impl Cri {
    /// A client that goes away drops this future, which kills the command.
    pub(crate) async fn run_command(&self, r: ExecSyncRequest) -> Result<ExecSyncResponse> {
        let timeout = u64::try_from(r.timeout).ok().filter(|s| *s > 0).map(Duration::from_secs);
        let out = self.pods.exec_sync(&r.container_id, r.cmd, timeout).await?;
        Ok(ExecSyncResponse { stdout: out.stdout, stderr: out.stderr, exit_code: out.status.code() })
    }
}
