//! Which processes hold a pipe, or sit in a directory: read from /proc.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::collections::HashSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::Interest;

/// The longest command line that an error repeats, in characters.
const LONGEST_COMMAND: usize = 120;
/// How many holders an error names.
const MOST_NAMED: usize = 8;
/// The access mode in a descriptor's flags.
const ACCESS_MODE: u32 = 0o3;

/// A pipe or FIFO, whatever descriptor leads to it.
pub(crate) type Node = (u64, u64);

/// A process that can't be mistaken for another.
pub(crate) struct Process {
    pub(crate) pid: u32,
    fd: OwnedFd,
}

impl Process {
    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(&self.fd, Signal::KILL);
    }

    /// Waits for its end, but no longer than `bound`.
    pub(crate) async fn gone(self, bound: Duration) {
        if let Ok(fd) = stdio::watch(self.fd, Interest::READABLE) {
            let _ = tokio::time::timeout(bound, fd.readable()).await;
        }
    }
}

fn all() -> impl Iterator<Item = (u32, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| Some((e.file_name().to_str()?.parse().ok()?, e.path())))
}

fn arguments(proc: &Path) -> Vec<String> {
    let raw = fs::read(proc.join("cmdline")).unwrap_or_default();
    raw.split(|b| *b == 0).filter(|a| !a.is_empty()).map(|a| String::from_utf8_lossy(a).into_owned()).collect()
}

/// The shims of a pod's bundle: processes whose working directory it is and
/// whose arguments name the pod. A shim never leaves its bundle; a person who
/// looks around there is none.
pub(crate) fn shims_in(bundle: &Path, pod: &str) -> Vec<Process> {
    let Ok(bundle) = fs::canonicalize(bundle) else { return Vec::new() };
    let sits = |proc: &Path| {
        fs::read_link(proc.join("cwd")).is_ok_and(|cwd| cwd == bundle) && arguments(proc).iter().any(|a| a == pod)
    };
    held(sits)
}

/// Shims whose bundle below `bundles` is gone, each with its pod's id.
pub(crate) fn orphaned_shims(bundles: &Path) -> Vec<(String, Process)> {
    let Ok(bundles) = fs::canonicalize(bundles) else { return Vec::new() };
    let pod_of = |proc: &Path| {
        let cwd = fs::read_link(proc.join("cwd")).ok()?;
        let id = cwd.strip_prefix(&bundles).ok()?.to_str()?.strip_suffix(" (deleted)")?.to_string();
        (!id.contains('/') && arguments(proc).contains(&id)).then_some(id)
    };
    let found = held(|proc| pod_of(proc).is_some());
    found.into_iter().filter_map(|p| Some((pod_of(Path::new(&format!("/proc/{}", p.pid)))?, p))).collect()
}

/// The processes that `wanted` is true of, held.
fn held(wanted: impl Fn(&Path) -> bool) -> Vec<Process> {
    let mut found = Vec::new();
    for (pid, proc) in all() {
        if !wanted(&proc) {
            continue;
        }
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        // Looked at again once it is held: the number may have changed hands.
        if let Some(Ok(fd)) = raw.map(|p| pidfd_open(p, PidfdFlags::empty()))
            && wanted(&proc)
        {
            found.push(Process { pid, fd });
        }
    }
    found
}

/// The calls of an OCI runtime that still make the container `id`: processes that
/// were told to create it.
pub(crate) fn creators(id: &str) -> Vec<Process> {
    let creates = |proc: &Path| {
        let arguments = arguments(proc);
        arguments.iter().any(|a| a == id) && arguments.iter().any(|a| a == "create")
    };
    held(creates)
}

/// The pipes that are a process's stdout and stderr.
pub(crate) fn outputs(pid: u32) -> HashSet<Node> {
    let of = |fd: u32| {
        let path = PathBuf::from(format!("/proc/{pid}/fd/{fd}"));
        fs::read_link(&path).ok().filter(|l| l.to_string_lossy().starts_with("pipe:"))?;
        fs::metadata(&path).ok().map(|m| (m.dev(), m.ino()))
    };
    [1, 2].into_iter().filter_map(of).collect()
}

