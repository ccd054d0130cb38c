//! Loop devices: a file as a block device.

use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use std::path::{Path, PathBuf};
use types::{Error, Result, ResultExt};

/// How often another number is tried when somebody else was faster.
const TRIES: u32 = 100;

// linux/loop.h
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct Configuration {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// A loop device that is held open; it frees itself once nobody has it open or mounted.
#[derive(Debug)]
pub struct Loop {
    path: PathBuf,
    _device: OwnedFd,
}

impl Loop {
    /// Its path, `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Puts `file` behind a free loop device.
///
/// # Errors
/// Where the file can't be opened, the kernel has no loop devices (or is older than
/// 5.8), or others are faster a hundred times.
pub fn attach(file: &Path, read_only: bool) -> Result<Loop> {
    let what = || format!("put {} behind a loop device", file.display());
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let backing = open(file, access | OFlags::CLOEXEC, Mode::empty()).context(what)?;
    let control = open("/dev/loop-control", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).context(what)?;
    for _ in 0..TRIES {
        // SAFETY: this ioctl takes no argument and returns a number.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(std::io::Error::last_os_error()).context(what);
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = open(&path, access | OFlags::CLOEXEC, Mode::empty()).context(what)?;
        match configure(&device, &backing, read_only) {
            Ok(()) => return Ok(Loop { path, _device: device }),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            Err(e) => return Err(e).context(what),
        }
    }
    Err(Error::unavailable(format!("{}: others took each free one", what())))
}

fn configure(device: &OwnedFd, backing: &OwnedFd, read_only: bool) -> std::io::Result<()> {
    // SAFETY: it is plain data, for which zero means "not set".
    let mut c: Configuration = unsafe { std::mem::zeroed() };
    c.fd = u32::try_from(backing.as_raw_fd()).map_err(std::io::Error::other)?;
    c.info.flags = LO_FLAGS_AUTOCLEAR | if read_only { LO_FLAGS_READ_ONLY } else { 0 };
    // SAFETY: the structure has the kernel's layout and lives through the call, which
    // only reads it; both descriptors are open.
    if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const c) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_are_the_kernel_s() {
        assert_eq!(size_of::<Info>(), 232);
        assert_eq!(size_of::<Configuration>(), 304);
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let e = attach(Path::new("/nonexistent/image"), true).unwrap_err();
        assert!(e.to_string().contains("/nonexistent/image"), "{e}");
    }
}
