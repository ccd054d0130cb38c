//! The init of a pod that shares one pid namespace: it reaps whatever loses its
//! parent there, and ends on SIGTERM or SIGINT, which ends the namespace.
//!
//! It runs with a read-only, empty root file system, so it is linked statically
//! and opens nothing.

use sys::process::{InitSignal, InitSignals, reap_all};

fn main() -> std::process::ExitCode {
    let Ok(signals) = InitSignals::block() else { return std::process::ExitCode::FAILURE };
    loop {
        // Reaping comes first: what died before the signals were blocked sends none.
        reap_all();
        match signals.wait() {
            Ok(InitSignal::Child) => {}
            Ok(InitSignal::Terminate) => return std::process::ExitCode::SUCCESS,
            Err(_) => return std::process::ExitCode::FAILURE,
        }
    }
}
