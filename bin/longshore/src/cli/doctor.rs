//! `doctor`: what on this node keeps pods from running, each with a remedy.
//!
//! It looks by itself, so that it works without a daemon; one that answers is asked
//! for its own conditions and for what it waits for.

use super::args::DoctorArgs;
use super::client::{Answer, Client};
use super::output::{print, print_json};
use super::{Context, DEFAULT_SOCKET};
use crate::config::Config;
use proto::admin::WaitingRequest;
use proto::cri::{ListPodSandboxRequest, StatusRequest};
use rustix::fs::StatVfsMountFlags;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use types::{Error, Result};

/// Less than this free, in bytes, is worth a warning.
const LITTLE: u64 = 256 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warning,
    Broken,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Broken => "broken",
        }
    }
}

struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    remedy: &'static str,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, check: &'static str, found: impl Into<String>) {
        self.0.push(Finding { check, verdict: Verdict::Ok, found: found.into(), remedy: "" });
    }

    fn warn(&mut self, check: &'static str, found: impl Into<String>, remedy: &'static str) {
        self.0.push(Finding { check, verdict: Verdict::Warning, found: found.into(), remedy });
    }

    fn broken(&mut self, check: &'static str, found: impl Into<String>, remedy: &'static str) {
        self.0.push(Finding { check, verdict: Verdict::Broken, found: found.into(), remedy });
    }
}

/// Prints all findings; the exit code is 1 where something is broken.
pub async fn doctor(context: &Context, args: &DoctorArgs) -> Result<u8> {
    let mut config =
        Config::load(args.config.as_deref()).map_err(|e| Error::invalid(format!("read the configuration: {e:#}")))?;
    if context.socket != Path::new(DEFAULT_SOCKET) {
        config.socket.clone_from(&context.socket);
    }
    config.root = args.root.clone().unwrap_or(config.root);
    config.state = args.state.clone().unwrap_or(config.state);
    let mut all = Findings::default();
    kernel(&mut all);
    cgroups(&mut all);
    runtimes(&mut all, &config).await;
    directory(&mut all, "root directory", &config.root);
    directory(&mut all, "state directory", &config.state);
    let pods = daemon(&mut all, &config).await;
    bundles(&mut all, &config.state, pods.as_ref());
    report(context, &all.0)?;
    Ok(u8::from(all.0.iter().any(|f| f.verdict == Verdict::Broken)))
}

fn report(context: &Context, all: &[Finding]) -> Result<()> {
    if context.json() {
        let one = |f: &Finding| -> Value {
            json!({ "check": f.check, "verdict": f.verdict.word(), "found": f.found, "remedy": f.remedy })
        };
        return print_json(&json!({ "findings": all.iter().map(one).collect::<Vec<_>>() }));
    }
    let mut text = String::new();
    for f in all {
        text.push_str(&format!("{:8} {}: {}\n", f.verdict.word(), f.check, f.found));
        if !f.remedy.is_empty() {
            text.push_str(&format!("{:8} -> {}\n", "", f.remedy));
        }
    }
    print(&text)
}

fn kernel(all: &mut Findings) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    all.ok("kernel", release.trim());
    let missing: Vec<&str> = ["net", "ipc", "uts", "pid", "mnt", "user"]
        .into_iter()
        .filter(|ns| !Path::new("/proc/self/ns").join(ns).exists())
        .collect();
    if missing.is_empty() {
        all.ok("namespaces", "all kinds");
    } else {
        all.broken("namespaces", format!("missing: {}", missing.join(", ")), "use a kernel that is built with them");
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if filesystems.lines().any(|l| l.trim_start_matches("nodev").trim() == "overlay") {
        all.ok("overlayfs", "known to the kernel");
    } else {
        all.broken("overlayfs", "not known to the kernel", "load it: modprobe overlay");
    }
    if Path::new("/proc/sys/kernel/seccomp/actions_avail").exists() {
        all.ok("seccomp", "known to the kernel");
    } else {
        all.warn("seccomp", "not known to the kernel", "use a kernel with CONFIG_SECCOMP_FILTER");
    }
}

