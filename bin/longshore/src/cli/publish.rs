//! `longshore --address A publish --topic T --namespace N`: what containerd's older
//! shims execute as their `-publish-binary`, once per event.

use super::args::PublishArgs;
use std::io::Read;
use types::{Error, Result, ResultExt};

/// Longer than any event.
const LONGEST: u64 = 1 << 20;

/// Sends the event on stdin to the daemon.
pub(super) async fn publish(args: PublishArgs) -> Result<()> {
    let address = args
        .address
        .ok_or_else(|| Error::invalid("publish needs --address: the address that the shim was told with -address"))?;
    let mut event = Vec::new();
    std::io::stdin().take(LONGEST).read_to_end(&mut event).context(|| "read the event from stdin".to_string())?;
    runtime::shim_v2::publish(&address, &args.namespace, &args.topic, &event).await
}
