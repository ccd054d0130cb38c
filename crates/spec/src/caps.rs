//! Capabilities: from CRI's names to the five sets.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use proto::cri;
use types::{Error, Result};

/// Every capability up to the newest, CAP_CHECKPOINT_RESTORE.
pub const ALL: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// What a container has unless CRI says otherwise: containerd's set.
pub const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// The set that a kernel bit mask means, bit 0 being CAP_CHOWN (the `CapBnd` line
/// of /proc/PID/status). Bits beyond the newest capability are passed over.
pub fn from_mask(mask: u64) -> Capabilities {
    ALL.iter().enumerate().filter(|(bit, _)| mask & (1 << bit) != 0).map(|(_, cap)| *cap).collect()
}

/// One capability by its name, with or without `CAP_`, in any case of letters.
fn parse(field: &str, name: &str) -> Result<Capability> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    ALL.iter()
        .copied()
        .find(|cap| cap.to_string() == bare)
        .ok_or_else(|| Error::invalid(format!("{field}: unknown capability {name:?}")))
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL") || name.eq_ignore_ascii_case("CAP_ALL")
}

fn parse_list(field: &str, names: &[String]) -> Result<Vec<Capability>> {
    names.iter().filter(|n| !is_all(n)).map(|n| parse(field, n)).collect()
}

/// The container's capability sets, none of them beyond `node`.
///
/// ALL is applied before single names, adding before dropping. Ambient ones are
/// in every set, as the kernel wants it; the inheritable set is empty otherwise
/// (CVE-2022-24769, CVE-2022-29162, CVE-2022-27650).
///
/// # Errors
/// `InvalidArgument` that names an unknown capability.
pub(crate) fn sets(
    wanted: Option<&cri::Capability>,
    privileged: bool,
    node: &Capabilities,
    warnings: &mut Vec<String>,
) -> Result<LinuxCapabilities> {
    let empty = cri::Capability::default();
    let wanted = wanted.unwrap_or(&empty);
    let added = parse_list("capabilities.add", &wanted.add_capabilities)?;
    let dropped = parse_list("capabilities.drop", &wanted.drop_capabilities)?;
    let ambient: Capabilities =
        parse_list("capabilities.add_ambient", &wanted.add_ambient_capabilities)?.into_iter().collect();

    let mut set: Capabilities = DEFAULT.into_iter().collect();
    if privileged || wanted.add_capabilities.iter().any(|n| is_all(n)) {
        set = ALL.into_iter().collect();
    }
    // A privileged container has everything, whatever else is said.
    if !privileged {
        if wanted.drop_capabilities.iter().any(|n| is_all(n)) {
            set.clear();
        }
        set.extend(added);
        set.extend(&ambient);
        for cap in &dropped {
            set.remove(cap);
        }
    }
    let ambient: Capabilities = ambient.into_iter().filter(|c| set.contains(c) && node.contains(c)).collect();

    let mut missing: Vec<String> = set.difference(node).map(|c| format!("CAP_{c}")).collect();
    missing.sort();
    if !missing.is_empty() {
        warnings.push(format!("not given, since this node's runtime lacks them: {}", missing.join(", ")));
    }
    set.retain(|c| node.contains(c));

    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(set.clone()));
    sets.set_effective(Some(set.clone()));
    sets.set_permitted(Some(set));
    sets.set_inheritable(Some(ambient.clone()));
    sets.set_ambient(Some(ambient));
    Ok(sets)
}

