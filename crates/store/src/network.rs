//! Addresses of pods and ports of the node: who holds which.
//!
//! A claim is committed before anything is made of it, and freed after all that was
//! made of it is gone. So a crash leaves at most claims that nobody uses, and those
//! are found by the pod that holds them.

use crate::{Durability, SqlExt, Store};
use rusqlite::{OptionalExtension, Transaction, params};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use types::{Error, ErrorKind, Result};

/// Addresses that can be given out, by their distance from the network's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressRange {
    /// Its name in the database and in errors: `10.85.0.0/16`.
    pub name: String,
    /// The network's own address, number 0.
    pub base: IpAddr,
    /// The lowest number that may be given out.
    pub first: i64,
    /// The highest one.
    pub last: i64,
}

/// One address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AddressWish {
    /// The next free one of the first of these ranges that has any.
    Next(Vec<AddressRange>),
    /// This number of this range.
    Exactly(AddressRange, i64),
}

/// A port of the node that a pod wants or holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortClaim {
    /// `tcp`, `udp`, `sctp`.
    pub protocol: String,
    /// The one address of the node; `None` is all of both families, an unspecified
    /// one all of its family.
    pub host_ip: Option<IpAddr>,
    /// The port of the node.
    pub host_port: u16,
    /// The port in the pod.
    pub container_port: u16,
}

impl PortClaim {
    /// Whether a packet could be meant for both.
    fn collides(&self, other: &Self) -> bool {
        let covers = |a: Option<IpAddr>, b: Option<IpAddr>| match (a, b) {
            (None, _) | (_, None) => true,
            (Some(a), Some(b)) => a.is_ipv4() == b.is_ipv4() && (a == b || a.is_unspecified() || b.is_unspecified()),
        };
        self.protocol == other.protocol && self.host_port == other.host_port && covers(self.host_ip, other.host_ip)
    }
}

/// What a pod holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkClaims {
    /// The pod.
    pub pod_id: String,
    /// Addresses from our ranges, each with its range's name.
    pub addresses: Vec<(String, IpAddr)>,
    /// Ports, each with the pod's addresses (`ADDRESS/BITS`) that it leads to,
    /// which are as its holder wrote them.
    pub ports: Vec<(PortClaim, String)>,
}

impl Store {
    /// Gives `pod_id` an address per wish, all of them or none. Numbers are given
    /// out in turn, so that an address rests as long as possible before its reuse.
    ///
    /// # Errors
    /// `ResourceExhausted` naming a range without a free address, `AlreadyExists`
    /// naming the pod that holds a wanted one, or when this pod has addresses.
    pub async fn claim_addresses(&self, pod_id: &str, wishes: Vec<AddressWish>) -> Result<Vec<IpAddr>> {
        let pod_id = pod_id.to_owned();
        self.write(Durability::Normal, move |t| {
            let held: i64 = t
                .prepare_cached("SELECT count(*) FROM pod_addresses WHERE pod_id=?1")
                .and_then(|mut s| s.query_row([&pod_id], |row| row.get(0)))
                .sql(|| format!("read the addresses of pod {pod_id}"))?;
            if held != 0 {
                return Err(Error::exists(format!("pod {pod_id} is attached to the network already")));
            }
            wishes.iter().map(|wish| claim_address(t, &pod_id, wish)).collect()
        })
        .await
    }

    /// Gives `pod_id` these ports of the node, all of them or none. `target` are the
    /// pod's addresses, kept as they are.
    ///
    /// # Errors
    /// `AlreadyExists`, naming the pod that holds one.
    pub async fn claim_ports(&self, pod_id: &str, claims: Vec<PortClaim>, target: &str) -> Result<()> {
        let (pod_id, target) = (pod_id.to_owned(), target.to_owned());
        self.write(Durability::Normal, move |t| {
            claims.iter().try_for_each(|claim| claim_port(t, &pod_id, claim, &target))
        })
        .await
    }

