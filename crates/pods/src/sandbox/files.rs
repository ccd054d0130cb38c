//! What stands in a pod's hostname, hosts and resolv.conf. Contents are decided
//! purely and checked, so that no field can add a line of its own.

use super::plan::NamespacePlan;
use proto::cri::{DnsConfig, PodSandboxConfig};
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use types::{Error, Result, ResultExt};

/// As much of the node's own files is copied, in bytes.
const LONGEST_COPY: u64 = 1 << 20;
/// Together the fields of a DNS configuration have at most so many bytes.
const LONGEST_DNS: usize = 64 << 10;

/// The contents of a pod's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Contents {
    /// The host name, without a newline.
    pub hostname: String,
    /// `None` copies the node's.
    pub hosts: Option<String>,
    /// `None` copies the node's.
    pub resolv_conf: Option<String>,
}

/// Decides on the files of a pod on a node of this name.
///
/// # Errors
/// `InvalidArgument`, naming the field.
pub(super) fn contents(config: &PodSandboxConfig, plan: &NamespacePlan, node: &str) -> Result<Contents> {
    spec::check_hostname(&config.hostname)?;
    // The file says what `hostname` says.
    let own = plan.uts && !config.hostname.is_empty();
    let hostname = if own { config.hostname.clone() } else { node.to_owned() };
    let hosts = plan.net.then(|| hosts(&hostname, &[]));
    let resolv_conf = config.dns_config.as_ref().map(resolv_conf).transpose()?.flatten();
    Ok(Contents { hostname, hosts, resolv_conf })
}

/// As resolvers expect it: loopback in both families, and the pod itself, whose
/// name must resolve also before it has an address, and without one.
pub(super) fn hosts(hostname: &str, addresses: &[IpAddr]) -> String {
    let short = hostname.split('.').next().filter(|s| *s != hostname).map(|s| format!(" {s}")).unwrap_or_default();
    let mut text = "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n"
        .to_owned();
    if addresses.is_empty() {
        let _ = writeln!(text, "127.0.1.1\t{hostname}{short}");
    }
    for address in addresses {
        let _ = writeln!(text, "{address}\t{hostname}{short}");
    }
    text
}

/// Gives a file that [`write`] has made other contents.
pub(super) fn overwrite(path: &Path, content: &[u8]) -> Result<()> {
    let what = || format!("write {}", path.display());
    let nofollow = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let mut file =
        std::fs::OpenOptions::new().write(true).truncate(true).custom_flags(nofollow).open(path).context(what)?;
    file.write_all(content).context(what)
}

/// `None` where nothing is said and the node's file counts.
fn resolv_conf(dns: &DnsConfig) -> Result<Option<String>> {
    let all = [("server", &dns.servers), ("search domain", &dns.searches), ("option", &dns.options)];
    for (what, words) in all {
        if let Some(bad) = words.iter().find(|w| w.is_empty() || w.chars().any(|c| c.is_whitespace() || c.is_control()))
        {
            return Err(Error::invalid(format!("DNS {what} {bad:?} is not one word")));
        }
    }
    if all.iter().flat_map(|(_, words)| words.iter()).map(String::len).sum::<usize>() > LONGEST_DNS {
        return Err(Error::invalid(format!("the DNS configuration is longer than {LONGEST_DNS} bytes")));
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    Ok((!text.is_empty()).then_some(text))
}

/// The node's file, or nothing where there is none; at most 1 MiB of it.
pub(super) fn of_node(path: &Path) -> Result<Vec<u8>> {
    let mut copy = Vec::new();
    match std::fs::File::open(path).and_then(|f| f.take(LONGEST_COPY).read_to_end(&mut copy)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context(|| format!("read {}", path.display())),
        _ => Ok(copy),
    }
}

/// The node's resolv.conf for a pod without a DNS configuration. In a network namespace
/// of its own a pod doesn't reach a resolver on the node's loopback, such as
/// systemd-resolved, which says elsewhere whom it asks itself.
pub(super) fn resolv_conf_of_node(own_net: bool) -> Result<Vec<u8>> {
    resolv_conf_from(Path::new("/etc/resolv.conf"), Path::new("/run/systemd/resolve/resolv.conf"), own_net)
}

fn resolv_conf_from(file: &Path, upstream: &Path, own_net: bool) -> Result<Vec<u8>> {
    let said = of_node(file)?;
    let asked = if own_net && asks_only_itself(&said) { of_node(upstream)? } else { Vec::new() };
    Ok(if asked.is_empty() { said } else { asked })
}

fn asks_only_itself(resolv_conf: &[u8]) -> bool {
    let text = String::from_utf8_lossy(resolv_conf);
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next().and_then(|s| s.parse::<IpAddr>().ok()))
    });
    let servers: Vec<Option<IpAddr>> = servers.collect();
    !servers.is_empty() && servers.iter().all(|s| s.is_some_and(|s| s.is_loopback()))
}

