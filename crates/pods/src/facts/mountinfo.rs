//! /proc/self/mountinfo, as far as it is asked here.

use spec::Propagation;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use types::{Result, ResultExt};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MountPoint {
    /// Where it is.
    pub path: PathBuf,
    /// The file system's type.
    pub kind: String,
    /// The options of its superblock.
    pub super_options: Vec<String>,
    /// How it propagates.
    pub propagation: Propagation,
}

/// All mounts of this mount namespace, in the order they were made.
pub(super) fn read() -> Result<Vec<MountPoint>> {
    let path = "/proc/self/mountinfo";
    let text = std::fs::read_to_string(path).context(|| format!("read {path}"))?;
    Ok(text.lines().filter_map(parse).collect())
}

/// The mount that carries `path`: the last made of those with the longest path.
pub(super) fn carrier<'a>(mounts: &'a [MountPoint], path: &Path) -> Option<&'a MountPoint> {
    mounts.iter().filter(|m| path.starts_with(&m.path)).max_by_key(|m| m.path.as_os_str().len())
}

fn parse(line: &str) -> Option<MountPoint> {
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ').skip(4);
    let path = unescape(front.next()?);
    let tags: Vec<&str> = front.skip(1).collect();
    let propagation = if tags.iter().any(|t| t.starts_with("shared:")) {
        Propagation::Shared
    } else if tags.iter().any(|t| t.starts_with("master:")) {
        Propagation::Slave
    } else {
        Propagation::Private
    };
    let mut back = back.split(' ');
    let kind = back.next()?.to_string();
    let super_options = back.nth(1).unwrap_or("").split(',').map(String::from).collect();
    Some(MountPoint { path, kind, super_options, propagation })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 8).ok());
        match (first, octal) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            (other, _) => {
                bytes.push(*other);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_with_tags_and_escapes() {
        let m = parse("36 35 98:0 /mnt1 /a\\040b rw,noatime shared:1 master:2 - ext3 /dev/root rw,errors=continue")
            .unwrap();
        assert_eq!(m.path, Path::new("/a b"));
        assert_eq!((m.kind.as_str(), m.propagation), ("ext3", Propagation::Shared));
        assert_eq!(m.super_options, ["rw", "errors=continue"]);
        let m = parse("1 0 0:1 / / rw master:9 - overlay none rw").unwrap();
        assert_eq!(m.propagation, Propagation::Slave);
        assert_eq!(parse("1 0 0:1 / /x rw - tmpfs none rw").unwrap().propagation, Propagation::Private);
        assert!(parse("nonsense").is_none());
    }

    #[test]
    fn the_carrier_is_the_deepest_and_last_mount() {
        let at = |path: &str, kind: &str| MountPoint {
            path: path.into(),
            kind: kind.into(),
            super_options: vec![],
            propagation: Propagation::Private,
        };
        let all = [at("/", "a"), at("/x", "b"), at("/x", "c"), at("/xy", "d")];
        assert_eq!(carrier(&all, Path::new("/x/z")).unwrap().kind, "c");
        assert_eq!(carrier(&all, Path::new("/xyz")).unwrap().kind, "a");
        assert!(!read().unwrap().is_empty());
    }
}
