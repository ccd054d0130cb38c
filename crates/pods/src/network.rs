//! From a pod's CRI configuration to what its network is asked for. Pure.
//!
//! | annotation | what it asks for |
//! |---|---|
//! | `kubernetes.io/ingress-bandwidth`, `kubernetes.io/egress-bandwidth` | the most traffic, as a Kubernetes quantity in bits per second: `10M` |
//! | `io.longshore.network/ips` | addresses, separated by commas: `10.88.0.7,fd00::7`, each with or without `/BITS` |
//! | `io.longshore.network/mac` | the hardware address: `0a:58:0a:58:00:07` |
//! | `io.longshore.network/device-id` | the device that CNI plugins are told (`deviceID`) |
//!
//! Plugins that ask for the capability `io.kubernetes.cri.pod-annotations` get all
//! annotations, and may have their own.

use network::{AttachRequest, Bandwidth, Dns, Mac, Net, PortMapping, Protocol};
use proto::cri::{self, PodSandboxConfig};
use std::net::IpAddr;
use std::path::Path;
use types::{Error, Result};

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
const IPS: &str = "io.longshore.network/ips";
const MAC: &str = "io.longshore.network/mac";
const DEVICE: &str = "io.longshore.network/device-id";

/// Kubernetes' own bounds on bandwidths, in bits per second.
const BANDWIDTHS: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// What the network of the pod with this id and namespace is asked for.
///
/// # Errors
/// `InvalidArgument`, naming the field or annotation.
pub fn request(id: &str, config: &PodSandboxConfig, netns: &Path) -> Result<AttachRequest> {
    let meta = config.metadata.clone().unwrap_or_default();
    let note = |key: &str| config.annotations.get(key).map(|v| v.trim()).filter(|v| !v.is_empty());
    let at = |key: &'static str| move |e: Error| e.within(format!("the annotation {key}"));
    let limit = |key: &'static str| note(key).map(bandwidth).transpose().map_err(at(key));
    let ips = note(IPS).unwrap_or_default().split(',').map(str::trim).filter(|ip| !ip.is_empty());
    Ok(AttachRequest {
        pod_id: id.to_owned(),
        name: meta.name,
        namespace: meta.namespace,
        uid: meta.uid,
        netns: netns.to_owned(),
        ports: ports(&config.port_mappings)?,
        static_ips: ips.map(address).collect::<Result<_>>().map_err(at(IPS))?,
        mac: note(MAC).map(str::parse::<Mac>).transpose().map_err(at(MAC))?,
        bandwidth: Bandwidth { ingress: limit(INGRESS)?, egress: limit(EGRESS)? },
        dns: config.dns_config.as_ref().map(|dns| Dns {
            servers: dns.servers.clone(),
            searches: dns.searches.clone(),
            options: dns.options.clone(),
        }),
        cgroup: config.linux.as_ref().map(|l| l.cgroup_parent.clone()).unwrap_or_default(),
        device_id: note(DEVICE).map(str::to_owned),
        annotations: config.annotations.clone().into_iter().collect(),
    })
}

/// The mappings that name a port of the node: a kubelet also sends those that don't.
fn ports(mappings: &[cri::PortMapping]) -> Result<Vec<PortMapping>> {
    let port = |what: &str, n: i32| {
        let valid = u16::try_from(n).ok().filter(|n| *n > 0);
        valid.ok_or_else(|| Error::invalid(format!("a port mapping's {what} {n} is not between 1 and 65535")))
    };
    let mut ports = Vec::new();
    for mapping in mappings.iter().filter(|m| m.host_port != 0) {
        let protocol = match cri::Protocol::try_from(mapping.protocol) {
            Ok(cri::Protocol::Tcp) => Protocol::Tcp,
            Ok(cri::Protocol::Udp) => Protocol::Udp,
            Ok(cri::Protocol::Sctp) => Protocol::Sctp,
            Err(_) => return Err(Error::invalid(format!("a port mapping's protocol {} is unknown", mapping.protocol))),
        };
        let host_ip = match mapping.host_ip.as_str() {
            "" => None,
            ip => Some(
                ip.parse::<IpAddr>()
                    .map_err(|_| Error::invalid(format!("a port mapping's host address {ip:?} is none")))?,
            ),
        };
        ports.push(PortMapping {
            protocol,
            container_port: port("container port", mapping.container_port)?,
            host_port: port("host port", mapping.host_port)?,
            // 0.0.0.0 and :: are all addresses of their own family, and none of the other.
            host_ip,
        });
    }
    Ok(ports)
}

fn address(text: &str) -> Result<Net> {
    if text.contains('/') {
        return text.parse();
    }
    let address: Result<IpAddr, _> = text.parse();
    address.map(Net::from).map_err(|_| Error::invalid(format!("{text:?} is no address")))
}

