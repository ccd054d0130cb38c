//! Our table: what is in it, and how it changes.
//!
//! ```text
//! table inet longshore
//!   map  ports4     protocol . port           -> address . port    any address of the node
//!   map  bound4     protocol . host ip . port -> address . port    one address of the node
//!   set  backends4  protocol . address . port . host port          where they lead
//!   (the same with 6)
//!
//!   chain spoofed      prerouting, raw      127/8 that did not come by lo: drop
//!   chain prerouting   prerouting, dstnat   jump hostports
//!   chain output       output, dstnat       jump hostports
//!   chain hostports    not to this node, or to ::1: return; bound4, ports4, bound6, ports6: dnat
//!   chain postrouting  postrouting, srcnat  led to one of backends4: jump hairpin4
//!                                           from a pod's range: jump leaving4
//!   chain hairpin4     from 127/8, or from the network of the pod itself: masquerade
//!   chain leaving4     to a pod's range, or multicast: return; else masquerade
//! ```
//!
//! A pod's ports are elements of the maps, so that rules neither grow with the pods
//! nor change with them; only `hairpin` is written anew, when a network comes. Each change is one transaction. Where the kernel refuses a change because
//! somebody has altered the table, the table is made again, whole, likewise in one.

use super::Forward;
use crate::IpRange;
use crate::builtin::network_of;
use crate::netlink::Socket;
use crate::netlink::route::octets;
use crate::nft::{self, Base, Element, Expressions, Family, Field, Hook, Nat, R0, R1, R2, R4, R5, R6, Transaction};
use crate::{Net, Protocol};
use ::types::Result;
use std::collections::{BTreeMap, BTreeSet};

/// Register 3 of the concatenated IPv4 key.
const R3: u32 = R2 + 1;

/// What the table is to hold.
#[derive(Debug)]
pub(crate) struct Rules {
    table: String,
    /// Whose traffic to elsewhere is masqueraded.
    ranges: Vec<IpRange>,
    /// The built-in network stands, masqueraded or not: its bridge lets answers to 127/8
    /// in, and the table keeps everything else to 127/8 out.
    bridged: bool,
    pods: BTreeMap<String, Vec<Forward>>,
    /// The networks in the table's hairpin chains, by their names; `None` until it has
    /// been made.
    standing: Option<BTreeMap<String, Net>>,
}

impl Rules {
    pub(crate) fn new(table: String, pods: BTreeMap<String, Vec<Forward>>) -> Self {
        Self { table, ranges: Vec::new(), bridged: false, pods, standing: None }
    }

    pub(crate) fn table(&self) -> &str {
        &self.table
    }

    pub(crate) fn has(&self, pod_id: &str) -> bool {
        self.pods.contains_key(pod_id)
    }

    pub(crate) fn of(&self, pod_id: &str) -> &[Forward] {
        self.pods.get(pod_id).map(Vec::as_slice).unwrap_or_default()
    }

