//! A pod's network: the namespace, and who attaches it to what.
//!
//! ```text
//!   pods ──► Network ──┬──► cni/      plugins, where a configuration says which
//!                      ├──► builtin/  the network that needs nothing
//!                      └──► nobody    a pod has lo alone
//!
//! netns.rs     where the namespaces are pinned
//! types.rs     what a pod asks of its network and what it gets
//! builtin/     bridge, addresses, masquerade
//! host_ports/  ports of the node that lead to pods, with any network
//! nft/         nf_tables' messages
//! netlink/     links, addresses, routes, limits, tracked connections
//! turns.rs     one operation per pod at a time
//! checks.rs    what is amiss of pods' networks
//! ```
//!
//! A new namespace has `lo` up (`sys::namespace` does that while it makes it) and
//! nothing else. Who attached a pod is found by the pod's id alone, so that it is
//! detached rightly whatever the configuration has become.

mod builtin;
mod checks;
pub mod cni;
mod host_ports;
mod netlink;
mod netns;
mod nft;
mod turns;
mod types;

pub use self::types::{
    AttachRequest, Attached, Attachment, Bandwidth, Dns, INTERFACE, Mac, Net, PortMapping, Protocol,
};
pub use builtin::{Builtin, BuiltinConfig, Departure, InterfaceStats, IpRange, interface_stats};
pub use host_ports::HostPorts;
pub use netns::NetnsDir;

use ::types::{Error, Result};
use checks::Checks;
use cni::{Cni, CniConfig};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use store::Store;

/// How long all plugins of all networks together may take to attach a pod: with the
/// rest it stays below the kubelet's bound on RunPodSandbox, 4 min.
const ATTACH_BOUND: Duration = Duration::from_secs(100);
/// The same for a detachment: below its bound on StopPodSandbox, 2 min.
const DETACH_BOUND: Duration = Duration::from_secs(60);
/// The database's key of the pod CIDR: a kubelet tells it once, not to each daemon.
const POD_CIDR: &str = "pod_cidr";
/// So many pods that nobody knows any more are detached at a time.
const AT_ONCE: usize = 8;
/// How soon and how seldom what could not be detached, of pods that nobody knows any
/// more, is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// Who attaches pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// CNI plugins where there is a configuration of them, else the built-in network.
    Auto,
    /// CNI plugins.
    Cni,
    /// The built-in network.
    Builtin,
    /// Nobody: a pod has `lo` alone.
    None,
}

/// What an operator can set.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Who attaches pods.
    pub mode: Mode,
    /// Where configurations and plugins are.
    pub cni: CniConfig,
    /// The built-in network.
    pub builtin: BuiltinConfig,
    /// Whether the pod CIDR, once one was told, takes the place of the built-in
    /// network's ranges.
    pub ranges_of_pod_cidr: bool,
}

/// Whether pods can be attached, as a condition of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// They can.
    pub ready: bool,
    /// One word; empty where there is nothing to say.
    pub reason: String,
    /// A sentence.
    pub message: String,
}

impl Readiness {
    fn ready() -> Self {
        Self { ready: true, reason: String::new(), message: String::new() }
    }

    fn not_ready(reason: &str, message: impl Into<String>) -> Self {
        Self { ready: false, reason: reason.to_owned(), message: message.into() }
    }
}

/// What a pod is attached to, as it is stored with the pod; empty where nobody
/// attaches pods, and in the node's network.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// In the order of its interfaces.
    #[serde(default)]
    pub networks: Vec<Attached>,
}

impl PodNetwork {
    /// The pod's addresses, its own first: those of its first network, in the order
    /// in which that gave them.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.networks.first().into_iter().flat_map(|n| n.attachment.addresses.iter().map(|a| a.address))
    }
}

/// The networks of all pods. Clones share them.
#[derive(Debug, Clone)]
pub struct Network(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    mode: Mode,
    cni: Cni,
    builtin: Builtin,
    store: Store,
    ranges_of_pod_cidr: bool,
    /// The networks that this node's pods have their addresses from, as it was told.
    pod_cidr: RwLock<Vec<Net>>,
    checks: Mutex<Checks>,
    /// Something of the built-in network or its host ports was claimed, now or before:
    /// where nothing ever was, nothing needs to be freed.
    claimed: AtomicBool,
    /// Our table is watched.
    watched: AtomicBool,
    /// Pods that nobody knows any more and that are still attached.
    strays: Mutex<BTreeSet<String>>,
}

