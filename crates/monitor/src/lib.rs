//! The monitor of one container or exec: it starts the process through an OCI
//! runtime, stays its parent, carries its streams and reports its end. Compatible
//! with conmon 2.1 and 2.2 by command line, pipes and files (behaviours.md section 2).
//!
//! ```text
//! flags.rs settings.rs  the command line: words, then what they mean (pure)
//! daemon.rs             from the caller's child to a daemon
//! monitor.rs            the process's life: call, run, end
//! finish.rs             what follows its end, in order
//! runtime_call.rs       the runtime's command line and process
//! streams.rs console.rs the process's streams; its terminal
//! log/                  k8s-file and journald
//! attach.rs control.rs notify.rs  what clients, the manager and the process say
//! oom.rs exit.rs sync_pipe.rs     what is reported, and how
//! socket.rs poll.rs say.rs        sockets, the event loop, messages of our own
//! ```
//!
//! One thread and one epoll; nothing blocks but writes to the log's disk. There is no
//! async runtime: docs/decisions/ says why.

mod attach;
mod console;
mod control;
mod daemon;
mod exit;
mod finish;
mod flags;
mod log;
mod monitor;
mod notify;
mod oom;
mod poll;
mod runtime_call;
mod say;
mod settings;
mod socket;
mod streams;
mod sync_pipe;

use flags::Asked;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::os::fd::{OwnedFd, RawFd};

/// The version of conmon whose command line and files these are: callers gate what
/// they use on it.
pub const COMPATIBLE: &str = "2.2.1";

/// Does what the words behind the program's name ask for; returns the code that this
/// process is to exit with. `inherited` are the descriptors that it was started with.
///
/// A process with threads can't do this: it forks.
pub fn run(words: impl IntoIterator<Item = OsString>, inherited: BTreeMap<RawFd, OwnedFd>, version: &str) -> i32 {
    match flags::parse(words) {
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "conmon: {e}");
            1
        }
        Ok(Asked::Version) => print(&format!("conmon version {COMPATIBLE}\ncommit: longshore-conmon {version}\n")),
        Ok(Asked::Help) => print(&flags::help()),
        Ok(Asked::Run(flags)) => daemon::run(*flags, inherited),
    }
}

fn print(text: &str) -> i32 {
    let mut out = std::io::stdout();
    i32::from(out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err())
}
