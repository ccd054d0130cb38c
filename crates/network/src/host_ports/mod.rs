//! Ports of the node that lead to pods.
//!
//! ```text
//! add ──► claims in the database ──► elements in our nftables table (rules.rs)
//!                                └─► route_localnet, for 127.0.0.1
//!                                └─► tracked UDP peers forgotten
//! remove: the other way round
//! ```
//!
//! Of use with any network whose pods have addresses of their own: the built-in one
//! and CNI networks without `portmap`. What can't be had: `[::1]`, since IPv6 has no
//! `route_localnet`; it is refused by the node as if nobody listened.

mod events;
mod rules;

use events::{Change, Events};
pub(crate) use rules::Rules;

use crate::netlink::{Socket, conntrack, route};
use crate::turns::Turns;
use crate::{Net, PortMapping, Protocol};
use ::types::{Error, Result};
use fault::Step;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use store::{PortClaim, Store};

/// The setting by which an interface takes packets for 127/8.
const LOCALNET: &str = "route_localnet";
/// The database's key of the interfaces that we have given it to.
const OPENED: &str = "route_localnet";
/// The least time between two repairs of the table: somebody else may insist.
const REPAIR_PAUSE: Duration = Duration::from_secs(1);

/// One port of the node and the one address that it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Forward {
    pub(crate) protocol: Protocol,
    /// `None`: every address of the node of the target's family.
    pub(crate) host_ip: Option<IpAddr>,
    pub(crate) host_port: u16,
    pub(crate) target: Net,
    pub(crate) container_port: u16,
}

/// Who sees to it that answers to 127.0.0.1 are let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Localnet {
    /// The interface is prepared already.
    Done,
    /// The interface that leads to the pod is prepared.
    ByRoute,
}

/// The node's ports, in a table of our own; clones share it.
#[derive(Debug, Clone)]
pub struct HostPorts {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    rules: Mutex<Rules>,
    wire: Mutex<Wire>,
    turns: Turns,
    /// Held over the database's note of the interfaces that take packets for 127/8.
    opening: tokio::sync::Mutex<()>,
}

/// The way to the kernel. One socket for all changes, since closing one waits until
/// all that was taken out has been freed, some 10 ms.
#[derive(Debug, Default)]
struct Wire {
    socket: Option<Socket>,
    /// The ports of this socket and of those before it.
    ports: BTreeSet<u32>,
}

impl Wire {
    fn with<T>(&mut self, work: impl FnOnce(&Socket) -> Result<T>) -> Result<T> {
        // After an error it is not taken up again: answers may be left in it.
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => Socket::open(sys::netlink::Protocol::Netfilter)?,
        };
        let done = work(&socket);
        self.ports.insert(socket.port());
        if done.is_ok() {
            self.socket = Some(socket);
        }
        done
    }
}

