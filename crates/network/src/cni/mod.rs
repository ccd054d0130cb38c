//! The CNI client: versions 0.3.0 to 1.1.0 of the specification.
//!
//! ```text
//! config.rs    a network configuration, read                      pure
//! conf_dir.rs  the directory of configurations, watched
//! told.rs      what plugins are told of a pod                      pure
//! plugin.rs    a plugin's run
//! result.rs    what ADD answers                                    pure
//! cache.rs     what was attached, on disk
//!
//! attach:  record ─► ADD, plugin by plugin, each answer into the record
//! detach:  each record of the pod ─► DEL, plugins in reverse ─► record goes
//! ```
//!
//! A record is written before the first ADD and removed after the last DEL, and
//! carries the configuration as it was. So whatever may be attached is known, and
//! DEL is right also when the configuration has changed, or gone.

mod cache;
mod conf_dir;
mod config;
mod plugin;
mod result;
mod told;

use crate::Readiness;
use crate::turns::Turns;
use crate::types::{AttachRequest, Attached, Net};
use ::types::{Error, Result, ResultExt};
pub use cache::given_up;
use cache::{Cache, Found, Record, Torn};
use conf_dir::{ConfDir, Loaded};
use config::NetworkList;
use futures::StreamExt;
use plugin::{Plugins, Subject, Verb};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an answer of STATUS counts: kubelets ask for the node's status every few
/// seconds, and each answer is a run of every plugin.
const STATUS_COUNTS: Duration = Duration::from_secs(5);
/// The longest that STATUS may take, whatever other verbs may.
const STATUS_BOUND: Duration = Duration::from_secs(5);
/// How long a daemon that starts waits for the end of old attachments before it goes on
/// with its start, and for GC, which no new attachment may come across.
const COLLECT_BOUND: Duration = Duration::from_secs(10);
const GC_BOUND: Duration = Duration::from_secs(5);
/// So many pods are detached at a time.
const AT_ONCE: usize = 8;

/// Where configurations and plugins are.
#[derive(Debug, Clone)]
pub struct CniConfig {
    /// The directory of network configurations.
    pub conf_dir: PathBuf,
    /// The directories of plugins, the first that has one counts.
    pub bin_dirs: Vec<PathBuf>,
    /// The networks that each pod is attached to, by name, as eth0, eth1, …; none is
    /// the first by the name of its file.
    pub networks: Vec<String>,
    /// The bound on one call of one plugin.
    pub plugin_timeout: Duration,
    /// Whether plugins are asked to free what belongs to no pod of ours. Not where
    /// somebody else attaches pods to the same networks.
    pub gc: bool,
    /// Where attachments are recorded.
    pub cache_dir: PathBuf,
}

/// What lies in the directories of configurations and plugins.
#[derive(Debug, Default)]
pub struct Examined {
    /// Networks whose plugins are all installed, by name.
    pub whole: Vec<String>,
    /// Files that can't be used, plugins that are missing, networks that are not there.
    pub amiss: Vec<String>,
}

/// Looks at configurations and plugins without running or changing anything.
pub fn examine(conf_dir: &Path, bin_dirs: &[PathBuf], wanted: &[String]) -> Examined {
    let loaded = Loaded::load(conf_dir, &Loaded::default());
    let plugins = Plugins::new(bin_dirs.to_vec(), STATUS_BOUND);
    let mut all = Examined { whole: Vec::new(), amiss: loaded.complaints };
    for (file, list) in &loaded.networks {
        let missing: Vec<String> =
            list.plugins.iter().filter_map(|p| plugins.find(&p.kind).err()).map(|e| e.to_string()).collect();
        if missing.is_empty() {
            all.whole.push(list.name.clone());
        } else {
            all.amiss.push(format!("{} ({}): {}", list.name, file.display(), missing.join("; ")));
        }
    }
    for name in wanted.iter().filter(|w| !loaded.networks.iter().any(|(_, l)| l.name == **w)) {
        all.amiss.push(format!("the network {name} is not configured in {}", conf_dir.display()));
    }
    all
}