    /// Frees the ports of a pod; true when it held any.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn free_ports(&self, pod_id: &str) -> Result<bool> {
        self.free_from("host_ports", pod_id).await
    }

    /// Frees the addresses of a pod; true when it held any.
    ///
    /// # Errors
    /// When it can't be committed.
    pub async fn free_addresses(&self, pod_id: &str) -> Result<bool> {
        self.free_from("pod_addresses", pod_id).await
    }

    async fn free_from(&self, table: &'static str, pod_id: &str) -> Result<bool> {
        let pod_id = pod_id.to_owned();
        self.write_end(Durability::Normal, move |t| {
            let freed = t
                .prepare_cached(&format!("DELETE FROM {table} WHERE pod_id=?1"))
                .and_then(|mut s| s.execute([&pod_id]))
                .sql(|| format!("free what pod {pod_id} holds of the network"))?;
            Ok(freed != 0)
        })
        .await
    }

    /// What each pod holds, by its id. Asked of the writer, so that it is in order
    /// with claims that were sent before.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn network_claims(&self) -> Result<Vec<NetworkClaims>> {
        self.write(Durability::Normal, |t| {
            let mut all = BTreeMap::<String, NetworkClaims>::new();
            for (pod, range, address) in addresses(t)? {
                claims_of(&mut all, pod).addresses.push((range, address));
            }
            for (pod, claim, target) in ports(t, None)? {
                claims_of(&mut all, pod).ports.push((claim, target));
            }
            Ok(all.into_values().collect())
        })
        .await
    }
}

fn claims_of(all: &mut BTreeMap<String, NetworkClaims>, pod_id: String) -> &mut NetworkClaims {
    let empty = NetworkClaims { pod_id: pod_id.clone(), addresses: Vec::new(), ports: Vec::new() };
    all.entry(pod_id).or_insert(empty)
}

fn addresses(t: &Transaction<'_>) -> Result<Vec<(String, String, IpAddr)>> {
    let rows: Vec<(String, String, String)> = t
        .prepare_cached("SELECT pod_id, range, address FROM pod_addresses ORDER BY pod_id, rowid")
        .and_then(|mut s| s.query_map([], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))?.collect())
        .sql(|| "read the pods' addresses".into())?;
    // One that can't be read is nobody's: its pod loses the rest too at its end.
    Ok(rows.into_iter().filter_map(|(pod, range, address)| Some((pod, range, address.parse().ok()?))).collect())
}

type PortRow = (String, PortClaim, String);

/// All ports, or those of one number.
fn ports(t: &Transaction<'_>, number: Option<u16>) -> Result<Vec<PortRow>> {
    t.prepare_cached(
        "SELECT pod_id, protocol, host_ip, host_port, container_port, target FROM host_ports
         WHERE ?1 IS NULL OR host_port=?1 ORDER BY pod_id, rowid",
    )
    .and_then(|mut s| {
        s.query_map([number], |r| {
            let host_ip: String = r.get(2)?;
            let claim = PortClaim {
                protocol: r.get(1)?,
                host_ip: host_ip.parse().ok(),
                host_port: r.get(3)?,
                container_port: r.get(4)?,
            };
            Ok((r.get(0)?, claim, r.get(5)?))
        })?
        .collect()
    })
    .sql(|| "read the node's ports that pods hold".into())
}

fn claim_port(t: &Transaction<'_>, pod_id: &str, claim: &PortClaim, target: &str) -> Result<()> {
    let PortClaim { protocol, host_port, .. } = claim;
    if let Some((holder, _, _)) = ports(t, Some(*host_port))?.into_iter().find(|(_, c, _)| c.collides(claim)) {
        let whose = if holder == pod_id { "this pod already".to_owned() } else { format!("pod {holder}") };
        let what = format!("host port {host_port}/{protocol} of pod {pod_id} is held by {whose}");
        return Err(Error::exists(what));
    }
    let host_ip = claim.host_ip.map(|a| a.to_string()).unwrap_or_default();
    t.prepare_cached(
        "INSERT INTO host_ports (pod_id, protocol, host_ip, host_port, container_port, target)
         VALUES (?1,?2,?3,?4,?5,?6)",
    )
    .and_then(|mut s| s.execute(params![pod_id, protocol, host_ip, host_port, claim.container_port, target]))
    .sql(|| format!("store host port {host_port}/{protocol} of pod {pod_id}"))?;
    Ok(())
}