impl HostPorts {
    /// Reads what is held. The table `inet TABLE` is made with the first change.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn open(table: &str, store: Store) -> Result<Self> {
        let mut pods = BTreeMap::new();
        for claims in store.network_claims().await? {
            let mut all = Vec::new();
            for (claim, target) in &claims.ports {
                match forwards_of(claim, target) {
                    Ok(some) => all.extend(some),
                    Err(e) => tracing::warn!(pod = claims.pod_id, error = %e, "a stored host port is left out"),
                }
            }
            if !all.is_empty() {
                pods.insert(claims.pod_id, all);
            }
        }
        let rules = Mutex::new(Rules::new(table.to_owned(), pods));
        Ok(Self {
            inner: Arc::new(Inner {
                store,
                rules,
                wire: Mutex::default(),
                turns: Turns::default(),
                opening: tokio::sync::Mutex::default(),
            }),
        })
    }

    /// Leads `ports` to the pod's `addresses`, of which the first of each family
    /// counts. All of them are there afterwards, or none.
    ///
    /// # Errors
    /// `AlreadyExists` naming the pod that holds one, `InvalidArgument` for a port
    /// that can't be had, `FailedPrecondition` where the kernel lacks nf_tables.
    pub async fn add(&self, pod_id: &str, addresses: &[Net], ports: &[PortMapping]) -> Result<()> {
        self.lead(pod_id, addresses, ports, Localnet::ByRoute).await
    }

    pub(crate) async fn lead(
        &self,
        pod_id: &str,
        addresses: &[Net],
        ports: &[PortMapping],
        localnet: Localnet,
    ) -> Result<()> {
        if ports.is_empty() {
            return Ok(());
        }
        let all = forwards(addresses, ports).map_err(|e| e.within(format!("host ports of pod {pod_id}")))?;
        let target = targets(addresses).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let (this, pod, claims) = (self.clone(), pod_id.to_owned(), claims(ports));
        crate::to_its_end("lead host ports", async move {
            let _turn = this.inner.turns.take(&pod).await;
            this.inner.store.claim_ports(&pod, claims, &target).await?;
            let (ports, of) = (this.clone(), pod.clone());
            let led = async {
                if localnet == Localnet::ByRoute {
                    this.let_loopback_in(&all).await?;
                }
                crate::blocking("lead host ports", move || {
                    fault::during(Step::NetworkPorts, || ports.install(&of, all))
                })
                .await
            };
            match led.await {
                Ok(()) => Ok(()),
                Err(e) => match this.take_away(&pod).await {
                    Ok(()) => Err(e),
                    Err(left) => Err(Error::new(e.kind(), format!("{e}; {left}"))),
                },
            }
        })
        .await
    }

    fn install(&self, pod_id: &str, all: Vec<Forward>) -> Result<()> {
        let udp = udp_ports(&all);
        self.change(|rules, socket| rules.set(socket, pod_id, all))?;
        // A peer that was sending before the port led here must come here now.
        self.forget(&udp);
        Ok(())
    }

    /// Takes a pod's ports away; none is success. Without its namespace, too.
    ///
    /// # Errors
    /// Names what is left; the ports stay claimed then.
    pub async fn remove(&self, pod_id: &str) -> Result<()> {
        let (this, pod) = (self.clone(), pod_id.to_owned());
        crate::to_its_end("take host ports away", async move {
            let _turn = this.inner.turns.take(&pod).await;
            this.take_away(&pod).await
        })
        .await
    }

    async fn take_away(&self, pod_id: &str) -> Result<()> {
        if self.rules().has(pod_id) {
            let (ports, pod) = (self.clone(), pod_id.to_owned());
            crate::blocking("take host ports away", move || {
                fault::during(Step::NetworkUnports, || ports.uninstall(&pod))
            })
            .await?;
        }
        self.inner.store.free_ports(pod_id).await?;
        Ok(())
    }

    fn uninstall(&self, pod_id: &str) -> Result<()> {
        let udp = self.change(|rules, socket| {
            let udp = udp_ports(rules.of(pod_id));
            rules.set(socket, pod_id, Vec::new()).map(|()| udp)
        })?;
        self.forget(&udp);
        Ok(())
    }

    /// The ports work without it, but for peers that never pause.
    fn forget(&self, udp: &[u16]) {
        if udp.is_empty() {
            return;
        }
        let done = self.change(|_, socket| conntrack::forget(socket, rules::number(Protocol::Udp), udp));
        if let Err(e) = done {
            tracing::warn!(error = %e, "UDP peers that send all the time may go on to where the port led before");
        }
    }

    /// Work on the rules, over the one socket.
    pub(crate) fn change<T>(&self, work: impl FnOnce(&mut Rules, &Socket) -> Result<T>) -> Result<T> {
        let mut rules = self.rules();
        let mut wire = self.inner.wire.lock().unwrap_or_else(PoisonError::into_inner);
        wire.with(|socket| work(&mut rules, socket))
    }

    /// Takes the ports of all pods but `live` away, and makes the table as it should
    /// be, whatever it was. Returns what was removed.
    ///
    /// # Errors
    /// Lists all that failed.
    pub async fn reconcile(&self, live: &BTreeSet<String>) -> Result<Vec<String>> {
        let (mut removed, mut failed) = (Vec::new(), Vec::new());
        let stored = self.inner.store.network_claims().await?;
        let stored = stored.into_iter().filter(|c| !c.ports.is_empty()).map(|c| c.pod_id);
        let known: BTreeSet<String> = self.rules().pods().into_iter().chain(stored).collect();
        for pod in known.iter().filter(|p| !live.contains(*p)) {
            match self.remove(pod).await {
                Ok(()) => removed.push(format!("host ports of pod {pod}")),
                Err(e) => failed.push(e),
            }
        }
        let ports = self.clone();
        match self.keep_loopback_out().await {
            Ok(()) => failed.extend(crate::blocking("make the table", move || ports.restore()).await.err()),
            Err(e) => failed.push(e),
        }
        Error::join("reconcile host ports", failed).map(|()| removed)
    }

    /// Lets answers to 127.0.0.1 in by the interfaces that lead to pods. Packets to 127/8
    /// from there are dropped by the table; so which ones they are is noted first, and
    /// they are as before when the table goes.
    async fn let_loopback_in(&self, all: &[Forward]) -> Result<()> {
        let targets: BTreeSet<IpAddr> = all.iter().map(|f| f.target.address).filter(IpAddr::is_ipv4).collect();
        let closed = crate::blocking("find the way to a pod", move || closed_to_loopback(&targets)).await?;
        if closed.is_empty() {
            return Ok(());
        }
        let _alone = self.inner.opening.lock().await;
        let noted = self.inner.store.meta(OPENED).await?.unwrap_or_default();
        let all: BTreeSet<&str> = noted.split(' ').chain(closed.iter().map(String::as_str)).collect();
        let all: Vec<&str> = all.into_iter().filter(|name| !name.is_empty()).collect();
        self.inner.store.set_meta(OPENED, &all.join(" ")).await?;
        crate::blocking("let answers to 127.0.0.1 in", move || {
            closed.iter().try_for_each(|name| route::set_conf("ipv4", name, LOCALNET, "1").map(drop))
        })
        .await
    }

    /// Before the table goes, which keeps neighbours away from 127/8 (CVE-2020-8558).
    async fn keep_loopback_out(&self) -> Result<()> {
        let _alone = self.inner.opening.lock().await;
        let opened = self.inner.store.meta(OPENED).await?.unwrap_or_default();
        if opened.is_empty() || !self.rules().is_empty() {
            return Ok(());
        }
        crate::blocking("keep neighbours away from 127/8", move || {
            opened.split(' ').try_for_each(|name| route::set_conf("ipv4", name, LOCALNET, "0").map(drop))
        })
        .await?;
        self.inner.store.set_meta(OPENED, "").await
    }

    fn restore(&self) -> Result<()> {
        self.change(|rules, socket| if rules.is_empty() { rules.release(socket).map(drop) } else { rules.make(socket) })
    }

    /// Makes the table again whenever somebody else takes it away or something out of
    /// it (a flush of the whole rule set, as a restart of the node's firewall is), for
    /// as long as this is awaited.
    ///
    /// # Errors
    /// When the kernel can't be listened to; never `Ok`.
    pub async fn keep(&self) -> Result<()> {
        let events = Events::open()?;
        let table = self.rules().table().to_owned();
        loop {
            let change = events.next(&table).await?;
            let ports = self.clone();
            match crate::blocking("mend the table", move || ports.mend(&change)).await {
                Ok(false) => {}
                Ok(true) => tokio::time::sleep(REPAIR_PAUSE).await,
                Err(e) => tracing::error!(error = %e, "host ports and masquerade are gone"),
            }
        }
    }

    fn mend(&self, change: &Change) -> Result<bool> {
        // The lock comes first: who is at it has noted its socket when he is done.
        let mut rules = self.rules();
        let mut wire = self.inner.wire.lock().unwrap_or_else(PoisonError::into_inner);
        let certain = match change {
            Change::By(ports) if ports.iter().all(|p| wire.ports.contains(p)) => return Ok(false),
            Change::By(_) => true,
            Change::Unknown => false,
        };
        wire.with(|socket| rules.mend(socket, certain))
    }

    /// Removes the table where no pod has a port and nothing else needs it; true
    /// when it is gone.
    ///
    /// # Errors
    /// Names the table.
    pub async fn release(&self) -> Result<bool> {
        self.keep_loopback_out().await?;
        let ports = self.clone();
        crate::blocking("release the table", move || ports.change(|rules, socket| rules.release(socket))).await
    }

    /// The rules; blocking work on them is a few system calls.
    pub(crate) fn rules(&self) -> MutexGuard<'_, Rules> {
        self.inner.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The interfaces that lead to these addresses and take nothing for 127/8, by name.