/// Who attaches the next pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Cni,
    Builtin,
    Nobody,
}

impl Network {
    /// Opens what was attached before and follows the configurations.
    ///
    /// # Errors
    /// Names the directory that can't be made; `InvalidArgument` for a built-in network
    /// that can't work.
    pub async fn open(config: NetworkConfig, store: Store) -> Result<Self> {
        let by_cni = matches!(config.mode, Mode::Auto | Mode::Cni);
        let cni = Cni::open(config.cni, by_cni)?;
        let claimed = !store.network_claims().await?.is_empty();
        let builtin = Builtin::open(config.builtin, store.clone()).await?;
        let this = Self(Arc::new(Inner {
            mode: config.mode,
            cni,
            builtin,
            store: store.clone(),
            ranges_of_pod_cidr: config.ranges_of_pod_cidr,
            pod_cidr: RwLock::default(),
            checks: Mutex::default(),
            claimed: false.into(),
            watched: false.into(),
            strays: Mutex::default(),
        }));
        if claimed {
            this.claim();
        }
        if let Some(told) = store.meta(POD_CIDR).await?
            && let Err(e) = this.use_pod_cidr(&told).await
        {
            tracing::warn!("the pod CIDR {told} that was told before is not used: {e}");
        }
        Ok(this)
    }

    /// Takes the node's pod CIDR, networks separated by commas, as a kubelet tells it
    /// (UpdateRuntimeConfig): plugins are told of it that ask for `ipRanges`, and where
    /// no ranges are configured it is those of the built-in network. Pods keep what
    /// they have. It is remembered; an empty one changes nothing.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no list of networks, or where the built-in network
    /// attaches pods and can't use it; nothing has changed then.
    pub async fn set_pod_cidr(&self, told: &str) -> Result<()> {
        if told.trim().is_empty() {
            return Ok(());
        }
        if self.use_pod_cidr(told).await? {
            self.0.store.set_meta(POD_CIDR, told).await?;
        }
        Ok(())
    }

    /// True where it is another one than before.
    async fn use_pod_cidr(&self, told: &str) -> Result<bool> {
        let parts = told.split(',').map(str::trim).filter(|p| !p.is_empty());
        let nets = parts.map(|p| p.parse().map(builtin::network_of)).collect::<Result<Vec<Net>>>();
        let nets = nets.map_err(|e| e.within("the pod CIDR"))?;
        if *self.0.pod_cidr.read().unwrap_or_else(PoisonError::into_inner) == nets {
            return Ok(false);
        }
        if self.0.ranges_of_pod_cidr {
            let six = builtin::node_has_ipv6();
            let ours = nets.iter().filter(|net| six || net.address.is_ipv4());
            let ranges = ours.map(|net| (*net).try_into()).collect::<Result<Vec<IpRange>>>();
            let used = match ranges {
                Ok(ranges) => self.0.builtin.set_ranges(ranges).await,
                Err(e) => Err(e),
            };
            match (used, self.by() == By::Builtin) {
                (Err(e), true) => return Err(e.within("the pod CIDR")),
                (Err(e), false) => tracing::warn!("the built-in network could not use the pod CIDR {told}: {e}"),
                (Ok(()), true) => tracing::info!("the built-in network gives addresses of the pod CIDR {told}"),
                (Ok(()), false) => {}
            }
        }
        *self.0.pod_cidr.write().unwrap_or_else(PoisonError::into_inner) = nets;
        Ok(true)
    }

    /// Before anything of ours is claimed. From then on our table is watched.
    fn claim(&self) {
        self.0.claimed.store(true, Ordering::Relaxed);
        if self.0.watched.swap(true, Ordering::Relaxed) {
            return;
        }
        let ports = self.0.builtin.host_ports().clone();
        tokio::spawn(async move {
            if let Err(e) = ports.keep().await {
                tracing::warn!("a flush of the packet filter's rules is not noticed before the next pod: {e}");
            }
        });
    }

    fn by(&self) -> By {
        match self.0.mode {
            Mode::Cni => By::Cni,
            // A broken configuration is one too: pods must not end up elsewhere.
            Mode::Auto if self.0.cni.is_configured() => By::Cni,
            Mode::Auto | Mode::Builtin => By::Builtin,
            Mode::None => By::Nobody,
        }
    }

