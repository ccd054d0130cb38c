//! A container's log file: its format, and following it while it is written.

mod follow;
mod format;

pub use follow::{Follower, Start};
pub use format::{Line, Printer, Stream};
