//! The built-in network: a bridge in the node, a veth pair per pod, addresses from
//! ranges of our own, masquerade and host ports by nftables. No program is run.
//!
//! ```text
//!            node                                   pod
//!   longshore0  10.85.0.1/16, fd…::1/64
//!      └── lsh0123456789ab ═══ veth ═══ eth0  10.85.0.7/16, fd…::7/64
//!                                        default via 10.85.0.1, fd…::1
//!   attach: claim addresses ─► make the link ─► claim and lead host ports
//!   detach: host ports; link ─► free addresses
//! ```
//!
//! Claims are committed before anything is made of them and freed last, so that a
//! crash leaves at most what [`Builtin::reconcile`] finds by the pod's id. The kernel
//! takes some 20 ms to remove a link, which [`Builtin::part`] spares its caller: the
//! addresses stay claimed that long, and who wants one of them waits.

mod leaving;
mod node;
mod pod;
mod range;

pub use leaving::Departure;
pub use pod::InterfaceStats;
pub use range::IpRange;
pub(crate) use range::network_of;

use crate::host_ports::Localnet;
use crate::turns::Turns;
use crate::{AttachRequest, Attachment, HostPorts, Net};
use ::types::{Error, ErrorKind, Result};
use fault::Step;
use leaving::Leaving;
use node::Node;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};
use store::{AddressWish, Store};

/// How long those who need nothing but the truth wait for pods that are leaving.
const LEAVING_BOUND: Duration = Duration::from_secs(5);

/// How long a failure to prepare the node counts before [`Builtin::status`] tries again.
const UNREADY_COUNTS: Duration = Duration::from_secs(5);

/// How the built-in network is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltinConfig {
    /// The bridge's name.
    pub bridge: String,
    /// Where addresses come from. A pod gets one of each family that is here; of
    /// several ranges of a family, the first with a free address gives it.
    pub ranges: Vec<IpRange>,
    /// The largest packet of the pods' interfaces in bytes; `None` takes it from the
    /// interface of the node's default route.
    pub mtu: Option<u32>,
    /// The name of our nftables table, family inet. Whatever has it is replaced.
    pub table: String,
    /// Whether what pods send elsewhere has the node's address.
    pub masquerade: bool,
}

impl BuiltinConfig {
    /// Ranges that no usual network has: one of IPv4, and one of IPv6 where this
    /// node has IPv6.
    pub fn default_ranges() -> Vec<IpRange> {
        let six = node_has_ipv6();
        let all = ["10.85.0.0/16", "fd4c:6f6e:6773::/64"].iter().filter_map(|r| r.parse::<IpRange>().ok());
        all.filter(|r| six || r.gateway().address.is_ipv4()).collect()
    }
}

impl Default for BuiltinConfig {
    fn default() -> Self {
        Self {
            bridge: "longshore0".into(),
            ranges: Self::default_ranges(),
            mtu: None,
            table: "longshore".into(),
            masquerade: true,
        }
    }
}

/// The built-in network; clones share it.
#[derive(Debug, Clone)]
pub struct Builtin {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: RwLock<BuiltinConfig>,
    /// Held for writing while the ranges change: nobody attaches a pod meanwhile.
    changing: tokio::sync::RwLock<()>,
    store: Store,
    ports: HostPorts,
    node: Mutex<Option<Node>>,
    /// Ranges that are no longer configured but that pods have addresses of.
    former: Mutex<Vec<IpRange>>,
    turns: Turns,
    leaving: Leaving,
    /// Why the node could not be prepared when it was tried last, and when that was.
    unready: Mutex<Option<(Instant, Error)>>,
}

impl Builtin {
    /// Reads what is held. Bridge and table are made with the first pod.
    ///
    /// # Errors
    /// `InvalidArgument` for a configuration that can't work; when the database
    /// can't be read.
    pub async fn open(config: BuiltinConfig, store: Store) -> Result<Self> {
        let ports = HostPorts::open(&config.table, store.clone()).await?;
        Self::with_host_ports(config, store, ports)
    }

    /// The same with host ports that other networks use too.
    ///
    /// # Errors
    /// `InvalidArgument` for a configuration that can't work.
    pub fn with_host_ports(config: BuiltinConfig, store: Store, ports: HostPorts) -> Result<Self> {
        check(&config)?;
        Ok(Self {
            inner: Arc::new(Inner {
                config: RwLock::new(config),
                changing: tokio::sync::RwLock::default(),
                store,
                ports,
                node: Mutex::new(None),
                former: Mutex::default(),
                turns: Turns::default(),
                leaving: Leaving::default(),
                unready: Mutex::default(),
            }),
        })
    }

