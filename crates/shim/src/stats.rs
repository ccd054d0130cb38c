//! A container's figures, as containerd's cgroup metrics of v1 or v2.

use oci::cgroup::{Cgroup, field, number};
use prost_types::Any;
use proto::cgroups::{v1, v2};
use std::collections::HashMap;
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

/// The limit of pids in version 1, where none is 0 on the wire; elsewhere it is the
/// greatest number.
fn pids_limit_v1(path: &Path) -> u64 {
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
        pids: Some(v2::PidsStat { current: file("pids.current"), limit: file("pids.max") }),
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
        rdma: Some(v2::RdmaStat {
            current: rdma(&read(dir, "rdma.current"), |device, hca_handles, hca_objects| v2::RdmaEntry {
                device,
                hca_handles,
                hca_objects,
            }),
            limit: rdma(&read(dir, "rdma.max"), |device, hca_handles, hca_objects| v2::RdmaEntry {
                device,
                hca_handles,
                hca_objects,
            }),
        }),
        hugetlb: page_sizes(dir, ".current").map(|pagesize| hugetlb_v2(dir, pagesize)).collect(),
        network: Vec::new(),
    }
}

fn hugetlb_v2(dir: &Path, pagesize: String) -> v2::HugeTlbStat {
    let file = |name: &str| number(&dir.join(format!("hugetlb.{pagesize}.{name}"))).unwrap_or(0);
    let failcnt = get(&read(dir, &format!("hugetlb.{pagesize}.events")), "max");
    v2::HugeTlbStat { current: file("current"), max: file("max"), failcnt, pagesize }
}

/// The sizes of huge pages ("2MB") that a cgroup has files for, by the end of one's name.
fn page_sizes(dir: &Path, end: &str) -> impl Iterator<Item = String> {
    let all = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut sizes: Vec<String> = all
        .filter_map(|e| {
            let name = e.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(end)?;
            // hugetlb.2MB.rsvd.current is another figure.
            (!size.contains('.')).then(|| size.to_string())
        })
        .collect();
    sizes.sort_unstable();
    sizes.into_iter()
}

