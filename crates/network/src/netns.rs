//! Where network namespaces are pinned, so that CNI plugins and `ip netns` find
//! them.
//!
//! ```text
//! /run/netns/                      a shared mount, as `ip netns add` makes it
//!   longshore-0123456789abcdef     nsfs, bound; named after the pod's id
//!   whatever                       somebody else's
//! ```

use ::types::{Error, Result, ResultExt};
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// So many digits of the pod's id are in the name: 64 random bits.
const DIGITS: usize = 16;
/// How long the lock of the directory is waited for: who takes it holds it for a few
/// system calls.
const LOCK_BOUND: Duration = Duration::from_secs(5);
const LOCK_AGAIN: Duration = Duration::from_millis(10);
/// How often a step is done that meets the removal of the directory.
const TRIES: u32 = 20;

/// The directory of the pinned network namespaces.
#[derive(Debug, Clone)]
pub struct NetnsDir {
    dir: PathBuf,
}

impl NetnsDir {
    /// The directory of this path; nothing is touched.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Makes the directory, mode 0755, and sees to it that what is mounted in it
    /// propagates: a pin that stayed behind in another mount namespace would keep
    /// a dead pod's network alive. Takes the lock that `ip netns` takes. True when
    /// it had to become a mount of its own for that.
    ///
    /// # Errors
    /// Names the directory.
    pub fn prepare(&self) -> Result<bool> {
        self.again(|| self.prepare_once())
    }

    /// Does what fails where another runtime, at its end, takes the directory away.
    fn again<T>(&self, step: impl Fn() -> Result<T>) -> Result<T> {
        let mut done = step();
        for _ in 0..TRIES {
            if !matches!(&done, Err(e) if e.is_not_found()) {
                break;
            }
            done = step();
        }
        done
    }

    fn prepare_once(&self) -> Result<bool> {
        std::fs::create_dir_all(&self.dir).context(|| format!("make {}", self.dir.display()))?;
        let _lock = self.lock()?;
        let real = self.dir.canonicalize().context(|| format!("resolve {}", self.dir.display()))?;
        let holder = sys::mount::mount_of(&real)?;
        if holder.shared {
            return Ok(false);
        }
        let made = holder.target != real;
        if made {
            sys::mount::bind_onto_itself(&real)?;
        }
        sys::mount::make_shared(&real)?;
        Ok(made)
    }

    /// Takes back what [`Self::prepare`] did when it said true, unless somebody
    /// has pinned a namespace there since.
    ///
    /// # Errors
    /// Names the directory.
    pub fn release(&self) -> Result<()> {
        let _lock = match self.lock() {
            Err(e) if e.is_not_found() => return Ok(()),
            other => other?,
        };
        let mut entries = std::fs::read_dir(&self.dir).context(|| format!("list {}", self.dir.display()))?;
        if entries.next().is_none() && sys::mount::detach(&self.dir)? {
            // Somebody may have made a file below the mount; then it stays.
            let _ = std::fs::remove_dir(&self.dir);
        }
        Ok(())
    }

