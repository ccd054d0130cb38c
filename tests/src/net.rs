//! A node's network of a test's own: a network namespace in which a daemon runs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};

static MADE: AtomicUsize = AtomicUsize::new(0);

/// A network namespace with `lo` up, which goes when this is dropped.
pub struct NodeNet {
    name: String,
    path: PathBuf,
}

impl NodeNet {
    /// Makes one.
    #[allow(clippy::new_without_default, reason = "it makes something of the node's")]
    pub fn new() -> Self {
        let name = format!("e2e-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let path = Path::new("/run/netns").join(&name);
        let made = Command::new("ip").args(["netns", "add", &name]).output().unwrap();
        assert!(made.status.success(), "ip netns add: {}", String::from_utf8_lossy(&made.stderr));
        let net = Self { name, path };
        net.must(&["ip", "link", "set", "lo", "up"]);
        net
    }

    /// Where it is pinned.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a command in it.
    pub fn run(&self, command: &[&str]) -> Output {
        let net = format!("--net={}", self.path.display());
        Command::new("nsenter").arg(net).arg("--").args(command).output().unwrap()
    }

    /// Runs a command in it that must succeed, and gives what it printed.
    pub fn must(&self, command: &[&str]) -> String {
        let out = self.run(command);
        assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// The names of its interfaces but for `lo` and bridges.
    pub fn links(&self) -> BTreeSet<String> {
        let names = |args: &[&str]| -> BTreeSet<String> {
            let all = self.must(args);
            all.lines()
                .filter_map(|l| l.split_whitespace().next())
                .map(|n| n.split('@').next().unwrap().into())
                .collect()
        };
        let bridges = names(&["ip", "-br", "link", "show", "type", "bridge"]);
        let mut links = names(&["ip", "-br", "link", "show"]);
        links.retain(|l| l != "lo" && !bridges.contains(l));
        links
    }

    /// All its rules of packet filters, of both families.
    pub fn rules(&self) -> String {
        self.must(&["iptables-save"]) + &self.must(&["ip6tables-save"]) + &self.must(&["nft", "list", "ruleset"])
    }
}

impl Drop for NodeNet {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}