/// The anonymous pipes that a process holds the reading end of.
pub(crate) fn read_ends(pid: u32) -> HashSet<Node> {
    descriptors(Path::new(&format!("/proc/{pid}")))
        .filter(|d| d.mode == 0 && fs::read_link(&d.path).is_ok_and(|l| l.to_string_lossy().starts_with("pipe:")))
        .filter_map(|Descriptor { path, .. }| fs::metadata(path).ok().map(|m| (m.dev(), m.ino())))
        .collect()
}

/// One descriptor of a process.
struct Descriptor {
    path: PathBuf,
    /// 0 read, 1 write, 2 both.
    mode: u32,
    /// Before Linux 5.14 it isn't told.
    inode: Option<u64>,
}

impl Descriptor {
    /// Whether it leads to one of `nodes`. Only what may be one is looked at itself: a
    /// dead file server's file would not answer.
    fn is_one_of(&self, nodes: &HashSet<Node>) -> bool {
        self.inode.is_none_or(|inode| nodes.iter().any(|node| node.1 == inode))
            && fs::metadata(&self.path).is_ok_and(|m| nodes.contains(&(m.dev(), m.ino())))
    }
}

/// A process's descriptors.
fn descriptors(proc: &Path) -> impl Iterator<Item = Descriptor> {
    let info = proc.join("fdinfo");
    let entries = fs::read_dir(proc.join("fd")).into_iter().flatten().flatten();
    entries.filter_map(move |e| {
        let text = fs::read_to_string(info.join(e.file_name())).ok()?;
        let of = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)).map(str::trim);
        let mode = u32::from_str_radix(of("flags:")?, 8).ok()? & ACCESS_MODE;
        Some(Descriptor { path: e.path(), mode, inode: of("ino:").and_then(|n| n.parse().ok()) })
    })
}

/// The processes that can write into any of `nodes`, named for an error:
/// `1234 (sleep 1000), 1240 (cat)`. Empty where nobody does.
pub(crate) fn writers(nodes: &HashSet<Node>, but: &[u32]) -> String {
    let mut named = Vec::new();
    let mut more = 0;
    if nodes.is_empty() {
        return String::new();
    }
    for (pid, proc) in all() {
        if but.contains(&pid) {
            continue;
        }
        let holds = descriptors(&proc).any(|d| d.mode != 0 && d.is_one_of(nodes));
        if !holds {
            continue;
        }
        if named.len() == MOST_NAMED {
            more += 1;
            continue;
        }
        let command = arguments(&proc).join(" ");
        let shown: String = command.chars().filter(|c| !c.is_control()).take(LONGEST_COMMAND).collect();
        let dots = if command.chars().count() > LONGEST_COMMAND { "…" } else { "" };
        named.push(format!("{pid} ({shown}{dots})"));
    }
    let mut text = named.join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_writer_is_named_with_its_command() {
        let mut child =
            Command::new("/bin/sleep").arg("61").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        // It has no words while it is still becoming the command.
        while std::fs::read(format!("/proc/{}/cmdline", child.id())).unwrap().is_empty() {
            std::thread::yield_now();
        }
        let nodes = outputs(child.id());
        let wanted = format!("{} (/bin/sleep 61)", child.id());
        // A fork of another test may have it for a moment too.
        let settled = |wanted: &str, leave: &[u32]| {
            let mut named = writers(&nodes, leave);
            for _ in 0..1000 {
                if named == wanted {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
                named = writers(&nodes, leave);
            }
            named
        };
        let named = settled(&wanted, &[std::process::id()]);
        let ours = read_ends(std::process::id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(named, wanted);
        assert!(nodes.iter().any(|n| ours.contains(n)));
        assert_eq!(settled("", &[]), "");
    }
}
