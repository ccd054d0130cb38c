//! `logs`: the container's log file, once or for as long as it grows.

use super::args::LogsArgs;
use super::client::{Answer, present};
use super::log::{Follower, Line, Printer, Start, Stream};
use super::run::wait;
use super::{Context, find};
use proto::cri::{ContainerState, ContainerStatusRequest};
use serde_json::json;
use std::io::{BufWriter, Write};
use std::path::Path;
use types::{Error, ErrorKind, Result};

/// Prints a container's log.
pub async fn logs(context: &Context, args: LogsArgs) -> Result<()> {
    let mut client = context.connect().await?;
    let container = find::container(&mut client, &args.container).await?;
    let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
    let answer = client.runtime.container_status(request).await;
    let status = answer.answer(|| format!("ask for container {}", args.container))?.status;
    let status = present(status, || format!("status of container {}", args.container))?;
    if status.log_path.is_empty() {
        return Err(Error::precondition(format!("container {} keeps no log", args.container))
            .hint("it was made without a log path"));
    }
    let start = args.tail.map_or(Start::Beginning, Start::Tail);
    let mut follower = Follower::open(Path::new(&status.log_path), start)?;
    let mut sink = sink(Printer::new(args.timestamps), context.json());
    if args.follow && status.state() == ContainerState::ContainerRunning {
        let mut client = client.clone();
        let ended = tokio::spawn(async move { wait::exit(&mut client, &container.id).await });
        let mut end = None;
        follower.follow(async { end = ended.await.ok() }, sink).await?;
        return match end {
            Some(Err(e)) if e.kind() != ErrorKind::NotFound => Err(e),
            // It has ended, or was removed.
            _ => Ok(()),
        };
    }
    if !follower.exists() && status.state() == ContainerState::ContainerRunning {
        return Err(Error::not_found(format!("the log {} of container {} is gone", status.log_path, args.container)));
    }
    while follower.read(&mut sink)? {}
    Ok(())
}

/// What is done with each line: printed as text to stdout and stderr, or as an
/// object each to stdout. `None` writes out what was gathered.
pub fn sink(mut printer: Printer, json: bool) -> impl FnMut(Option<&Line<'_>>) -> Result<()> {
    let mut out = BufWriter::with_capacity(64 << 10, std::io::stdout());
    move |line| {
        let written = match line {
            None => out.flush(),
            Some(line) if json => {
                let stream = if line.stream == Stream::Stdout { "stdout" } else { "stderr" };
                let text = String::from_utf8_lossy(line.text);
                writeln!(out, "{}", json!({"time": line.time, "stream": stream, "partial": line.partial, "log": text}))
            }
            // A terminal shows both streams: their order is kept as in the log.
            Some(line) if line.stream == Stream::Stderr => {
                out.flush().and_then(|()| printer.print(line, &mut out, &mut std::io::stderr().lock()))
            }
            Some(line) => printer.print(line, &mut out, &mut std::io::sink()),
        };
        written.map_err(|e| match e.kind() {
            std::io::ErrorKind::BrokenPipe => super::output::broken_pipe(),
            _ => Error::internal("print the log").because(e),
        })
    }
}
