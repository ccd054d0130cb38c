//! `doctor`: what on this node keeps pods from running, each with a remedy.
//!
//! It looks by itself, so that it works without a daemon; one that answers is asked
//! for its own conditions and for what it waits for.

mod daemon;
mod node;

use super::args::DoctorArgs;
use super::output::{print, print_json};
use super::{Context, DEFAULT_SOCKET};
use crate::config::Config;
use serde_json::{Value, json};
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
    remedy: String,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, check: &'static str, found: impl Into<String>) {
        self.0.push(Finding { check, verdict: Verdict::Ok, found: found.into(), remedy: String::new() });
    }

    fn warn(&mut self, check: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding { check, verdict: Verdict::Warning, found: found.into(), remedy: remedy.into() });
    }

    fn broken(&mut self, check: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding { check, verdict: Verdict::Broken, found: found.into(), remedy: remedy.into() });
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
    node::kernel(&mut all);
    node::cgroups(&mut all);
    node::runtimes(&mut all, &config).await;
    node::cni(&mut all, &config);
    node::directory(&mut all, "root directory", &config.root);
    node::directory(&mut all, "state directory", &config.state);
    daemon::database(&mut all, &config.root);
    daemon::sockets(&mut all, &config);
    let pods = daemon::daemon(&mut all, &config, args.fix).await;
    daemon::bundles(&mut all, &config.state, pods.as_ref());
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
