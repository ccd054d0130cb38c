//! A container's figures, as containerd's cgroup metrics of v1 or v2.

use oci::cgroup::{Cgroup, field, number};
use prost_types::Any;
use proto::cgroups::{v1, v2};
use std::path::Path;

/// The figures now, packed; version 2 where the node has it alone.
pub fn stats(cgroup: &Cgroup) -> Any {
    match cgroup.v2() {
        Some(dir) => proto::pack("io.containerd.cgroups.v2.Metrics", &metrics_v2(dir)),
        None => proto::pack("io.containerd.cgroups.v1.Metrics", &metrics_v1(cgroup)),
    }
}

fn read(dir: &Path, file: &str) -> String {
    std::fs::read_to_string(dir.join(file)).unwrap_or_default()
}

fn get(text: &str, key: &str) -> u64 {
    field(text, key).unwrap_or(0)
}

/// A limit; none is 0 on the wire of pids, the greatest number elsewhere.
fn pids_limit(path: &Path) -> u64 {
    number(path).filter(|n| *n != u64::MAX).unwrap_or(0)
}

fn pressure(dir: &Path, file: &str) -> Option<v2::PsiStats> {
    let text = std::fs::read_to_string(dir.join(file)).ok()?;
    let line = |name: &str| {
        let l = text.lines().find(|l| l.starts_with(name))?;
        let value = |key: &str| l.split_whitespace().find_map(|f| f.strip_prefix(key)?.strip_prefix('='));
        let average = |key: &str| value(key).and_then(|v| v.parse().ok()).unwrap_or(0.0);
        Some(v2::PsiData {
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
            total: value("total").and_then(|v| v.parse().ok()).unwrap_or(0),
        })
    };
    Some(v2::PsiStats { some: line("some"), full: line("full") })
}

fn metrics_v2(dir: &Path) -> v2::Metrics {
    let cpu = read(dir, "cpu.stat");
    let m = read(dir, "memory.stat");
    let events = read(dir, "memory.events");
    let file = |name: &str| number(&dir.join(name)).unwrap_or(0);
    v2::Metrics {
        pids: Some(v2::PidsStat { current: file("pids.current"), limit: pids_limit(&dir.join("pids.max")) }),
        cpu: Some(v2::CpuStat {
            usage_usec: get(&cpu, "usage_usec"),
            user_usec: get(&cpu, "user_usec"),
            system_usec: get(&cpu, "system_usec"),
            nr_periods: get(&cpu, "nr_periods"),
            nr_throttled: get(&cpu, "nr_throttled"),
            throttled_usec: get(&cpu, "throttled_usec"),
            psi: pressure(dir, "cpu.pressure"),
            nr_bursts: get(&cpu, "nr_bursts"),
            burst_usec: get(&cpu, "burst_usec"),
        }),
        memory: Some(memory_v2(dir, &m)),
        memory_events: Some(v2::MemoryEvents {
            low: get(&events, "low"),
            high: get(&events, "high"),
            max: get(&events, "max"),
            oom: get(&events, "oom"),
            oom_kill: get(&events, "oom_kill"),
            oom_group_kill: get(&events, "oom_group_kill"),
        }),
        io: Some(v2::IoStat { usage: io_v2(&read(dir, "io.stat")), psi: pressure(dir, "io.pressure") }),
        ..Default::default()
    }
}

