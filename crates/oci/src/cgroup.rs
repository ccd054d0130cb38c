//! A container's cgroups: where they are, who is in them, whether the OOM killer
//! struck. Both versions, and the hybrid of the two.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use sys::pidfd::PidFd;
use types::{Error, Result, ResultExt, Signal};

/// How many processes are held at a time while they are sent a signal: a descriptor each.
const AT_ONCE: usize = 256;

/// Where a container's cgroups are.
#[derive(Debug, Clone, Default)]
pub struct Cgroup {
    /// By controller ("memory", "pids", …); empty on a node with v2 alone.
    v1: BTreeMap<String, PathBuf>,
    /// The v2 directory, where v2 has controllers.
    v2: Option<PathBuf>,
    /// The v2 directory of a hybrid, which has no controllers.
    bare: Option<PathBuf>,
}

/// A mounted hierarchy: the part of it that is mounted, and where.
struct Hierarchy {
    root: String,
    point: PathBuf,
    v2: bool,
    controllers: Vec<String>,
}

fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        if left.len() < 5 || right.len() < 3 || !right[0].starts_with("cgroup") {
            continue;
        }
        found.push(Hierarchy {
            root: left[3].to_string(),
            point: PathBuf::from(left[4]),
            v2: right[0] == "cgroup2",
            controllers: right[2].split(',').map(String::from).collect(),
        });
    }
    found
}

/// A path of /proc/PID/cgroup below a hierarchy's mount; `None` where it is
/// outside what is mounted, or all of it.
fn place(h: &Hierarchy, path: &str) -> Option<PathBuf> {
    let below = if h.root == "/" { path } else { path.strip_prefix(&h.root)? };
    let below = below.trim_matches('/');
    // A container in the root cgroup has none of its own.
    let plain = |p: &str| !matches!(p, "" | "." | "..");
    below.split('/').all(plain).then(|| h.point.join(below))
}

impl Cgroup {
    /// The cgroups that process `pid` is in, seen from our namespace. Those that
    /// it shares with us are left out: they are not its own.
    ///
    /// # Errors
    /// Where /proc can't be read, for one because it has ended.
    pub fn of(pid: i32) -> Result<Self> {
        let read = |p: String| std::fs::read_to_string(&p).context(|| format!("read {p}"));
        let theirs = read(format!("/proc/{pid}/cgroup"))?;
        let ours = read("/proc/self/cgroup".into())?;
        let all = hierarchies(&read("/proc/self/mountinfo".into())?);
        Ok(Self::from_text(&theirs, &ours, &all))
    }

    /// The same without those that it shares with `other`: what a call of the OCI runtime
    /// has borne begins in the cgroup of the call, where others may be too.
    ///
    /// # Errors
    /// Where /proc can't be read, for one because either has ended.
    pub fn apart_from(other: i32, pid: i32) -> Result<Self> {
        let read = |p: String| std::fs::read_to_string(&p).context(|| format!("read {p}"));
        // Theirs first: one that is moved in between has no cgroup of its own then.
        let theirs = read(format!("/proc/{pid}/cgroup"))?;
        let shared = read(format!("/proc/{other}/cgroup"))? + &read("/proc/self/cgroup".into())?;
        let all = hierarchies(&read("/proc/self/mountinfo".into())?);
        Ok(Self::from_text(&theirs, &shared, &all))
    }

    /// The cgroups that the path in a bundle's config.json names, as far as they are
    /// there. A runtime that is killed in `create` leaves them, also before anybody is
    /// in them. None with systemd's kind of path: a scope that is empty goes by itself.
    pub fn of_bundle(bundle: &Path) -> Self {
        let config = std::fs::read(bundle.join("config.json")).unwrap_or_default();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
        let Some(path) = config["linux"]["cgroupsPath"].as_str().filter(|p| p.starts_with('/')) else {
            return Self::default();
        };
        let mut c = Self::default();
        for h in hierarchies(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()) {
            match place(&h, path).filter(|dir| dir.is_dir()) {
                Some(dir) if h.v2 => c.v2 = Some(dir),
                Some(dir) => c.v1.extend(h.controllers.into_iter().map(|name| (name, dir.clone()))),
                None => {}
            }
        }
        c.settle();
        c
    }

