//! Pods' networks end to end: Debian's CNI plugins, and scripts in their place for
//! faults that real ones don't have. Each test has a node's network of its own.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{Cri, Daemon, IMAGE, NodeNet, busybox, container, netns, wait_for};
use proto::cri::*;
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testkit::TempRoot;

const BOUND: Duration = Duration::from_secs(30);
/// Where Debian's containernetworking-plugins has them. Others are asked for by hand:
/// `LONGSHORE_TEST_CNI` names the folder of plugins that speak CNI 1.1.
const DEBIAN: &str = "/usr/lib/cni";

fn newer_plugins() -> Option<String> {
    std::env::var("LONGSHORE_TEST_CNI").ok()
}

/// The newest version that the plugins speak.
fn newest() -> &'static str {
    if newer_plugins().is_some() { "1.1.0" } else { "1.0.0" }
}

/// A daemon in a node's network of its own, with CNI's directories in its own.
/// The daemon goes first.
struct World {
    daemon: Daemon,
    cri: Cri,
    net: NodeNet,
    dirs: Dirs,
}

#[derive(Clone)]
struct Dirs {
    conf: PathBuf,
    bin: PathBuf,
    ipam: PathBuf,
}

impl World {
    /// Without any configuration; `config` is more of `[network.cni]`.
    async fn with(config: &str) -> Self {
        Self::mode("cni", config).await
    }

    /// In another mode; `config` is more of `[network.cni]` and what comes after it.
    async fn mode(mode: &str, config: &str) -> Self {
        let root = TempRoot::new();
        let dirs = Dirs { conf: root.join("net.d"), bin: root.join("bin"), ipam: root.join("ipam") };
        std::fs::create_dir(&dirs.bin).unwrap();
        let config = format!(
            "[network]\nmode = {mode:?}\n[network.cni]\nconf_dir = {:?}\nbin_dirs = [{:?}, {:?}]\n{config}\n",
            dirs.conf,
            dirs.bin,
            newer_plugins().unwrap_or_else(|| DEBIAN.into())
        );
        let net = NodeNet::new();
        let daemon = Daemon::in_netns(root, &config, net.path()).await;
        daemon.import(&busybox(), IMAGE);
        let cri = daemon.cri().await;
        Self { daemon, cri, net, dirs }
    }