/// A Kubernetes quantity of bits per second, rounded up to whole bits.
fn bandwidth(text: &str) -> Result<u64> {
    let bad = || Error::invalid(format!("{text:?} is no bandwidth")).hint("bits per second, such as 500k, 10M or 1Gi");
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let exponent = suffix.strip_prefix(['e', 'E']).and_then(|e| e.parse::<i32>().ok());
    let factor = match suffix {
        "m" => 1e-3,
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "Ki" => 1024f64,
        "Mi" => 1024f64.powi(2),
        "Gi" => 1024f64.powi(3),
        "Ti" => 1024f64.powi(4),
        _ => 10f64.powi(exponent.filter(|e| (-15..=15).contains(e)).ok_or_else(bad)?),
    };
    let bits = number.parse::<f64>().map_err(|_| bad())? * factor;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates, and is then refused")]
    let bits = bits.ceil() as u64;
    if BANDWIDTHS.contains(&bits) {
        return Ok(bits);
    }
    Err(Error::invalid(format!("a bandwidth of {bits} bits per second is not between 1k and 1P")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::cri::DnsConfig;

    fn of(annotations: &[(&str, &str)]) -> Result<AttachRequest> {
        let annotations = annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        request("id", &PodSandboxConfig { annotations, ..Default::default() }, Path::new("/run/netns/x"))
    }

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, bits) in [
            ("1000", 1_000),
            ("10M", 10_000_000),
            ("1.5k", 1_500),
            ("1Gi", 1 << 30),
            ("2e6", 2_000_000),
            ("1E3", 1_000),
            ("1000000m", 1_000),
            ("1P", 1_000_000_000_000_000),
        ] {
            assert_eq!(bandwidth(text).unwrap(), bits, "{text}");
        }
        for bad in ["", "M", "999", "2P", "-5M", "10MB", "1e99", "1.2.3M", "10 M", "inf", "0x10"] {
            assert!(bandwidth(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn annotations_ask_for_addresses_and_limits() {
        let r =
            of(&[(INGRESS, "1M"), (IPS, "10.0.0.7, fd00::7/64"), (MAC, "02:00:00:00:00:07"), (DEVICE, "0000:03:00.1")])
                .unwrap();
        assert_eq!(r.bandwidth, Bandwidth { ingress: Some(1_000_000), egress: None });
        let ips: Vec<String> = r.static_ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.0.0.7/32", "fd00::7/64"]);
        assert_eq!(
            (r.mac.unwrap().to_string().as_str(), r.device_id.as_deref()),
            ("02:00:00:00:00:07", Some("0000:03:00.1"))
        );
        assert_eq!(r.annotations.len(), 4);
        for (key, bad) in [(EGRESS, "fast"), (IPS, "10.0.0"), (IPS, "10.0.0.1/99"), (MAC, "01:00:00:00:00:00")] {
            let e = of(&[(key, bad)]).unwrap_err();
            assert!(e.kind() == types::ErrorKind::InvalidArgument && e.to_string().contains(key), "{e}");
        }
        assert_eq!(of(&[]).unwrap().static_ips, []);
    }

    #[test]
    fn only_mappings_with_a_port_of_the_node_count() {
        let mapping = |host_port, container_port, host_ip: &str| cri::PortMapping {
            protocol: cri::Protocol::Udp.into(),
            host_port,
            container_port,
            host_ip: host_ip.into(),
        };
        let got = ports(&[mapping(0, 80, ""), mapping(8080, 80, "0.0.0.0"), mapping(81, 80, "::1")]).unwrap();
        assert_eq!(got.len(), 2);
        let ipv4_alone = Some(IpAddr::from([0, 0, 0, 0]));
        assert_eq!((got[0].host_port, got[0].host_ip, got[0].protocol), (8080, ipv4_alone, Protocol::Udp));
        assert_eq!(ports(&[mapping(80, 80, "")]).unwrap()[0].host_ip, None);
        assert_eq!(got[1].host_ip, Some("::1".parse().unwrap()));
        for bad in [mapping(70_000, 80, ""), mapping(80, 0, ""), mapping(-1, 80, ""), mapping(80, 80, "localhost")] {
            assert!(ports(&[bad]).is_err());
        }
        assert!(ports(&[cri::PortMapping { protocol: 9, ..mapping(1, 1, "") }]).is_err());
    }

    #[test]
    fn dns_and_cgroup_are_passed_on() {
        let config = PodSandboxConfig {
            dns_config: Some(DnsConfig { servers: vec!["10.0.0.1".into()], ..Default::default() }),
            linux: Some(cri::LinuxPodSandboxConfig { cgroup_parent: "/kubepods/x".into(), ..Default::default() }),
            ..Default::default()
        };
        let r = request("id", &config, Path::new("/n")).unwrap();
        assert_eq!((r.dns.unwrap().servers.len(), r.cgroup.as_str()), (1, "/kubepods/x"));
    }
}
