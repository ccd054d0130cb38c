//! Root file systems whose owners are mapped: the mount options `uidmap=` and
//! `gidmap=` of containerd's snapshotters, for pods with user namespaces.
//!
//! ```text
//! overlay   each lower layer is bound with mapped owners to
//!           /run/longshore/l/<bundle's hash>/<n>, the overlay is mounted upon
//!           these, and they are taken off again: it keeps its own hold of them
//! bind      the bind itself is mapped
//! ```
//!
//! The places lie outside of the bundle, which callers remove with all that is in
//! it, and are found again by `delete` after a crash.

use rustix::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use sys::namespace::Wanted;
use sys::ns_helper::{HelperCommand, IdRange, make_in_user_namespace};
use types::{Error, Result, ResultExt};

const DIRECTORY: &str = "/run/longshore/l";
/// How often a place is made that meets the removal of the last one.
const TRIES: u32 = 20;

/// The mapping that mount options ask for, taken out of them.
#[derive(Debug, PartialEq, Eq)]
pub struct Mapping {
    uids: Vec<IdRange>,
    gids: Vec<IdRange>,
}

/// FNV-1a of `parts`: a short name, no secret.
pub fn short_name(parts: &[&str]) -> String {
    const PRIME: u128 = 0x0100_0000_0000_0000_0000_013b;
    let hash = parts
        .iter()
        .flat_map(|p| p.bytes().chain([0]))
        .fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128, |h, b| (h ^ u128::from(b)).wrapping_mul(PRIME));
    format!("{hash:032x}")
}

/// `container:host:size`, one or more with commas between.
fn ranges(text: &str) -> Result<Vec<IdRange>> {
    let bad = || Error::invalid(format!("the id mapping {text:?} is not container:host:size"));
    text.split(',')
        .map(|one| {
            let numbers: Vec<u32> = one.split(':').map(str::parse).collect::<Result<_, _>>().map_err(|_| bad())?;
            match numbers[..] {
                [inside, outside, length] if length > 0 => Ok(IdRange { inside, outside, length }),
                _ => Err(bad()),
            }
        })
        .collect()
}

/// Does any of the options ask for mapped owners?
pub fn asked(options: &[String]) -> bool {
    options.iter().any(|o| o.starts_with("uidmap=") || o.starts_with("gidmap="))
}

/// Takes the mapping out of `options`.
///
/// # Errors
/// `InvalidArgument` where it makes no sense, or maps users or groups alone.
pub fn take(options: &mut Vec<String>) -> Result<Option<Mapping>> {
    if !asked(options) {
        return Ok(None);
    }
    let (mut uids, mut gids) = (Vec::new(), Vec::new());
    let mut rest = Vec::with_capacity(options.len());
    for o in options.drain(..) {
        match o.split_once('=') {
            Some(("uidmap", map)) => uids.extend(ranges(map)?),
            Some(("gidmap", map)) => gids.extend(ranges(map)?),
            _ => rest.push(o),
        }
    }
    *options = rest;
    if uids.is_empty() || gids.is_empty() {
        return Err(Error::invalid("a root file system needs both uidmap and gidmap, or neither"));
    }
    Ok(Some(Mapping { uids, gids }))
}

impl Mapping {
    /// A user namespace with this mapping, which lives as long as the descriptor.
    ///
    /// # Errors
    /// Those of the helper process, and of the kernel for ranges that overlap.
    pub fn namespace(&self) -> Result<OwnedFd> {
        let helper = HelperCommand::this_binary();
        let open = |links: &Path| sys::namespace::open(&links.join("user"));
        make_in_user_namespace(&helper, &self.uids, &self.gids, &Wanted::default(), &mut |_| {}, open)
    }
}

/// Lower layers with mapped owners; taken off again when dropped. What then fails
/// is found once more by [`forget`].
pub struct Lowers {
    dir: PathBuf,
    bound: usize,
}

