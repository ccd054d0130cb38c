//! A pod's network namespace and what is in it.
//!
//! ```text
//! netns.rs     where the namespaces are pinned
//! types.rs     what a pod asks of its network and what it gets
//! builtin/     the network that needs nothing: bridge, addresses, masquerade
//! host_ports/  ports of the node that lead to pods, with any network
//! nft/         nf_tables' messages
//! netlink/     links, addresses, routes, limits, tracked connections
//! turns.rs     one operation per pod at a time
//! ```
//!
//! A new namespace has `lo` up (`sys::namespace` does that while it makes it) and
//! nothing else.

mod builtin;
mod host_ports;
mod netlink;
mod netns;
mod nft;
mod turns;
mod types;

pub use self::types::{AttachRequest, Attachment, Bandwidth, Dns, INTERFACE, Mac, Net, PortMapping, Protocol};
pub use builtin::{Builtin, BuiltinConfig, InterfaceStats, IpRange, interface_stats};
pub use host_ports::HostPorts;
pub use netns::NetnsDir;

/// Runs system calls that may wait for the kernel's locks where they hold nobody up;
/// they begin at once and end even if nobody awaits them.
fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> ::types::Result<T> + Send + 'static,
) -> impl Future<Output = ::types::Result<T>> + Send {
    let work = tokio::task::spawn_blocking(work);
    async move { work.await.map_err(|e| ::types::Error::internal(what).because(e))? }
}

/// Carries an operation to its end even if nobody awaits it any more.
async fn to_its_end<T: Send + 'static>(
    what: &'static str,
    work: impl Future<Output = ::types::Result<T>> + Send + 'static,
) -> ::types::Result<T> {
    tokio::spawn(work).await.map_err(|e| ::types::Error::internal(what).because(e))?
}
