//! What plugins are told of a pod: CNI_ARGS, and the values of the capabilities that
//! they may ask for. Pure.

use crate::types::{AttachRequest, Net};
use ::types::{Error, Result};
use serde_json::{Map, Value, json};

/// The bandwidth plugin wants a burst beside each rate; this is what Kubernetes'
/// runtimes give, in bits.
const BURST: u64 = i32::MAX as u64;

/// The pod's name and ids, as Kubernetes' runtimes pass them.
///
/// # Errors
/// `InvalidArgument` where a value would be read as two.
pub fn args(request: &AttachRequest) -> Result<Vec<(String, String)>> {
    let all = [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", request.namespace.as_str()),
        ("K8S_POD_NAME", request.name.as_str()),
        ("K8S_POD_INFRA_CONTAINER_ID", request.pod_id.as_str()),
        ("K8S_POD_UID", request.uid.as_str()),
    ];
    if let Some((key, value)) = all.iter().find(|(_, v)| v.contains([';', '\0'])) {
        return Err(Error::invalid(format!("{key} {value:?} can't be told to CNI plugins: it has a `;` in it")));
    }
    Ok(all.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
}

/// The values of all capabilities that there is something to tell of; `pod_cidr` are
/// the networks that the node's pods have their addresses from, one of each family.
pub fn capabilities(request: &AttachRequest, pod_cidr: &[Net]) -> Map<String, Value> {
    let mut all = Map::new();
    if !pod_cidr.is_empty() {
        // A set of ranges for each address that a pod gets.
        let sets: Vec<Value> = pod_cidr.iter().map(|net| json!([{ "subnet": net.to_string() }])).collect();
        all.insert("ipRanges".into(), sets.into());
    }
    if !request.ports.is_empty() {
        let ports: Vec<Value> = request
            .ports
            .iter()
            .map(|p| {
                json!({
                    "hostPort": p.host_port,
                    "containerPort": p.container_port,
                    "protocol": p.protocol.name(),
                    "hostIP": p.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
                })
            })
            .collect();
        all.insert("portMappings".into(), ports.into());
    }
    let mut bandwidth = Map::new();
    for (name, rate) in [("ingress", request.bandwidth.ingress), ("egress", request.bandwidth.egress)] {
        if let Some(rate) = rate {
            bandwidth.insert(format!("{name}Rate"), rate.into());
            bandwidth.insert(format!("{name}Burst"), BURST.into());
        }
    }
    if !bandwidth.is_empty() {
        all.insert("bandwidth".into(), bandwidth.into());
    }
    if let Some(dns) = &request.dns {
        let dns = json!({ "servers": dns.servers, "searches": dns.searches, "options": dns.options });
        all.insert("dns".into(), dns);
    }
    if !request.static_ips.is_empty() {
        let ips: Vec<Value> = request.static_ips.iter().map(|ip| ip.to_string().into()).collect();
        all.insert("ips".into(), ips.into());
    }
    if let Some(mac) = request.mac {
        all.insert("mac".into(), mac.to_string().into());
    }
    if !request.cgroup.is_empty() {
        all.insert("cgroupPath".into(), request.cgroup.clone().into());
    }
    if let Some(device) = &request.device_id {
        all.insert("deviceID".into(), device.clone().into());
    }
    if !request.annotations.is_empty() {
        // containerd's and CRI-O's name of it.
        let annotations = request.annotations.iter().map(|(k, v)| (k.clone(), v.clone().into()));
        all.insert("io.kubernetes.cri.pod-annotations".into(), Map::from_iter(annotations).into());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Bandwidth, Dns, PortMapping, Protocol};

    fn request() -> AttachRequest {
        AttachRequest {
            pod_id: "id".into(),
            name: "web".into(),
            namespace: "default".into(),
            uid: "u".into(),
            netns: "/run/netns/x".into(),
            ports: vec![],
            static_ips: vec![],
            mac: None,
            bandwidth: Bandwidth::default(),
            dns: None,
            cgroup: String::new(),
            device_id: None,
            annotations: Default::default(),
        }
    }

    #[test]
    fn only_what_there_is_is_told() {
        assert!(capabilities(&request(), &[]).is_empty());
        let port = PortMapping { protocol: Protocol::Udp, container_port: 53, host_port: 5353, host_ip: None };
        let full = AttachRequest {
            ports: vec![port],
            static_ips: vec!["10.0.0.7/24".parse().unwrap()],
            mac: Some("02:00:00:00:00:07".parse().unwrap()),
            bandwidth: Bandwidth { ingress: Some(1_000_000), egress: None },
            dns: Some(Dns { servers: vec!["10.0.0.1".into()], ..Dns::default() }),
            cgroup: "/kubepods/x".into(),
            device_id: Some("0000:01:00.0".into()),
            annotations: [("a".to_owned(), "b".to_owned())].into(),
            ..request()
        };
        assert_eq!(
            Value::from(capabilities(&full, &["10.1.0.0/24".parse().unwrap(), "fd01::/64".parse().unwrap()])),
            json!({
                "ipRanges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd01::/64"}]],
                "portMappings": [{"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": ""}],
                "ips": ["10.0.0.7/24"],
                "mac": "02:00:00:00:00:07",
                "bandwidth": {"ingressRate": 1_000_000, "ingressBurst": 2_147_483_647},
                "dns": {"servers": ["10.0.0.1"], "searches": [], "options": []},
                "cgroupPath": "/kubepods/x",
                "deviceID": "0000:01:00.0",
                "io.kubernetes.cri.pod-annotations": {"a": "b"},
            })
        );
    }

    #[test]
    fn no_name_can_add_an_argument() {
        let args = args(&request()).unwrap();
        assert_eq!(args[0], ("IgnoreUnknown".to_owned(), "1".to_owned()));
        assert_eq!(args[3].1, "id");
        let evil = AttachRequest { name: "x;K8S_POD_UID=y".into(), ..request() };
        assert!(super::args(&evil).is_err());
    }
}
