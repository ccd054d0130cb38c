//! Paths as words: no file system is asked, symlinks are the runtime's business.

use std::path::PathBuf;
use types::{Error, Result};

/// `path` made absolute and lexically clean: no empty, `.` or `..` parts, and
/// never above the root. A relative path is taken from the root.
pub(crate) fn clean(path: &str) -> PathBuf {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            other => parts.push(other),
        }
    }
    PathBuf::from(format!("/{}", parts.join("/")))
}

/// How many parts a clean path has; `/` has none.
pub(crate) fn depth(path: &std::path::Path) -> usize {
    path.components().count().saturating_sub(1)
}

/// True when one of the parts is `..`.
pub(crate) fn climbs(path: &str) -> bool {
    path.split('/').any(|part| part == "..")
}

/// Refuses what can't be a C string or would break a line of /proc/mounts.
pub(crate) fn check_text(field: &str, text: &str) -> Result<()> {
    if text.contains(['\0', '\n']) {
        return Err(Error::invalid(format!("{field} {text:?} contains a NUL byte or a newline")));
    }
    Ok(())
}

/// A host path: absolute, and without `..`.
pub(crate) fn host_path(field: &str, path: &str) -> Result<PathBuf> {
    check_text(field, path)?;
    if !path.starts_with('/') || climbs(path) {
        return Err(Error::invalid(format!("{field} {path:?} is not an absolute path without \"..\"")));
    }
    Ok(clean(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn clean_never_leaves_the_root() {
        for (from, to) in
            [("", "/"), ("a", "/a"), ("/a//b/./c", "/a/b/c"), ("../../x", "/x"), ("/a/../../b/", "/b"), ("..", "/")]
        {
            assert_eq!(clean(from), Path::new(to), "{from}");
        }
        assert_eq!(depth(Path::new("/")), 0);
        assert_eq!(depth(Path::new("/a/b")), 2);
    }

    #[test]
    fn host_paths_are_absolute_and_do_not_climb() {
        assert!(host_path("f", "/a/b").is_ok());
        for bad in ["", "a", "/a/../b", "/a\n", "/a\0"] {
            assert!(host_path("f", bad).is_err(), "{bad:?}");
        }
    }
}