    /// The host ports, for pods of other networks.
    pub fn host_ports(&self) -> &HostPorts {
        &self.inner.ports
    }

    /// Attaches a pod whose namespace has no `eth0` yet. What was begun when an error
    /// comes is undone. It goes on to its end when this future is dropped, and a
    /// [`Self::detach`] that comes meanwhile waits for that.
    ///
    /// # Errors
    /// `AlreadyExists` naming the pod that holds a wanted port or address, or when
    /// this one is attached; `ResourceExhausted` naming a range without addresses;
    /// `InvalidArgument` for an address of no range.
    pub async fn attach(&self, request: &AttachRequest) -> Result<Attachment> {
        let (this, request) = (self.clone(), request.clone());
        crate::to_its_end("attach a pod", async move {
            let _turn = this.inner.turns.take(&request.pod_id).await;
            this.attach_or_undo(&request).await
        })
        .await
    }

    async fn attach_or_undo(&self, request: &AttachRequest) -> Result<Attachment> {
        let _unchanged = self.inner.changing.read().await;
        let wishes = wishes(&self.config().ranges, &request.static_ips)
            .map_err(|e| e.within(format!("attach pod {}", request.pod_id)))?;
        let claim = self.claim(&request.pod_id, wishes);
        let addresses = fault::around(Step::NetworkClaim, claim).await?;
        match self.attach_with(request, &addresses).await {
            Ok(attachment) => Ok(attachment),
            Err(e) => match self.remove(&request.pod_id).await {
                Ok(()) => Err(e),
                Err(left) => Err(Error::new(e.kind(), format!("{e}; {left}"))),
            },
        }
    }

    /// Addresses of pods that are just leaving are as good as free: they are waited for.
    async fn claim(&self, pod_id: &str, wishes: Vec<AddressWish>) -> Result<Vec<IpAddr>> {
        let leaving = self.inner.leaving.now();
        let claimed = self.inner.store.claim_addresses(pod_id, wishes.clone()).await;
        let kind = claimed.as_ref().err().map(Error::kind);
        let held = matches!(kind, Some(ErrorKind::AlreadyExists | ErrorKind::ResourceExhausted));
        if held && self.inner.leaving.wait_for(leaving).await {
            return self.inner.store.claim_addresses(pod_id, wishes).await;
        }
        claimed
    }

    async fn attach_with(&self, request: &AttachRequest, addresses: &[IpAddr]) -> Result<Attachment> {
        let ranges: Vec<(IpRange, IpAddr)> = addresses.iter().filter_map(|a| Some((self.range_of(*a)?, *a))).collect();
        let addresses: Vec<Net> = ranges.iter().map(|(r, a)| Net { address: *a, prefix: r.network().prefix }).collect();
        let Some(first) = addresses.first() else {
            return Err(Error::precondition("the built-in network has no range of addresses"));
        };
        let mac = request.mac.unwrap_or_else(|| node::mac_for(first.address));
        let mut gateways: Vec<IpAddr> = ranges.iter().map(|(r, _)| r.gateway().address).collect();
        gateways.dedup();
        let plug = pod::Plug {
            pod_id: request.pod_id.clone(),
            netns: request.netns.clone(),
            mac,
            addresses: addresses.clone(),
            gateways: gateways.clone(),
            bandwidth: request.bandwidth,
        };
        let this = self.clone();
        let node =
            crate::blocking("attach a pod", move || fault::during(Step::NetworkLink, || this.plug(&plug))).await?;
        self.inner.ports.lead(&request.pod_id, &addresses, &request.ports, Localnet::Done).await?;
        let host_interface = Some(pod::host_interface(&request.pod_id));
        Ok(Attachment { addresses, gateways, mac: Some(mac), host_interface, mtu: Some(node.mtu) })
    }

    /// Makes the link, and once more if the bridge turns out to be gone.
    fn plug(&self, plug: &pod::Plug) -> Result<Node> {
        let node = self.prepare()?;
        let Err(e) = plug.make(node) else { return Ok(node) };
        if node::stands(&self.config(), node)? {
            return Err(e);
        }
        *self.node() = None;
        pod::unplug(&pod::host_interface(&plug.pod_id))?;
        let node = self.prepare()?;
        plug.make(node).map(|()| node)
    }

    /// Whether pods can be attached, as far as the last attempt to prepare the node tells.
    /// One that failed is made again now and then: while the node isn't ready, no pod
    /// comes that would.
    ///
    /// # Errors
    /// Why they can't be.
    pub async fn status(&self) -> Result<()> {
        let this = self.clone();
        crate::blocking("prepare the node", move || {
            let last = this.unready().as_ref().map(|(at, e)| (at.elapsed(), e.copy()));
            match last {
                None => Ok(()),
                Some((since, e)) if since < UNREADY_COUNTS => Err(e),
                Some(_) => this.prepare().map(drop),
            }
        })
        .await
    }

