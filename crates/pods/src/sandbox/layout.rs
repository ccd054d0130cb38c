//! Where things lie: a function of the state directory and the pod's id alone.

use std::path::{Path, PathBuf};
use sys::namespace::Kind;
use types::{Result, check_identifier};

/// The paths of one pod.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// The pod's id.
    pub id: String,
    /// `<state>/ns/<id>`: made first and removed last, so that it tells of a pod
    /// whose making or ending was cut off.
    pub pins: PathBuf,
    /// `<state>/pods/<id>`.
    pub dir: PathBuf,
}

impl Layout {
    /// The pod's paths.
    ///
    /// # Errors
    /// `InvalidArgument` for an id that could lead elsewhere.
    pub fn of(state: &Path, id: &str) -> Result<Self> {
        check_identifier("pod id", id)?;
        Ok(Self { id: id.to_owned(), pins: pins(state).join(id), dir: dirs(state).join(id) })
    }

    /// The pin of a namespace; that of the net namespace is elsewhere.
    pub fn pin(&self, kind: Kind) -> PathBuf {
        self.pins.join(kind.name())
    }

    /// The pin of the pid namespace that a container takes from another one.
    pub fn target_pin(&self, container: &str) -> Result<PathBuf> {
        check_identifier("container id", container)?;
        Ok(self.pins.join(format!("pid-{container}")))
    }

    pub fn hostname(&self) -> PathBuf {
        self.dir.join("hostname")
    }

    pub fn hosts(&self) -> PathBuf {
        self.dir.join("hosts")
    }

    pub fn resolv_conf(&self) -> PathBuf {
        self.dir.join("resolv.conf")
    }

    pub fn shm(&self) -> PathBuf {
        self.dir.join("shm")
    }

    pub fn init_rootfs(&self) -> PathBuf {
        self.dir.join("init-rootfs")
    }
}

/// The directory of all pods' pins.
pub(super) fn pins(state: &Path) -> PathBuf {
    state.join("ns")
}

/// The directory of all pods' files.
pub(super) fn dirs(state: &Path) -> PathBuf {
    state.join("pods")
}

/// Says that the mount on the netns directory is ours to take away.
pub(super) fn netns_marker(state: &Path) -> PathBuf {
    state.join("netns-mount-is-ours")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_can_lead_nowhere_else() {
        for bad in ["..", "a/b", "", "a\n", "/etc"] {
            assert!(Layout::of(Path::new("/s"), bad).is_err(), "{bad:?}");
        }
        let layout = Layout::of(Path::new("/s"), "a1").unwrap();
        assert_eq!(layout.pin(Kind::Ipc), Path::new("/s/ns/a1/ipc"));
        assert_eq!(layout.shm(), Path::new("/s/pods/a1/shm"));
        assert!(layout.target_pin("../x").is_err());
    }
}
