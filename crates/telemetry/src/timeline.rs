//! Timelines: the timed steps of each pod, in memory.
//!
//! ```text
//! Timelines ── pod id ── [span, span, …]   in the order in which they began
//!                         │
//!                         ├ a whole operation (step "")      RunPodSandbox ├────────┤
//!                         └ its steps                          network       ├─┤
//!                                                               shim            ├───┤
//! ```
//!
//! The lock is held for a push or an update in memory and never for IO; whoever
//! persists a timeline takes the text from [`Timelines::serialize`].

use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use types::{Result, ResultExt};

/// How many spans a pod keeps. A pod's start and that of a dozen containers need
/// about a hundred; beyond the bound the oldest container starts are forgotten.
pub const LONGEST_TIMELINE: usize = 512;

/// One timed step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// The call that it belongs to: "RunPodSandbox", "StartContainer", …
    pub operation: String,
    /// The step's name, empty for the operation as a whole.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub step: String,
    /// The container's name, empty where the step concerns the pod.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container: String,
    /// Unix time in nanoseconds.
    pub started_at: i64,
    /// `None` while it runs.
    pub duration: Option<Duration>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[derive(Debug, Default)]
struct Timeline {
    /// The number of the next span, so that a guard finds its own after evictions.
    next: u64,
    spans: VecDeque<(u64, Span)>,
}

impl Timeline {
    fn push(&mut self, span: Span) -> u64 {
        let number = self.next;
        self.next += 1;
        while self.spans.len() >= LONGEST_TIMELINE {
            self.evict();
        }
        self.spans.push_back((number, span));
        number
    }

    /// Forgets the oldest operation on a container together with its steps; the
    /// pod's own start is kept for as long as there is anything else.
    fn evict(&mut self) {
        let Some(first) = self.spans.iter().position(|(_, s)| !s.container.is_empty()) else {
            self.spans.pop_front();
            return;
        };
        let Some((_, oldest)) = self.spans.remove(first) else { return };
        if !oldest.step.is_empty() {
            return;
        }
        let alike = |s: &Span| s.operation == oldest.operation && s.container == oldest.container;
        let mut at = first;
        while let Some((_, span)) = self.spans.get(at) {
            if alike(span) && span.step.is_empty() {
                break;
            }
            if alike(span) {
                self.spans.remove(at);
            } else {
                at += 1;
            }
        }
    }
}

/// The timelines of all pods. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Timelines {
    pods: Arc<Mutex<HashMap<String, Timeline>>>,
}

impl Timelines {
    /// No timelines yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Timeline>> {
        // A panic elsewhere leaves at worst one span unfinished.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a span; see [`SpanGuard`] for its end. `step` is empty for a whole
    /// operation, `container` for a step that concerns the pod.
    pub fn span(&self, pod: &str, operation: &str, step: &str, container: &str) -> SpanGuard {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let span = Span {
            operation: operation.to_string(),
            step: step.to_string(),
            container: container.to_string(),
            started_at: i64::try_from(since_epoch.as_nanos()).unwrap_or(i64::MAX),
            duration: None,
            error: None,
        };
        let number = self.lock().entry(pod.to_string()).or_default().push(span);
        SpanGuard { timelines: self.clone(), pod: pod.to_string(), number, began: Instant::now(), open: true }
    }

    /// Awaits `future` within a span and records its error's text, if it fails.
    /// A future that is dropped before its end leaves an "interrupted" span.
    pub async fn timed<T, E: Display>(
        &self,
        pod: &str,
        operation: &str,
        step: &str,
        container: &str,
        future: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let span = self.span(pod, operation, step, container);
        let result = future.await;
        span.end(&result);
        result
    }

    /// The pod's spans in the order in which they began; none for an unknown pod.
    pub fn get(&self, pod: &str) -> Vec<Span> {
        self.lock().get(pod).map(|t| t.spans.iter().map(|(_, s)| s.clone()).collect()).unwrap_or_default()
    }

    /// The spans that still run, of all pods, each with its pod's id.
    pub fn open(&self) -> Vec<(String, Span)> {
        let pods = self.lock();
        let all = pods.iter().flat_map(|(id, t)| t.spans.iter().map(move |(_, span)| (id, span)));
        all.filter(|(_, span)| span.duration.is_none()).map(|(id, span)| (id.clone(), span.clone())).collect()
    }

    /// The pod's timeline as JSON, to be given to [`Timelines::restore`] later.
    ///
    /// # Errors
    /// `Internal` where serialisation fails, which a span gives no reason for.
    pub fn serialize(&self, pod: &str) -> Result<String> {
        serde_json::to_string(&self.get(pod)).context(|| format!("serialise the timeline of pod {pod}"))
    }

    /// Takes back what [`Timelines::serialize`] gave, before anything is recorded
    /// anew. Spans that still ran then count as interrupted.
    ///
    /// # Errors
    /// `Internal` for a text that is none of ours; the pod's timeline is then empty.
    pub fn restore(&self, pod: &str, json: &str) -> Result<()> {
        let spans: Vec<Span> = serde_json::from_str(json).context(|| format!("read the timeline of pod {pod}"))?;
        let mut timeline = Timeline::default();
        for mut span in spans {
            if span.duration.is_none() {
                span.duration = Some(Duration::ZERO);
                span.error.get_or_insert_with(|| "interrupted by the end of the daemon".to_string());
            }
            timeline.push(span);
        }
        self.lock().insert(pod.to_string(), timeline);
        Ok(())
    }