/// The client.
#[derive(Debug)]
pub struct Cni {
    config: CniConfig,
    plugins: Plugins,
    status_plugins: Plugins,
    cache: Cache,
    conf_dir: Option<ConfDir>,
    /// The specification forbids two operations on one pod at a time.
    turns: Turns,
    /// The last answer of STATUS, and to which configurations.
    status: tokio::sync::Mutex<Option<(Instant, Arc<Loaded>, Readiness)>>,
}

impl Cni {
    /// Opens the records; `watch` says whether configurations are followed, for a
    /// daemon that attaches pods by CNI and not only detaches old ones.
    ///
    /// # Errors
    /// Names the directory of the records.
    pub fn open(config: CniConfig, watch: bool) -> Result<Self> {
        let bound = config.plugin_timeout;
        Ok(Self {
            plugins: Plugins::new(config.bin_dirs.clone(), bound),
            status_plugins: Plugins::new(config.bin_dirs.clone(), bound.min(STATUS_BOUND)),
            cache: Cache::open(&config.cache_dir)?,
            conf_dir: watch.then(|| ConfDir::watch(&config.conf_dir)),
            turns: Turns::default(),
            status: tokio::sync::Mutex::default(),
            config,
        })
    }

    fn loaded(&self) -> Arc<Loaded> {
        self.conf_dir.as_ref().map(ConfDir::loaded).unwrap_or_default()
    }

    /// There is a configuration, a good or a broken one.
    pub fn is_configured(&self) -> bool {
        let loaded = self.loaded();
        !loaded.networks.is_empty() || !loaded.complaints.is_empty()
    }

    /// The networks that a pod is attached to.
    fn selected(&self, loaded: &Loaded) -> Result<Vec<Arc<NetworkList>>> {
        let dir = self.config.conf_dir.display();
        let complaints = |e: Error| if loaded.complaints.is_empty() { e } else { e.hint(loaded.complaints.join("; ")) };
        if self.config.networks.is_empty() {
            let first = loaded.networks.first().map(|(_, list)| vec![list.clone()]);
            let none = || complaints(Error::precondition(format!("no CNI network is configured in {dir}")));
            return first.ok_or_else(none);
        }
        let find = |name: &String| {
            let found = loaded.networks.iter().find(|(_, l)| l.name == *name).map(|(_, l)| l.clone());
            found.ok_or_else(|| {
                complaints(Error::precondition(format!("the CNI network {name} is not configured in {dir}")))
            })
        };
        self.config.networks.iter().map(find).collect()
    }

    /// Attaches a pod to its networks. What has failed half-way is left for
    /// [`Self::detach`].
    ///
    /// # Errors
    /// Names plugin and network, with the plugin's own words.
    pub async fn attach(&self, request: &AttachRequest, pod_cidr: &[Net]) -> Result<Vec<Attached>> {
        let lists = self.selected(&self.loaded())?;
        let args = told::args(request)?;
        let capabilities = told::capabilities(request, pod_cidr);
        // Before anything is attached: what was never begun needs no end.
        for plugin in lists.iter().flat_map(|l| &l.plugins) {
            self.plugins.find(&plugin.kind)?;
        }
        let _turn = self.turns.take(&request.pod_id).await;
        let mut attachments = Vec::new();
        for (n, list) in lists.iter().enumerate() {
            let interface = format!("eth{n}");
            let mut record = Record::new(&request.pod_id, &interface, &list.name, &list.text);
            record.netns.clone_from(&request.netns);
            record.cni_args.clone_from(&args);
            record.capability_args.clone_from(&capabilities);
            self.store(&record).await?;
            let result = self.add(list, &mut record).await?;
            let attachment = result::attachment(&result, &interface, n == 0);
            let attachment = attachment.map_err(|e| e.within(format!("network {}", list.name)))?;
            attachments.push(Attached { network: list.name.clone(), interface, attachment, result: Some(result) });
        }
        Ok(attachments)
    }

