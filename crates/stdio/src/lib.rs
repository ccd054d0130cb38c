//! Standard IO of processes: FIFOs, terminals, files, the CRI log, capped sinks
//! and drains.
//!
//! ```text
//! uri.rs     where a stream goes: "", fifo, file://, binary://, cri://
//! fifo.rs    named pipes held at both ends; anonymous pipes
//! pump.rs    bytes from one descriptor to another, asynchronously, by splice
//! cri_log.rs the CRI log's lines (pure)
//! writer.rs  the one thread that writes to files
//! capped.rs  the first N bytes of a stream, the rest thrown away
//! logger.rs  logging binaries: programs that take both streams
//! ```
//!
//! What nobody has to look at is not copied by us: a FIFO is handed to the
//! process itself wherever the node's security module does not object.

mod capped;
pub mod cri_log;
pub mod fifo;
pub mod logger;
pub mod pump;
mod uri;
mod watch;
mod writer;

pub use capped::{Capped, collect};
pub use cri_log::{DEFAULT_LIMIT, Stream};
pub use uri::Uri;
pub use watch::watch;
pub use writer::{Ending, Format, Log, NotOpened, Sources, Writer};
