//! The command line: every command but `serve` is a client of the daemon's socket,
//! over CRI where CRI can say it and over the admin service where it can't.
//!
//! ```text
//! args.rs        the commands and their options
//! client.rs      the connection, and statuses as errors
//! find.rs        names and id prefixes -> pods, containers, images
//! output.rs      tables, JSON, sizes and times for people
//! run/           `run`: flags -> CRI configs, the container's life, its signals and stdin
//! log/           the CRI log format, and following a log file by inotify
//! list.rs exec.rs logs.rs lifecycle.rs images.rs inspect.rs timeline.rs doctor.rs publish.rs version.rs
//! ```
//!
//! Exit codes: 0; 1 for a failure (one line on stderr); 2 for wrong usage; `run` and
//! `exec` pass on the command's code, 125 where it could not be run at all and 126
//! where the container's process could not be started.

mod args;
mod client;
mod doctor;
mod exec;
#[cfg(test)]
mod fake;
mod find;
mod images;
mod inspect;
mod lifecycle;
mod list;
mod log;
mod logs;
mod output;
mod publish;
mod run;
#[cfg(test)]
mod tests;
mod timeline;
mod version;

pub use args::{Cli, Command, ServeArgs};

use args::Format;
use clap::Parser;
use client::Client;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use types::{Error, Result, ResultExt};

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/longshore/longshore.sock";

/// The exit code for a command that could not be run at all, as docker's and podman's.
const NOT_RUN: u8 = 125;

/// Reads the process's arguments; on wrong usage it says so and exits with 2.
pub fn parse() -> Cli {
    let mut cli = Cli::parse();
    if let Command::Serve(serve) = &mut cli.command {
        serve.socket.clone_from(&cli.socket);
    }
    if let Command::Publish(publish) = &mut cli.command {
        publish.address.clone_from(&cli.address);
    }
    cli
}

/// What every command is given.
struct Context {
    socket: PathBuf,
    format: Format,
}

impl Context {
    async fn connect(&self) -> Result<Client> {
        Client::connect(&self.socket).await
    }

    fn json(&self) -> bool {
        self.format == Format::Json
    }
}

/// Runs any command but `serve` and gives the process's exit code; failures have
/// been printed by then.
pub fn run(cli: Cli) -> ExitCode {
    let socket = cli.socket.unwrap_or_else(|| Path::new(DEFAULT_SOCKET).to_path_buf());
    let context = Context { socket, format: cli.output };
    let code_of_failure = match cli.command {
        Command::Run(_) | Command::Exec(_) => NOT_RUN,
        _ => 1,
    };
    let result = tokio::runtime::Builder::new_multi_thread()
        // One follows a log and may block on our stdout; the others must go on.
        .worker_threads(2)
        .enable_all()
        .build()
        .context(|| "start the command's runtime".to_string())
        .and_then(|runtime| {
            let result = runtime.block_on(dispatch(&context, cli.command));
            // A thread may still wait for our stdin; the process ends without it.
            runtime.shutdown_background();
            result
        });
    match result {
        Ok(code) => ExitCode::from(code),
        Err(e) if output::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("longshore: {e}");
            ExitCode::from(code_of_failure)
        }
    }
}

async fn dispatch(context: &Context, command: Command) -> Result<u8> {
    match command {
        Command::Run(args) => return run::run(context, *args).await,
        Command::Doctor(args) => return doctor::doctor(context, &args).await,
        Command::Exec(args) => return exec::exec(context, args).await,
        Command::Serve(_) => return Err(Error::internal("serve is no client command")),
        Command::Pods(args) => list::pods(context, &args).await,
        Command::Ps(args) => list::containers(context, &args).await,
        Command::Logs(args) => logs::logs(context, args).await,
        Command::Stop(args) => lifecycle::stop(context, &args).await,
        Command::Rm(args) => lifecycle::remove(context, &args).await,
        Command::Images(args) => images::list(context, &args).await,
        Command::Pull(args) => images::pull(context, &args).await,
        Command::Import(args) => images::import(context, &args).await,
        Command::Rmi(args) => images::remove(context, &args).await,
        Command::Inspect(args) => inspect::inspect(context, &args).await,
        Command::Timeline(args) => timeline::timeline(context, &args).await,
        Command::Config => {
            crate::config::print_default();
            Ok(())
        }
        Command::Publish(args) => publish::publish(args).await,
        Command::FaultPoints => output::print(&(fault::points().join("\n") + "\n")),
        Command::Version => version::version(context).await,
    }
    .map(|()| 0)
}