/// Writes a new file, 0644, as the pod's root owns it. Symlinks are not followed:
/// whatever is there already is an error.
pub(super) fn write(path: &Path, content: &[u8], owner: Option<(u32, u32)>) -> Result<()> {
    let what = || format!("write {}", path.display());
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(path).context(what)?;
    file.write_all(content).context(what)?;
    // The umask may have taken bits away.
    file.set_permissions(std::fs::Permissions::from_mode(0o644)).context(what)?;
    if let Some((uid, gid)) = owner {
        std::os::unix::fs::fchown(&file, Some(uid), Some(gid)).context(what)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::plan::PidPlan;
    use super::*;

    fn plan(own: bool) -> NamespacePlan {
        NamespacePlan { net: own, ipc: own, uts: own, pid: PidPlan::Private, user: None, pause: false }
    }

    #[test]
    fn a_resolver_of_the_node_s_loopback_is_passed_over_in_a_network_of_ones_own() {
        let dir = tempfile::tempdir().unwrap();
        let (file, upstream) = (dir.path().join("resolv.conf"), dir.path().join("upstream"));
        let stub = "# systemd\nnameserver 127.0.0.53\noptions edns0\n";
        std::fs::write(&file, stub).unwrap();
        let of = |own| String::from_utf8(resolv_conf_from(&file, &upstream, own).unwrap()).unwrap();
        assert_eq!(of(true), stub, "without systemd-resolved");
        std::fs::write(&upstream, "nameserver 192.0.2.53\n").unwrap();
        assert_eq!((of(true).as_str(), of(false).as_str()), ("nameserver 192.0.2.53\n", stub));
        let both = "nameserver 127.0.0.1\nnameserver 192.0.2.1\n";
        std::fs::write(&file, both).unwrap();
        assert_eq!(of(true), both);
    }

    fn dns(servers: &[&str], searches: &[&str], options: &[&str]) -> DnsConfig {
        let own = |l: &[&str]| l.iter().map(ToString::to_string).collect();
        DnsConfig { servers: own(servers), searches: own(searches), options: own(options) }
    }

    #[test]
    fn resolv_conf_is_what_was_asked_for_or_the_nodes() {
        let text = resolv_conf(&dns(&["10.0.0.1", "fe80::1%eth0"], &["a.b", "c"], &["ndots:5"])).unwrap().unwrap();
        assert_eq!(text, "search a.b c\nnameserver 10.0.0.1\nnameserver fe80::1%eth0\noptions ndots:5\n");
        assert_eq!(resolv_conf(&dns(&[], &[], &[])).unwrap(), None);
    }

    #[test]
    fn no_field_can_add_a_line() {
        for bad in [dns(&["1.1.1.1\nnameserver 6.6.6.6"], &[], &[]), dns(&[], &["a b"], &[]), dns(&[], &[], &["x\r"])] {
            assert!(resolv_conf(&bad).is_err(), "{bad:?}");
        }
        assert!(resolv_conf(&dns(&[], &["x".repeat(LONGEST_DNS).as_str(), "y"], &[])).is_err());
    }

    #[test]
    fn cve_2025_0750_a_host_name_is_no_path() {
        for bad in ["..", "a..b", "a/b", "../x", "a\nb", "-a", ".a", "a.", "é", "a b", &"x".repeat(65)] {
            let config = PodSandboxConfig { hostname: bad.to_string(), ..Default::default() };
            for own in [true, false] {
                assert!(contents(&config, &plan(own), "node").is_err(), "{bad:?}");
            }
        }
    }

    #[test]
    fn the_file_names_the_host_that_the_pod_sees() {
        let config = PodSandboxConfig { hostname: "web-0.svc".into(), ..Default::default() };
        let own = contents(&config, &plan(true), "node").unwrap();
        assert_eq!(own.hostname, "web-0.svc");
        assert!(own.hosts.unwrap().ends_with("127.0.1.1\tweb-0.svc web-0\n"));
        let text = hosts("web-0.svc", &["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()]);
        assert!(text.ends_with("10.0.0.7\tweb-0.svc web-0\nfd00::7\tweb-0.svc web-0\n") && !text.contains("127.0.1.1"));
        let host = contents(&config, &plan(false), "node").unwrap();
        assert_eq!(host, Contents { hostname: "node".into(), hosts: None, resolv_conf: None });
        assert_eq!(contents(&PodSandboxConfig::default(), &plan(true), "node").unwrap().hostname, "node");
    }
}
