//! The shim's binary as a command: `start` and `delete`; and the FIFO that its
//! log comes through.

use super::bootstrap::Bootstrap;
use super::config::Handler;
use crate::ops::step;
use prost::Message;
use proto::containerd::task::v3::DeleteResponse;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::Command;
use types::{Error, ErrorKind, Result, ResultExt};

/// The most that a command may say on each stream; the protobuf dialect's bound
/// is 10 MiB, and nothing useful is longer than this.
const LONGEST_ANSWER: u64 = 1 << 20;
/// How long the answer may go on after the command itself has ended, where a
/// child of it still holds the pipe.
const LINGER: Duration = Duration::from_millis(100);

/// The shim's binary with what each of its calls needs.
#[derive(Debug)]
pub(crate) struct Binary {
    shim: PathBuf,
    namespace: String,
    grpc_address: PathBuf,
    ttrpc_address: Option<PathBuf>,
    publish: PathBuf,
}

struct Answer {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Binary {
    /// `publish` is our own binary, which some shims run to tell of events.
    pub(crate) fn new(handler: &Handler, namespace: &str, events: &Path, publish: &Path) -> Self {
        let mut ttrpc = events.as_os_str().to_owned();
        ttrpc.push(".ttrpc");
        Self {
            shim: handler.shim.clone(),
            namespace: namespace.to_string(),
            grpc_address: events.to_path_buf(),
            // Ours sends none: exits come by Wait.
            ttrpc_address: (!handler.bears_our_name()).then(|| ttrpc.into()),
            publish: publish.to_path_buf(),
        }
    }

    /// `start`: the shim of pod `id` in `bundle`.
    pub(crate) async fn start(&self, bundle: &Path, id: &str, bound: Duration) -> Result<Bootstrap> {
        let answer = self.run(bundle, id, "start", &[], bound).await?;
        if !answer.status.success() {
            return Err(self.failed("start", &answer));
        }
        if !answer.stderr.is_empty() {
            tracing::warn!(pod = id, stderr = %tail(&answer.stderr), "the shim's start wrote to stderr");
        }
        Bootstrap::parse(&answer.stdout).map_err(|e| {
            let stderr = tail(&answer.stderr);
            let e = e.within(format!("{} start", self.shim.display()));
            if stderr.is_empty() { e } else { e.hint(format!("its stderr: {stderr}")) }
        })
    }

    /// `delete`: cleans up after the task `id` of a dead shim, its processes too.
    pub(crate) async fn delete(&self, bundle: &Path, id: &str, bound: Duration) -> Result<DeleteResponse> {
        let path = bundle.to_string_lossy();
        let answer = self.run(bundle, id, "delete", &["-bundle", &path], bound).await?;
        if !answer.status.success() {
            return Err(self.failed("delete", &answer));
        }
        DeleteResponse::decode(answer.stdout.as_slice())
            .context_kind(ErrorKind::Internal, || format!("{} delete: its answer can't be read", self.shim.display()))
    }

    fn failed(&self, action: &str, answer: &Answer) -> Error {
        let said = [tail(&answer.stderr), tail(&answer.stdout)].concat();
        Error::internal(format!("{} {action}: {}: {said}", self.shim.display(), answer.status))
    }