    /// ADD by each plugin, which is told what those before it have answered. Each
    /// answer is recorded at once: where a later plugin fails, DEL of the earlier ones
    /// needs it (the firewall plugin's rules are by address).
    async fn add(&self, list: &NetworkList, record: &mut Record) -> Result<Value> {
        for plugin in &list.plugins {
            let input = list.input(plugin, record.result.as_ref(), &record.capability_args);
            let said =
                self.plugins.run(list, &plugin.kind, Verb::Add, Some(subject(record, &record.netns)), &input).await?;
            let answer: Map<String, Value> = serde_json::from_slice(&said).context(|| {
                let said = String::from_utf8_lossy(&said).chars().take(200).collect::<String>();
                format!(
                    "ADD by the CNI plugin {} (network {}): its answer {said:?} is no result",
                    plugin.kind, list.name
                )
            })?;
            record.result = Some(answer.into());
            self.store(record).await?;
        }
        record.result.clone().ok_or_else(|| Error::internal(format!("the network {} has no plugins", list.name)))
    }

    async fn store(&self, record: &Record) -> Result<()> {
        let (cache, record) = (self.cache.clone(), record.clone());
        crate::blocking("record an attachment", move || cache.put(&record)).await
    }

    /// Detaches a pod from whatever it was attached to, the last network first; none
    /// is success. It goes on to its end, and may be asked for again.
    ///
    /// # Errors
    /// All failures, joined; what has failed stays recorded.
    pub async fn detach(&self, pod: &str) -> Result<()> {
        let _turn = self.turns.take(pod).await;
        let Found { records, torn, mut errors } = self.cache.of(pod);
        for record in records.iter().rev() {
            errors.extend(self.detach_one(record).await.err());
        }
        for torn in &torn {
            errors.extend(self.detach_torn(torn).await.err());
        }
        Error::join(&format!("detach pod {pod:.12} from its CNI networks"), errors)
    }

    async fn detach_one(&self, record: &Record) -> Result<()> {
        let list = record.config().and_then(|c| NetworkList::parse(&c)).map_err(|e| self.unreadable(record, e))?;
        // A namespace that has gone is empty by the specification, and the plugins
        // free what lies elsewhere.
        let gone = sys::namespace::inode(&record.netns).is_err();
        let netns = if gone { Path::new("") } else { &record.netns };
        let previous = record.result.as_ref().filter(|_| list.version.has_check());
        let mut errors = Vec::new();
        for plugin in list.plugins.iter().rev() {
            let input = list.input(plugin, previous, &record.capability_args);
            let run = self.plugins.run(&list, &plugin.kind, Verb::Del, Some(subject(record, netns)), &input);
            errors.extend(run.await.err());
        }
        if errors.is_empty() {
            return self.cache.remove(record);
        }
        let path = self.cache.path(record);
        let hint = || format!("it is tried again; without {} it is given up", path.display());
        Error::join(&format!("interface {}", record.if_name), errors).map_err(|e| e.copy().hint(hint()))
    }

    /// As far as its name and the network's configuration of today go: no plugin hears
    /// what it once answered, and what it would not free then, nobody can say. Then the
    /// record is given up, or the pod could never be removed.
    async fn detach_torn(&self, torn: &Torn) -> Result<()> {
        let Torn { pod, network, interface, error, .. } = torn;
        tracing::warn!("pod {pod:.12}: {error}; DEL is asked for by today's configuration, and the record given up");
        let loaded = match &self.conf_dir {
            Some(dir) => dir.loaded(),
            None => Arc::new(Loaded::load(&self.config.conf_dir, &Loaded::default())),
        };
        let list = loaded.networks.iter().find(|(_, l)| l.name == *network).map(|(_, l)| l.clone());
        let subject = || Subject { pod, netns: Path::new(""), interface, args: &[] };
        match list {
            None => tracing::warn!("the network {network} is not configured any more: nobody can be asked"),
            Some(list) => {
                for plugin in list.plugins.iter().rev() {
                    let input = list.input(plugin, None, &Map::new());
                    let run = self.plugins.run(&list, &plugin.kind, Verb::Del, Some(subject()), &input);
                    if let Err(e) = run.await {
                        tracing::warn!("pod {pod:.12}: {e}");
                    }
                }
            }
        }
        self.cache.give_up(torn)
    }

