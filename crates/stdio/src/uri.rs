//! Where a task's stream goes (behaviours.md section 4).

use crate::cri_log::DEFAULT_LIMIT;
use crate::logger::{Binary, Handshake};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use types::{Error, Result};

/// The target of one standard stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Uri {
    /// Nowhere: /dev/null.
    Null,
    /// A named pipe: a bare path or `fifo://`. For output it may be another file that is there.
    Fifo(PathBuf),
    /// The CRI log at this path, written by the shim; private to us:
    /// `cri:///path?limit=16384`.
    Cri {
        /// The log file.
        path: PathBuf,
        /// The longest line in bytes before it is split.
        limit: usize,
    },
    /// A file to which the bytes are appended as they are: `file:///path`.
    File(PathBuf),
    /// A logging binary, which takes both streams: `binary:///path?key=value…`
    /// or `binary-v2:///…`.
    Binary(Binary),
}

impl Uri {
    /// Reads a stream's URI as it stands in a Create or Exec request.
    ///
    /// # Errors
    /// `Unimplemented` for schemes that are not served, `InvalidArgument` for
    /// paths that are not absolute and limits that are no number from 1.
    pub fn parse(text: &str) -> Result<Self> {
        if text.is_empty() {
            return Ok(Self::Null);
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(Self::Fifo(absolute(text, text.as_bytes().to_vec())?));
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = absolute(text, percent_decode(path))?;
        match scheme {
            "fifo" => Ok(Self::Fifo(path)),
            "file" => Ok(Self::File(path)),
            "cri" => Ok(Self::Cri { path, limit: limit(text, query)? }),
            "binary" => Ok(Self::Binary(Binary { path, args: arguments(query), handshake: Handshake::ByteOrEnd })),
            "binary-v2" => Ok(Self::Binary(Binary { path, args: arguments(query), handshake: Handshake::Byte })),
            _ => Err(Error::unimplemented(format!("streams of scheme {scheme:?} are not served (in {text:?})"))
                .hint("use a FIFO's path, fifo://, file://, binary://, binary-v2:// or cri://")),
        }
    }
}

fn limit(text: &str, query: &str) -> Result<usize> {
    let Some(value) = query.split('&').find_map(|p| p.strip_prefix("limit=")) else { return Ok(DEFAULT_LIMIT) };
    match value.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(Error::invalid(format!("limit {value:?} in {text:?} is no number of bytes from 1"))),
    }
}

/// Each key and its first value, in the URI's order; a key without a value has
/// an empty one. As in every query, `+` is a blank.
fn arguments(query: &str) -> Vec<OsString> {
    let decode = |t: &str| OsString::from_vec(percent_decode(&t.replace('+', " ")));
    let mut all: Vec<OsString> = Vec::new();
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let key = decode(key);
        if !all.chunks(2).any(|known| known[0] == key) {
            all.extend([key, decode(value)]);
        }
    }
    all
}

fn absolute(text: &str, path: Vec<u8>) -> Result<PathBuf> {
    let path = PathBuf::from(OsString::from_vec(path));
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(Error::invalid(format!("the path of stream {text:?} is not absolute")))
    }
}

fn percent_decode(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = (bytes[i] == b'%').then(|| text.get(i + 1..i + 3)).flatten();
        match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
            Some(b) => {
                out.push(b);
                i += 3;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::ErrorKind;

    #[test]
    fn schemes_are_told_apart() {
        assert_eq!(Uri::parse("").unwrap(), Uri::Null);
        assert_eq!(Uri::parse("/run/f%20o").unwrap(), Uri::Fifo("/run/f%20o".into()));
        assert_eq!(Uri::parse("fifo:///run/a%20b").unwrap(), Uri::Fifo("/run/a b".into()));
        assert_eq!(Uri::parse("file:///x").unwrap(), Uri::File("/x".into()));
        assert_eq!(
            Uri::parse("cri:///var/log/p%3f/0.log?limit=10").unwrap(),
            Uri::Cri { path: "/var/log/p?/0.log".into(), limit: 10 }
        );
        assert_eq!(Uri::parse("cri:///l").unwrap(), Uri::Cri { path: "/l".into(), limit: DEFAULT_LIMIT });
    }

    #[test]
    fn arguments_keep_their_order_and_are_decoded() {
        let Uri::Binary(b) = Uri::parse("binary:///opt/a%20b?z=1&a=%2Fx%26y&flag&e=&z=2&--w+x=c+d").unwrap() else {
            panic!("a binary");
        };
        assert_eq!(b.path, PathBuf::from("/opt/a b"));
        assert_eq!(b.args, ["z", "1", "a", "/x&y", "flag", "", "e", "", "--w x", "c d"]);
        assert_eq!(b.handshake, Handshake::ByteOrEnd);
        let Uri::Binary(b) = Uri::parse("binary-v2:///l").unwrap() else { panic!("a binary") };
        assert_eq!((b.args.len(), b.handshake), (0, Handshake::Byte));
    }

    #[test]
    fn what_is_not_served_is_named() {
        let e = Uri::parse("npipe:///x").unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unimplemented);
        assert!(e.to_string().contains("npipe"), "{e}");
        for bad in ["relative", "file://relative", "binary://logger", "cri:///x?limit=0", "cri:///x?limit=y"] {
            assert_eq!(Uri::parse(bad).unwrap_err().kind(), ErrorKind::InvalidArgument, "{bad}");
        }
    }
}