    fn unready(&self) -> MutexGuard<'_, Option<(Instant, Error)>> {
        self.inner.unready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bridge, the sysctls and the table.
    fn prepare(&self) -> Result<Node> {
        let prepared = self.prepare_now();
        *self.unready() = prepared.as_ref().err().map(|e| (Instant::now(), e.copy()));
        prepared
    }

    fn prepare_now(&self) -> Result<Node> {
        let config = self.config();
        let mut ready = self.node();
        let node = match *ready {
            Some(node) => node,
            None => node::ensure(&config).map_err(|e| e.within("prepare the node for the built-in network"))?,
        };
        let former = self.inner.former.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let all = config.ranges.iter().copied().chain(former);
        let ranges: Vec<IpRange> = all.filter(|_| config.masquerade).collect();
        self.inner.ports.change(|rules, socket| rules.masquerade(socket, &ranges))?;
        *ready = Some(node);
        Ok(node)
    }

    /// Takes a pod's host ports, link and addresses away; what isn't there is as good.
    /// Its namespace need not exist any more.
    ///
    /// # Errors
    /// Lists what is left; addresses that may be in use stay held.
    pub async fn detach(&self, pod_id: &str) -> Result<()> {
        let (this, pod_id) = (self.clone(), pod_id.to_owned());
        crate::to_its_end("detach a pod", async move {
            let _turn = this.inner.turns.take(&pod_id).await;
            this.remove(&pod_id).await
        })
        .await
    }

    /// The same for a caller that has no use for the removed link: the host ports are
    /// gone when this returns, link and addresses soon afterwards. Whoever detaches the
    /// pod once more, or attaches it, waits for that.
    ///
    /// # Errors
    /// The host ports that are left. What becomes of the rest, the [`Departure`] tells.
    pub async fn part(&self, pod_id: &str) -> Result<Departure> {
        let (this, pod_id) = (self.clone(), pod_id.to_owned());
        crate::to_its_end("detach a pod", async move {
            let turn = this.inner.turns.take(&pod_id).await;
            let mark = this.inner.leaving.mark(&pod_id);
            let (leaver, pod) = (this.clone(), pod_id.clone());
            let gone = tokio::spawn(async move {
                let gone = leaver.unplug(&pod).await;
                drop((mark, turn));
                gone.map_err(|e| e.within(format!("detach pod {pod} from the network")))
            });
            this.inner.ports.remove(&pod_id).await.map(|()| Departure::new(gone))
        })
        .await
    }

    async fn remove(&self, pod_id: &str) -> Result<()> {
        let (ports, freed) = tokio::join!(self.inner.ports.remove(pod_id), self.unplug(pod_id));
        let errors = [ports.err(), freed.err()].into_iter().flatten().collect();
        Error::join(&format!("detach pod {pod_id} from the network"), errors)
    }

    /// The link, and then the addresses, which nobody may have while it is there.
    async fn unplug(&self, pod_id: &str) -> Result<()> {
        let interface = pod::host_interface(pod_id);
        let unplug = move || fault::during(Step::NetworkUnlink, || pod::unplug(&interface));
        crate::blocking("detach a pod", unplug).await?;
        fault::around(Step::NetworkFree, self.inner.store.free_addresses(pod_id)).await.map(drop)
    }

    /// Gives addresses of these ranges from now on. Pods that have others keep them.
    ///
    /// # Errors
    /// `InvalidArgument` for ranges that can't work, and nothing has changed then; when
    /// the database can't be read.
    pub async fn set_ranges(&self, ranges: Vec<IpRange>) -> Result<()> {
        let config = BuiltinConfig { ranges, ..self.config() };
        check(&config)?;
        let (this, config) = (self.clone(), config.clone());
        crate::to_its_end("change the ranges of pods' addresses", async move {
            let _alone = this.inner.changing.write().await;
            if this.config() == config {
                return Ok(());
            }
            let held = this.inner.store.network_claims().await?;
            let used: BTreeSet<&str> = held.iter().flat_map(|c| c.addresses.iter().map(|(r, _)| r.as_str())).collect();
            this.keep_former(&config.ranges, &used);
            *this.inner.config.write().unwrap_or_else(PoisonError::into_inner) = config;
            // The next pod finds the bridge without their gateways, and gives it those.
            *this.node() = None;
            Ok(())
        })
        .await
    }

