//! `exec`: ExecSync, whose answer comes when the command has ended.

use super::args::ExecArgs;
use super::client::Answer;
use super::output::{is_broken_pipe, print_bytes, print_json, to_json};
use super::{Context, find};
use proto::cri::ExecSyncRequest;
use std::io::Write;
use types::Result;

/// Runs a command in a container and gives its exit code. When we are killed, the
/// daemon sees the call cancelled and kills the command.
pub async fn exec(context: &Context, args: ExecArgs) -> Result<u8> {
    let mut client = context.connect().await?;
    let container = find::container(&mut client, &args.container).await?;
    let what = format!("run {:?} in container {}", args.command[0], args.container);
    let request = ExecSyncRequest { container_id: container.id, cmd: args.command, timeout: args.timeout };
    let answer = client.runtime.exec_sync(request).await.answer(|| what)?;
    let code = exit_code(answer.exit_code);
    if context.json() {
        print_json(&to_json("runtime.v1.ExecSyncResponse", &answer)?)?;
        return Ok(code);
    }
    match print_bytes(&answer.stdout) {
        Err(e) if !is_broken_pipe(&e) => return Err(e),
        _ => {}
    }
    // Where stderr is closed there is nobody to tell.
    let _ = std::io::stderr().write_all(&answer.stderr);
    Ok(code)
}

/// A container's exit code as ours; what fits no process's exit status is 255.
pub fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(255)
}
