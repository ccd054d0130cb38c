//! UpdateContainerResources.

use super::PodContext;
use crate::state::{ContainerInfo, ContainerState};
use proto::cri::LinuxContainerResources;
use spec::Spec;
use types::{Result, ResultExt};

/// The limits after an update: what the update does not set stays.
pub fn merge_resources(
    old: Option<&LinuxContainerResources>,
    new: &LinuxContainerResources,
) -> LinuxContainerResources {
    let mut merged = old.cloned().unwrap_or_default();
    macro_rules! take_number {
        ($($field:ident),*) => {$( if new.$field != 0 { merged.$field = new.$field; } )*};
    }
    take_number!(cpu_period, cpu_quota, cpu_shares, memory_limit_in_bytes, oom_score_adj, memory_swap_limit_in_bytes);
    // A limit on memory and swap together that nobody has set anew must not stay below
    // the new one on memory, which it includes.
    let (memory, swap) = (merged.memory_limit_in_bytes, merged.memory_swap_limit_in_bytes);
    if new.memory_limit_in_bytes != 0
        && new.memory_swap_limit_in_bytes == 0
        && swap > 0
        && (memory > swap || memory < 0)
    {
        merged.memory_swap_limit_in_bytes = memory;
    }
    for (to, from) in [(&mut merged.cpuset_cpus, &new.cpuset_cpus), (&mut merged.cpuset_mems, &new.cpuset_mems)] {
        if !from.is_empty() {
            to.clone_from(from);
        }
    }
    if !new.hugepage_limits.is_empty() {
        merged.hugepage_limits.clone_from(&new.hugepage_limits);
    }
    merged.unified.extend(new.unified.iter().map(|(k, v)| (k.clone(), v.clone())));
    merged
}

/// Applies merged limits: to the stored spec, and to the task where it runs.
///
/// # Errors
/// What the spec or the runtime refuses; the stored spec is then as before.
pub async fn update(ctx: &PodContext, info: &ContainerInfo, merged: &LinuxContainerResources) -> Result<()> {
    let shared = &ctx.shared;
    let mut warnings = Vec::new();
    let resources = spec::linux_resources(merged, &ctx.handler()?.node, &mut warnings)?;
    for w in warnings {
        tracing::warn!("update of container {:.12}: {w}", info.id);
    }
    if matches!(info.state(), ContainerState::Running { .. }) {
        let json = serde_json::to_string(&resources).context(|| "encode limits".into())?;
        shared
            .bounded("updating the task", shared.runtime.update_task(&ctx.pod.id, &info.id, &json))
            .await
            .map_err(|e| e.within(format!("update container {} ({:.12})", info.name_key(), info.id)))?;
    }
    let path = shared.container_dir(&info.id).join("config.json");
    let text = tokio::fs::read_to_string(&path).await.context(|| format!("read {}", path.display()))?;
    let mut spec: Spec = serde_json::from_str(&text).context(|| format!("read {}", path.display()))?;
    spec::apply_update(&mut spec, &resources);
    let text = serde_json::to_string(&spec).context(|| "encode the spec".into())?;
    super::create::write_file(&path, text).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_update_leaves_out_stays() {
        let old = LinuxContainerResources {
            cpu_shares: 10,
            memory_limit_in_bytes: 5,
            cpuset_cpus: "0".into(),
            ..Default::default()
        };
        let new = LinuxContainerResources { cpu_shares: 20, cpuset_mems: "1".into(), ..Default::default() };
        let merged = merge_resources(Some(&old), &new);
        assert_eq!((merged.cpu_shares, merged.memory_limit_in_bytes), (20, 5));
        assert_eq!((merged.cpuset_cpus.as_str(), merged.cpuset_mems.as_str()), ("0", "1"));
    }

    #[test]
    fn a_raised_memory_limit_raises_the_one_with_swap() {
        let limits = |memory, swap| LinuxContainerResources {
            memory_limit_in_bytes: memory,
            memory_swap_limit_in_bytes: swap,
            ..Default::default()
        };
        for (old, new, expected) in [
            ((100, 100), (200, 0), (200, 200)),
            ((100, 300), (200, 0), (200, 300)),
            ((100, 100), (50, 0), (50, 100)),
            ((100, 100), (-1, 0), (-1, -1)),
            ((100, -1), (200, 0), (200, -1)),
            ((100, 0), (200, 0), (200, 0)),
            ((100, 100), (200, 150), (200, 150)),
        ] {
            let merged = merge_resources(Some(&limits(old.0, old.1)), &limits(new.0, new.1));
            assert_eq!(merged, limits(expected.0, expected.1), "{old:?} with {new:?}");
        }
    }
}
