//! The daemon and the command line: the composition root.

mod cli;
mod config;
mod handlers;
mod serve;

use std::process::ExitCode;

fn main() -> ExitCode {
    // Before anything else, above all before any thread: the namespace helper.
    if let Some(code) = sys::ns_helper::run_if_asked() {
        return code;
    }
    let mut cli = cli::parse();
    match cli.command {
        cli::Command::Serve(args) => match serve::run(args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("longshore: {e:#}");
                ExitCode::FAILURE
            }
        },
        command => {
            cli.command = command;
            cli::run(cli)
        }
    }
}