    /// Forgets a pod. Guards that are still open for it then record nothing.
    pub fn remove(&self, pod: &str) {
        self.lock().remove(pod);
    }

    fn finish(&self, pod: &str, number: u64, took: Duration, error: Option<String>) {
        let mut pods = self.lock();
        let Some(timeline) = pods.get_mut(pod) else { return };
        if let Ok(at) = timeline.spans.binary_search_by_key(&number, |(n, _)| *n) {
            let span = &mut timeline.spans[at].1;
            span.duration = Some(took);
            span.error = error;
        }
    }
}

/// An open span. It ends with [`SpanGuard::done`], [`SpanGuard::fail`] or
/// [`SpanGuard::end`]; one that is merely dropped was left by an early return or a
/// cancelled future, and is recorded as interrupted.
#[derive(Debug)]
#[must_use = "a span that is dropped at once counts as interrupted"]
pub struct SpanGuard {
    timelines: Timelines,
    pod: String,
    number: u64,
    began: Instant,
    open: bool,
}

impl SpanGuard {
    /// It went well.
    pub fn done(self) {
        self.close(None);
    }

    /// It failed, and why.
    pub fn fail(self, error: &impl Display) {
        self.close(Some(error.to_string()));
    }

    /// It ended as `result` says.
    pub fn end<T, E: Display>(self, result: &std::result::Result<T, E>) {
        self.close(result.as_ref().err().map(ToString::to_string));
    }

    fn close(mut self, error: Option<String>) {
        self.open = false;
        self.timelines.finish(&self.pod, self.number, self.began.elapsed(), error);
    }
}

impl Drop for SpanGuard {
    fn drop(&mut self) {
        if self.open {
            self.timelines.finish(&self.pod, self.number, self.began.elapsed(), Some("interrupted".to_string()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_runs_until_it_ends_and_says_how() {
        let t = Timelines::new();
        let whole = t.span("p", "RunPodSandbox", "", "");
        let step = t.span("p", "RunPodSandbox", "network", "");
        assert!(t.get("p").iter().all(|s| s.duration.is_none()));
        let open: Vec<_> = t.open().into_iter().map(|(pod, s)| (pod, s.step)).collect();
        assert_eq!(open, [("p".to_string(), String::new()), ("p".to_string(), "network".to_string())]);
        step.fail(&"no address");
        whole.done();
        drop(t.span("p", "StopPodSandbox", "", ""));
        assert!(t.open().is_empty());
        let spans = t.get("p");
        assert!(spans.iter().all(|s| s.duration.is_some() && s.started_at > 0));
        assert_eq!(spans[0].error, None);
        assert_eq!(spans[1].error.as_deref(), Some("no address"));
        assert_eq!(spans[2].error.as_deref(), Some("interrupted"));
        assert!(t.get("other").is_empty());
    }

    #[tokio::test]
    async fn timed_records_errors_and_dropped_futures() {
        let t = Timelines::new();
        let good: Result<u8, String> = t.timed("p", "A", "x", "c", async { Ok(7) }).await;
        assert_eq!(good, Ok(7));
        let bad: Result<u8, String> = t.timed("p", "A", "y", "c", async { Err("why".to_string()) }).await;
        assert!(bad.is_err());
        let never = t.timed("p", "A", "z", "c", std::future::pending::<Result<(), String>>());
        assert!(tokio::time::timeout(Duration::from_millis(5), never).await.is_err());
        let errors: Vec<_> = t.get("p").into_iter().map(|s| s.error).collect();
        assert_eq!(errors, [None, Some("why".into()), Some("interrupted".into())]);
    }

    #[test]
    fn beyond_the_bound_the_oldest_container_start_goes_and_the_pods_stays() {
        let t = Timelines::new();
        t.span("p", "RunPodSandbox", "", "").done();
        for _ in 0..LONGEST_TIMELINE {
            t.span("p", "StartContainer", "", "c").done();
            t.span("p", "StartContainer", "shim", "c").done();
        }
        let spans = t.get("p");
        assert!(spans.len() <= LONGEST_TIMELINE && spans.len() > LONGEST_TIMELINE - 3, "{}", spans.len());
        assert_eq!(spans[0].operation, "RunPodSandbox");
        assert_eq!(spans[1].step, "", "no step is left without its operation");
        for _ in 0..2 * LONGEST_TIMELINE {
            t.span("q", "X", "", "").done();
        }
        assert_eq!(t.get("q").len(), LONGEST_TIMELINE);
    }

    #[test]
    fn an_evicted_or_removed_span_can_still_be_ended() {
        let t = Timelines::new();
        let early = t.span("p", "StartContainer", "", "c");
        for _ in 0..LONGEST_TIMELINE {
            t.span("p", "StartContainer", "", "c").done();
        }
        early.done();
        let late = t.span("p", "X", "", "");
        t.remove("p");
        late.done();
        assert!(t.get("p").is_empty());
    }

    #[test]
    fn a_restored_timeline_is_the_same_and_open_spans_are_interrupted() {
        let (a, b) = (Timelines::new(), Timelines::new());
        a.span("p", "RunPodSandbox", "", "").fail(&"x");
        let open = a.span("p", "StartContainer", "create", "c");
        b.restore("p", &a.serialize("p").unwrap()).unwrap();
        let (before, after) = (a.get("p"), b.get("p"));
        assert_eq!(before[0], after[0]);
        assert_eq!(after[1].error.as_deref(), Some("interrupted by the end of the daemon"));
        assert!(b.restore("p", "nonsense").is_err());
        open.done();
    }
}