    fn from_text(theirs: &str, ours: &str, all: &[Hierarchy]) -> Self {
        let mut c = Self::default();
        for line in theirs.lines().filter(|l| !ours.lines().any(|o| o == *l)) {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            if controllers.is_empty() {
                c.v2 = all.iter().filter(|h| h.v2).find_map(|h| place(h, path));
                continue;
            }
            for controller in controllers.split(',') {
                let name = controller.strip_prefix("name=").unwrap_or(controller);
                let found = all
                    .iter()
                    .filter(|h| !h.v2 && h.controllers.iter().any(|x| x == controller))
                    .find_map(|h| place(h, path));
                if let Some(dir) = found {
                    c.v1.insert(name.to_string(), dir);
                }
            }
        }
        c.settle();
        c
    }

    /// In a hybrid the v2 side has no controllers and nothing to say.
    fn settle(&mut self) {
        if self.v1.contains_key("memory") || self.v1.contains_key("pids") {
            self.bare = self.v2.take();
        }
    }

    /// The v2 directory.
    pub fn v2(&self) -> Option<&Path> {
        self.v2.as_deref()
    }

    /// The v1 directory of a controller.
    pub fn v1(&self, controller: &str) -> Option<&Path> {
        self.v1.get(controller).map(PathBuf::as_path)
    }

    /// The directory whose members are the container's.
    fn members(&self) -> Option<&Path> {
        self.v2
            .as_deref()
            .or_else(|| ["pids", "freezer", "memory", "systemd", "devices", "cpu"].into_iter().find_map(|n| self.v1(n)))
    }

    /// Every process in it and below it, as numbers of our namespace.
    pub fn processes(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        if let Some(dir) = self.members() {
            walk(dir, &mut pids, 0);
        }
        pids
    }

    /// Sends a signal to each of them; returns how many it found.
    pub fn signal_all(&self, signal: Signal) -> usize {
        self.signal_others(signal, 0)
    }

    /// Sends a signal to each of them but `except`; returns how many it found.
    pub fn signal_others(&self, signal: Signal, except: i32) -> usize {
        signal_members(|| self.processes(), signal, except)
    }

    /// Kills all of them until none is left or `rounds` looks have been taken;
    /// for the kernel's own kill of a v2 cgroup one is enough.
    pub fn kill_once(&self) -> usize {
        if let Some(dir) = &self.v2
            && std::fs::write(dir.join("cgroup.kill"), "1").is_ok()
        {
            return self.processes().len();
        }
        self.signal_all(Signal::KILL)
    }

    fn directories(&self) -> impl Iterator<Item = &PathBuf> {
        self.v1.values().chain(&self.v2).chain(&self.bare)
    }

    /// Kills whoever is in any of its directories: a runtime that is killed itself has
    /// perhaps put a process into some of them only.
    pub fn kill_everywhere(&self) {
        for dir in self.directories() {
            let members = || {
                let mut pids = Vec::new();
                walk(dir, &mut pids, 0);
                pids
            };
            signal_members(members, Signal::KILL, 0);
        }
    }

    /// Removes its directories and those below; none must have a process any more.
    ///
    /// # Errors
    /// Naming those that stay.
    pub fn remove(&self) -> Result<()> {
        // Controllers that are mounted together have one directory.
        Error::join("remove the cgroup", self.directories().filter_map(|dir| remove(dir, 0).err()).collect())
    }

    /// Whether it is still there: systemd removes that of a scope as soon as nobody is
    /// in it. False also where there never was one of the container's own.
    pub fn exists(&self) -> bool {
        self.members().is_some_and(Path::exists)
    }

    /// How often the OOM killer has struck in it.
    pub fn oom_kills(&self) -> u64 {
        let from = |dir: Option<&Path>, file: &str| {
            let text = std::fs::read_to_string(dir?.join(file)).ok()?;
            field(&text, "oom_kill")
        };
        from(self.v2(), "memory.events").or_else(|| from(self.v1("memory"), "memory.oom_control")).unwrap_or(0)
    }

    /// The most memory it has used, in bytes.
    pub fn peak_memory(&self) -> Option<u64> {
        let from = |dir: Option<&Path>, file: &str| number(&dir?.join(file));
        from(self.v2(), "memory.peak").or_else(|| from(self.v1("memory"), "memory.max_usage_in_bytes"))
    }

    /// The cgroup's path, as it is told to people.
    pub fn name(&self) -> Option<String> {
        self.v2().or_else(|| self.v1("memory")).map(|p| p.display().to_string())
    }
}