    /// Attaches a pod. What has failed half-way is left for [`Self::detach`], which
    /// is to follow.
    ///
    /// # Errors
    /// Who failed at what, in a plugin's case with its own words.
    pub async fn attach(&self, request: &AttachRequest) -> Result<PodNetwork> {
        let networks = async {
            match self.by() {
                By::Cni => self.attach_by_cni(request).await,
                By::Builtin => {
                    self.claim();
                    let attachment = self.0.builtin.attach(request).await?;
                    let (network, interface) = ("longshore".to_owned(), INTERFACE.to_owned());
                    Ok(vec![Attached { network, interface, attachment, result: None }])
                }
                By::Nobody => Ok(Vec::new()),
            }
        };
        match tokio::time::timeout(ATTACH_BOUND, networks).await {
            Ok(networks) => Ok(PodNetwork { networks: networks? }),
            Err(_) => {
                // Plugins were killed, but may take a moment to die: DEL comes next.
                let late = overdue(ATTACH_BOUND, "attaching it to its network");
                match self.0.cni.end_plugins(&request.pod_id).await {
                    Ok(()) => Err(late),
                    Err(e) => Err(Error::new(late.kind(), format!("{late}; {e}"))),
                }
            }
        }
    }

    /// By plugins, and where none of them leads host ports, these by ourselves.
    async fn attach_by_cni(&self, request: &AttachRequest) -> Result<Vec<Attached>> {
        let ours = !request.ports.is_empty() && !self.0.cni.asks_for("portMappings");
        let pod_cidr = self.0.pod_cidr.read().unwrap_or_else(PoisonError::into_inner).clone();
        let networks = self.0.cni.attach(request, &pod_cidr).await?;
        if let Some(first) = networks.first().filter(|_| ours) {
            self.claim();
            let ports = self.0.builtin.host_ports();
            ports.add(&request.pod_id, &first.attachment.addresses, &request.ports).await?;
        }
        Ok(networks)
    }

    /// Detaches a pod from whatever it was attached to, by whomever; nothing is
    /// success. It may be asked for again, and with the namespace gone. A link of ours
    /// is removed soon afterwards, and its addresses are free then.
    ///
    /// # Errors
    /// All failures, joined; what is still attached stays known.
    pub async fn detach(&self, pod: &str) -> Result<()> {
        self.detach_by(pod, async {
            let departure = self.0.builtin.part(pod).await?;
            let (this, pod) = (self.clone(), pod.to_owned());
            tokio::spawn(async move {
                if let Err(e) = departure.end().await {
                    tracing::warn!("{e}; it is tried again");
                    this.detach_later(&pod);
                }
            });
            Ok(())
        })
        .await
    }

    async fn detach_by(&self, pod: &str, from_builtin: impl Future<Output = Result<()>>) -> Result<()> {
        let detach = async {
            let mut errors = Vec::new();
            if self.0.claimed.load(Ordering::Relaxed) {
                errors.extend(from_builtin.await.err());
            }
            errors.extend(self.0.cni.detach(pod).await.err());
            self.checks().forget(pod);
            if errors.len() == 1 { errors.pop().map_or(Ok(()), Err) } else { Error::join("its networks", errors) }
        };
        bounded(DETACH_BOUND, "detaching it from its network", detach).await
    }

    /// Detaches a pod that is gone for everybody else, now and then until it is done.
    pub fn detach_later(&self, pod: &str) {
        let mut strays = self.0.strays.lock().unwrap_or_else(PoisonError::into_inner);
        let first = strays.is_empty();
        strays.insert(pod.to_owned());
        if first {
            tokio::spawn(self.clone().detach_strays());
        }
    }