    fn lock(&self) -> Result<rustix::fd::OwnedFd> {
        let what = || format!("lock {}", self.dir.display());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&self.dir, flags, Mode::empty()).context(what)?;
        let until = Instant::now() + LOCK_BOUND;
        loop {
            match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                // Anybody who can open the directory can hold its lock, for ever.
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(LOCK_AGAIN),
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let held = format!("{}: another process has held it for {} s", what(), LOCK_BOUND.as_secs());
                    return Err(
                        Error::unavailable(held).hint(format!("find it: lslocks, or fuser {}", self.dir.display()))
                    );
                }
                done => return done.context(what).map(|()| fd),
            }
        }
    }

    /// Where the pod's network namespace is pinned; a function of its id alone.
    pub fn path(&self, pod_id: &str) -> PathBuf {
        let short: String = pod_id.chars().take(DIGITS).collect();
        self.dir.join(format!("longshore-{short}"))
    }

    /// Pins the namespace that `link` (`/proc/…/ns/net`) leads to. The directory is made
    /// again where it has gone since [`Self::prepare`].
    ///
    /// # Errors
    /// `AlreadyExists` when the pod has a pin, `NotFound` without that namespace.
    pub fn pin(&self, pod_id: &str, link: &Path) -> Result<PathBuf> {
        self.again(|| match self.pin_once(pod_id, link) {
            Err(e) if e.is_not_found() => {
                // One more mount that stays with the next pin, and that nobody counts as his.
                self.prepare()?;
                Err(e)
            }
            done => done,
        })
    }

    fn pin_once(&self, pod_id: &str, link: &Path) -> Result<PathBuf> {
        // Whoever takes the directory away looks first whether there is a pin.
        let _lock = self.lock()?;
        let path = self.path(pod_id);
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .context(|| format!("pin the network namespace at {}", path.display()))?;
        if let Err(e) = sys::mount::bind(link, &path) {
            // The error to report is the first one.
            let _ = std::fs::remove_file(&path);
            return Err(e);
        }
        Ok(path)
    }

    /// Takes the pod's pin away; none is success. The namespace ends with its last
    /// process and its last open descriptor.
    ///
    /// # Errors
    /// Names the path.
    pub fn unpin(&self, pod_id: &str) -> Result<()> {
        let path = self.path(pod_id);
        sys::mount::detach_all(&path)?;
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).context(|| format!("remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_comes_and_goes_with_its_directory() {
        let root = tempfile::tempdir().unwrap();
        let netns = NetnsDir::at(root.path().join("netns"));
        let made = netns.prepare().unwrap();
        assert!(!netns.prepare().unwrap(), "the second time it is ready");
        let pod = "0123456789abcdef0123";
        let pinned = netns.pin(pod, Path::new("/proc/self/ns/net")).unwrap();
        assert_eq!(pinned, root.path().join("netns/longshore-0123456789abcdef"));
        let own = sys::namespace::inode(Path::new("/proc/self/ns/net")).unwrap();
        assert_eq!(sys::namespace::inode(&pinned).unwrap(), own);
        assert_eq!(
            netns.pin(pod, Path::new("/proc/self/ns/net")).unwrap_err().kind(),
            ::types::ErrorKind::AlreadyExists
        );
        netns.release().unwrap();
        assert!(pinned.exists(), "a directory in use is left alone");
        netns.unpin(pod).unwrap();
        netns.unpin(pod).unwrap();
        assert!(!pinned.exists());
        if made {
            netns.release().unwrap();
            netns.release().unwrap();
        }
        // Another runtime on the node has taken it away, and knows of no pin to come.
        let _ = std::fs::remove_dir(root.path().join("netns"));
        let pinned = netns.pin(pod, Path::new("/proc/self/ns/net")).unwrap();
        assert_eq!(sys::namespace::inode(&pinned).unwrap(), own);
        assert!(sys::mount::mount_of(pinned.parent().unwrap()).unwrap().shared);
        netns.unpin(pod).unwrap();
        assert_eq!(netns.pin(pod, Path::new("/proc/self/ns/none")).unwrap_err().kind(), ::types::ErrorKind::NotFound);
        assert!(!pinned.exists());
        let _ = sys::mount::detach(&root.path().join("netns")).unwrap();
        assert_eq!(sys::mount::mounts_below(root.path()).unwrap(), Vec::<PathBuf>::new());
    }

    #[test]
    fn who_holds_the_lock_holds_nobody_up_for_ever() {
        let root = tempfile::tempdir().unwrap();
        let netns = NetnsDir::at(root.path());
        let held = netns.lock().unwrap();
        let e = netns.pin("a", Path::new("/proc/self/ns/net")).unwrap_err();
        assert_eq!(e.kind(), ::types::ErrorKind::Unavailable);
        assert!(e.to_string().contains(root.path().to_str().unwrap()), "{e}");
        drop(held);
        netns.lock().unwrap();
    }

    /// Where `/run` is shared already, nothing is mounted for us; an `ip netns add`
    /// that comes later binds the directory, our pins included, onto itself.
    #[test]
    fn an_ip_netns_that_comes_later_hides_no_pin() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().canonicalize().unwrap();
        sys::mount::tmpfs(&run, "mode=755").unwrap();
        sys::mount::make_shared(&run).unwrap();
        let netns = NetnsDir::at(run.join("netns"));
        let made = netns.prepare();
        let pinned = netns.pin("a", Path::new("/proc/self/ns/net"));
        let bound = sys::mount::bind_onto_itself(&run.join("netns"));
        let unpinned = netns.unpin("a");
        let left = sys::mount::mounts_below(&run.join("netns"));
        for mount in sys::mount::mounts_below(&run).unwrap() {
            sys::mount::detach_all(&mount).unwrap();
        }
        assert!(!made.unwrap());
        pinned.unwrap();
        bound.and(unpinned).unwrap();
        assert_eq!(left.unwrap(), [run.join("netns")], "only the bind itself is left");
    }
}
