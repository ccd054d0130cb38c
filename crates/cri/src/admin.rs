//! Our own service beside CRI, for the command line.

use crate::errors::status;
use crate::server::Cri;
use pods::{Operation, PodFilter};
use proto::admin::admin_server::Admin;
use proto::admin::*;
use std::path::Path;
use tonic::{Request, Response, Status};
use types::{Error, Result};

type Answer<T> = Result<Response<T>, Status>;

impl Cri {
    async fn import_file(&self, r: ImportRequest) -> Result<ImportResponse> {
        let path = Path::new(&r.path);
        if !path.is_absolute() {
            return Err(Error::invalid(format!("{:?} is not an absolute path", r.path)));
        }
        let reference = Some(r.reference.as_str()).filter(|s| !s.is_empty());
        let imported = self.images.import(path, reference).await?;
        let images = imported.into_iter().map(|i| ImportedImage { id: i.id, references: i.references }).collect();
        Ok(ImportResponse { images })
    }

    fn find_timeline(&self, pod: &str) -> Result<TimelineResponse> {
        let info = match self.pods.pod(pod) {
            Ok(view) => view.pod.clone(),
            Err(e) if e.is_not_found() => {
                let all = self.pods.pods(&PodFilter::default());
                // The newest of that name.
                let named = |p: &&std::sync::Arc<pods::PodInfo>| {
                    p.config.metadata.as_ref().is_some_and(|m| m.name == pod || p.name() == pod)
                };
                all.iter().rev().find(named).cloned().ok_or(e)?
            }
            Err(e) => return Err(e),
        };
        let spans = self
            .pods
            .timelines()
            .get(&info.id)
            .into_iter()
            .map(|s| Span {
                operation: s.operation,
                step: s.step,
                container: s.container,
                started_at: s.started_at,
                duration: s.duration.map_or(-1, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX)),
                error: s.error.unwrap_or_default(),
            })
            .collect();
        Ok(TimelineResponse { pod_id: info.id.clone(), pod_name: info.name(), spans })
    }
}

#[tonic::async_trait]
impl Admin for Cri {
    async fn import(&self, r: Request<ImportRequest>) -> Answer<ImportResponse> {
        self.import_file(r.into_inner()).await.map(Response::new).map_err(status("Import"))
    }
    async fn timeline(&self, r: Request<TimelineRequest>) -> Answer<TimelineResponse> {
        self.find_timeline(&r.get_ref().pod).map(Response::new).map_err(status("Timeline"))
    }
    async fn waiting(&self, _: Request<WaitingRequest>) -> Answer<WaitingResponse> {
        let pulls = self.images.pulls().into_iter();
        let pulls = pulls.map(|(image, age)| Operation { what: format!("pull of {image}"), age, waits_for: vec![] });
        let operations = self.pods.operations().into_iter().chain(pulls).map(|o| WaitingOperation {
            what: o.what,
            milliseconds: u64::try_from(o.age.as_millis()).unwrap_or(u64::MAX),
            waits_for: o.waits_for.iter().map(|(step, age)| format!("{step} ({} s)", age.as_secs())).collect(),
        });
        Ok(Response::new(WaitingResponse { operations: operations.collect() }))
    }
    async fn health(&self, r: Request<HealthRequest>) -> Answer<HealthResponse> {
        if r.get_ref().reconcile {
            self.pods.reconcile().await;
        }
        let rounds = self.pods.rounds();
        let at = rounds.last.and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        let troubles = self.pods.troubles().into_iter().chain(rounds.left).map(|t| Trouble {
            check: t.check.word().to_string(),
            found: t.found,
            remedy: t.remedy,
        });
        Ok(Response::new(HealthResponse {
            troubles: troubles.collect(),
            rounds: rounds.count,
            last_round_at: at.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX)),
            removed: rounds.removed,
            recent: rounds.recent,
        }))
    }
    async fn close_stdin(&self, r: Request<CloseStdinRequest>) -> Answer<CloseStdinResponse> {
        self.pods.close_stdin(&r.get_ref().container_id).await.map_err(status("CloseStdin"))?;
        Ok(Response::new(CloseStdinResponse {}))
    }
}