fn memory_v2(dir: &Path, m: &str) -> v2::MemoryStat {
    let file = |name: &str| number(&dir.join(name)).unwrap_or(0);
    v2::MemoryStat {
        anon: get(m, "anon"),
        file: get(m, "file"),
        kernel_stack: get(m, "kernel_stack"),
        slab: get(m, "slab"),
        sock: get(m, "sock"),
        shmem: get(m, "shmem"),
        file_mapped: get(m, "file_mapped"),
        file_dirty: get(m, "file_dirty"),
        file_writeback: get(m, "file_writeback"),
        anon_thp: get(m, "anon_thp"),
        inactive_anon: get(m, "inactive_anon"),
        active_anon: get(m, "active_anon"),
        inactive_file: get(m, "inactive_file"),
        active_file: get(m, "active_file"),
        unevictable: get(m, "unevictable"),
        slab_reclaimable: get(m, "slab_reclaimable"),
        slab_unreclaimable: get(m, "slab_unreclaimable"),
        pgfault: get(m, "pgfault"),
        pgmajfault: get(m, "pgmajfault"),
        workingset_refault: get(m, "workingset_refault_anon") + get(m, "workingset_refault_file"),
        workingset_activate: get(m, "workingset_activate_anon") + get(m, "workingset_activate_file"),
        workingset_nodereclaim: get(m, "workingset_nodereclaim"),
        pgrefill: get(m, "pgrefill"),
        pgscan: get(m, "pgscan"),
        pgsteal: get(m, "pgsteal"),
        pgactivate: get(m, "pgactivate"),
        pgdeactivate: get(m, "pgdeactivate"),
        pglazyfree: get(m, "pglazyfree"),
        pglazyfreed: get(m, "pglazyfreed"),
        thp_fault_alloc: get(m, "thp_fault_alloc"),
        thp_collapse_alloc: get(m, "thp_collapse_alloc"),
        usage: file("memory.current"),
        usage_limit: file("memory.max"),
        swap_usage: file("memory.swap.current"),
        swap_limit: file("memory.swap.max"),
        max_usage: file("memory.peak"),
        swap_max_usage: file("memory.swap.peak"),
        psi: pressure(dir, "memory.pressure"),
    }
}

fn io_v2(text: &str) -> Vec<v2::IoEntry> {
    let mut entries = Vec::new();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let Some((major, minor)) = fields.next().and_then(|d| d.split_once(':')) else { continue };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
        let mut e = v2::IoEntry { major, minor, ..Default::default() };
        for (key, value) in fields.filter_map(|f| f.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match key {
                "rbytes" => e.rbytes = value,
                "wbytes" => e.wbytes = value,
                "rios" => e.rios = value,
                "wios" => e.wios = value,
                _ => {}
            }
        }
        entries.push(e);
    }
    entries
}

fn metrics_v1(c: &Cgroup) -> v1::Metrics {
    v1::Metrics {
        pids: c.v1("pids").map(|d| v1::PidsStat {
            current: number(&d.join("pids.current")).unwrap_or(0),
            limit: pids_limit(&d.join("pids.max")),
        }),
        cpu: c.v1("cpuacct").map(|acct| cpu_v1(acct, c.v1("cpu"))),
        memory: c.v1("memory").map(memory_v1),
        blkio: c.v1("blkio").map(|d| v1::BlkIoStat {
            io_service_bytes_recursive: blkio(d, "io_service_bytes_recursive"),
            io_serviced_recursive: blkio(d, "io_serviced_recursive"),
            io_queued_recursive: blkio(d, "io_queued_recursive"),
            io_service_time_recursive: blkio(d, "io_service_time_recursive"),
            io_wait_time_recursive: blkio(d, "io_wait_time_recursive"),
            io_merged_recursive: blkio(d, "io_merged_recursive"),
            io_time_recursive: blkio(d, "time_recursive"),
            sectors_recursive: blkio(d, "sectors_recursive"),
        }),
        memory_oom_control: c.v1("memory").map(|d| {
            let text = read(d, "memory.oom_control");
            v1::MemoryOomControl {
                oom_kill_disable: get(&text, "oom_kill_disable"),
                under_oom: get(&text, "under_oom"),
                oom_kill: get(&text, "oom_kill"),
            }
        }),
        ..Default::default()
    }
}