    async fn detach_strays(self) {
        let this = &self;
        let (mut wait, longest) = RETRY;
        loop {
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(longest);
            let strays = self.0.strays.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let detach = |pod: String| async move {
                match this.detach_by(&pod, this.0.builtin.detach(&pod)).await {
                    Ok(()) => {
                        tracing::info!("pod {pod:.12} is detached from its network at last");
                        this.0.strays.lock().unwrap_or_else(PoisonError::into_inner).remove(&pod);
                    }
                    Err(e) => tracing::warn!("what is left of pod {pod:.12}: {e}"),
                }
            };
            futures::stream::iter(strays).for_each_concurrent(AT_ONCE, detach).await;
            // The lock is held for the decision: who comes later starts a new task.
            if self.0.strays.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
                return;
            }
        }
    }

    /// Asks whether a pod's network is as it was made: the built-in one looks at the
    /// pod's link, plugins are asked by CHECK. What is amiss is also told by
    /// [`Self::status`] until the pod is detached or checked again.
    ///
    /// # Errors
    /// What is amiss.
    pub async fn check(&self, pod: &str) -> Result<()> {
        self.checks().begin(pod);
        let check = async {
            if self.0.claimed.load(Ordering::Relaxed) {
                self.0.builtin.check(pod).await?;
            }
            self.0.cni.check(pod).await
        };
        let checked = bounded(DETACH_BOUND, "checking its network", check).await;
        self.checks().note(pod, checked.as_ref().err().map(ToString::to_string));
        checked
    }

    fn checks(&self) -> MutexGuard<'_, Checks> {
        self.0.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frees what former daemons left of pods that are not `live`. To be called before
    /// pods are made; what fails is tried again later.
    pub async fn collect(&self, live: &BTreeSet<String>) -> Vec<Error> {
        let (left, mut errors) = self.0.cni.collect(live).await;
        for pod in left {
            self.detach_later(&pod);
        }
        // Where pods are not attached by ourselves and never were, the node's links and
        // tables are not looked at: they may be another daemon's.
        let ours = self.by() == By::Builtin || self.0.claimed.load(Ordering::Relaxed);
        if ours {
            match self.0.builtin.reconcile(live).await {
                Ok(removed) => removed.iter().for_each(|what| tracing::info!("freed {what}, which is no more")),
                Err(e) => errors.push(e),
            }
        }
        errors
    }

    /// The pods that nobody knows any more and whose detachment is tried again and again.
    pub fn strays(&self) -> BTreeSet<String> {
        self.0.strays.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The pods that are attached, or were and can't be detached, whoever knows of them.
    ///
    /// # Errors
    /// When the records can't be read.
    pub async fn attached(&self) -> Result<BTreeSet<String>> {
        let mut pods = self.0.cni.attached();
        if self.0.claimed.load(Ordering::Relaxed) {
            pods.extend(self.0.builtin.attached().await?);
        }
        Ok(pods)
    }

    /// Takes back what only pods need of the node, if none is left: for a daemon that
    /// ends.
    ///
    /// # Errors
    /// Names what can't be removed.
    pub async fn release(&self) -> Result<()> {
        if self.0.claimed.load(Ordering::Relaxed) { self.0.builtin.release().await } else { Ok(()) }
    }

    /// Whether pods can be attached.
    pub async fn status(&self) -> Readiness {
        let mut readiness = self.readiness().await;
        if readiness.ready && readiness.reason.is_empty() {
            let checks = self.checks();
            if let Some(message) = checks.message() {
                (readiness.reason, readiness.message) = ("PodNetworkAmiss".into(), message);
            }
        }
        readiness
    }

    async fn readiness(&self) -> Readiness {
        match self.by() {
            By::Cni => self.0.cni.status().await,
            By::Builtin => match self.0.builtin.status().await {
                Ok(()) => Readiness::ready(),
                Err(e) => Readiness::not_ready("BuiltinNetworkNotReady", e.to_string()),
            },
            By::Nobody => Readiness::not_ready(
                "NoPodNetwork",
                "network.mode is \"none\": a pod has a network namespace with lo alone",
            ),
        }
    }

    /// For `crictl info`: the mode, and what is configured.
    pub fn info(&self) -> Value {
        let cni = (self.by() == By::Cni).then(|| self.0.cni.info());
        let pod_cidr = self.0.pod_cidr.read().unwrap_or_else(PoisonError::into_inner).clone();
        json!({ "mode": self.0.mode, "cni": cni, "podCidr": pod_cidr, "amiss": self.checks().amiss() })
    }
}

async fn bounded<T>(bound: Duration, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(bound, work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(overdue(bound, what)),
    }
}

fn overdue(bound: Duration, what: &str) -> Error {
    Error::deadline(format!("{what} has not ended after {} s", bound.as_secs()))
}

/// Runs system calls that may wait for the kernel's locks where they hold nobody up;
/// they begin at once and end even if nobody awaits them.
fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> impl Future<Output = Result<T>> + Send {
    let work = tokio::task::spawn_blocking(work);
    async move { work.await.map_err(|e| Error::internal(what).because(e))? }
}

/// Carries an operation to its end even if nobody awaits it any more.
async fn to_its_end<T: Send + 'static>(
    what: &'static str,
    work: impl Future<Output = ::types::Result<T>> + Send + 'static,
) -> ::types::Result<T> {
    tokio::spawn(work).await.map_err(|e| ::types::Error::internal(what).because(e))?
}