    /// Remembers ranges that pods still have addresses of.
    fn keep_former(&self, configured: &[IpRange], used: &BTreeSet<&str>) {
        let former = used.iter().filter_map(|r| r.parse().ok()).filter(|r| !configured.contains(r)).collect();
        *self.inner.former.lock().unwrap_or_else(PoisonError::into_inner) = former;
    }

    /// Whether a pod's link is as it was made; a pod that has none is fine.
    ///
    /// # Errors
    /// `FailedPrecondition`, naming what is amiss.
    pub async fn check(&self, pod_id: &str) -> Result<()> {
        let held = self.inner.store.network_claims().await?;
        if !held.iter().any(|c| c.pod_id == pod_id && !c.addresses.is_empty()) {
            return Ok(());
        }
        let (config, interface) = (self.config(), pod::host_interface(pod_id));
        crate::blocking("look at a pod's link", move || node::check_link(&config, &interface)).await
    }

    /// Frees what no pod of `live` holds: addresses, ports, links; and makes the table
    /// as it should be. Returns what was removed.
    ///
    /// # Errors
    /// Lists all that failed; the rest is done.
    pub async fn reconcile(&self, live: &BTreeSet<String>) -> Result<Vec<String>> {
        let (mut removed, mut failed) = (Vec::new(), Vec::new());
        let bridge = self.config().bridge;
        let plugged = crate::blocking("list the bridge's ports", move || node::plugged(&bridge)).await?;
        let held = self.inner.store.network_claims().await?;
        // First: while others are detached, the table must not stand without masquerade.
        let used: BTreeSet<&str> = held
            .iter()
            .filter(|c| live.contains(&c.pod_id))
            .flat_map(|c| c.addresses.iter().map(|(range, _)| range.as_str()))
            .collect();
        self.keep_former(&self.config().ranges, &used);
        if !used.is_empty() {
            let this = self.clone();
            failed.extend(crate::blocking("prepare the node", move || this.prepare()).await.err());
        }
        for claims in held.iter().filter(|c| !c.addresses.is_empty() && !live.contains(&c.pod_id)) {
            let addresses: Vec<String> = claims.addresses.iter().map(|(_, a)| a.to_string()).collect();
            match self.detach(&claims.pod_id).await {
                Ok(()) => removed.push(format!("addresses {} of pod {}", addresses.join(", "), claims.pod_id)),
                Err(e) => failed.push(e),
            }
        }
        let expected: BTreeSet<String> = live.iter().map(|p| pod::host_interface(p)).collect();
        for (name, alias) in plugged.into_iter().filter(|(n, _)| n.starts_with(pod::PREFIX) && !expected.contains(n)) {
            let whose = alias.as_deref().and_then(|a| a.strip_prefix(pod::ALIAS)).unwrap_or("unknown").to_owned();
            let link = name.clone();
            match crate::blocking("remove a link", move || pod::unplug(&link)).await {
                Ok(()) => removed.push(format!("interface {name} of pod {whose}")),
                Err(e) => failed.push(e),
            }
        }
        match self.inner.ports.reconcile(live).await {
            Ok(ports) => removed.extend(ports),
            Err(e) => failed.push(e),
        }
        Error::join("reconcile the built-in network", failed).map(|()| removed)
    }