fn closed_to_loopback(targets: &BTreeSet<IpAddr>) -> Result<Vec<String>> {
    let socket = Socket::open(sys::netlink::Protocol::Route)?;
    let mut closed = BTreeSet::new();
    for target in targets {
        let Some(index) = route::interface_towards(&socket, *target)? else { continue };
        let Some(link) = route::link_at(&socket, index)?.filter(|l| l.name != "lo") else { continue };
        let conf = format!("/proc/sys/net/ipv4/conf/{}/{LOCALNET}", link.name);
        if std::fs::read_to_string(conf).is_ok_and(|v| v.trim() == "0") {
            closed.insert(link.name);
        }
    }
    Ok(closed.into_iter().collect())
}

fn udp_ports(all: &[Forward]) -> Vec<u16> {
    let ports: BTreeSet<u16> = all.iter().filter(|f| f.protocol == Protocol::Udp).map(|f| f.host_port).collect();
    ports.into_iter().collect()
}

/// The first address of each family.
fn targets(addresses: &[Net]) -> Vec<Net> {
    let of = |v4: bool| addresses.iter().find(|n| n.address.is_ipv4() == v4).copied();
    [of(true), of(false)].into_iter().flatten().collect()
}

fn claims(ports: &[PortMapping]) -> Vec<PortClaim> {
    let mut all: Vec<PortClaim> = Vec::new();
    for port in ports {
        let claim = PortClaim {
            protocol: port.protocol.name().to_owned(),
            host_ip: port.host_ip,
            host_port: port.host_port,
            container_port: port.container_port,
        };
        // The same mapping twice is one.
        if !all.contains(&claim) {
            all.push(claim);
        }
    }
    all
}