    /// Puts a configuration there, as tools do: whole.
    fn configure(&self, name: &str, text: &str) {
        let new = self.daemon.dir().join("new-conf");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.dirs.conf.join(name)).unwrap();
        let seen = |log: &str| log.contains(name) || self.info_text().contains(name);
        wait_for("the configuration is seen", BOUND, || seen(&self.daemon.log()));
    }

    fn info_text(&self) -> String {
        let cri = self.cri.clone();
        let asked = async move {
            let answer = cri.runtime.clone().status(StatusRequest { verbose: true }).await.unwrap().into_inner();
            answer.info["info"].clone()
        };
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(asked))
    }

    /// A plugin that is a shell script; its input is in `$input`.
    fn script(&self, name: &str, body: &str) {
        let path = self.dirs.bin.join(name);
        std::fs::write(&path, format!("#!/bin/sh\ninput=$(cat)\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn pod(&self, name: &str) -> PodSandboxConfig {
        let mut config = self.daemon.pod(name);
        let linux = config.linux.as_mut().unwrap();
        let options = linux.security_context.as_mut().unwrap().namespace_options.as_mut().unwrap();
        options.network = NamespaceMode::Pod.into();
        config
    }

    /// A pod with a web server on port 80 that says its name, on both families.
    async fn serve(&self, config: &PodSandboxConfig) -> (String, String) {
        let pod = self.cri.run_pod(config).await.unwrap();
        let name = &config.metadata.as_ref().unwrap().name;
        let script = format!("mkdir -p /www; echo I am {name} >/www/index.html; exec httpd -f -p [::]:80 -h /www");
        let id = self.run(&pod, config, &script).await;
        (pod, id)
    }

    async fn run(&self, pod: &str, config: &PodSandboxConfig, script: &str) -> String {
        let mut c = container("main", IMAGE, &["sh", "-c", script]);
        let options = config.linux.as_ref().unwrap().security_context.as_ref().unwrap().namespace_options.clone();
        c.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options = options;
        self.cri.run(pod, &c, config).await.unwrap()
    }

    async fn addresses(&self, pod: &str) -> Vec<String> {
        let network = self.cri.pod_status(pod).await.unwrap().status.unwrap().network.unwrap();
        let more = network.additional_ips.into_iter().map(|p| p.ip);
        std::iter::once(network.ip).chain(more).filter(|ip| !ip.is_empty()).collect()
    }

    /// What a command in a container prints; it must succeed within the bound.
    async fn must(&self, container: &str, command: &[&str]) -> String {
        let deadline = tokio::time::Instant::now() + BOUND;
        loop {
            let out = self.cri.exec(container, command, 10).await;
            match out {
                Ok(out) if out.exit_code == 0 => return String::from_utf8_lossy(&out.stdout).into_owned(),
                other => assert!(tokio::time::Instant::now() < deadline, "{command:?}: {other:?}"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// What the node fetches from this host and port; it must succeed within the bound.
    fn fetch(&self, at: &str) -> String {
        let url = format!("http://{at}/");
        let mut said = String::new();
        wait_for(&format!("the node fetches {url}"), BOUND, || {
            let out = self.net.run(&["timeout", "5", "busybox", "wget", "-qO-", &url]);
            said = String::from_utf8_lossy(&out.stdout).into_owned();
            out.status.success()
        });
        said
    }

    /// The pods "web" and "other", each with its addresses and a container, and the
    /// node reach each other, both families, by ping and by page.
    async fn reach_each_other(&self, web: (&[String], &str), other: (&[String], &str)) {
        self.must(other.1, &["ping", "-c", "1", &web.0[0]]).await;
        self.must(other.1, &["ping6", "-c", "1", &web.0[1]]).await;
        for at in [web.0[0].clone(), format!("[{}]", web.0[1])] {
            assert_eq!(self.must(other.1, &["wget", "-qO-", &format!("http://{at}/")]).await, "I am web\n");
            assert_eq!(self.fetch(&at), "I am web\n");
        }
        assert_eq!(self.must(web.1, &["wget", "-qO-", &format!("http://{}/", other.0[0])]).await, "I am other\n");
    }

    async fn condition(&self) -> RuntimeCondition {
        let status = self.cri.runtime.clone().status(StatusRequest::default()).await.unwrap().into_inner();
        status.status.unwrap().conditions.into_iter().find(|c| c.r#type == "NetworkReady").unwrap()
    }

    async fn remove(&self, pod: &str) {
        self.cri.stop_pod(pod).await.unwrap();
        self.cri.remove_pod(pod).await.unwrap();
    }

    fn records(&self) -> Vec<String> {
        let dir = std::fs::read_dir(self.daemon.dir().join("root/cni/results")).unwrap();
        dir.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    }

    /// The addresses that host-local has given away.
    fn leases(&self) -> Vec<String> {
        let networks = std::fs::read_dir(&self.dirs.ipam).into_iter().flatten().flatten();
        let files = networks.flat_map(|n| std::fs::read_dir(n.path()).unwrap().flatten());
        let names = files.map(|f| f.file_name().to_string_lossy().into_owned());
        names.filter(|n| n.starts_with(|c: char| c.is_ascii_hexdigit()) && n.contains(['.', ':'])).collect()
    }

    /// No namespace, interface, address, rule or record is left of these pods.
    fn leaves_nothing_of(&self, pods: &[&str], addresses: &[String]) {
        assert_eq!(self.records(), Vec::<String>::new(), "records");
        assert_eq!(self.leases(), Vec::<String>::new(), "leases");
        for pod in pods {
            assert!(!netns(pod).exists(), "a network namespace is left");
        }
        wait_for("links are gone", BOUND, || self.net.links().is_empty());
        let rules = self.net.rules();
        for word in pods.iter().copied().chain(addresses.iter().map(String::as_str)) {
            assert!(!rules.contains(word), "rules of {word} are left:\n{rules}");
        }
    }
}

fn host_local(dirs: &Dirs, ranges: Value) -> Value {
    json!({"type": "host-local", "dataDir": dirs.ipam, "ranges": ranges,
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]})
}

fn dual_stack() -> Value {
    json!([[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77::/64"}]])
}

/// What a node usually has.
fn bridge(dirs: &Dirs) -> Value {
    json!({"cniVersion": newest(), "name": "test", "plugins": [
        {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
            "capabilities": {"ips": true, "mac": true}, "ipam": host_local(dirs, dual_stack())},
        {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
        {"type": "bandwidth", "capabilities": {"bandwidth": true}},
        {"type": "firewall"},
        {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.arp_notify": "1"}},
    ]})
}

fn tcp(host_port: i32, container_port: i32, host_ip: &str) -> PortMapping {
    PortMapping { protocol: Protocol::Tcp.into(), container_port, host_port, host_ip: host_ip.into() }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_on_a_bridge_reach_each_other_and_are_reached() {
    let w = World::with("").await;
    w.configure("10-bridge.conflist", &bridge(&w.dirs).to_string());
    assert!(w.condition().await.status);
    let mut web = w.pod("web");
    web.port_mappings = vec![tcp(8080, 80, ""), tcp(0, 81, ""), tcp(8081, 80, "127.0.0.1")];
    web.annotations.insert("kubernetes.io/ingress-bandwidth".into(), "10M".into());
    web.hostname = "web-host".into();
    let (web_pod, web_id) = w.serve(&web).await;
    let other = w.pod("other");
    let (other_pod, other_id) = w.serve(&other).await;

    let (web_ips, other_ips) = (w.addresses(&web_pod).await, w.addresses(&other_pod).await);
    for ips in [&web_ips, &other_ips] {
        assert!(ips.len() == 2 && ips[0].starts_with("10.77.0.") && ips[1].starts_with("fd77::"), "{ips:?}");
    }
    w.reach_each_other((&web_ips, &web_id), (&other_ips, &other_id)).await;
    // The node's ports, on its loopback and its own addresses.
    for at in ["127.0.0.1:8080", "10.77.0.1:8080", "[fd77::1]:8080", "127.0.0.1:8081"] {
        assert_eq!(w.fetch(at), "I am web\n", "{at}");
    }
    // What CRI and people are told.
    let info: Value = serde_json::from_str(&w.cri.pod_status(&web_pod).await.unwrap().info["info"]).unwrap();
    assert_eq!(info["cniResult"]["ips"].as_array().unwrap().len(), 2, "{info}");
    assert_eq!(info["network"]["networks"][0]["network"], "test");
    let hosts = w.must(&web_id, &["cat", "/etc/hosts"]).await;
    assert!(hosts.contains(&format!("{}\tweb-host\n", web_ips[0])), "{hosts}");
    let (code, timeline, _) = w.daemon.cli(&["timeline", &web_pod]);
    assert!(code == 0 && timeline.contains("network"), "{timeline}");
    // The link that bandwidth is limited on.
    assert!(w.net.must(&["tc", "qdisc", "show"]).contains("tbf"), "a limit is set");
    assert_eq!(w.records().len(), 2);

    // Another pod in the node's network has no address of its own.
    let host = w.daemon.pod("host");
    let host_pod = w.cri.run_pod(&host).await.unwrap();
    assert_eq!(w.addresses(&host_pod).await, Vec::<String>::new());

    w.cri.stop_pod(&web_pod).await.unwrap();
    w.cri.stop_pod(&web_pod).await.unwrap();
    assert_eq!(w.addresses(&web_pod).await, Vec::<String>::new(), "a stopped pod has none");
    for pod in [&web_pod, &other_pod, &host_pod] {
        w.remove(pod).await;
    }
    w.leaves_nothing_of(&[&web_pod, &other_pod], &[web_ips, other_ips].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_can_be_asked_for() {
    let w = World::with("").await;
    w.configure("10-bridge.conflist", &bridge(&w.dirs).to_string());
    let mut config = w.pod("fixed");
    config.annotations.insert("io.longshore.network/ips".into(), "10.77.0.77, fd77::77".into());
    config.annotations.insert("io.longshore.network/mac".into(), "02:00:00:00:77:77".into());
    let pod = w.cri.run_pod(&config).await.unwrap();
    assert_eq!(w.addresses(&pod).await, ["10.77.0.77", "fd77::77"]);
    let id = w.run(&pod, &config, "sleep 1000").await;
    assert!(w.must(&id, &["ip", "link", "show", "eth0"]).await.contains("02:00:00:00:77:77"));
    // The same ones again are refused by their name, and cost nothing.
    let mut twice = w.pod("twice");
    twice.annotations.clone_from(&config.annotations);
    let e = w.cri.run_pod(&twice).await.unwrap_err();
    assert!(e.message().contains("10.77.0.77") && e.message().contains("bridge"), "{e}");
    assert_eq!((w.records().len(), w.net.links().len()), (1, 1));
    twice.annotations.insert("io.longshore.network/mac".into(), "nonsense".into());
    assert_eq!(w.cri.run_pod(&twice).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    w.remove(&pod).await;
    w.leaves_nothing_of(&[&pod], &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_plugins_and_versions_attach_too() {
    let w = World::with("networks = [\"ptp\", \"mac\"]").await;
    // The parent of macvlan; the other end of the link stands for the world outside.
    w.net.must(&["ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1"]);
    w.net.must(&["ip", "link", "set", "up0", "up"]);
    w.net.must(&["ip", "link", "set", "up1", "up"]);
    let links = w.net.links();
    // One plugin without a list, and an old version.
    let ptp = json!({"cniVersion": "0.3.1", "name": "ptp", "type": "ptp", "ipMasq": true,
        "ipam": host_local(&w.dirs, dual_stack())});
    w.configure("20-ptp.conf", &ptp.to_string());
    let missing = w.condition().await;
    assert!(!missing.status && missing.message.contains("network mac is not configured"), "{missing:?}");
    let macvlan = json!({"cniVersion": "0.4.0", "name": "mac", "plugins": [{"type": "macvlan", "master": "up0",
        "ipam": host_local(&w.dirs, json!([[{"subnet": "10.78.0.0/24"}]]))}]});
    w.configure("10-mac.conflist", &macvlan.to_string());
    assert!(w.condition().await.status);
    let (a, b) = (w.pod("a"), w.pod("b"));
    let ((pod_a, id_a), (pod_b, _)) = (w.serve(&a).await, w.serve(&b).await);
    // The first network of the list is the pod's own.
    let ips = w.addresses(&pod_b).await;
    assert!(ips.len() == 2 && ips[0].starts_with("10.77.0."), "{ips:?}");
    assert_eq!(w.must(&id_a, &["wget", "-qO-", &format!("http://{}/", ips[0])]).await, "I am b\n");
    assert_eq!(w.must(&id_a, &["wget", "-qO-", &format!("http://[{}]/", ips[1])]).await, "I am b\n");
    let info: Value = serde_json::from_str(&w.cri.pod_status(&pod_b).await.unwrap().info["info"]).unwrap();
    let second = &info["network"]["networks"][1];
    assert_eq!((&second["network"], &second["interface"]), (&json!("mac"), &json!("eth1")));
    let address = second["attachment"]["addresses"][0].as_str().unwrap().split('/').next().unwrap();
    assert_eq!(w.must(&id_a, &["wget", "-qO-", &format!("http://{address}/")]).await, "I am b\n");
    w.remove(&pod_a).await;
    w.remove(&pod_b).await;
    assert_eq!((w.records().len(), w.leases().len()), (0, 0));
    wait_for("the pods' links are gone", BOUND, || w.net.links() == links);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_fails_is_named_and_costs_nothing() {
    let w = World::with("plugin_timeout = 10").await;
    let chain = |last: Value| {
        let first = bridge(&w.dirs)["plugins"][0].clone();
        json!({"cniVersion": "1.0.0", "name": "test", "plugins": [first, last]}).to_string()
    };
    // On ADD alone: what DEL finds is the same for all.
    let fails = |body: &str| format!("[ $CNI_COMMAND = ADD ] || exit 0\n{body}");
    w.script("json", &fails(r#"echo because >&2; echo '{"code":7,"msg":"wrong colour","details":"blue"}'; exit 1"#));
    w.script("garbage", &fails("echo '<html>'"));
    w.script("rubbish", &fails("echo nonsense; exit 3"));
    w.script("hangs", &fails("sleep 1000"));
    let cases = [
        ("missing", tonic::Code::FailedPrecondition, &["plugin missing is not installed", "bin_dirs"][..]),
        ("json", tonic::Code::Internal, &["ADD by the CNI plugin json", "wrong colour: blue (code 7)", "because"]),
        ("garbage", tonic::Code::Internal, &["garbage", "<html>", "no result"]),
        ("rubbish", tonic::Code::Internal, &["rubbish", "exit status: 3", "nonsense"]),
        ("hangs", tonic::Code::DeadlineExceeded, &["hangs", "took longer than 10 s and was killed"]),
    ];
    for (n, (plugin, code, words)) in cases.into_iter().enumerate() {
        w.configure("10-test.conflist", &chain(json!({"type": plugin})));
        wait_for("it is in use", BOUND, || w.info_text().contains(&format!("\"type\":\"{plugin}\"")));
        let e = w.cri.run_pod(&w.pod(&format!("p{n}"))).await.unwrap_err();
        assert_eq!(e.code(), code, "{plugin}: {e}");
        for word in words {
            assert!(e.message().contains(word), "{plugin}: {word:?} is not in {e}");
        }
        assert_eq!(w.cri.pods().await.unwrap(), Vec::<String>::new());
        w.leaves_nothing_of(&[], &["10.77.0.".into()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_says_that_a_pod_waits_for_its_network() {
    let w = World::with("").await;
    let go = w.daemon.dir().join("go");
    w.script("waits", &format!("while [ ! -e {} ]; do sleep 0.05; done; echo '{{}}'", go.display()));
    let chain = json!({"cniVersion": "1.0.0", "name": "test", "plugins": [{"type": "waits"}]});
    w.configure("10-test.conflist", &chain.to_string());
    wait_for("it is in use", BOUND, || w.info_text().contains("\"type\":\"waits\""));
    let made = tokio::spawn({
        let (cri, config) = (w.cri.clone(), w.pod("p"));
        async move { cri.run_pod(&config).await }
    });
    wait_for("doctor says so", BOUND, || {
        let (_, findings) = w.daemon.doctor(&w.daemon.state(), &[]);
        let all: Vec<_> = findings.iter().map(|f| f["found"].as_str().unwrap()).collect();
        all.iter().any(|f| f.contains("RunPodSandbox of pod ") && f.contains("which waits for network ("))
    });
    std::fs::write(&go, "").unwrap();
    // Its answer has no address, which is no network; what was waited for has ended.
    if let Ok(pod) = made.await.unwrap() {
        w.remove(&pod).await;
    }
    w.leaves_nothing_of(&[], &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn dhcp_without_its_daemon_is_a_clear_error() {
    let w = World::with("").await;
    w.configure(
        "10-dhcp.conflist",
        &json!({"cniVersion": "1.0.0", "name": "test", "plugins": [
            {"type": "bridge", "bridge": "cni0", "ipam": {"type": "dhcp"}}]})
        .to_string(),
    );
    let e = w.cri.run_pod(&w.pod("p")).await.unwrap_err();
    assert!(e.message().contains("/run/cni/dhcp.sock"), "{e}");
    // DEL needs that daemon too. The pod is gone for everybody else; its record stays,
    // for DEL to be tried again.
    assert_eq!(w.cri.pods().await.unwrap(), Vec::<String>::new());
    wait_for("its link went with its namespace", BOUND, || w.net.links().is_empty());
    for name in w.records() {
        std::fs::remove_file(w.daemon.dir().join("root/cni/results").join(name)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_is_exhausted_is_a_clear_error() {
    let w = World::with("").await;
    let mut conf = bridge(&w.dirs);
    conf["plugins"][0]["ipam"] = host_local(&w.dirs, json!([[{"subnet": "10.77.0.0/29"}]]));
    w.configure("10-bridge.conflist", &conf.to_string());
    let mut pods = Vec::new();
    for n in 0..5 {
        pods.push(w.cri.run_pod(&w.pod(&format!("p{n}"))).await.unwrap());
    }
    let e = w.cri.run_pod(&w.pod("p5")).await.unwrap_err();
    assert!(e.message().contains("no IP addresses available in range set"), "{e}");
    assert_eq!((w.records().len(), w.leases().len(), w.net.links().len()), (5, 5, 5));
    w.remove(&pods.remove(0)).await;
    pods.push(w.cri.run_pod(&w.pod("p5")).await.unwrap());
    for pod in &pods {
        w.remove(pod).await;
    }
    let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
    w.leaves_nothing_of(&pods, &["10.77.0.".into()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_between_add_and_store_leaves_nothing() {
    let mut w = World::with("").await;
    // After the bridge has attached the pod: says so, and waits to be killed.
    let mark = w.daemon.dir().join("adding");
    let slow =
        format!("[ $CNI_COMMAND = ADD ] || exit 0\necho $$ >{0}.new; mv {0}.new {0}; sleep 1000", mark.display());
    w.script("slow", &slow);
    let mut conf = bridge(&w.dirs);
    conf["plugins"].as_array_mut().unwrap().push(json!({"type": "slow"}));
    w.configure("10-bridge.conflist", &conf.to_string());
    let mut config = w.pod("half");
    config.port_mappings = vec![tcp(8080, 80, "")];
    let call = tokio::spawn({
        let cri = w.cri.clone();
        async move { cri.run_pod(&config).await }
    });
    wait_for("ADD is under way", BOUND, || mark.exists());
    assert_eq!((w.records().len(), w.leases().len(), w.net.links().len()), (1, 2, 1));
    let pod = w.records()[0].split('-').nth(1).unwrap().to_string();
    assert!(netns(&pod).exists() && w.net.rules().contains(&pod));
    w.daemon.kill();
    assert!(call.await.unwrap().is_err());
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    assert_eq!(w.cri.pods().await.unwrap(), Vec::<String>::new());
    w.leaves_nothing_of(&[&pod], &["10.77.0.2".into(), "fd77::2".into()]);
    let plugin: u32 = std::fs::read_to_string(&mark).unwrap().trim().parse().unwrap();
    wait_for("the plugin is dead", BOUND, || longshore_tests::command_line(plugin).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_outlive_the_daemon_and_a_reboot_frees_them() {
    let mut w = World::with("").await;
    w.configure("10-bridge.conflist", &bridge(&w.dirs).to_string());
    let config = w.pod("web");
    let (pod, _) = w.serve(&config).await;
    let ips = w.addresses(&pod).await;
    // The configuration goes meanwhile: DEL is asked for by what was recorded.
    std::fs::remove_file(w.dirs.conf.join("10-bridge.conflist")).unwrap();
    w.daemon.kill();
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    assert_eq!(w.addresses(&pod).await, ips, "the pod is attached as before");
    assert_eq!(w.fetch(&ips[0]), "I am web\n");
    let condition = w.condition().await;
    assert!(!condition.status && condition.message.contains("no CNI network is configured"), "{condition:?}");
    let e = w.cri.run_pod(&w.pod("new")).await.unwrap_err();
    assert_eq!(e.code(), tonic::Code::FailedPrecondition, "{e}");
    // A restart of the node, as a node that is a container has it.
    w.daemon.kill();
    std::fs::remove_file(w.daemon.state().join("up")).unwrap();
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    assert_eq!(w.addresses(&pod).await, Vec::<String>::new());
    w.leaves_nothing_of(&[&pod], &ips);
    w.remove(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_of_the_node_plugins_are_told_of_no_namespace() {
    let mut w = World::with("").await;
    let calls = w.daemon.dir().join("calls");
    w.script(
        "teller",
        &format!(
            "echo \"$CNI_COMMAND $CNI_CONTAINERID netns=$CNI_NETNS\" >>{}\n\
             [ $CNI_COMMAND = ADD ] && echo '{{\"cniVersion\":\"1.0.0\",\"ips\":[{{\"address\":\"10.9.9.9/24\"}}]}}'\nexit 0",
            calls.display()
        ),
    );
    w.configure("10-teller.conflist", r#"{"cniVersion":"1.0.0","name":"teller","plugins":[{"type":"teller"}]}"#);
    let pod = w.cri.run_pod(&w.pod("p")).await.unwrap();
    w.daemon.kill();
    // As the end of a node: no process, no mount, no state; and another boot id.
    let shims = w.daemon.shims();
    shims.iter().for_each(|s| longshore_tests::signal(*s, rustix::process::Signal::KILL));
    wait_for("the shims are dead", BOUND, || w.daemon.shims().is_empty());
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let (state, pin) = (w.daemon.state(), netns(&pod));
    let mut mounts: Vec<&str> = table.lines().filter_map(|l| l.split(' ').nth(4)).collect();
    mounts.retain(|m| Path::new(m).starts_with(&state) || Path::new(m) == pin);
    for mount in mounts.into_iter().rev() {
        rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
    std::fs::remove_file(&pin).unwrap();
    std::fs::remove_dir_all(&state).unwrap();
    w.daemon.sql("UPDATE meta SET value = 'another' WHERE key = 'boot_id'");
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    let said = std::fs::read_to_string(&calls).unwrap();
    let last = said.lines().last().unwrap();
    assert_eq!(last, format!("DEL {pod} netns="), "{said}");
    assert_eq!(w.records().len(), 0);
    let status = w.cri.pod_status(&pod).await.unwrap().status.unwrap();
    assert_eq!(status.state(), PodSandboxState::SandboxNotready);
    w.remove(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_record_keeps_no_pod_from_going() {
    let w = World::with("").await;
    w.configure("10-bridge.conflist", &bridge(&w.dirs).to_string());
    let pod = w.cri.run_pod(&w.pod("p")).await.unwrap();
    let record = w.daemon.dir().join("root/cni/results").join(&w.records()[0]);
    // As a loss of power leaves a file whose name came to the disk before its content.
    std::fs::write(&record, "").unwrap();
    w.remove(&pod).await;
    let bad = format!("test-{pod}-eth0.bad");
    assert_eq!((w.records(), w.leases()), (vec![bad.clone()], Vec::new()));
    assert!(!netns(&pod).exists());
    std::fs::remove_file(record.with_file_name(bad)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detachment_that_hangs_keeps_no_daemon_from_its_start() {
    let mut w = World::with("").await;
    let (hang, calls) = (w.daemon.dir().join("hang"), w.daemon.dir().join("calls"));
    w.script(
        "sleepy",
        &format!(
            "if [ $CNI_COMMAND = DEL ]; then [ -e {} ] && exec sleep 600; echo DEL >>{}; fi\n\
             [ $CNI_COMMAND = ADD ] && echo '{{\"cniVersion\":\"1.0.0\",\"ips\":[{{\"address\":\"10.9.9.9/24\"}}]}}'\nexit 0",
            hang.display(),
            calls.display()
        ),
    );
    w.configure("10-sleepy.conflist", r#"{"cniVersion":"1.0.0","name":"sleepy","plugins":[{"type":"sleepy"}]}"#);
    let pod = w.cri.run_pod(&w.pod("p")).await.unwrap();
    w.daemon.kill();
    std::fs::write(&hang, "").unwrap();
    w.daemon.sql("UPDATE meta SET value = 'another' WHERE key = 'boot_id'");
    let begun = std::time::Instant::now();
    w.daemon.begin().await;
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(30), "it went on after 10 s, plus 5 s for GC: {took:?}");
    w.cri = w.daemon.cri().await;
    let status = w.cri.pod_status(&pod).await.unwrap().status.unwrap();
    assert_eq!(status.state(), PodSandboxState::SandboxNotready);
    assert_eq!(w.records().len(), 1, "it is still attached");
    std::fs::remove_file(&hang).unwrap();
    wait_for("it is detached", 4 * BOUND, || calls.exists() && w.records().is_empty());
    w.remove(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detachment_that_fails_is_tried_again() {
    let w = World::with("").await;
    let broken = w.daemon.dir().join("broken");
    w.script(
        "picky",
        &format!(
            "if [ $CNI_COMMAND = DEL ] && [ -e {} ]; then echo '{{\"code\":11,\"msg\":\"not now\"}}'; exit 1; fi\n\
         [ $CNI_COMMAND = ADD ] && echo \"$input\" | sed 's/.*\"prevResult\":\\({{.*}}\\),\"type.*/\\1/'\nexit 0",
            broken.display()
        ),
    );
    let mut conf = bridge(&w.dirs);
    conf["plugins"] = json!([conf["plugins"][0], {"type": "picky"}]);
    w.configure("10-bridge.conflist", &conf.to_string());
    let config = w.pod("p");
    let pod = w.cri.run_pod(&config).await.unwrap();
    std::fs::write(&broken, "").unwrap();
    let e = w.cri.stop_pod(&pod).await.unwrap_err();
    assert!(e.message().contains("DEL by the CNI plugin picky") && e.message().contains("not now"), "{e}");
    assert!(netns(&pod).exists(), "its namespace stays for the next time");
    assert_eq!((w.records().len(), w.leases().len()), (1, 0), "the other plugins were reached");
    assert!(w.cri.remove_pod(&pod).await.is_err());
    std::fs::remove_file(&broken).unwrap();
    w.remove(&pod).await;
    w.leaves_nothing_of(&[&pod], &["10.77.0.2".into()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_breaks_leaves_the_old_one_in_use() {
    let w = World::with("").await;
    let none = w.condition().await;
    assert!(!none.status && none.message.contains("no CNI network is configured"), "{none:?}");
    w.configure("10-bridge.conflist", &bridge(&w.dirs).to_string());
    assert!(w.condition().await.status);
    std::fs::write(w.dirs.conf.join("10-bridge.conflist"), "{\"cniVersion\":").unwrap();
    wait_for("the complaint", BOUND, || w.daemon.log().contains("stays in use"));
    let condition = w.condition().await;
    assert!(condition.status, "{condition:?}");
    assert_eq!(condition.reason, "BrokenNetworkConfiguration");
    assert!(condition.message.contains("10-bridge.conflist"), "{condition:?}");
    let pod = w.cri.run_pod(&w.pod("p")).await.unwrap();
    assert_eq!(w.addresses(&pod).await.len(), 2);
    w.remove(&pod).await;
    std::fs::remove_file(w.dirs.conf.join("10-bridge.conflist")).unwrap();
    wait_for("it is gone", BOUND, || !w.info_text().contains("10-bridge"));
    assert!(!w.condition().await.status);
}

#[tokio::test(flavor = "multi_thread")]
async fn newer_plugins_are_asked_for_status_and_gc() {
    let mut w = World::with("").await;
    let (log, sick) = (w.daemon.dir().join("calls"), w.daemon.dir().join("sick"));
    w.script(
        "new",
        &format!(
            "echo \"$CNI_COMMAND $CNI_CONTAINERID $input\" >>{0}\n\
         case $CNI_COMMAND in\n\
         ADD) echo '{{\"cniVersion\":\"1.1.0\",\"interfaces\":[{{\"name\":\"eth0\",\"sandbox\":\"/x\",\"mtu\":1400}}],\
         \"ips\":[{{\"address\":\"10.9.9.9/24\",\"interface\":0}}]}}' ;;\n\
         STATUS|CHECK) [ ! -e {1} ] || {{ echo '{{\"code\":50,\"msg\":\"out of colours\"}}'; exit 1; }} ;;\n\
         esac",
            log.display(),
            sick.display()
        ),
    );
    let conf = json!({"cniVersion": "0.4.0", "cniVersions": ["1.0.0", "1.1.0"], "name": "test",
        "plugins": [{"type": "new"}]});
    w.configure("10-new.conflist", &conf.to_string());
    let calls = |verb: &str| -> Vec<String> {
        let all = std::fs::read_to_string(&log).unwrap_or_default();
        all.lines().filter(|l| l.starts_with(verb)).map(str::to_string).collect()
    };
    assert!(w.condition().await.status);
    assert!(!calls("STATUS").is_empty());
    std::fs::write(&sick, "").unwrap();
    let mut last = w.condition().await;
    let deadline = tokio::time::Instant::now() + BOUND;
    while last.status {
        assert!(tokio::time::Instant::now() < deadline, "{last:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
        last = w.condition().await;
    }
    assert!(
        last.message.contains("STATUS by the CNI plugin new") && last.message.contains("out of colours"),
        "{last:?}"
    );
    let pod = w.cri.run_pod(&w.pod("p")).await.unwrap();
    assert_eq!(w.addresses(&pod).await, ["10.9.9.9"]);
    std::fs::remove_file(&sick).unwrap();
    let add = calls("ADD").pop().unwrap();
    assert!(add.contains(&pod) && add.contains("\"cniVersion\":\"1.1.0\""), "{add}");
    w.daemon.kill();
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    let gc = calls("GC").pop().unwrap();
    let (_, input) = gc.split_once("  ").unwrap();
    let input: Value = serde_json::from_str(input).unwrap();
    assert_eq!(input["cni.dev/valid-attachments"], json!([{"containerID": pod, "ifname": "eth0"}]));
    wait_for("it is asked whether the pod's network is as it was", BOUND, || calls("CHECK").len() == 1);
    assert!(calls("CHECK")[0].contains(&pod) && calls("CHECK")[0].contains("\"prevResult\":"));
    assert_eq!(w.condition().await.reason, "");
    // What CHECK finds is told, and nothing else follows from it.
    std::fs::write(&sick, "").unwrap();
    w.daemon.kill();
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    wait_for("the finding is logged", BOUND, || w.daemon.log().contains("CHECK by the CNI plugin new"));
    std::fs::remove_file(&sick).unwrap();
    let deadline = tokio::time::Instant::now() + BOUND;
    let mut told = w.condition().await;
    while !(told.status && told.reason == "PodNetworkAmiss") {
        assert!(tokio::time::Instant::now() < deadline, "{told:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
        told = w.condition().await;
    }
    assert!(told.message.contains(&pod[..12]) && told.message.contains("out of colours"), "{told:?}");
    let state = w.daemon.state();
    let (_, found, _) = w.daemon.cli(&["doctor", "--state", state.to_str().unwrap()]);
    assert!(found.contains("PodNetworkAmiss") && found.contains("out of colours"), "{found}");
    assert_eq!(w.addresses(&pod).await, ["10.9.9.9"], "the pod is left alone");
    w.remove(&pod).await;
    assert_eq!(w.condition().await.reason, "", "what is gone is not amiss");
    let del = calls("DEL").pop().unwrap();
    assert!(del.contains("prevResult") && del.contains("10.9.9.9"), "{del}");
}

/// Real plugins by their CHECK; with `LONGSHORE_TEST_CNI` also by STATUS and GC, though
/// none of them does anything on GC yet.
#[tokio::test(flavor = "multi_thread")]
async fn plugins_find_what_is_amiss_and_nothing_else() {
    let mut w = World::with("").await;
    let mut conf = bridge(&w.dirs);
    if newer_plugins().is_none() {
        // CHECK of portmap 1.1.1 looks for rules of IPv4 in ip6tables, that of bandwidth
        // panics where there is no limit.
        conf["plugins"].as_array_mut().unwrap().drain(1..3);
    }
    w.configure("10-bridge.conflist", &conf.to_string());
    let mut web = w.pod("web");
    web.port_mappings = vec![tcp(8080, 80, "")];
    let (pod, _) = w.serve(&web).await;
    w.daemon.kill();
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    wait_for("CHECK was asked", BOUND, || w.daemon.log().contains("the networks of 1 pods were looked at"));
    let condition = w.condition().await;
    assert!(condition.status && condition.reason.is_empty(), "{condition:?}");
    assert_eq!(w.fetch("127.0.0.1:8080"), "I am web\n");
    w.net.must(&["ip", "link", "del", &w.net.links().pop_first().unwrap()]);
    w.daemon.kill();
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    wait_for("CHECK was asked again", BOUND, || w.daemon.log().contains("1 pods were looked at, 1 are amiss"));
    let condition = w.condition().await;
    assert!(condition.status && condition.reason == "PodNetworkAmiss", "{condition:?}");
    w.remove(&pod).await;
    assert_eq!(w.condition().await.reason, "");
    // Rules are left: without the link the plugin doesn't know whom it masqueraded.
    assert_eq!((w.records().len(), w.leases().len()), (0, 0));
}

/// The built-in network with the ranges that the other tests have.
const BUILTIN: &str = "[network.builtin]\nranges = [\"10.77.0.0/24\", \"fd77::/64\"]";

#[tokio::test(flavor = "multi_thread")]
async fn the_built_in_network_does_what_plugins_do() {
    // No configuration of plugins: the daemon does it itself.
    let mut w = World::mode("auto", BUILTIN).await;
    assert!(w.condition().await.status);
    let mut web = w.pod("web");
    web.port_mappings = vec![tcp(8080, 80, ""), tcp(0, 81, ""), tcp(8081, 80, "127.0.0.1")];
    web.annotations.insert("kubernetes.io/egress-bandwidth".into(), "10M".into());
    web.annotations.insert("io.longshore.network/ips".into(), "10.77.0.50".into());
    let (web_pod, web_id) = w.serve(&web).await;
    let (other_pod, other_id) = w.serve(&w.pod("other")).await;
    let (web_ips, other_ips) = (w.addresses(&web_pod).await, w.addresses(&other_pod).await);
    assert_eq!((web_ips[0].as_str(), web_ips.len(), other_ips.len()), ("10.77.0.50", 2, 2));
    w.reach_each_other((&web_ips, &web_id), (&other_ips, &other_id)).await;
    let ports = ["127.0.0.1:8080", "10.77.0.1:8080", "[fd77::1]:8080", "127.0.0.1:8081"];
    for at in ports {
        assert_eq!(w.fetch(at), "I am web\n", "{at}");
    }
    // From a pod by the node's port, to another pod and to itself.
    for id in [&other_id, &web_id] {
        assert_eq!(w.must(id, &["wget", "-qO-", "http://10.77.0.1:8080/"]).await, "I am web\n");
    }
    let mut taken = w.pod("taken");
    taken.port_mappings = vec![tcp(8080, 8080, "")];
    let e = w.cri.run_pod(&taken).await.unwrap_err();
    assert!(e.code() == tonic::Code::AlreadyExists && e.message().contains("8080"), "{e}");
    // All of it outlives the daemon.
    w.daemon.kill();
    assert_eq!(w.fetch(ports[0]), "I am web\n");
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    assert_eq!((w.addresses(&web_pod).await, w.fetch(ports[0])), (web_ips.clone(), "I am web\n".into()));
    for pod in [&web_pod, &other_pod] {
        w.remove(pod).await;
    }
    w.leaves_nothing_of(&[&web_pod, &other_pod], &[web_ips, other_ips].concat());
    w.daemon.terminate();
    let links = w.net.must(&["ip", "-br", "link", "show"]);
    assert!(!links.contains("longshore0") && !w.net.rules().contains("longshore"), "{links}{}", w.net.rules());
}

async fn tell_pod_cidr(w: &World, cidr: &str) -> Result<(), tonic::Status> {
    let network_config = Some(NetworkConfig { pod_cidr: cidr.into() });
    let request = UpdateRuntimeConfigRequest { runtime_config: Some(RuntimeConfig { network_config }) };
    w.cri.runtime.clone().update_runtime_config(request).await.map(drop)
}

/// A kubelet tells the pod CIDR once, and neither again nor to a daemon that is started
/// anew.
#[tokio::test(flavor = "multi_thread")]
async fn the_pod_cidr_is_the_range_where_none_is_configured() {
    let mut w = World::mode("builtin", "").await;
    let (early, early_id) = w.serve(&w.pod("early")).await;
    let early_ips = w.addresses(&early).await;
    assert!(early_ips[0].starts_with("10.85.0.") && early_ips.len() == 2, "{early_ips:?}");
    for bad in ["10.66.0.0", "10.66.0.0/33", "10.66.0.0/31"] {
        let e = tell_pod_cidr(&w, bad).await.unwrap_err();
        assert!(e.code() == tonic::Code::InvalidArgument && e.message().contains("pod CIDR"), "{bad}: {e}");
    }
    tell_pod_cidr(&w, "").await.unwrap();
    tell_pod_cidr(&w, "10.66.0.0/24,fd66::/64").await.unwrap();
    let (late, late_id) = w.serve(&w.pod("late")).await;
    let late_ips = w.addresses(&late).await;
    assert_eq!(late_ips, ["10.66.0.2", "fd66::2"]);
    // Those that have addresses of the former ranges keep them, and are reached.
    for ips in [&early_ips, &late_ips] {
        assert!(w.fetch(&ips[0]).starts_with("I am"));
    }
    assert_eq!(w.must(&late_id, &["wget", "-qO-", &format!("http://{}/", early_ips[0])]).await, "I am early\n");
    assert_eq!(w.must(&early_id, &["wget", "-qO-", &format!("http://{}/", late_ips[0])]).await, "I am late\n");
    w.daemon.kill();
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    let again = w.cri.run_pod(&w.pod("again")).await.unwrap();
    assert_eq!(w.addresses(&again).await, ["10.66.0.3", "fd66::3"]);
    assert!(w.info_text().contains("10.66.0.0/24"));
    // Link by link, as they were made.
    assert_eq!(w.condition().await.reason, "");
    let link = w.net.links().pop_first().unwrap();
    w.net.must(&["ip", "link", "set", &link, "down"]);
    w.daemon.kill();
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    wait_for("it is seen", BOUND, || w.daemon.log().contains(&format!("its interface {link} is down")));
    for pod in [&early, &late, &again] {
        w.remove(pod).await;
    }
    w.leaves_nothing_of(&[&early, &late, &again], &[early_ips, late_ips].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_that_ask_for_ranges_are_told_the_pod_cidr() {
    let w = World::with("").await;
    let conf = json!({"cniVersion": newest(), "name": "test", "plugins": [
        {"type": "bridge", "bridge": "cni0", "isGateway": true, "capabilities": {"ipRanges": true},
            "ipam": {"type": "host-local", "dataDir": w.dirs.ipam}}]});
    w.configure("10-bridge.conflist", &conf.to_string());
    tell_pod_cidr(&w, "10.66.0.0/24,fd66::/64").await.unwrap();
    let pod = w.cri.run_pod(&w.pod("p")).await.unwrap();
    assert_eq!(w.addresses(&pod).await, ["10.66.0.2", "fd66::2"]);
    w.remove(&pod).await;
    w.leaves_nothing_of(&[&pod], &[]);
}

/// As a restart of the node's firewall does it: no pod is made or removed meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn rules_that_somebody_flushed_come_back_by_themselves() {
    let mut w = World::mode("builtin", BUILTIN).await;
    let mut web = w.pod("web");
    web.port_mappings = vec![tcp(8080, 80, "")];
    let (pod, _) = w.serve(&web).await;
    let before = w.net.must(&["nft", "list", "ruleset"]);
    let flushed = |w: &World, command: &[&str]| {
        w.net.must(command);
        wait_for("the rules are back", BOUND, || w.net.must(&["nft", "list", "ruleset"]) == before);
        assert_eq!(w.fetch("127.0.0.1:8080"), "I am web\n");
    };
    flushed(&w, &["nft", "flush", "ruleset"]);
    flushed(&w, &["nft", "flush", "table", "inet", "longshore"]);
    // A daemon that was started again watches them too.
    w.daemon.kill();
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    flushed(&w, &["nft", "delete", "table", "inet", "longshore"]);
    assert!(w.daemon.log().contains("somebody else changed the nftables table"));
    w.remove(&pod).await;
    w.daemon.terminate();
    assert!(!w.net.rules().contains("longshore"), "its own removal brings nothing back");
}

#[tokio::test(flavor = "multi_thread")]
async fn host_ports_work_without_a_plugin_for_them() {
    let w = World::mode("auto", BUILTIN).await;
    let mut conf = bridge(&w.dirs);
    conf["plugins"].as_array_mut().unwrap().truncate(1);
    w.configure("10-bridge.conflist", &conf.to_string());
    let mut web = w.pod("web");
    web.port_mappings = vec![tcp(8080, 80, "")];
    let (pod, _) = w.serve(&web).await;
    assert_eq!(w.records().len(), 1, "it is attached by plugins");
    let ips = w.addresses(&pod).await;
    for at in ["127.0.0.1:8080", "10.77.0.1:8080", "[fd77::1]:8080"] {
        assert_eq!(w.fetch(at), "I am web\n", "{at}");
    }
    w.remove(&pod).await;
    w.leaves_nothing_of(&[&pod], &ips);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_built_in_network_leaves_nothing_either() {
    let config = "[network.builtin]\nranges = [\"10.77.0.0/29\"]";
    let mut w = World::mode("builtin", config).await;
    let mut pods = Vec::new();
    for n in 0..5 {
        pods.push(w.cri.run_pod(&w.pod(&format!("p{n}"))).await.unwrap());
    }
    let e = w.cri.run_pod(&w.pod("p5")).await.unwrap_err();
    assert!(e.code() == tonic::Code::ResourceExhausted && e.message().contains("10.77.0.0/29"), "{e}");
    assert_eq!(w.net.links().len(), 5);
    w.remove(&pods.remove(0)).await;
    pods.push(w.cri.run_pod(&w.pod("p6")).await.unwrap());
    // Killed while pods are made and removed: what is in the database is right.
    let calls: Vec<_> = (10..14)
        .map(|n| {
            let (cri, config) = (w.cri.clone(), w.pod(&format!("p{n}")));
            tokio::spawn(async move { cri.run_pod(&config).await })
        })
        .collect();
    let gone = pods.remove(0);
    let stop = tokio::spawn({
        let (cri, gone) = (w.cri.clone(), gone.clone());
        async move { cri.stop_pod(&gone).await }
    });
    tokio::time::sleep(Duration::from_millis(30)).await;
    w.daemon.kill();
    for call in calls {
        let _ = call.await.unwrap();
    }
    let _ = stop.await.unwrap();
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    for pod in w.cri.pods().await.unwrap() {
        w.remove(&pod).await;
    }
    // The range itself stays, for masquerade.
    let all: Vec<String> = (2..7).map(|n| format!("10.77.0.{n}")).collect();
    w.leaves_nothing_of(&[&gone], &all);
    w.cri.run_pod(&w.pod("again")).await.unwrap();
    // A restart of the node.
    w.daemon.kill();
    std::fs::remove_file(w.daemon.state().join("up")).unwrap();
    w.daemon.begin().await;
    w.cri = w.daemon.cri().await;
    w.leaves_nothing_of(&[], &all);
}