fn cpu_v1(acct: &Path, cpu: Option<&Path>) -> v1::CpuStat {
    // cpuacct.stat counts ticks, of which Linux shows 100 a second.
    const TICK: u64 = 10_000_000;
    let ticks = read(acct, "cpuacct.stat");
    let throttling = cpu.map(|d| {
        let text = read(d, "cpu.stat");
        v1::Throttle {
            periods: get(&text, "nr_periods"),
            throttled_periods: get(&text, "nr_throttled"),
            throttled_time: get(&text, "throttled_time"),
        }
    });
    v1::CpuStat {
        usage: Some(v1::CpuUsage {
            total: number(&acct.join("cpuacct.usage")).unwrap_or(0),
            kernel: get(&ticks, "system") * TICK,
            user: get(&ticks, "user") * TICK,
            per_cpu: read(acct, "cpuacct.usage_percpu").split_whitespace().filter_map(|n| n.parse().ok()).collect(),
        }),
        throttling,
    }
}

fn memory_v1(d: &Path) -> v1::MemoryStat {
    let m = read(d, "memory.stat");
    let entry = |prefix: &str| {
        let file = |name: &str| number(&d.join(format!("{prefix}.{name}")));
        Some(v1::MemoryEntry {
            limit: file("limit_in_bytes")?,
            usage: file("usage_in_bytes")?,
            max: file("max_usage_in_bytes")?,
            failcnt: file("failcnt")?,
        })
    };
    v1::MemoryStat {
        cache: get(&m, "cache"),
        rss: get(&m, "rss"),
        rss_huge: get(&m, "rss_huge"),
        mapped_file: get(&m, "mapped_file"),
        dirty: get(&m, "dirty"),
        writeback: get(&m, "writeback"),
        pg_pg_in: get(&m, "pgpgin"),
        pg_pg_out: get(&m, "pgpgout"),
        pg_fault: get(&m, "pgfault"),
        pg_maj_fault: get(&m, "pgmajfault"),
        inactive_anon: get(&m, "inactive_anon"),
        active_anon: get(&m, "active_anon"),
        inactive_file: get(&m, "inactive_file"),
        active_file: get(&m, "active_file"),
        unevictable: get(&m, "unevictable"),
        hierarchical_memory_limit: get(&m, "hierarchical_memory_limit"),
        hierarchical_swap_limit: get(&m, "hierarchical_memsw_limit"),
        total_cache: get(&m, "total_cache"),
        total_rss: get(&m, "total_rss"),
        total_rss_huge: get(&m, "total_rss_huge"),
        total_mapped_file: get(&m, "total_mapped_file"),
        total_dirty: get(&m, "total_dirty"),
        total_writeback: get(&m, "total_writeback"),
        total_pg_pg_in: get(&m, "total_pgpgin"),
        total_pg_pg_out: get(&m, "total_pgpgout"),
        total_pg_fault: get(&m, "total_pgfault"),
        total_pg_maj_fault: get(&m, "total_pgmajfault"),
        total_inactive_anon: get(&m, "total_inactive_anon"),
        total_active_anon: get(&m, "total_active_anon"),
        total_inactive_file: get(&m, "total_inactive_file"),
        total_active_file: get(&m, "total_active_file"),
        total_unevictable: get(&m, "total_unevictable"),
        usage: entry("memory"),
        swap: entry("memory.memsw"),
        kernel: entry("memory.kmem"),
        kernel_tcp: entry("memory.kmem.tcp"),
    }
}

fn blkio(d: &Path, file: &str) -> Vec<v1::BlkIoEntry> {
    let mut entries = Vec::new();
    for line in read(d, &format!("blkio.{file}")).lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [device, op, value] = fields[..] else { continue };
        let Some((major, minor)) = device.split_once(':') else { continue };
        entries.push(v1::BlkIoEntry {
            op: op.into(),
            device: String::new(),
            major: major.parse().unwrap_or(0),
            minor: minor.parse().unwrap_or(0),
            value: value.parse().unwrap_or(0),
        });
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_lines_are_read() {
        let e = io_v2("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\nbad\n");
        assert_eq!(e.len(), 1);
        assert_eq!((e[0].major, e[0].rbytes, e[0].wios), (8, 1, 4));
    }
}