/// Sends a signal to each of `members` but `except`; returns how many it found.
fn signal_members(members: impl Fn() -> Vec<i32>, signal: Signal, except: i32) -> usize {
    let all: Vec<i32> = members().into_iter().filter(|pid| *pid != except).collect();
    let mut found = 0;
    for some in all.chunks(AT_ONCE) {
        // Opened first and looked at again: the number may have moved on.
        let held: Vec<PidFd> = some.iter().filter_map(|pid| PidFd::open(*pid).ok()).collect();
        let still: HashSet<i32> = members().into_iter().collect();
        found += held.iter().filter(|p| still.contains(&p.pid()) && p.signal(signal).is_ok()).count();
    }
    found
}

fn remove(dir: &Path, depth: usize) -> Result<()> {
    if depth <= 16 {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                remove(&entry.path(), depth + 1)?;
            }
        }
    }
    match std::fs::remove_dir(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context(|| format!("remove {}", dir.display())),
        _ => Ok(()),
    }
}

fn walk(dir: &Path, pids: &mut Vec<i32>, depth: usize) {
    // A container that nests cgroups without end must not exhaust our stack.
    if depth > 16 {
        return;
    }
    let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|p| *p > 0));
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&entry.path(), pids, depth + 1);
        }
    }
}

/// The value of `key` in a flat keyed file.
pub fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// A file's one number; "max" is the greatest there is.
pub fn number(path: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    match text.trim() {
        "max" => Some(u64::MAX),
        n => n.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_are_signalled_with_few_looks_and_only_those_that_stay() {
        let children: Vec<_> =
            (0..4).map(|_| std::process::Command::new("sleep").arg("1000").spawn().unwrap()).collect();
        let pids: Vec<i32> = children.iter().map(|c| i32::try_from(c.id()).unwrap()).collect();
        let looks = std::cell::Cell::new(0);
        let members = || {
            looks.set(looks.get() + 1);
            // The last one leaves after the first look.
            if looks.get() == 1 { pids.clone() } else { pids[..3].to_vec() }
        };
        assert_eq!(signal_members(members, Signal::KILL, pids[0]), 2);
        assert_eq!(looks.get(), 2);
        for (n, mut child) in children.into_iter().enumerate() {
            if matches!(n, 0 | 3) {
                assert!(child.try_wait().unwrap().is_none(), "{n}");
                child.kill().unwrap();
            }
            child.wait().unwrap();
        }
    }

    const V1: &str = "32 31 0:29 / /sys/fs/cgroup/memory rw shared:1 - cgroup cgroup rw,memory\n\
        33 31 0:30 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n\
        34 31 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn a_hybrid_node_counts_as_v1() {
        let c = Cgroup::from_text("4:memory:/a/b\n3:pids:/a/b\n0::/a/b\n", "0::/\n", &hierarchies(V1));
        assert_eq!(c.v1("memory").unwrap(), Path::new("/sys/fs/cgroup/memory/a/b"));
        assert!(c.v2().is_none());
    }

    #[test]
    fn v2_alone_and_a_mount_of_a_part() {
        let all = hierarchies("1 2 0:3 /node /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
        let c = Cgroup::from_text("0::/node/x\n", "0::/node\n", &all);
        assert_eq!(c.v2().unwrap(), Path::new("/sys/fs/cgroup/x"));
        let outside = Cgroup::from_text("0::/other/x\n", "0::/node\n", &all);
        assert!(outside.v2().is_none());
    }

    #[test]
    fn our_own_cgroup_and_the_root_are_nobody_s() {
        let c = Cgroup::from_text("4:memory:/x\n3:pids:/\n", "4:memory:/x\n3:pids:/y\n", &hierarchies(V1));
        assert!(c.members().is_none() && c.processes().is_empty());
    }

    #[test]
    fn a_path_that_is_none_names_no_cgroup() {
        for path in ["/", "//", "/.", "/./", "/a/../..", "/a//b", "/a/./b"] {
            assert!(hierarchies(V1).iter().all(|h| place(h, path).is_none()), "{path}");
        }
    }

    #[test]
    fn keyed_files_are_read_by_whole_keys() {
        assert_eq!(field("oom 1\noom_kill 3\n", "oom_kill"), Some(3));
        assert_eq!(field("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", "oom_kill"), Some(2));
        assert_eq!(field("oom_kill_disable 0\n", "oom_kill"), None);
    }
}
