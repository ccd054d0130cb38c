//! What only our own shim can: `longshore.shim.v1`.

use crate::container::Msg;
use crate::shared::Shared;
use crate::wire;
use async_trait::async_trait;
use proto::longshore_shim::{
    CertificateRequest, CertificateResponse, FeaturesRequest, FeaturesResponse, Longshore, ReopenLogRequest,
    ReopenLogResponse, WaitingRequest, WaitingResponse,
};
use std::sync::Arc;
use ttrpc::r#async::TtrpcContext;
use types::ExitStatus;

/// What callers may rely upon.
const FEATURES: [&str; 4] = ["cri-log", "reopen-log", "certificate", "waiting"];

pub(crate) struct Private {
    pub shared: Arc<Shared>,
}

#[async_trait]
impl Longshore for Private {
    async fn features(&self, _: &TtrpcContext, _: FeaturesRequest) -> ttrpc::Result<FeaturesResponse> {
        Ok(FeaturesResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            features: FEATURES.map(String::from).to_vec(),
        })
    }

    async fn reopen_log(&self, _: &TtrpcContext, req: ReopenLogRequest) -> ttrpc::Result<ReopenLogResponse> {
        self.shared.ask(&req.id, Msg::ReopenLog).await.map_err(wire::error)?;
        Ok(ReopenLogResponse {})
    }

    async fn certificate(&self, _: &TtrpcContext, req: CertificateRequest) -> ttrpc::Result<CertificateResponse> {
        let exec = (!req.exec_id.is_empty()).then_some(req.exec_id);
        let c = self.shared.ask(&req.id, |r| Msg::Certificate(exec, r)).await.map_err(wire::error)?;
        Ok(CertificateResponse {
            exit_status: wire::exit_status(c.status),
            exited_at: Some(wire::timestamp(c.exited_at)),
            signal: match c.status {
                ExitStatus::Signal(n) => n.into(),
                ExitStatus::Code(_) | ExitStatus::Unknown(_) => 0,
            },
            oom_killed: c.oom_killed,
            oom_cgroup: c.oom_cgroup.unwrap_or_default(),
            killed_by: c.killed_by.unwrap_or_default(),
            peak_memory: c.peak_memory.unwrap_or(0),
        })
    }

    async fn waiting(&self, _: &TtrpcContext, _: WaitingRequest) -> ttrpc::Result<WaitingResponse> {
        Ok(WaitingResponse { waits: self.shared.waits().await })
    }
}
