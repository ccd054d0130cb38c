//! What ADD answers, as the plugins of all versions from 0.3.0 on write it. Pure.

use crate::types::{Attachment, Net};
use ::types::{Error, Result, ResultExt};
use serde::Deserialize;
use serde_json::Value;
use std::net::IpAddr;

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Ip>,
}

#[derive(Deserialize)]
struct Interface {
    name: String,
    #[serde(default)]
    mac: String,
    /// Empty for interfaces of the node.
    #[serde(default)]
    sandbox: String,
    #[serde(default)]
    mtu: Option<u32>,
}

#[derive(Deserialize)]
struct Ip {
    address: Net,
    #[serde(default)]
    gateway: Option<String>,
    #[serde(default)]
    interface: Option<usize>,
}

/// The pod's side of a result: its interface `name`, and the addresses that are on
/// it or on none by name.
///
/// # Errors
/// When it is no result, or the pod was to be given an address by it and has none: a
/// kubelet takes a pod without one for broken, and makes it anew for ever (behaviours.md
/// section 6). A further network may be one of links alone.
pub fn attachment(result: &Value, name: &str, addressed: bool) -> Result<Attachment> {
    let answer: Answer =
        serde_json::from_value(result.clone()).context(|| "the answer to ADD is no result of CNI".into())?;
    let in_pod = |i: &Interface| !i.sandbox.is_empty();
    let is_ours = |ip: &&Ip| match ip.interface {
        None => true,
        Some(n) => answer.interfaces.get(n).is_some_and(|i| in_pod(i) && i.name == name),
    };
    let ours: Vec<&Ip> = answer.ips.iter().filter(is_ours).collect();
    if ours.is_empty() && addressed {
        return Err(Error::internal(format!("the network gave the pod no address for {name}"))
            .hint("does its configuration have an \"ipam\"?"));
    }
    let gateways = ours.iter().filter_map(|ip| ip.gateway.as_deref()).filter_map(|g| g.parse::<IpAddr>().ok());
    let own = answer.interfaces.iter().find(|i| in_pod(i) && i.name == name);
    Ok(Attachment {
        addresses: ours.iter().map(|ip| ip.address).collect(),
        gateways: gateways.collect(),
        mac: own.and_then(|i| i.mac.parse().ok()),
        // By convention the link's other end; a bridge comes before it.
        host_interface: answer.interfaces.iter().rfind(|i| !in_pod(i)).map(|i| i.name.clone()),
        mtu: own.and_then(|i| i.mtu).filter(|mtu| *mtu > 0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn results_of_all_versions_are_read() {
        let old = json!({"cniVersion": "0.3.1",
            "interfaces": [{"name": "br0", "mac": "02:00:00:00:00:01"}, {"name": "veth1", "mac": "02:00:00:00:00:02"},
                {"name": "eth0", "mac": "02:00:00:00:00:03", "sandbox": "/run/netns/x"}],
            "ips": [{"version": "4", "interface": 2, "address": "10.1.0.2/16", "gateway": "10.1.0.1"},
                {"version": "6", "interface": 2, "address": "fd00::2/64", "gateway": "fd00::1"}],
            "routes": [{"dst": "0.0.0.0/0"}], "dns": {}});
        let a = attachment(&old, "eth0", true).unwrap();
        assert_eq!(a.addresses, ["10.1.0.2/16".parse().unwrap(), "fd00::2/64".parse().unwrap()]);
        assert_eq!(a.gateways.len(), 2);
        assert_eq!(a.mac.unwrap().to_string(), "02:00:00:00:00:03");
        assert_eq!(a.host_interface.as_deref(), Some("veth1"));
        let new = json!({"cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "sandbox": "/x", "mtu": 1400}],
            "ips": [{"address": "fd00::2/64", "interface": 0}]});
        let a = attachment(&new, "eth0", true).unwrap();
        assert_eq!((a.mtu, a.mac, a.host_interface), (Some(1400), None, None));
    }

    #[test]
    fn addresses_of_other_interfaces_are_not_the_pods() {
        let mixed = json!({"interfaces": [{"name": "eth0"}, {"name": "eth0", "sandbox": "/x"}, {"name": "net1", "sandbox": "/x"}],
            "ips": [{"address": "10.0.0.1/8", "interface": 0}, {"address": "10.0.0.2/8", "interface": 1},
                {"address": "10.0.0.3/8", "interface": 2}, {"address": "10.0.0.4/8"}]});
        let got: Vec<String> =
            attachment(&mixed, "eth0", true).unwrap().addresses.iter().map(ToString::to_string).collect();
        assert_eq!(got, ["10.0.0.2/8", "10.0.0.4/8"]);
    }

    #[test]
    fn no_address_is_an_error_and_so_is_nonsense() {
        for (bad, reason) in [
            (json!({}), "no address"),
            (json!({"ips": [{"address": "10.0.0.1/8", "interface": 9}]}), "no address"),
            (json!({"ips": [{"address": "10.0.0.1"}]}), "no result"),
            (json!({"ips": 3}), "no result"),
        ] {
            let e = attachment(&bad, "eth0", true).unwrap_err().to_string();
            assert!(e.contains(reason), "{bad}: {e}");
        }
    }
}
