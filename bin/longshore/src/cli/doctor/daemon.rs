//! The daemon: its socket, its database, what it says of itself, what it waits for.

use super::Findings;
use crate::cli::client::{Answer, Client};
use crate::config::Config;
use proto::admin::{HealthRequest, WaitingRequest};
use proto::cri::{ListPodSandboxRequest, StatusRequest};
use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// From so many milliseconds on an operation counts as stuck.
const STUCK: u64 = 10_000;

/// Who may reach the sockets, and whether anybody listens.
pub(super) fn sockets(all: &mut Findings, config: &Config) {
    let own = &config.socket;
    let shown = own.display();
    match std::fs::symlink_metadata(own) {
        Err(_) => all.warn("sockets", format!("{shown} does not exist"), "start the daemon: systemctl start longshore"),
        Ok(m) if !m.file_type().is_socket() => {
            all.broken("sockets", format!("{shown} is no socket"), "remove it, and start the daemon again");
        }
        Ok(m) if m.mode() & 0o007 != 0 || m.uid() != 0 => {
            let found = format!("{shown} is open to others: mode {:o}, owner {}", m.mode() & 0o777, m.uid());
            all.warn("sockets", found, "whoever writes to it is root on this node: chown root, chmod 0660");
        }
        Ok(m) => match UnixStream::connect(own) {
            Ok(stream) => {
                let who = rustix::net::sockopt::socket_peercred(&stream).ok();
                let who = who.map_or_else(|| "somebody".into(), |c| of_process(c.pid.as_raw_nonzero().get()));
                all.ok("sockets", format!("{shown}: mode {:o}, {who} listens", m.mode() & 0o777));
            }
            Err(e) => all.warn(
                "sockets",
                format!("{shown}: nobody listens ({e})"),
                "start the daemon: systemctl start longshore; a new one takes the socket's place",
            ),
        },
    }
    let events = config.state.join("events");
    if let Ok(m) = std::fs::metadata(&events)
        && m.mode() & 0o077 != 0
    {
        let found = format!("{} is open to others: mode {:o}", events.display(), m.mode() & 0o777);
        all.warn("sockets", found, "chmod 0700: who writes there can report ends of containers");
    }
}

fn of_process(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{} ({pid})", name.trim())
}

/// The database as it lies there, and damaged ones aside.
pub(super) fn database(all: &mut Findings, root: &Path) {
    let dir = root.join("db");
    match store::examine(&dir) {
        Ok(()) => all.ok("database", format!("{} is whole", dir.display())),
        Err(e) if e.is_not_found() => all.warn("database", e.to_string(), "the daemon makes it at its first start"),
        Err(e) => all.broken(
            "database",
            e.to_string(),
            "restart the daemon: it puts the damaged one aside and restores the records from their copy; look at the disk",
        ),
    }
    for aside in store::set_aside(&dir) {
        let found = format!("a damaged one lies aside: {}", aside.display());
        all.warn("database", found, "look at the disk; remove the file once it is of no use");
    }
}

/// Asks the daemon, where one answers, and gives the ids of its pods.
pub(super) async fn daemon(all: &mut Findings, config: &Config, fix: bool) -> Option<BTreeSet<String>> {
    let mut client = match Client::connect(&config.socket).await {
        Ok(client) => client,
        Err(e) => {
            all.warn("daemon", e.to_string(), "start it: systemctl start longshore");
            return None;
        }
    };
    match client.runtime.status(StatusRequest { verbose: false }).await.answer(|| "ask its status".into()) {
        Ok(status) => {
            let conditions = status.status.into_iter().flat_map(|s| s.conditions);
            for c in conditions.filter(|c| !c.status || !c.reason.is_empty()) {
                let found = format!("{} is {}: {} {}", c.r#type, c.status, c.reason, c.message);
                all.warn("daemon", found, "see the daemon's log");
            }
            all.ok("daemon", format!("answers on {}", config.socket.display()));
        }
        Err(e) => all.broken("daemon", e.to_string(), "see the daemon's log"),
    }
    waiting(all, &mut client).await;
    health(all, &mut client, fix).await;
    let pods = client.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.ok()?;
    Some(pods.into_inner().items.into_iter().map(|p| p.id).collect())
}

async fn waiting(all: &mut Findings, client: &mut Client) {
    match client.admin.waiting(WaitingRequest {}).await.answer(|| "ask what it waits for".into()) {
        Ok(answer) if answer.operations.is_empty() => all.ok("operations", "none is under way"),
        Ok(answer) => {
            for o in answer.operations {
                let waits = if o.waits_for.is_empty() { "" } else { ", which waits for " };
                let what = format!("{}{waits}{}", o.what, o.waits_for.join(" and "));
                if o.milliseconds >= STUCK {
                    let found = format!("for {} s now: {what}", o.milliseconds / 1000);
                    let remedy =
                        "look at the process that it waits for (stopped? in state D?) and its lines in the log";
                    all.warn("operations", found, remedy);
                } else {
                    all.ok("operations", format!("for {} ms now: {what}", o.milliseconds));
                }
            }
        }
        Err(e) => all.warn("operations", e.to_string(), "the daemon may be of an older release"),
    }
}

/// What it says of its database, its quarantine and its leftovers.
async fn health(all: &mut Findings, client: &mut Client, fix: bool) {
    let answer = client.admin.health(HealthRequest { reconcile: fix }).await.answer(|| "ask what is amiss".into());
    let answer = match answer {
        Ok(answer) => answer,
        Err(e) => return all.warn("leftovers", e.to_string(), "the daemon may be of an older release"),
    };
    for check in ["database", "quarantine", "leftovers"] {
        for trouble in answer.troubles.iter().filter(|t| t.check == check) {
            all.warn(check, trouble.found.clone(), trouble.remedy.clone());
        }
    }
    if !answer.troubles.iter().any(|t| t.check == "quarantine") {
        all.ok("quarantine", "empty");
    }
    let names = if answer.recent.is_empty() { String::new() } else { format!(": {}", answer.recent.join(", ")) };
    let found =
        format!("looked for {} times since the daemon's start, {} removed{names}", answer.rounds, answer.removed);
    all.ok("leftovers", found);
}

/// What lies in the state directory, against what the daemon knows.
pub(super) fn bundles(all: &mut Findings, state: &Path, pods: Option<&BTreeSet<String>>) {
    let names = |dir: &str| -> Vec<String> {
        let entries = std::fs::read_dir(state.join(dir)).into_iter().flatten().flatten();
        entries.filter_map(|e| e.file_name().into_string().ok()).collect()
    };
    let mut left = BTreeSet::new();
    for id in names("bundles") {
        if state.join("bundles").join(&id).join("bootstrap.json.bad").exists() {
            let found = format!("pod {id:.12}: its bootstrap.json could not be read and is set aside beside it");
            all.warn("quarantine", found, "stop and remove the pod; then its bundle goes");
        }
        left.insert(id);
    }
    left.extend(names("conmon/bundles"));
    left.extend(names("ns"));
    if let Some(pods) = pods {
        left.retain(|id| !pods.contains(id));
        for id in left {
            let found = format!("{id:.12} has something in the state directory, and is no pod of the daemon's");
            all.warn(
                "leftovers",
                found,
                "unless it is being made now, or in quarantine: the daemon removes it within five minutes, or at once with longshore doctor --fix",
            );
        }
    }
}