/// No capability in any set.
pub(crate) fn none() -> LinuxCapabilities {
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(Capabilities::new()));
    sets.set_effective(Some(Capabilities::new()));
    sets.set_permitted(Some(Capabilities::new()));
    sets.set_inheritable(Some(Capabilities::new()));
    sets.set_ambient(Some(Capabilities::new()));
    sets
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cap(add: &[&str], drop: &[&str], ambient: &[&str]) -> cri::Capability {
        let own = |l: &[&str]| l.iter().map(ToString::to_string).collect();
        cri::Capability {
            add_capabilities: own(add),
            drop_capabilities: own(drop),
            add_ambient_capabilities: own(ambient),
        }
    }

    fn node() -> Capabilities {
        ALL.into_iter().filter(|c| *c != Capability::SysResource).collect()
    }

    fn bounding(wanted: &cri::Capability, privileged: bool) -> Capabilities {
        sets(Some(wanted), privileged, &node(), &mut Vec::new()).unwrap().bounding().clone().unwrap()
    }

    #[test]
    fn names_are_read_with_and_without_prefix() {
        let set = bounding(&cap(&["cap_net_admin", "SYS_TIME"], &["CAP_CHOWN", "kill"], &[]), false);
        assert!(set.contains(&Capability::NetAdmin) && set.contains(&Capability::SysTime));
        assert!(!set.contains(&Capability::Chown) && !set.contains(&Capability::Kill));
        assert_eq!(set.len(), 14);
    }

    #[test]
    fn an_unknown_capability_is_refused_by_name() {
        for wanted in [cap(&["FLY"], &[], &[]), cap(&[], &["CAP_FLY"], &[]), cap(&[], &[], &["FLY"])] {
            let e = sets(Some(&wanted), false, &node(), &mut Vec::new()).unwrap_err();
            assert!(e.kind() == types::ErrorKind::InvalidArgument && e.to_string().contains("FLY"), "{e}");
        }
    }

    #[test]
    fn what_the_node_lacks_is_one_warning() {
        let mut warnings = Vec::new();
        let set = sets(None, true, &node(), &mut warnings).unwrap();
        assert_eq!(set.bounding().as_ref().unwrap().len(), 40);
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("CAP_SYS_RESOURCE"), "{warnings:?}");
        assert!(sets(None, false, &node(), &mut warnings).is_ok());
        assert_eq!(warnings.len(), 1);
    }

    #[test]
    fn cve_2022_24769_inheritable_is_empty_unless_ambient_is_asked_for() {
        for privileged in [false, true] {
            let s = sets(Some(&cap(&["ALL"], &[], &[])), privileged, &node(), &mut Vec::new()).unwrap();
            assert!(s.inheritable().as_ref().unwrap().is_empty() && s.ambient().as_ref().unwrap().is_empty());
        }
        let s = sets(Some(&cap(&[], &[], &["NET_ADMIN"])), false, &node(), &mut Vec::new()).unwrap();
        for set in [s.ambient(), s.inheritable()] {
            assert_eq!(set.as_ref().unwrap().iter().collect::<Vec<_>>(), [&Capability::NetAdmin]);
        }
        assert!(s.permitted().as_ref().unwrap().contains(&Capability::NetAdmin));
    }

    #[test]
    fn a_mask_is_the_set_of_its_bits() {
        assert_eq!(from_mask(0x1ff_feff_ffff), node());
        assert_eq!(from_mask(u64::MAX).len(), 41);
        assert_eq!(from_mask(1 << 21).into_iter().collect::<Vec<_>>(), [Capability::SysAdmin]);
    }

    proptest! {
        #[test]
        fn drop_all_then_add_is_exactly_what_was_added(picked in proptest::sample::subsequence(ALL.to_vec(), 0..=41)) {
            let names: Vec<String> = picked.iter().map(ToString::to_string).collect();
            let wanted = cri::Capability { add_capabilities: names, drop_capabilities: vec!["ALL".into()], ..Default::default() };
            let expected: Capabilities = picked.into_iter().filter(|c| node().contains(c)).collect();
            prop_assert_eq!(bounding(&wanted, false), expected);
        }

        #[test]
        fn nothing_exceeds_the_node(mask in any::<u64>(), privileged in any::<bool>(), add in proptest::sample::subsequence(ALL.to_vec(), 0..=5)) {
            let names: Vec<String> = add.iter().map(ToString::to_string).collect();
            let wanted = cri::Capability { add_ambient_capabilities: names, ..Default::default() };
            let node = from_mask(mask);
            let s = sets(Some(&wanted), privileged, &node, &mut Vec::new()).unwrap();
            for set in [s.bounding(), s.effective(), s.permitted(), s.inheritable(), s.ambient()] {
                prop_assert!(set.as_ref().unwrap().is_subset(&node));
            }
            prop_assert!(s.ambient().as_ref().unwrap().is_subset(s.permitted().as_ref().unwrap()));
        }
    }
}