/// Lines like `mlx4_0 hca_handle=2 hca_object=max`; no limit is the greatest number.
fn rdma<T>(text: &str, make: impl Fn(String, u32, u32) -> T) -> Vec<T> {
    let one = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let value = |key: &str| {
            let v = rest.split_whitespace().find_map(|f| f.strip_prefix(key)?.strip_prefix('='))?;
            if v == "max" { Some(u32::MAX) } else { v.parse().ok() }
        };
        Some(make(device.to_string(), value("hca_handle")?, value("hca_object")?))
    };
    text.lines().filter_map(one).collect()
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
            limit: pids_limit_v1(&d.join("pids.max")),
        }),
        cpu: c.v1("cpuacct").map(|acct| cpu_v1(acct, c.v1("cpu"))),
        memory: c.v1("memory").map(memory_v1),
        blkio: c.v1("blkio").map(|d| blkio_v1(d, &devices(&read(Path::new("/proc"), "partitions")))),
        hugetlb: c.v1("hugetlb").into_iter().flat_map(hugetlb_v1).collect(),
        rdma: c.v1("rdma").map(|d| v1::RdmaStat {
            current: rdma(&read(d, "rdma.current"), |device, hca_handles, hca_objects| v1::RdmaEntry {
                device,
                hca_handles,
                hca_objects,
            }),
            limit: rdma(&read(d, "rdma.max"), |device, hca_handles, hca_objects| v1::RdmaEntry {
                device,
                hca_handles,
                hca_objects,
            }),
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

fn hugetlb_v1(dir: &Path) -> Vec<v1::HugetlbStat> {
    let one = |pagesize: String| {
        let file = |name: &str| number(&dir.join(format!("hugetlb.{pagesize}.{name}"))).unwrap_or(0);
        let (usage, max, failcnt) = (file("usage_in_bytes"), file("max_usage_in_bytes"), file("failcnt"));
        v1::HugetlbStat { usage, max, failcnt, pagesize }
    };
    page_sizes(dir, ".usage_in_bytes").map(one).collect()
}

fn blkio_v1(d: &Path, devices: &Devices) -> v1::BlkIoStat {
    let file = |name: &str| blkio(&read(d, &format!("blkio.{name}")), devices);
    let mut stat = v1::BlkIoStat {
        io_service_bytes_recursive: file("io_service_bytes_recursive"),
        io_serviced_recursive: file("io_serviced_recursive"),
        io_queued_recursive: file("io_queued_recursive"),
        io_service_time_recursive: file("io_service_time_recursive"),
        io_wait_time_recursive: file("io_wait_time_recursive"),
        io_merged_recursive: file("io_merged_recursive"),
        io_time_recursive: file("time_recursive"),
        sectors_recursive: file("sectors_recursive"),
    };
    // Those are CFQ's, which is gone since Linux 5.0; these every kernel counts.
    if stat.io_service_bytes_recursive.is_empty() && stat.io_serviced_recursive.is_empty() {
        stat.io_service_bytes_recursive = file("throttle.io_service_bytes");
        stat.io_serviced_recursive = file("throttle.io_serviced");
    }
    stat
}

/// The nodes of block devices by major and minor number.
type Devices = HashMap<(u64, u64), String>;

/// Reads /proc/partitions.
fn devices(text: &str) -> Devices {
    let one = |line: &str| {
        let mut fields = line.split_whitespace();
        let (major, minor) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(((major, minor), format!("/dev/{}", fields.nth(1)?)))
    };
    text.lines().filter_map(one).collect()
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

/// Lines like `8:0 Read 4096`, or `8:0 7` where there is but one figure; the line
/// `Total 4096` is of no device.
fn blkio(text: &str, devices: &Devices) -> Vec<v1::BlkIoEntry> {
    let one = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (device, op, value) = match fields[..] {
            [device, op, value] => (device, op, value),
            [device, value] => (device, "", value),
            _ => return None,
        };
        let (major, minor) = device.split_once(':')?;
        let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
        let device = devices.get(&(major, minor)).cloned().unwrap_or_default();
        Some(v1::BlkIoEntry { op: op.into(), device, major, minor, value: value.parse().ok()? })
    };
    text.lines().filter_map(one).collect()
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

    /// A directory with these files.
    fn files(all: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in all {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn block_io_is_the_throttle_s_where_there_is_no_other() {
        let partitions = "major minor  #blocks  name\n\n   8        0     100 sda\n 254        0  100 vda\n";
        let devices = devices(partitions);
        let throttle = [
            ("blkio.throttle.io_service_bytes", "254:0 Read 4096\n254:0 Write 512\nTotal 4608\n"),
            ("blkio.throttle.io_serviced", "254:0 Read 1\n"),
        ];
        let stat = blkio_v1(files(&throttle).path(), &devices);
        let bytes = &stat.io_service_bytes_recursive;
        assert_eq!(bytes.len(), 2, "{bytes:?}");
        assert_eq!((bytes[0].op.as_str(), bytes[0].device.as_str(), bytes[0].value), ("Read", "/dev/vda", 4096));
        assert_eq!(stat.io_serviced_recursive[0].value, 1);
        let cfq =
            [("blkio.io_serviced_recursive", "8:0 Read 7\n"), ("blkio.sectors_recursive", "8:0 9\n"), throttle[0]];
        let stat = blkio_v1(files(&cfq).path(), &devices);
        assert_eq!((stat.io_serviced_recursive[0].value, stat.sectors_recursive[0].value), (7, 9));
        assert!(stat.io_service_bytes_recursive.is_empty());
    }

    #[test]
    fn huge_pages_and_rdma_are_read() {
        let v1 = [
            ("hugetlb.2MB.usage_in_bytes", "1\n"),
            ("hugetlb.2MB.max_usage_in_bytes", "2\n"),
            ("hugetlb.2MB.failcnt", "3\n"),
            ("hugetlb.2MB.rsvd.usage_in_bytes", "9\n"),
        ];
        let all = hugetlb_v1(files(&v1).path());
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].usage, all[0].max, all[0].failcnt, all[0].pagesize.as_str()), (1, 2, 3, "2MB"));
        let v2 = [
            ("hugetlb.1GB.current", "4\n"),
            ("hugetlb.1GB.max", "max\n"),
            ("hugetlb.1GB.events", "max 5\n"),
            ("pids.max", "max\n"),
            ("rdma.max", "mlx4_0 hca_handle=2 hca_object=max\n"),
        ];
        let m = metrics_v2(files(&v2).path());
        assert_eq!((m.hugetlb[0].current, m.hugetlb[0].max, m.hugetlb[0].failcnt), (4, u64::MAX, 5));
        assert_eq!(m.pids.unwrap().limit, u64::MAX);
        let limit = &m.rdma.unwrap().limit[0];
        assert_eq!((limit.hca_handles, limit.hca_objects), (2, u32::MAX));
    }
}
