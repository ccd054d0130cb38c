//! How a user namespace's ids stand for the host's.

use types::{Error, Result};

/// A run of ids: `container..container+size` are `host..host+size` outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The first id inside.
    pub container: u32,
    /// The first id outside.
    pub host: u32,
    /// How many.
    pub size: u32,
}

/// The mapping of a user-namespaced pod.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IdMap {
    /// Of users.
    pub uids: Vec<IdRange>,
    /// Of groups.
    pub gids: Vec<IdRange>,
}

impl IdMap {
    /// The host's uid for `uid` inside.
    ///
    /// # Errors
    /// `InvalidArgument` when no range has it.
    pub fn uid(&self, uid: u32) -> Result<u32> {
        map(&self.uids, uid, "uid")
    }

    /// The host's gid for `gid` inside.
    ///
    /// # Errors
    /// `InvalidArgument` when no range has it.
    pub fn gid(&self, gid: u32) -> Result<u32> {
        map(&self.gids, gid, "gid")
    }

    /// A text that names the mapping, for the keys of layers copied for it.
    pub(crate) fn key(&self) -> String {
        let part = |ranges: &[IdRange]| {
            let all: Vec<String> = ranges.iter().map(|r| format!("{}-{}-{}", r.container, r.host, r.size)).collect();
            all.join(",")
        };
        format!("u{}:g{}", part(&self.uids), part(&self.gids))
    }
}

fn map(ranges: &[IdRange], id: u32, what: &str) -> Result<u32> {
    ranges
        .iter()
        .find_map(|r| {
            let offset = id.checked_sub(r.container).filter(|o| *o < r.size)?;
            r.host.checked_add(offset)
        })
        .ok_or_else(|| Error::invalid(format!("{what} {id} is outside of the user namespace's mapping")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_map_range_by_range() {
        let range = |container, host, size| IdRange { container, host, size };
        let map = IdMap { uids: vec![range(0, 100_000, 10), range(20, 5, 1)], gids: vec![range(0, u32::MAX, 2)] };
        assert_eq!(map.uid(9).unwrap(), 100_009);
        assert_eq!(map.uid(20).unwrap(), 5);
        assert!(map.uid(10).is_err() && map.uid(21).is_err());
        assert!(map.gid(1).is_err(), "an overflow is no id");
    }
}
