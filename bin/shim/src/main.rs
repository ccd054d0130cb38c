//! `containerd-shim-longshore-v2`: the shim's binary.
//!
//! ```text
//! start    makes the socket, starts the shim behind it, prints the address
//! (none)   the shim itself, with the socket as descriptor 3
//! delete   cleans up after a shim that is gone, prints the exit
//! ```
//!
//! The command line is containerd's (behaviours.md section 3). `start` is on the
//! path of every pod's start: it does nothing that it need not.

mod flags;
mod start;

use flags::{Action, Flags};
use std::io::Write;
use std::process::ExitCode;
use types::{Error, Result, ResultExt};

fn main() -> ExitCode {
    if let Some(code) = sys::ns_helper::run_if_asked() {
        return code;
    }
    sys::process::inherit_nothing();
    sys::malloc::be_small();
    let result = Flags::parse(std::env::args_os().skip(1)).and_then(run);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            shim::log::line("error", &e);
            // Nobody reads it but the caller of `start` and `delete`.
            let _ = writeln!(std::io::stderr(), "{e}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: Flags) -> Result<()> {
    if !matches!(flags.action, Action::Version | Action::Info) {
        flags.require_namespace()?;
    }
    match flags.action {
        Action::Version => print(format!(
            "containerd-shim-longshore-v2:\n  Version:  {}\n  Revision: \n  Go version: none (Rust)\n\n",
            env!("CARGO_PKG_VERSION")
        )),
        Action::Info => print(start::info()?),
        Action::Start => start::start(&flags),
        Action::Delete => delete(&flags),
        Action::Serve => serve(flags),
    }
}

fn print(bytes: impl AsRef<[u8]>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes.as_ref()).and_then(|()| out.flush()).context(|| "write to standard output".into())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // One that hangs, in a mount of a dead server say, must leave others.
        .max_blocking_threads(32)
        .thread_stack_size(128 << 10)
        .thread_keep_alive(std::time::Duration::from_millis(100))
        .build()
        .context(|| "start the asynchronous runtime".into())
}

fn delete(flags: &Flags) -> Result<()> {
    let bundle = flags.bundle()?;
    let reply = runtime()?.block_on(shim::delete(&flags.id, &bundle));
    start::forget_socket(&bundle);
    print(reply?)
}

fn serve(flags: Flags) -> Result<()> {
    let bundle = flags.bundle()?;
    shim::log::open(&bundle);
    let listener = std::os::unix::net::UnixListener::from(
        sys::process::take_inherited()
            .map_err(|e| Error::invalid("this is no shim's socket; use the command `start`").because(e))?,
    );
    // A container may not look into us, nor at our binary (CVE-2019-5736).
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .context(|| "forbid dumps".into())?;
    let socket = start::socket_of(&bundle);
    let settings = shim::Settings {
        id: flags.id,
        namespace: flags.namespace,
        events: std::env::var("TTRPC_ADDRESS").unwrap_or_default(),
        sockets: socket.as_deref().and_then(|s| s.parent()).unwrap_or(&bundle).to_path_buf(),
        socket: socket.clone(),
    };
    let runtime = runtime()?;
    let result = runtime.block_on(shim::serve(listener, settings));
    // A thread that hangs in a file system must not keep us.
    runtime.shutdown_background();
    match (&result, socket) {
        (Err(_), Some(socket)) => start::remove_socket(&socket),
        // Shutdown has removed it; what is there now is our successor's.
        (Ok(()), Some(socket)) => start::remove_directory_of(&socket),
        (_, None) => {}
    }
    result
}