    /// The pods that have an address or a host port; those that are leaving have none
    /// when this returns, unless the kernel takes long over their links.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn attached(&self) -> Result<BTreeSet<String>> {
        self.all_have_left().await;
        Ok(self.inner.store.network_claims().await?.into_iter().map(|c| c.pod_id).collect())
    }

    /// Removes the bridge and the table where no pod needs them.
    ///
    /// # Errors
    /// Names what can't be removed.
    pub async fn release(&self) -> Result<()> {
        if !self.all_have_left().await {
            let pods: Vec<String> = self.inner.leaving.now().iter().map(|pod| format!("{pod:.12}")).collect();
            let what = format!("the kernel has not removed the links of pods {} yet", pods.join(", "));
            return Err(Error::deadline(what).hint("bridge and table stay"));
        }
        let held = self.inner.store.network_claims().await?;
        if held.iter().any(|c| !c.addresses.is_empty()) {
            return Ok(());
        }
        let this = self.clone();
        let bridge = crate::blocking("remove the bridge", move || {
            let mut ready = this.node();
            if node::remove_bridge(&this.config().bridge)? {
                *ready = None;
                this.inner.ports.rules().forget_bridge();
            }
            Ok(())
        })
        .await;
        let table = self.inner.ports.release().await.map(drop);
        Error::join("release the built-in network", [bridge.err(), table.err()].into_iter().flatten().collect())
    }

    /// Waits for those who are leaving; false where that takes too long, as it does for
    /// ever where something in the kernel holds on to a link.
    async fn all_have_left(&self) -> bool {
        let leaving = &self.inner.leaving;
        tokio::time::timeout(LEAVING_BOUND, leaving.wait_for(leaving.now())).await.is_ok()
    }

    fn range_of(&self, address: IpAddr) -> Option<IpRange> {
        self.config().ranges.into_iter().find(|r| r.contains(address))
    }

    fn config(&self) -> BuiltinConfig {
        self.inner.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The bridge, once it has been made; held only over system calls.
    fn node(&self) -> MutexGuard<'_, Option<Node>> {
        self.inner.node.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the kernel speaks IPv6.
pub(crate) fn node_has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

fn check(config: &BuiltinConfig) -> Result<()> {
    let name = &config.bridge;
    if name.is_empty() || name.len() > 15 || name.contains(['/', ' ']) || name == "." || name == ".." {
        return Err(Error::invalid(format!("{name:?} can't be the name of a bridge")).hint("1 to 15 characters"));
    }
    for (at, range) in config.ranges.iter().enumerate() {
        if let Some(other) = config.ranges[..at].iter().find(|o| o.overlaps(range.network())) {
            return Err(Error::invalid(format!("the ranges {other} and {range} of pods' addresses overlap")));
        }
    }
    if config.ranges.is_empty() {
        return Err(Error::invalid("the built-in network needs a range of pods' addresses"));
    }
    Ok(())
}

/// One address per family that has ranges, those that the pod names first.
fn wishes(ranges: &[IpRange], wanted: &[Net]) -> Result<Vec<AddressWish>> {
    let mut wishes = Vec::new();
    for v4 in [true, false] {
        let of_family: Vec<IpRange> = ranges.iter().copied().filter(|r| r.network().address.is_ipv4() == v4).collect();
        let mut named = false;
        for net in wanted.iter().filter(|n| n.address.is_ipv4() == v4) {
            let exact =
                of_family.iter().find_map(|r| Some(AddressWish::Exactly(r.addresses(), r.number(net.address)?)));
            wishes.push(exact.ok_or_else(|| no_range(net.address, ranges))?);
            named = true;
        }
        if !named && !of_family.is_empty() {
            wishes.push(AddressWish::Next(of_family.iter().map(|r| r.addresses()).collect()));
        }
    }
    Ok(wishes)
}

fn no_range(address: IpAddr, ranges: &[IpRange]) -> Error {
    let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
    Error::invalid(format!("{address} is no address that a pod can have"))
        .hint(format!("the built-in network gives out addresses of {}", ranges.join(", ")))
}

/// The counters of every interface in the namespace pinned at `netns`.
///
/// # Errors
/// Names a namespace that can't be entered.
pub async fn interface_stats(netns: &Path) -> Result<Vec<InterfaceStats>> {
    let netns = netns.to_owned();
    crate::blocking("read interface statistics", move || pod::stats(&netns)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_gets_one_address_per_family_or_those_it_names() {
        let ranges = ["10.85.0.0/24", "10.86.0.0/24", "fd00::/64"].map(|r| r.parse().unwrap());
        let plain = wishes(&ranges, &[]).unwrap();
        assert!(matches!(&plain[..], [AddressWish::Next(v4), AddressWish::Next(v6)] if v4.len() == 2 && v6.len() == 1));
        let wanted = ["10.86.0.9".parse::<IpAddr>().unwrap().into()];
        let named = wishes(&ranges, &wanted).unwrap();
        assert!(matches!(&named[..], [AddressWish::Exactly(r, 9), AddressWish::Next(_)] if r.name == "10.86.0.0/24"));
        for bad in ["10.87.0.1", "10.85.0.1", "10.85.0.255"] {
            let e = wishes(&ranges, &[bad.parse::<IpAddr>().unwrap().into()]).unwrap_err().to_string();
            assert!(e.contains(bad) && e.contains("10.86.0.0/24"), "{e}");
        }
    }

    #[test]
    fn what_can_t_work_is_refused_before_anything_is_made() {
        let good = BuiltinConfig::default();
        check(&good).unwrap();
        for bad in [
            BuiltinConfig { bridge: "a-name-that-is-too-long".into(), ..good.clone() },
            BuiltinConfig { ranges: vec![], ..good.clone() },
            BuiltinConfig {
                ranges: ["10.0.0.0/8", "10.1.0.0/16"].map(|r| r.parse().unwrap()).to_vec(),
                ..good.clone()
            },
        ] {
            assert!(check(&bad).is_err(), "{bad:?}");
        }
    }
}