    async fn run(&self, bundle: &Path, id: &str, action: &str, extra: &[&str], bound: Duration) -> Result<Answer> {
        let what = || format!("{} {action} for {id}", self.shim.display());
        let mut command = Command::new(&self.shim);
        command
            .args(["-namespace", &self.namespace, "-address"])
            .arg(&self.grpc_address)
            .arg("-publish-binary")
            .arg(&self.publish)
            .args(["-id", id])
            .args(extra)
            .arg(action)
            .current_dir(bundle)
            .env("NAMESPACE", &self.namespace)
            .env("GRPC_ADDRESS", &self.grpc_address)
            .env("MAX_SHIM_VERSION", "2")
            .env("TTRPC_ADDRESS", self.ttrpc_address.as_deref().unwrap_or(Path::new("")))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(|e| {
            let e = Err::<(), _>(e).context(what).err().unwrap_or_else(|| Error::internal(what()));
            e.hint("is the shim's binary installed and executable?").with_kind(ErrorKind::FailedPrecondition)
        })?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let mut out = child.stdout.take().map(|p| p.take(LONGEST_ANSWER));
        let mut err = child.stderr.take().map(|p| p.take(LONGEST_ANSWER));
        let status = {
            let read = async {
                if let (Some(out), Some(err)) = (&mut out, &mut err) {
                    tokio::try_join!(out.read_to_end(&mut stdout), err.read_to_end(&mut stderr)).map(|_| ())
                } else {
                    Ok(())
                }
            };
            tokio::pin!(read);
            let ended = async {
                tokio::select! {
                    _ = &mut read => child.wait().await,
                    status = child.wait() => {
                        let _ = tokio::time::timeout(LINGER, &mut read).await;
                        status
                    }
                }
            };
            step(format!("'{} {action}'", self.shim.display()), tokio::time::timeout(bound, ended)).await
        };
        match status {
            Ok(Ok(status)) => Ok(Answer { status, stdout, stderr }),
            Ok(Err(e)) => Err(e).context(what),
            Err(_) => {
                let _ = child.kill().await;
                Err(Error::deadline(format!("{} took longer than {bound:?} and was killed", what())))
            }
        }
    }
}

/// The end of what a command said, on one line.
fn tail(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let text = text.trim();
    let from = text.char_indices().rev().nth(2000).map_or(0, |(i, _)| i);
    text[from..].replace('\n', "; ")
}

/// Opens the shim's log FIFO: for reading and writing, so that it never ends
/// while the shim may still open it.
pub(crate) fn open_log(bundle: &Path) -> Result<pipe::Receiver> {
    let path = bundle.join("log");
    crate::bundle::make_fifo(&path)?;
    pipe::OpenOptions::new()
        .read_write(true)
        .open_receiver(&path)
        .context(|| format!("open the shim's log {}", path.display()))
}

/// Copies the shim's log into ours, line by line, until `gone` and the FIFO is
/// empty. Buffers exist only while there is something in them.
pub(crate) async fn copy_log(pod: String, log: pipe::Receiver, gone: impl Future<Output = ()>) {
    const LONGEST_LINE: usize = 16 << 10;
    let mut gone = std::pin::pin!(gone);
    let mut line = Vec::new();
    loop {
        let last = tokio::select! {
            ready = log.readable() => match ready { Ok(()) => false, Err(_) => return },
            () = &mut gone => true,
        };
        let mut chunk = [0u8; 2048];
        while let Ok(n @ 1..) = log.try_read(&mut chunk) {
            for part in chunk[..n].split_inclusive(|b| *b == b'\n') {
                line.extend_from_slice(part);
                if line.ends_with(b"\n") || line.len() >= LONGEST_LINE {
                    say(&pod, &line);
                    line = Vec::new();
                }
            }
        }
        if last {
            if !line.is_empty() {
                say(&pod, &line);
            }
            return;
        }
    }
}

/// Shims write logfmt or JSON lines with a level; ours is chosen by it.
fn say(pod: &str, line: &[u8]) {
    let line = String::from_utf8_lossy(line);
    let line = line.trim_end();
    let has = |level: &str| line.contains(&format!("level={level}")) || line.contains(&format!("\"level\":\"{level}"));
    if ["error", "fatal", "panic"].into_iter().any(has) {
        tracing::error!(target: "shim", pod, "{line}");
    } else if has("warn") {
        tracing::warn!(target: "shim", pod, "{line}");
    } else if has("debug") || has("trace") {
        tracing::debug!(target: "shim", pod, "{line}");
    } else {
        tracing::info!(target: "shim", pod, "{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_one_line_and_whole_characters() {
        assert_eq!(tail(b" a\nb \n"), "a; b");
        let long = "é".repeat(5000);
        assert!(tail(long.as_bytes()).chars().count() <= 2001);
    }
}
