//! Logging, and the timelines of pods: what each step of a pod's and a
//! container's start took, kept with the pod so that it can be asked afterwards.
//!
//! ```text
//! logging.rs    tracing to stderr: text, JSON, or text for the journal
//! timeline.rs   spans per pod, bounded; serialised by the caller who persists them
//! ```

mod logging;
mod timeline;

pub use logging::{LogFormat, init_logging};
pub use timeline::{LONGEST_TIMELINE, Span, SpanGuard, Timelines};