    /// Whether the table would hold nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.pods.is_empty() && !self.bridged
    }

    pub(crate) fn pods(&self) -> Vec<String> {
        self.pods.keys().cloned().collect()
    }

    /// Masquerades what these ranges of the built-in network send elsewhere, and makes the
    /// table if it isn't there: somebody may have flushed the whole rule set.
    ///
    /// # Errors
    /// Names the message that the kernel refused; nothing has changed then.
    pub(crate) fn masquerade(&mut self, socket: &Socket, ranges: &[IpRange]) -> Result<()> {
        self.bridged = true;
        if self.ranges == ranges && self.standing.is_some() && nft::table_exists(socket, &self.table)? {
            return Ok(());
        }
        self.ranges = ranges.to_vec();
        self.make(socket)
    }

    /// Gives a pod these ports instead of those that it has.
    ///
    /// # Errors
    /// Names the message that the kernel refused; nothing has changed then.
    pub(crate) fn set(&mut self, socket: &Socket, pod_id: &str, ports: Vec<Forward>) -> Result<()> {
        let new = elements(&ports);
        let old = match if ports.is_empty() { None } else { Some(ports) } {
            Some(ports) => self.pods.insert(pod_id.to_owned(), ports),
            None => self.pods.remove(pod_id),
        };
        let gone = elements(old.as_deref().unwrap_or_default());
        if new == gone && self.standing.is_some() {
            return Ok(());
        }
        let changed = match self.change(socket, &gone, &new) {
            Ok(true) => Ok(()),
            Ok(false) => self.make(socket),
            Err(e) => Err(e),
        };
        if changed.is_err() {
            match old {
                Some(ports) => self.pods.insert(pod_id.to_owned(), ports),
                None => self.pods.remove(pod_id),
            };
        }
        changed
    }

    /// Changes elements only; false where that can't be done.
    fn change(&mut self, socket: &Socket, gone: &Elements, new: &Elements) -> Result<bool> {
        let Some(standing) = &self.standing else { return Ok(false) };
        // What has been named once stays: a pod's ports come and go, its network rarely.
        let mut networks = self.networks();
        networks.extend(standing.iter().map(|(name, net)| (name.clone(), *net)));
        let mut t = Transaction::new(&self.table);
        for (set, elements) in gone {
            t.del_elements(set, &elements.iter().cloned().collect::<Vec<_>>());
        }
        for (set, elements) in new {
            t.add_elements(set, &elements.iter().cloned().collect::<Vec<_>>());
        }
        if standing.len() != networks.len() {
            for family in Family::BOTH {
                t.flush_chain(&named("hairpin", family));
                hairpin(&mut t, family, &networks);
            }
        }
        if t.commit(socket)?.is_err() {
            return Ok(false);
        }
        self.standing = Some(networks);
        Ok(true)
    }

    /// Makes the table anew, in place of one that is there.
    ///
    /// # Errors
    /// Names the message that the kernel refused; the old table stands then.
    pub(crate) fn make(&mut self, socket: &Socket) -> Result<()> {
        let mut t = Transaction::new(&self.table);
        t.add_table();
        t.del_table();
        t.add_table();
        let networks = self.networks();
        for family in Family::BOTH {
            sets(&mut t, family);
        }
        chains(&mut t);
        spoofed(&mut t);
        hostports(&mut t);
        for family in Family::BOTH {
            hairpin(&mut t, family, &networks);
            self.postrouting(&mut t, family);
        }
        let all: Vec<Forward> = self.pods.values().flatten().copied().collect();
        for (set, elements) in elements(&all) {
            t.add_elements(&set, &elements.into_iter().collect::<Vec<_>>());
        }
        t.commit(socket)??;
        self.standing = Some(networks);
        Ok(())
    }

    /// Makes a table anew that somebody else has removed or taken something out of:
    /// `certain` says that this is known. True when there was a need.
    ///
    /// # Errors
    /// Names the message that the kernel refused.
    pub(crate) fn mend(&mut self, socket: &Socket, certain: bool) -> Result<bool> {
        if self.standing.is_none() || !certain && nft::table_exists(socket, &self.table)? {
            return Ok(false);
        }
        tracing::warn!(table = self.table, "somebody else changed the nftables table; it is made again");
        self.make(socket).map(|()| true)
    }

    /// Removes the table where it would hold nothing.
    ///
    /// # Errors
    /// Names the message that the kernel refused.
    pub(crate) fn release(&mut self, socket: &Socket) -> Result<bool> {
        if !self.is_empty() {
            return Ok(false);
        }
        // A kernel without nf_tables has no table either.
        if self.standing.is_none() && !nft::table_exists(socket, &self.table).unwrap_or(false) {
            return Ok(true);
        }
        let mut t = Transaction::new(&self.table);
        t.add_table();
        t.del_table();
        t.commit(socket)??;
        self.standing = None;
        Ok(true)
    }

    /// The bridge is gone.
    pub(crate) fn forget_bridge(&mut self) {
        self.ranges.clear();
        self.bridged = false;
    }

    /// The networks of our ranges and of all pods with ports, by their names.
    fn networks(&self) -> BTreeMap<String, Net> {
        let ranges = self.ranges.iter().map(|r| r.network());
        let targets = self.pods.values().flatten().map(|f| network_of(f.target));
        ranges.chain(targets).map(|n| (n.to_string(), n)).collect()
    }

    fn postrouting(&self, t: &mut Transaction<'_>, family: Family) {
        let (port, host_port) = if family == Family::V4 { (R2, R3) } else { (R5, R6) };
        let backend = Expressions::default()
            .family(family)
            .destination_changed()
            .protocol(R0)
            .destination(family, R1)
            .port(port)
            .original_port(host_port)
            .in_set(&named("backends", family), R0)
            .jump(&named("hairpin", family));
        t.add_rule("postrouting", backend);
        let ours = || self.ranges.iter().map(|r| r.network()).filter(|n| Family::of(n.address) == family);
        let leaving = named("leaving", family);
        for range in ours() {
            let rule = Expressions::default().family(family).source(family, R0);
            t.add_rule("postrouting", rule.within(R0, &octets(range.address), range.prefix).jump(&leaving));
        }
        for range in ours() {
            let rule = Expressions::default().family(family).destination(family, R0);
            t.add_rule(&leaving, rule.within(R0, &octets(range.address), range.prefix).back());
        }
        let (multicast, prefix) = match family {
            Family::V4 => (vec![224, 0, 0, 0], 4),
            Family::V6 => ([&[0xff][..], &[0; 15]].concat(), 8),
        };
        t.add_rule(
            &leaving,
            Expressions::default().family(family).destination(family, R0).within(R0, &multicast, prefix).back(),
        );
        t.add_rule(&leaving, Expressions::default().nat(family, Nat::Masquerade { scatter: true }));
    }
}

fn named(what: &str, family: Family) -> String {
    format!("{what}{}", if family == Family::V4 { 4 } else { 6 })
}

