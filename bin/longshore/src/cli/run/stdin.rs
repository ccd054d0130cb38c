//! Our standard input into the container's, through the FIFO that its shim reads.

use crate::cli::client::{Answer, Client};
use proto::admin::CloseStdinRequest;
use proto::cri::ContainerStatusRequest;
use serde_json::Value;
use std::fs::OpenOptions;
use std::path::PathBuf;
use types::{Error, ErrorKind, Result};

/// The FIFO of the container's stdin, by its verbose status.
///
/// # Errors
/// As the call; `FailedPrecondition` where it names none.
pub async fn fifo(client: &mut Client, id: &str) -> Result<PathBuf> {
    let request = ContainerStatusRequest { container_id: id.to_string(), verbose: true };
    let info = client.runtime.container_status(request).await.answer(|| format!("ask for container {id}"))?.info;
    let nested = info.get("info").and_then(|text| serde_json::from_str::<Value>(text).ok());
    let nested = nested.and_then(|all| all.get("stdin")?.as_str().map(PathBuf::from));
    let path = nested.or_else(|| info.get("stdin").map(PathBuf::from)).filter(|p| p.is_absolute());
    path.ok_or_else(|| {
        Error::precondition(format!("the daemon names no standard input of container {id}"))
            .hint("--interactive works with our own shim only")
    })
}

/// Copies our stdin there until its end, then closes the container's. Runs by itself:
/// a container that ends first leaves the copy waiting, and it ends with the process.
pub fn copy(mut client: Client, id: String, fifo: PathBuf) {
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let opened = OpenOptions::new().write(true).open(&fifo);
        // A broken pipe is a container that reads no more.
        let copied = opened.and_then(|mut to| std::io::copy(&mut std::io::stdin().lock(), &mut to));
        if let Err(e) = &copied
            && e.kind() != std::io::ErrorKind::BrokenPipe
        {
            eprintln!("longshore: pass on standard input: {e}");
        }
        let _ = ended.send(());
    });
    tokio::spawn(async move {
        if end.await.is_err() {
            return;
        }
        let request = CloseStdinRequest { container_id: id.clone() };
        let closed = client.admin.close_stdin(request).await.answer(|| format!("close stdin of container {id}"));
        // It has ended already, or was removed.
        let over = [ErrorKind::NotFound, ErrorKind::FailedPrecondition, ErrorKind::Cancelled];
        match closed {
            Err(e) if !over.contains(&e.kind()) => eprintln!("longshore: {e}"),
            _ => {}
        }
    });
}