    fn unreadable(&self, record: &Record, e: Error) -> Error {
        e.within(format!("the attachment {}", self.cache.path(record).display()))
            .hint("repair the file, or remove it to give up what it stands for")
    }

    /// Asks whether the pod's networks are as they were made.
    ///
    /// # Errors
    /// What the plugins find amiss.
    pub async fn check(&self, pod: &str) -> Result<()> {
        let _turn = self.turns.take(pod).await;
        let Found { records, torn, mut errors } = self.cache.of(pod);
        errors.extend(torn.into_iter().map(|t| t.error));
        Error::join("read its attachments", errors)?;
        for record in &records {
            let list = record.config().and_then(|c| NetworkList::parse(&c)).map_err(|e| self.unreadable(record, e))?;
            if !list.version.has_check() || list.disable_check {
                continue;
            }
            for plugin in &list.plugins {
                let input = list.input(plugin, record.result.as_ref(), &record.capability_args);
                let subject = Some(subject(record, &record.netns));
                self.plugins.run(&list, &plugin.kind, Verb::Check, subject, &input).await?;
            }
        }
        Ok(())
    }

    /// Whether pods can be attached: there is a configuration, its plugins are
    /// installed, and where they speak STATUS, they say so.
    pub async fn status(&self) -> Readiness {
        let loaded = self.loaded();
        let mut last = self.status.lock().await;
        if let Some((at, of, readiness)) = &*last
            && at.elapsed() < STATUS_COUNTS
            && Arc::ptr_eq(of, &loaded)
        {
            return readiness.clone();
        }
        let readiness = match self.ask_status(&loaded).await {
            Err(e) => Readiness::not_ready("NetworkPluginNotReady", e.to_string()),
            Ok(()) if loaded.complaints.is_empty() => Readiness::ready(),
            Ok(()) => Readiness {
                ready: true,
                reason: "BrokenNetworkConfiguration".into(),
                message: loaded.complaints.join("; "),
            },
        };
        // Only what plugins had to be started for is remembered.
        let asked = loaded.networks.iter().any(|(_, l)| l.version.has_gc_and_status());
        *last = asked.then(|| (Instant::now(), loaded, readiness.clone()));
        readiness
    }

    async fn ask_status(&self, loaded: &Loaded) -> Result<()> {
        for list in self.selected(loaded)? {
            for plugin in &list.plugins {
                self.plugins.find(&plugin.kind).map_err(|e| e.within(format!("network {}", list.name)))?;
            }
            if list.version.has_gc_and_status() {
                for plugin in &list.plugins {
                    let input = list.input(plugin, None, &Map::new());
                    self.status_plugins.run(&list, &plugin.kind, Verb::Status, None, &input).await?;
                }
            }
        }
        Ok(())
    }

    /// Frees what former daemons left: ends plugins that still run, detaches pods that
    /// are not `live`, and lets the plugins that can forget whatever else they hold.
    /// To be called before pods are made; a plugin that hangs keeps it no longer than
    /// about 20 s. Gives the pods that are not detached and what failed.
    pub async fn collect(&self, live: &BTreeSet<String>) -> (BTreeSet<String>, Vec<Error>) {
        let (pods, mut errors) = (self.attached(), self.cache.all().errors);
        if !pods.is_empty() {
            let ended = self.end_plugins_of(pods.clone(), live.clone());
            let ended = tokio::time::timeout(COLLECT_BOUND, ended).await;
            let ended = ended.unwrap_or_else(|_| Err(crate::overdue(COLLECT_BOUND, "looking for old plugins")));
            errors.extend(ended.err());
        }
        let stale: Vec<String> = pods.difference(live).cloned().collect();
        let mut left: BTreeSet<String> = stale.iter().cloned().collect();
        let all = async {
            let detach = |pod: String| async move { (self.detach(&pod).await, pod) };
            let mut detached = futures::stream::iter(stale).map(detach).buffer_unordered(AT_ONCE).boxed();
            while let Some((outcome, pod)) = detached.next().await {
                match outcome {
                    Ok(()) => {
                        tracing::info!("detached pod {pod:.12}, which is no more, from its CNI networks");
                        left.remove(&pod);
                    }
                    Err(e) => errors.push(e),
                }
            }
        };
        if tokio::time::timeout(COLLECT_BOUND, all).await.is_err() {
            let what = format!("detaching {} pods that are no more from their CNI networks", left.len());
            errors.push(crate::overdue(COLLECT_BOUND, &what).hint("it goes on while the daemon serves"));
        }
        match tokio::time::timeout(GC_BOUND, self.collect_garbage()).await {
            Ok(more) => errors.extend(more),
            Err(_) => errors.push(crate::overdue(GC_BOUND, "GC by CNI plugins").hint("the next start asks again")),
        }
        (left, errors)
    }

