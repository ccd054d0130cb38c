//! Metrics, tracing and the timelines of pods.
