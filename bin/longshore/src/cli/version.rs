//! `version`: ours and the daemon's.

use super::Context;
use super::client::Answer;
use super::output::{print, print_json, to_json};
use proto::cri::VersionRequest;
use serde_json::json;
use types::Result;

/// Prints our version, then the daemon's if one answers.
pub async fn version(context: &Context) -> Result<()> {
    let ours = env!("CARGO_PKG_VERSION");
    if !context.json() {
        print(&format!("Client:   longshore {ours}\n"))?;
    }
    let mut client = context.connect().await?;
    let request = VersionRequest { version: "v1".to_string() };
    let theirs = client.runtime.version(request).await.answer(|| "ask for the daemon's version".to_string())?;
    if context.json() {
        let daemon = to_json("runtime.v1.VersionResponse", &theirs)?;
        return print_json(&json!({"client": {"version": ours}, "daemon": daemon}));
    }
    print(&format!(
        "Daemon:   {} {}\nCRI:      {}\nSocket:   {}\n",
        theirs.runtime_name,
        theirs.runtime_version,
        theirs.runtime_api_version,
        context.socket.display()
    ))
}