fn sets(t: &mut Transaction<'_>, family: Family) {
    let address = if family == Family::V4 { Field::Ipv4 } else { Field::Ipv6 };
    let target = [address, Field::Port];
    t.add_set(&named("ports", family), &[Field::Protocol, Field::Port], Some(&target));
    t.add_set(&named("bound", family), &[Field::Protocol, address, Field::Port], Some(&target));
    t.add_set(&named("backends", family), &[Field::Protocol, address, Field::Port, Field::Port], None);
}

/// Priorities as `nft` names them: raw, dstnat, srcnat.
fn chains(t: &mut Transaction<'_>) {
    let base = |kind, hook, priority| Some(Base { kind, hook, priority });
    t.add_chain("spoofed", base("filter", Hook::Prerouting, -300));
    t.add_chain("prerouting", base("nat", Hook::Prerouting, -100));
    t.add_chain("output", base("nat", Hook::Output, -100));
    t.add_chain("postrouting", base("nat", Hook::Postrouting, 100));
    t.add_chain("hostports", None);
    for family in Family::BOTH {
        t.add_chain(&named("hairpin", family), None);
        t.add_chain(&named("leaving", family), None);
    }
}

/// CVE-2020-8558: `route_localnet`, without which 127.0.0.1 can't lead to a pod, also
/// lets in what a neighbour sends to 127.0.0.1, or in its name. Before NAT takes its
/// changes back, no packet from outside has either.
fn spoofed(t: &mut Transaction<'_>) {
    let rule = || Expressions::default().not_from_lo().family(Family::V4);
    let loopback = [127, 0, 0, 0];
    t.add_rule("spoofed", rule().destination(Family::V4, R0).within(R0, &loopback, 8).drop());
    t.add_rule("spoofed", rule().source(Family::V4, R0).within(R0, &loopback, 8).drop());
}

fn hostports(t: &mut Transaction<'_>) {
    t.add_rule("prerouting", Expressions::default().jump("hostports"));
    t.add_rule("output", Expressions::default().jump("hostports"));
    t.add_rule("hostports", Expressions::default().destined_elsewhere().back());
    // The answers to ::1 could not come back: IPv6 has no route_localnet. Refused at
    // once is better than lost.
    let own = std::net::Ipv6Addr::LOCALHOST.octets();
    let to_own = Expressions::default().family(Family::V6).destination(Family::V6, R0).within(R0, &own, 128);
    t.add_rule("hostports", to_own.back());
    for family in Family::BOTH {
        let (after_address, port) = if family == Family::V4 { (R2, R1) } else { (R5, R4) };
        let to = Nat::Destination { address: R0, port };
        let bound = Expressions::default().family(family).protocol(R0).destination(family, R1).port(after_address);
        t.add_rule("hostports", bound.map(&named("bound", family), R0, R0).nat(family, to));
        let any = Expressions::default().family(family).protocol(R0).port(R1);
        t.add_rule("hostports", any.map(&named("ports", family), R0, R0).nat(family, to));
    }
}

/// Whose answers would not come by the node otherwise: the node's own 127.0.0.1, the
/// pod itself, and its neighbours in the same network.
fn hairpin(t: &mut Transaction<'_>, family: Family, networks: &BTreeMap<String, Net>) {
    let chain = named("hairpin", family);
    let loopback = Net { address: [127, 0, 0, 0].into(), prefix: 8 };
    let sources = networks.values().copied().chain([loopback]);
    for network in sources.filter(|n| Family::of(n.address) == family) {
        let rule = Expressions::default().family(family).source(family, R0);
        let rule = rule.within(R0, &octets(network.address), network.prefix);
        t.add_rule(&chain, rule.nat(family, Nat::Masquerade { scatter: false }));
    }
}

/// Elements by the name of their set. A set, since two host addresses may share a
/// backend.
type Elements = BTreeMap<String, BTreeSet<Element>>;

fn elements(ports: &[Forward]) -> Elements {
    let mut all = Elements::new();
    for forward in ports {
        let family = Family::of(forward.target.address);
        let protocol = [number(forward.protocol), 0, 0, 0];
        let (host_port, port) = (padded(forward.host_port), padded(forward.container_port));
        let target = octets(forward.target.address);
        let value = Some([&target[..], &port].concat());
        let (set, key) = match forward.host_ip {
            None => ("ports", [&protocol[..], &host_port].concat()),
            Some(host_ip) => ("bound", [&protocol[..], &octets(host_ip), &host_port].concat()),
        };
        all.entry(named(set, family)).or_default().insert(Element { key, value });
        let key = [&protocol[..], &target, &port, &host_port].concat();
        all.entry(named("backends", family)).or_default().insert(Element { key, value: None });
    }
    all
}

/// The protocol's IP number.
pub(crate) fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

fn padded(port: u16) -> [u8; 4] {
    let [a, b] = port.to_be_bytes();
    [a, b, 0, 0]
}