fn forwards(addresses: &[Net], ports: &[PortMapping]) -> Result<Vec<Forward>> {
    let targets = targets(addresses);
    let mut all = Vec::new();
    for port in ports {
        let some = forward(port, &targets)?;
        all.extend(some.into_iter().filter(|f| !all.contains(f)).collect::<Vec<_>>());
    }
    Ok(all)
}

/// A mapping once per family that it is for.
fn forward(port: &PortMapping, targets: &[Net]) -> Result<Vec<Forward>> {
    let PortMapping { protocol, container_port, host_port, host_ip } = *port;
    let what = || format!("host port {host_port}/{}", protocol.name());
    if host_port == 0 || container_port == 0 {
        return Err(Error::invalid(what()).because("a port is 1 to 65535"));
    }
    if host_ip == Some(std::net::Ipv6Addr::LOCALHOST.into()) {
        return Err(Error::invalid(format!("{} on ::1", what()))
            .because("IPv6 can't redirect its loopback address")
            .hint("use 127.0.0.1, or another address of the node"));
    }
    let meant = |t: &&Net| host_ip.is_none_or(|h| h.is_ipv4() == t.address.is_ipv4());
    let host_ip_only = host_ip.filter(|h| !h.is_unspecified());
    let all: Vec<Forward> = targets
        .iter()
        .filter(meant)
        .map(|target| Forward { protocol, host_ip: host_ip_only, host_port, target: *target, container_port })
        .collect();
    match host_ip {
        Some(ip) if all.is_empty() => {
            Err(Error::precondition(format!("{} on {ip}", what())).because("the pod has no address of that family"))
        }
        _ if all.is_empty() => Err(Error::precondition(what()).because("the pod has no address")),
        _ => Ok(all),
    }
}

/// What a stored claim stands for.
fn forwards_of(claim: &PortClaim, target: &str) -> Result<Vec<Forward>> {
    let protocol = match claim.protocol.as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        other => return Err(Error::invalid(format!("{other:?} is no protocol with ports"))),
    };
    let addresses = target.split_whitespace().map(str::parse).collect::<Result<Vec<Net>>>()?;
    let port = PortMapping {
        protocol,
        container_port: claim.container_port,
        host_port: claim.host_port,
        host_ip: claim.host_ip,
    };
    forward(&port, &addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(host_ip: Option<&str>) -> PortMapping {
        PortMapping {
            protocol: Protocol::Tcp,
            container_port: 80,
            host_port: 8080,
            host_ip: host_ip.map(|h| h.parse().unwrap()),
        }
    }

    #[test]
    fn a_host_ip_picks_the_family() {
        let both: Vec<Net> = ["10.85.0.2/16", "fd00::2/64"].map(|n| n.parse().unwrap()).to_vec();
        let count =
            |host_ip: Option<&str>, addresses: &[Net]| forwards(addresses, &[mapping(host_ip)]).map(|f| f.len());
        assert_eq!(count(None, &both).unwrap(), 2);
        assert_eq!(count(Some("0.0.0.0"), &both).unwrap(), 1);
        assert_eq!(count(Some("::"), &both).unwrap(), 1);
        assert_eq!(count(Some("127.0.0.1"), &both).unwrap(), 1);
        assert!(count(Some("fd00::9"), &both[..1]).unwrap_err().to_string().contains("of that family"));
        assert!(count(Some("::1"), &both).unwrap_err().to_string().contains("loopback"));
        assert!(count(None, &[]).is_err());
        let twice = forwards(&both, &[mapping(None), mapping(None)]).unwrap();
        assert_eq!(twice.len(), 2, "the same mapping twice is one");
    }
}
