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
use types::{Result, ResultExt};

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

    // Nobody but a caller's Shutdown ends a shim: it outlives its daemon.
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .context(|| "ignore SIGTERM".into())?;
    let mut interrupt =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt()).context(|| "ignore SIGINT".into())?;
    loop {
        tokio::select! {
            () = shared.stop.notified() => break,
            _ = terminate.recv() => log::warn("SIGTERM is ignored; ask for Shutdown"),
            _ = interrupt.recv() => log::warn("SIGINT is ignored; ask for Shutdown"),
        }
    }
    shared.events.flush(Duration::from_secs(3)).await;
    // A connection's writer ends only once it has written what handlers have
    // answered, Shutdown's own answer too; this waits for it.
    let _ = tokio::time::timeout(Duration::from_secs(1), server.shutdown()).await;
    Ok(())
}