fn cgroups(all: &mut Findings) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let of = |kind: &str| mounts.lines().filter(|l| l.split(' ').nth(2) == Some(kind)).count();
    match (of("cgroup"), of("cgroup2")) {
        (0, 0) => all.broken("cgroups", "none are mounted", "mount -t cgroup2 cgroup2 /sys/fs/cgroup"),
        (0, _) => all.ok("cgroups", "version 2"),
        (_, 0) => all.ok("cgroups", "version 1"),
        (..) => all.ok("cgroups", "hybrid: version 1 controllers beside version 2"),
    }
}

async fn runtimes(all: &mut Findings, config: &Config) {
    match crate::handlers::build(config).await {
        Ok(built) if built.ready.holds => all.ok("runtimes", built.info.to_string()),
        Ok(built) => {
            all.broken("runtimes", built.ready.message, "install runc, or name an OCI runtime in runtime.binary");
        }
        Err(e) => all.broken("runtimes", format!("{e:#}"), "set the handler right in the configuration"),
    }
    if let Err(e) = crate::serve::find_binary(&config.runtime.pod_init, "longshore-pod-init") {
        all.broken("pod init", format!("{e:#}"), "install it beside longshore, or name it in runtime.pod_init");
    }
}

fn directory(all: &mut Findings, check: &'static str, dir: &Path) {
    let shown = dir.display();
    match rustix::fs::statvfs(dir) {
        Err(e) => all.warn(check, format!("{shown}: {e}"), "the daemon makes it at its first start"),
        Ok(s) if s.f_flag.contains(StatVfsMountFlags::RDONLY) => {
            all.broken(check, format!("{shown} is mounted read-only"), "mount it for writing: mount -o remount,rw");
        }
        Ok(s) if s.f_bavail.saturating_mul(s.f_frsize) == 0 => {
            all.broken(check, format!("{shown}: its disk is full"), "free some space, for example by removing images");
        }
        Ok(s) if s.f_bavail.saturating_mul(s.f_frsize) < LITTLE => {
            let free = s.f_bavail.saturating_mul(s.f_frsize) >> 20;
            all.warn(check, format!("{shown}: {free} MiB are free"), "free some space before it is full");
        }
        Ok(_) => all.ok(check, shown.to_string()),
    }
}

/// Asks the daemon, where one answers, and gives the ids of its pods.
async fn daemon(all: &mut Findings, config: &Config) -> Option<BTreeSet<String>> {
    let mut client = match Client::connect(&config.socket).await {
        Ok(client) => client,
        Err(e) => {
            all.warn("daemon", e.to_string(), "start it: systemctl start longshore");
            return None;
        }
    };
    match client.runtime.status(StatusRequest { verbose: false }).await.answer(|| "ask its status".into()) {
        Ok(status) => {
            for c in status.status.into_iter().flat_map(|s| s.conditions).filter(|c| !c.status) {
                let found = format!("{} is false: {} {}", c.r#type, c.reason, c.message);
                all.warn("daemon", found, "see the daemon's log");
            }
            all.ok("daemon", format!("answers on {}", config.socket.display()));
        }
        Err(e) => all.broken("daemon", e.to_string(), "see the daemon's log"),
    }
    match client.admin.waiting(WaitingRequest {}).await.answer(|| "ask what it waits for".into()) {
        Ok(answer) if answer.operations.is_empty() => all.ok("operations", "none is under way"),
        Ok(answer) => {
            for o in answer.operations {
                if o.milliseconds >= 10_000 {
                    let found = format!("{}, for {} s", o.what, o.milliseconds / 1000);
                    all.warn(
                        "operations",
                        found,
                        "look at the shim's process (stopped? in state D?) and its lines in the log",
                    );
                } else {
                    all.ok("operations", format!("{}, for {} ms", o.what, o.milliseconds));
                }
            }
        }
        Err(e) => all.warn("operations", e.to_string(), "the daemon may be of an older release"),
    }
    let pods = client.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.ok()?;
    Some(pods.into_inner().items.into_iter().map(|p| p.id).collect())
}

/// What lies in the state directory, against what the daemon knows.
fn bundles(all: &mut Findings, state: &Path, pods: Option<&BTreeSet<String>>) {
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
    left.extend(names("ns"));
    if let Some(pods) = pods {
        left.retain(|id| !pods.contains(id));
        if left.is_empty() {
            all.ok("leftovers", "none in the state directory");
        }
        for id in left {
            let found = format!("{id:.12} has something in the state directory, and is no pod of the daemon's");
            all.warn("leftovers", found, "unless it is being made now, the daemon's next start removes it");
        }
    }
}
