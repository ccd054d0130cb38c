//! A shim's life: from an open socket to Shutdown.

use crate::log;
use crate::private::Private;
use crate::sandbox::Sandboxes;
use crate::service::Tasks;
use crate::shared::{Settings, Shared};
use oci::Children;
use proto::containerd::runtime::sandbox::v1::{SandboxClient, register_sandbox};
use proto::containerd::task::v3::register_task;
use proto::longshore_shim::{LongshoreClient, register_longshore};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use types::{Result, ResultExt};

/// How long the end waits for logs that are still being written.
const FLUSH: Duration = Duration::from_secs(3);

/// Serves both task services, the sandbox service and our own on `listener` until Shutdown.
///
/// # Errors
/// Where this process can't become a subreaper or serve at all.
pub async fn serve(listener: UnixListener, settings: Settings) -> Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context(|| "become a subreaper".into())?;
    let children = Children::new();
    let sweeper = children.clone();
    tokio::spawn(async move {
        if let Err(e) = sweeper.run().await {
            log::warn(format_args!("orphans are not reaped: {e}"));
        }
    });
    let shared = Arc::new(Shared::new(settings, children));
    listener.set_nonblocking(true).context(|| "prepare the socket".into())?;
    let listener = tokio::net::UnixListener::from_std(listener).context(|| "watch the socket".into())?;
    let mut server = ttrpc::r#async::Server::new().add_listener(listener.into());
    let tasks = Arc::new(Tasks { shared: shared.clone() });
    for name in proto::TASK_SERVICES {
        server = server.register_service(register_task(tasks.clone(), name));
    }
    let sandboxes = Arc::new(Sandboxes::new(shared.clone()));
    server = server.register_service(register_sandbox(sandboxes, SandboxClient::SERVICE));
    let private = Arc::new(Private { shared: shared.clone() });
    server = server.register_service(register_longshore(private, LongshoreClient::SERVICE));
    server.start().await.context(|| "serve".into())?;

    until_shutdown(&shared).await?;
    shared.events.flush(Duration::from_secs(3)).await;
    // A connection's writer ends only once it has written what handlers have
    // answered, Shutdown's own answer too; this waits for it.
    let _ = tokio::time::timeout(Duration::from_secs(1), server.shutdown()).await;
    let _ = tokio::task::spawn_blocking(move || shared.writer.flush(FLUSH)).await;
    Ok(())
}

/// Waits for the end. Nobody but a caller's Shutdown ends a shim, since it outlives its
/// daemon; except the node's own shutdown, which would wait for us.
async fn until_shutdown(shared: &Arc<Shared>) -> Result<()> {
    let mut terminate = catch(SignalKind::terminate())?;
    let mut interrupt = catch(SignalKind::interrupt())?;
    // Caught, so that they do not end us: people send the first to containerd's shims to
    // see where they hang.
    let (mut ask, mut other) = (catch(SignalKind::user_defined1())?, catch(SignalKind::user_defined2())?);
    loop {
        let end = tokio::select! {
            () = shared.stop.notified() => return Ok(()),
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            _ = ask.recv() => {
                let waits = shared.waits().await;
                log::warn(format_args!("SIGUSR1: {} containers; waiting for: [{}]", shared.handles().len(), waits.join("; ")));
                continue;
            }
            _ = other.recv() => continue,
        };
        if is_shutdown(&std::fs::read_to_string("/proc/1/comm").unwrap_or_default()) {
            log::warn(format_args!("{end} while the node shuts down"));
            return Ok(());
        }
        log::warn(format_args!("{end} is ignored; ask for Shutdown"));
    }
}

fn catch(kind: SignalKind) -> Result<Signal> {
    signal(kind).context(|| format!("catch signal {}", kind.as_raw_value()))
}

/// Does the node shut down, by the name of its first process? In systemd's last phase,
/// when every process that is left gets SIGTERM and is waited for, it is another program.
fn is_shutdown(init: &str) -> bool {
    init.trim().starts_with("systemd-shutdow")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_s_shutdown_is_seen_by_its_first_process() {
        assert!(is_shutdown("systemd-shutdow\n"));
        assert!(!is_shutdown("systemd\n") && !is_shutdown("init") && !is_shutdown(""));
    }
}
