//! The crate's surface: whole specs, case by case and by property.

#![allow(clippy::unwrap_used)] // the lint spares only functions marked as tests

mod common;

use common::Inputs;
use longshore_spec::*;
use proptest::prelude::*;
use proto::cri;
use std::path::{Path, PathBuf};
use types::ErrorKind;

fn json(spec: &Spec) -> serde_json::Value {
    serde_json::to_value(spec).unwrap()
}

fn destinations(spec: &Spec) -> Vec<String> {
    spec.mounts().iter().flatten().map(|m| m.destination().display().to_string()).collect()
}

fn options(spec: &Spec, destination: &str) -> Vec<String> {
    let found = spec.mounts().iter().flatten().rfind(|m| m.destination() == Path::new(destination));
    found.unwrap_or_else(|| panic!("no mount at {destination}")).options().clone().unwrap()
}

fn mount(container_path: &str, host_path: &str) -> cri::Mount {
    cri::Mount { container_path: container_path.into(), host_path: host_path.into(), ..Default::default() }
}

#[test]
fn a_plain_container() {
    let made = Inputs::new().make().unwrap();
    let spec = json(&made.spec);
    assert_eq!(spec["root"], serde_json::json!({"path": "rootfs", "readonly": false}));
    assert_eq!(spec["process"]["args"], serde_json::json!(["true"]));
    assert_eq!(spec["process"]["user"], serde_json::json!({"uid": 0, "gid": 0, "additionalGids": [0]}));
    assert_eq!(spec["process"]["capabilities"]["bounding"].as_array().unwrap().len(), 14);
    assert_eq!(spec["linux"]["cgroupsPath"], "/longshore/pods/id");
    assert_eq!(spec["linux"]["resources"]["devices"], serde_json::json!([{"allow": false, "access": "rwm"}]));
    assert_eq!(spec["annotations"]["io.kubernetes.cri.container-type"], "container");
    assert_eq!(spec["annotations"]["io.kubernetes.cri.sandbox-id"], "pod-id");
    for absent in ["hostname", "hooks"] {
        assert!(spec.get(absent).is_none(), "{absent}");
    }
    for absent in ["rlimits", "oomScoreAdj", "apparmorProfile", "selinuxLabel"] {
        assert!(spec["process"].get(absent).is_none(), "{absent}");
    }
    let kinds: Vec<&str> =
        spec["linux"]["namespaces"].as_array().unwrap().iter().map(|n| n["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["mount", "pid", "network", "ipc", "uts", "cgroup"]);
    assert_eq!(
        destinations(&made.spec),
        [
            "/proc",
            "/dev",
            "/dev/pts",
            "/dev/mqueue",
            "/sys",
            "/sys/fs/cgroup",
            "/etc/hostname",
            "/etc/hosts",
            "/etc/resolv.conf",
            "/dev/shm"
        ]
    );
    assert!(made.warnings.is_empty() && made.ensure.is_empty());
}

#[test]
fn a_privileged_container_sees_the_host() {
    let mut inputs = Inputs::new();
    inputs.privileged();
    inputs.sc().masked_paths = vec!["/proc/kcore".into()];
    inputs.sc().seccomp = Some(cri::SecurityProfile::default());
    let null = HostDevice { path: "/dev/null".into(), block: false, major: 1, minor: 3, mode: 0o666, uid: 0, gid: 0 };
    inputs.host.all_devices = vec![null];
    let spec = inputs.make().unwrap().spec;
    let text = json(&spec);
    assert_eq!(text["linux"]["resources"]["devices"], serde_json::json!([{"allow": true, "access": "rwm"}]));
    assert_eq!(text["linux"]["devices"][0]["path"], "/dev/null");
    assert!(text["linux"].get("seccomp").is_none());
    assert_eq!(text["linux"]["maskedPaths"], serde_json::json!([]));
    assert!(options(&spec, "/sys").contains(&"rw".into()) && options(&spec, "/sys/fs/cgroup").contains(&"rw".into()));
    assert!(!text["linux"]["namespaces"].to_string().contains("cgroup"));

    inputs.pod = Default::default();
    let e = inputs.make().unwrap_err();
    assert!(e.kind() == ErrorKind::InvalidArgument && e.to_string().contains("privileged"), "{e}");
}

#[test]
fn apparmor_of_a_privileged_container_is_what_it_names() {
    let of = |kind: cri::security_profile::ProfileType, apparmor: bool| {
        let mut inputs = Inputs::new();
        inputs.privileged();
        inputs.node.apparmor = apparmor;
        let localhost_ref = if kind == cri::security_profile::ProfileType::Localhost { "mine" } else { "" };
        inputs.sc().apparmor =
            Some(cri::SecurityProfile { profile_type: kind.into(), localhost_ref: localhost_ref.into() });
        inputs.make().map(|made| json(&made.spec)["process"].get("apparmorProfile").cloned())
    };
    use cri::security_profile::ProfileType::{Localhost, RuntimeDefault, Unconfined};
    assert_eq!(of(Localhost, true).unwrap(), Some("mine".into()));
    assert_eq!(of(Localhost, false).unwrap_err().kind(), ErrorKind::FailedPrecondition, "it must not run without");
    assert_eq!((of(RuntimeDefault, true).unwrap(), of(Unconfined, true).unwrap()), (None, None));
}

#[test]
fn errors_name_container_field_and_value() {
    let mut inputs = Inputs::new();
    inputs.sc().run_as_username = "mallory".into();
    let e = inputs.make().unwrap_err().to_string();
    assert!(e.contains("container \"c\"") && e.contains("\"mallory\""), "{e}");
    let mut inputs = Inputs::new();
    inputs.sc().readonly_paths = vec!["proc/sys".into()];
    let e = inputs.make().unwrap_err().to_string();
    assert!(e.contains("readonly_paths") && e.contains("\"proc/sys\""), "{e}");
}

#[test]
fn cve_2025_0750_a_log_path_stays_in_its_directory() {
    for bad in ["/etc/x", "../x", "a/../../b"] {
        let mut inputs = Inputs::new();
        inputs.config.log_path = bad.into();
        assert_eq!(inputs.make().unwrap_err().kind(), ErrorKind::InvalidArgument, "{bad}");
    }
}

#[test]
fn mounts_are_sorted_and_take_the_place_of_defaults() {
    let mut inputs = Inputs::new();
    inputs.config.mounts = vec![
        mount("/data/deep/er", "/h/3"),
        mount("/data", "/h/1"),
        mount("etc/hosts", "/h/hosts"),
        mount("/data/deep", "/h/2"),
    ];
    inputs.volumes.insert("../../vol".into(), "/anon/vol".into());
    let made = inputs.make().unwrap();
    let all = destinations(&made.spec);
    assert_eq!(
        all[6..],
        ["/data", "/vol", "/etc/hosts", "/data/deep", "/etc/hostname", "/etc/resolv.conf", "/dev/shm", "/data/deep/er"]
    );
    assert_eq!(options(&made.spec, "/data"), ["rbind", "rprivate", "rw"]);
    assert_eq!(made.ensure.len(), 4);

    inputs.config.mounts = vec![mount("/dev", "/dev")];
    let all = destinations(&inputs.make().unwrap().spec);
    assert_eq!(all.iter().filter(|d| d.starts_with("/dev")).collect::<Vec<_>>(), ["/dev", "/dev/shm"]);
}

#[test]
fn propagation_and_read_only_are_checked() {
    let with = |change: &dyn Fn(&mut cri::Mount), inputs: &mut Inputs| {
        let mut m = mount("/m", "/h");
        change(&mut m);
        inputs.config.mounts = vec![m];
        inputs.make()
    };
    let mut inputs = Inputs::new();
    let both = |m: &mut cri::Mount| m.propagation = cri::MountPropagation::PropagationBidirectional as i32;
    let slave = |m: &mut cri::Mount| m.propagation = cri::MountPropagation::PropagationHostToContainer as i32;
    let made = with(&both, &mut inputs).unwrap();
    assert!(options(&made.spec, "/m").contains(&"rshared".into()));
    assert_eq!(json(&made.spec)["linux"]["rootfsPropagation"], "rshared");
    inputs.host.propagation.insert("/h".into(), Propagation::Slave);
    assert!(with(&both, &mut inputs).unwrap_err().to_string().contains("shared"));
    assert_eq!(json(&with(&slave, &mut inputs).unwrap().spec)["linux"]["rootfsPropagation"], "rslave");
    inputs.host.propagation.insert("/h".into(), Propagation::Private);
    assert!(with(&slave, &mut inputs).is_err());

    let rro = |m: &mut cri::Mount| (m.readonly, m.recursive_read_only) = (true, true);
    assert_eq!(with(&rro, &mut inputs).unwrap_err().kind(), ErrorKind::FailedPrecondition);
    inputs.node.recursive_read_only = true;
    assert!(options(&with(&rro, &mut inputs).unwrap().spec, "/m").contains(&"rro".into()));
    assert!(with(&|m| m.recursive_read_only = true, &mut inputs).is_err(), "writable");
    let shared_rro = |m: &mut cri::Mount| {
        rro(m);
        slave(m);
    };
    inputs.host.propagation.clear();
    assert!(with(&shared_rro, &mut inputs).is_err(), "not private");
    let mapped = |m: &mut cri::Mount| m.uid_mappings = vec![cri::IdMapping { host_id: 1, container_id: 0, length: 9 }];
    assert_eq!(with(&mapped, &mut inputs).unwrap_err().kind(), ErrorKind::FailedPrecondition);
    inputs.node.idmap_mounts = true;
    assert!(json(&with(&mapped, &mut inputs).unwrap().spec).to_string().contains("uidMappings"));
    for bad in ["", "h", "/a/../b"] {
        assert!(with(&|m| m.host_path = bad.into(), &mut inputs).is_err(), "{bad:?}");
    }
    assert!(with(&|m| m.container_path = "/..".into(), &mut inputs).is_err(), "the root");
}

#[test]
fn image_mounts_are_read_only_and_resolved_by_the_caller() {
    let mut inputs = Inputs::new();
    let mut m = mount("/img", "");
    m.image = Some(cri::ImageSpec { image: "sha256:1".into(), ..Default::default() });
    inputs.config.mounts = vec![m];
    assert!(inputs.make().unwrap_err().to_string().contains("read-only"));
    inputs.config.mounts[0].readonly = true;
    assert_eq!(inputs.make().unwrap_err().kind(), ErrorKind::NotFound);
    inputs.image_mounts.insert("/img".into(), vec!["/images/1".into()]);
    let made = inputs.make().unwrap();
    assert!(made.ensure.is_empty());
    assert_eq!(options(&made.spec, "/img"), ["rbind", "rprivate", "ro"]);
    inputs.image_mounts.insert("/img".into(), vec!["/l/2".into(), "/l/1".into()]);
    assert_eq!(options(&inputs.make().unwrap().spec, "/img"), ["ro", "lowerdir=/l/2:/l/1"]);
    inputs.config.mounts[0].host_path = "/h".into();
    assert_eq!(inputs.make().unwrap_err().kind(), ErrorKind::InvalidArgument);
    inputs.config.mounts[0].host_path.clear();
    inputs.config.mounts[0].mount_options = vec!["suid".into()];
    assert!(inputs.make().unwrap_err().to_string().contains("\"suid\""));
    inputs.image_mounts.insert("/img".into(), vec!["/l/a:b".into(), "/l/1".into()]);
    assert!(inputs.make().is_err());
}

#[test]
fn devices_come_with_their_rules() {
    let device =
        |path: &str, minor| HostDevice { path: path.into(), block: true, major: 8, minor, mode: 0o600, uid: 0, gid: 6 };
    let mut inputs = Inputs::new();
    let asked = cri::Device { container_path: "/dev/x".into(), host_path: "/dev/sd".into(), permissions: "wr".into() };
    inputs.config.devices = vec![asked];
    assert!(inputs.make().unwrap_err().to_string().contains("/dev/sd"));
    inputs.host.devices.insert("/dev/sd".into(), vec![device("/dev/sd/a", 1), device("/dev/sd/b/c", 2)]);
    let linux = json(&inputs.make().unwrap().spec)["linux"].clone();
    let paths: Vec<&str> = linux["devices"].as_array().unwrap().iter().map(|d| d["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["/dev/x/a", "/dev/x/b/c"]);
    let rule = serde_json::json!({"allow": true, "type": "b", "major": 8, "minor": 2, "access": "rw"});
    assert_eq!(linux["resources"]["devices"][2], rule);
    inputs.config.devices[0].permissions = "rx".into();
    assert!(inputs.make().is_err());
    inputs.config.devices.clear();
    inputs.config.cdi_devices = vec![cri::CdiDevice { name: "v/c=d".into() }];
    assert_eq!(inputs.make().unwrap_err().kind(), ErrorKind::Unimplemented);
}

#[test]
fn user_namespaces_map_ids_and_replace_what_the_kernel_refuses() {
    let mut inputs = Inputs::new();
    let line = IdMap { host: 100_000, container: 0, length: 1000 };
    let maps = IdMaps { uids: vec![line], gids: vec![line] };
    inputs.namespaces.user = Some(("/ns/user".into(), maps));
    let spec = json(&inputs.make().unwrap().spec);
    assert_eq!(spec["linux"]["namespaces"][0], serde_json::json!({"type": "user", "path": "/ns/user"}));
    assert_eq!(spec["linux"]["uidMappings"], serde_json::json!([{"hostID": 100_000, "containerID": 0, "size": 1000}]));
    inputs.namespaces.net = None;
    inputs.namespaces.ipc = None;
    let made = inputs.make().unwrap().spec;
    assert!(
        options(&made, "/sys").contains(&"rbind".into()) && options(&made, "/dev/mqueue").contains(&"rbind".into())
    );
    inputs.sc().run_as_user = Some(cri::Int64Value { value: 1000 });
    assert!(inputs.make().unwrap_err().to_string().contains("uid 1000"));
}

#[test]
fn pid_namespaces() {
    let mut inputs = Inputs::new();
    for (mode, expected) in [
        (PidMode::Private, Some(serde_json::json!({"type": "pid"}))),
        (PidMode::Host, None),
        (PidMode::Path("/proc/7/ns/pid".into()), Some(serde_json::json!({"type": "pid", "path": "/proc/7/ns/pid"}))),
    ] {
        inputs.namespaces.pid = mode;
        let spec = json(&inputs.make().unwrap().spec);
        let found = spec["linux"]["namespaces"].as_array().unwrap().iter().find(|n| n["type"] == "pid").cloned();
        assert_eq!(found, expected);
    }
}

#[test]
fn rlimits_are_the_operators_within_the_daemons_rights() {
    let mut inputs = Inputs::new();
    inputs.policy.rlimits = vec![Rlimit { name: "RLIMIT_NOFILE".into(), soft: 10, hard: u64::MAX }];
    inputs.node.hard_limits.insert("RLIMIT_NOFILE".into(), 4096);
    let with = |inputs: &Inputs| {
        let made = inputs.make().unwrap();
        (json(&made.spec)["process"]["rlimits"].clone(), made.warnings.len())
    };
    let expect = |hard: u64| serde_json::json!([{"type": "RLIMIT_NOFILE", "soft": 10, "hard": hard}]);
    assert_eq!(with(&inputs), (expect(u64::MAX), 0));
    inputs.node.bounding = capabilities_from_mask(!(1 << 24));
    assert_eq!(with(&inputs), (expect(4096), 1));
    inputs.policy.rlimits[0].name = "RLIMIT_NONSENSE".into();
    assert!(inputs.make().is_err());
}

#[test]
fn pids_limit_is_the_operators() {
    let mut inputs = Inputs::new();
    inputs.policy.pids_limit = Some(99);
    assert_eq!(json(&inputs.make().unwrap().spec)["linux"]["resources"]["pids"]["limit"], 99);
}

prop_compose! {
    fn any_mount()(container in "/?[a-c]?(/|\\.\\./|\\./|[a-c]){0,8}", host in "/[a-c]{1,3}", readonly in any::<bool>(), propagation in 0i32..3) -> cri::Mount {
        cri::Mount { container_path: container, host_path: host, readonly, propagation, ..Default::default() }
    }
}

proptest! {
    #[test]
    fn any_accepted_configuration_makes_a_sound_spec(
        mounts in proptest::collection::vec(any_mount(), 0..6),
        privileged in any::<bool>(),
        mask in any::<u64>(),
        uid in proptest::option::of(prop_oneof![9 => 0i64..70_000, 1 => -5i64..(1 << 33)]),
        groups in proptest::collection::vec(prop_oneof![19 => 0i64..70_000, 1 => -1i64..(1 << 32)], 0..4),
        masked in proptest::collection::vec("(/[a-z]{1,3}){1,2}", 0..3),
        env in proptest::collection::vec(("[A-Z]{1,2}", "[a-z\n]{0,4}"), 0..6),
        oom in -1100i64..1100,
    ) {
        let mut inputs = Inputs::new();
        if privileged {
            inputs.privileged();
        }
        inputs.node.bounding = capabilities_from_mask(mask);
        inputs.config.mounts = mounts;
        inputs.config.envs = env.iter().map(|(k, v)| cri::KeyValue { key: k.clone(), value: v.clone().into_bytes() }).collect();
        inputs.config.linux.as_mut().unwrap().resources = Some(cri::LinuxContainerResources { oom_score_adj: oom, ..Default::default() });
        let sc = inputs.sc();
        sc.run_as_user = uid.map(|value| cri::Int64Value { value });
        sc.supplemental_groups = groups.clone();
        sc.masked_paths = masked.clone();
        let too_large = |v: &i64| *v < 0 || *v > i64::from(i32::MAX);
        let made = match inputs.make() {
            Ok(made) => made,
            Err(e) => {
                prop_assert_eq!(e.kind(), ErrorKind::InvalidArgument);
                return Ok(());
            }
        };
        prop_assert!(!uid.iter().any(too_large) && !groups.iter().any(too_large), "overflow accepted");

        let spec = &made.spec;
        for m in spec.mounts().iter().flatten() {
            let d = m.destination().display().to_string();
            prop_assert!(d.starts_with('/') && d.len() > 1 && !d.split('/').any(|p| p == ".."), "{}", d);
        }
        let process = spec.process().as_ref().unwrap();
        let caps = process.capabilities().as_ref().unwrap();
        prop_assert!(caps.inheritable().as_ref().unwrap().is_empty() && caps.ambient().as_ref().unwrap().is_empty());
        prop_assert!(caps.bounding().as_ref().unwrap().is_subset(&inputs.node.bounding));
        let mut keys: Vec<&str> = process.env().iter().flatten().map(|e| e.split_once('=').unwrap().0).collect();
        let all = keys.len();
        keys.sort_unstable();
        keys.dedup();
        prop_assert_eq!(keys.len(), all);
        let linux = spec.linux().as_ref().unwrap();
        let expected = if privileged { vec![] } else { masked };
        prop_assert_eq!(linux.masked_paths().as_ref().unwrap(), &expected);
        prop_assert!(process.oom_score_adj().is_some_and(|v| (-1000..=1000).contains(&v)));
        let adj = process.oom_score_adj().unwrap();
        prop_assert!(mask & (1 << 24) != 0 || adj >= 0, "{} without the right", adj);
        let groups = process.user().additional_gids().clone().unwrap();
        prop_assert!(groups.contains(&process.user().gid()) && groups.is_sorted());

        let text = serde_json::to_string(spec).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Spec>(&text).unwrap(), spec);
        let paths: Vec<PathBuf> = made.ensure.clone();
        prop_assert_eq!(paths.len(), inputs.config.mounts.len());
    }
}