fn claim_address(t: &Transaction<'_>, pod_id: &str, wish: &AddressWish) -> Result<IpAddr> {
    let ranges = match wish {
        AddressWish::Exactly(range, number) => return claim_exactly(t, pod_id, range, *number),
        AddressWish::Next(ranges) => ranges,
    };
    for range in ranges {
        let Some(number) = next_free(t, range)? else { continue };
        t.prepare_cached("INSERT OR REPLACE INTO address_ranges (range, last_given) VALUES (?1,?2)")
            .and_then(|mut s| s.execute(params![range.name, number]))
            .sql(|| format!("note the last address given of {}", range.name))?;
        return hold(t, pod_id, range, number);
    }
    let names: Vec<&str> = ranges.iter().map(|r| r.name.as_str()).collect();
    let room: i64 = ranges.iter().map(|r| r.last - r.first + 1).sum();
    let names = names.join(", ");
    let what = format!("give pod {pod_id} an address of {names}: all {room} addresses are held by pods");
    Err(Error::new(ErrorKind::ResourceExhausted, what).hint("remove pods, or configure a larger range"))
}

fn claim_exactly(t: &Transaction<'_>, pod_id: &str, range: &AddressRange, number: i64) -> Result<IpAddr> {
    let address = plus(range.base, number);
    let holder: Option<String> = t
        .prepare_cached("SELECT pod_id FROM pod_addresses WHERE address=?1")
        .and_then(|mut s| s.query_row([address.to_string()], |r| r.get(0)).optional())
        .sql(|| format!("look who holds {address}"))?;
    match holder {
        Some(holder) => Err(Error::exists(format!("address {address} of pod {pod_id} is held by pod {holder}"))),
        None => hold(t, pod_id, range, number),
    }
}

fn hold(t: &Transaction<'_>, pod_id: &str, range: &AddressRange, number: i64) -> Result<IpAddr> {
    let address = plus(range.base, number);
    t.prepare_cached("INSERT INTO pod_addresses (range, number, address, pod_id) VALUES (?1,?2,?3,?4)")
        .and_then(|mut s| s.execute(params![range.name, number, address.to_string(), pod_id]))
        .sql(|| format!("give pod {pod_id} the address {address}"))?;
    Ok(address)
}

/// The next number after the last one given that nobody holds, beginning again at
/// the end.
fn next_free(t: &Transaction<'_>, range: &AddressRange) -> Result<Option<i64>> {
    let what = || format!("look for a free address of {}", range.name);
    let given: Option<i64> = t
        .prepare_cached("SELECT last_given FROM address_ranges WHERE range=?1")
        .and_then(|mut s| s.query_row([&range.name], |r| r.get(0)).optional())
        .sql(what)?;
    let from = match given {
        Some(n) if (range.first..range.last).contains(&n) => n + 1,
        _ => range.first,
    };
    let elsewhere = held_of_other_ranges(t, range)?;
    for (low, high) in [(from, range.last), (range.first, from - 1)] {
        let mut held = t
            .prepare_cached(
                "SELECT number FROM pod_addresses WHERE range=?1 AND number BETWEEN ?2 AND ?3 ORDER BY number",
            )
            .sql(what)?;
        let mut rows = held.query(params![range.name, low, high]).sql(what)?;
        let mut next_held = || rows.next().and_then(|row| row.map(|r| r.get::<_, i64>(0)).transpose()).sql(what);
        let mut held = next_held()?;
        for candidate in low..=high {
            if held == Some(candidate) {
                held = next_held()?;
            } else if !elsewhere.contains(&plus(range.base, candidate)) {
                return Ok(Some(candidate));
            }
        }
    }
    Ok(None)
}

/// Addresses that pods have from ranges of another name, which may be what this one
/// was called before the configuration changed.
fn held_of_other_ranges(t: &Transaction<'_>, range: &AddressRange) -> Result<BTreeSet<IpAddr>> {
    let all: Vec<String> = t
        .prepare_cached("SELECT address FROM pod_addresses WHERE range<>?1")
        .and_then(|mut s| s.query_map([&range.name], |r| r.get(0))?.collect())
        .sql(|| format!("look for addresses of {} that pods hold", range.name))?;
    Ok(all.iter().filter_map(|a| a.parse().ok()).filter(|a: &IpAddr| a.is_ipv4() == range.base.is_ipv4()).collect())
}

/// The address so many after `base`.
fn plus(base: IpAddr, number: i64) -> IpAddr {
    match base {
        IpAddr::V4(a) => Ipv4Addr::from(u32::from(a).wrapping_add(u32::try_from(number).unwrap_or(0))).into(),
        IpAddr::V6(a) => Ipv6Addr::from(u128::from(a).wrapping_add(u128::try_from(number).unwrap_or(0))).into(),
    }
}