    /// The pods that records name.
    pub fn attached(&self) -> BTreeSet<String> {
        let found = self.cache.all();
        let torn = found.torn.into_iter().map(|t| t.pod);
        found.records.into_iter().map(|r| r.container_id).chain(torn).collect()
    }

    /// Ends the plugins that still run for a pod whose attachment was given up, and
    /// waits for their deaths.
    ///
    /// # Errors
    /// Names those that don't die.
    pub async fn end_plugins(&self, pod: &str) -> Result<()> {
        self.end_plugins_of(BTreeSet::from([pod.to_owned()]), BTreeSet::new()).await
    }

    async fn end_plugins_of(&self, pods: BTreeSet<String>, live: BTreeSet<String>) -> Result<()> {
        let dirs = self.config.bin_dirs.clone();
        crate::blocking("look for old plugins", move || plugin::end_orphans(&pods, &live, &dirs)).await
    }

    /// GC by the plugins of the networks in use.
    async fn collect_garbage(&self) -> Vec<Error> {
        let mut errors = Vec::new();
        // Without a configuration there is nobody to ask, which Status says.
        let lists = if self.config.gc { self.selected(&self.loaded()).unwrap_or_default() } else { Vec::new() };
        let Found { records, torn, errors: unreadable } = self.cache.all();
        for list in lists.iter().filter(|l| l.version.has_gc_and_status() && !l.disable_gc) {
            if !(torn.is_empty() && unreadable.is_empty()) {
                // What can't be read may be valid.
                break;
            }
            let valid: Vec<Value> = records
                .iter()
                .filter(|r| r.network_name == list.name)
                .map(|r| json!({ "containerID": r.container_id, "ifname": r.if_name }))
                .collect();
            for plugin in &list.plugins {
                let mut input = list.input(plugin, None, &Map::new());
                // The second name is an early one, which libcni still sends too.
                input.insert("cni.dev/valid-attachments".into(), valid.clone().into());
                input.insert("cni.dev/attachments".into(), valid.clone().into());
                errors.extend(self.plugins.run(list, &plugin.kind, Verb::Gc, None, &input).await.err());
            }
        }
        errors
    }

    /// For `crictl info`: the configurations in use, as they stand.
    pub fn info(&self) -> Value {
        let loaded = self.loaded();
        let networks = loaded.networks.iter().map(|(path, list)| {
            let config: Value = serde_json::from_str(&list.text).unwrap_or_default();
            json!({ "file": path, "name": list.name, "cniVersion": list.version.to_string(), "config": config })
        });
        json!({
            "confDir": self.config.conf_dir,
            "binDirs": self.config.bin_dirs,
            "networks": networks.collect::<Vec<_>>(),
            "complaints": loaded.complaints,
        })
    }

    /// A network that a pod would be attached to asks for this capability.
    pub fn asks_for(&self, capability: &str) -> bool {
        self.selected(&self.loaded()).is_ok_and(|lists| lists.iter().any(|l| l.asks_for(capability)))
    }
}

fn subject<'a>(record: &'a Record, netns: &'a Path) -> Subject<'a> {
    Subject { pod: &record.container_id, netns, interface: &record.if_name, args: &record.cni_args }
}