impl Lowers {
    /// Binds each of `layers` in a place of its own.
    ///
    /// # Errors
    /// `Unimplemented` where a layer's file system can't map owners; nothing is
    /// left then.
    pub fn bind(bundle: &Path, layers: &[&str], namespace: &OwnedFd) -> Result<Self> {
        let mut lowers = Self { dir: place(bundle), bound: 0 };
        for layer in layers {
            let target = lowers.dir.join(lowers.bound.to_string());
            make(&target).context(|| format!("make {}", target.display()))?;
            // Counted first: its directory must go too.
            lowers.bound += 1;
            sys::mount::bind_idmapped(Path::new(layer), &target, namespace.as_fd())?;
        }
        Ok(lowers)
    }

    /// Where they are, in their order.
    pub fn paths(&self) -> Vec<String> {
        (0..self.bound).map(|n| self.dir.join(n.to_string()).display().to_string()).collect()
    }
}

impl Drop for Lowers {
    fn drop(&mut self) {
        let _ = clear(&self.dir);
    }
}

/// Makes a place and what is above it. Whoever takes the last place away takes
/// [`DIRECTORY`] too, perhaps between two of our steps.
fn make(place: &Path) -> std::io::Result<()> {
    use std::io::ErrorKind::{AlreadyExists, NotFound};
    // The second one: it was there, and gone when std looked whether it is a directory.
    let again = |made: &std::io::Result<()>| matches!(made, Err(e) if matches!(e.kind(), NotFound | AlreadyExists));
    let mut made = Ok(());
    for _ in 0..TRIES {
        made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(place);
        if !again(&made) {
            break;
        }
    }
    made
}

fn place(bundle: &Path) -> PathBuf {
    Path::new(DIRECTORY).join(short_name(&[&bundle.to_string_lossy()]))
}

/// Takes off what a process that was killed in the middle has left of `bundle`'s
/// lower layers; usually nothing.
///
/// # Errors
/// Those of umount and rmdir.
pub fn forget(bundle: &Path) -> Result<()> {
    clear(&place(bundle))
}

fn clear(dir: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).context(|| format!("list {}", dir.display())),
    };
    let mut errors = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        // Never what is in it: rmdir refuses where the layer is still there.
        let gone = sys::mount::detach(&path)
            .and_then(|_| std::fs::remove_dir(&path).context(|| format!("remove {}", path.display())));
        errors.extend(gone.err());
    }
    if errors.is_empty() {
        errors.extend(std::fs::remove_dir(dir).context(|| format!("remove {}", dir.display())).err());
        let _ = std::fs::remove_dir(DIRECTORY);
    }
    Error::join("take off mapped layers", errors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(o: &[&str]) -> Vec<String> {
        o.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_mapping_is_taken_out_of_the_options() {
        let mut o = options(&["ro", "uidmap=0:100000:65536,65536:5:1", "lowerdir=/a", "gidmap=0:7:9"]);
        let m = take(&mut o).unwrap().unwrap();
        assert_eq!(o, ["ro", "lowerdir=/a"]);
        assert_eq!(m.uids.len(), 2);
        assert_eq!(m.gids, [IdRange { inside: 0, outside: 7, length: 9 }]);
        assert_eq!(take(&mut o).unwrap(), None);
    }

    #[test]
    fn a_place_is_made_while_the_last_one_goes() {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("l");
        let live = |name: &str| {
            let own = shared.join(name);
            for _ in 0..3000 {
                make(&own.join("0")).unwrap();
                std::fs::remove_dir(own.join("0")).and_then(|()| std::fs::remove_dir(&own)).unwrap();
                let _ = std::fs::remove_dir(&shared);
            }
        };
        std::thread::scope(|s| {
            s.spawn(|| live("a"));
            live("b");
        });
    }

    #[test]
    fn half_a_mapping_and_nonsense_are_refused() {
        for bad in [
            &["uidmap=0:1:2"][..],
            &["uidmap=0:1", "gidmap=0:1:2"],
            &["uidmap=0:1:0", "gidmap=0:1:2"],
            &["uidmap=", "gidmap="],
        ] {
            assert_eq!(take(&mut options(bad)).unwrap_err().kind(), types::ErrorKind::InvalidArgument, "{bad:?}");
        }
    }
}
