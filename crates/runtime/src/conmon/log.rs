//! An exec's log, taken apart into the streams that it was made of: for monitors
//! that can't hand our own pipes down (behaviours.md section 2).
//!
//! Lines `TIME stream P|F text`; the newline of a P line is no output. What is no
//! such line is skipped, and counted.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;
use stdio::Capped;
use types::{Result, ResultExt};

/// More than this in a line is none of a monitor's: those are of 8 KiB at most.
const LONGEST: u64 = 1 << 20;

/// The streams of a log file, each kept up to `keep` bytes.
pub(crate) struct Streams {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    /// Lines that were skipped.
    pub(crate) skipped: usize,
}

/// Reads a log back. One that was never begun is empty.
///
/// # Errors
/// Those of the file system.
pub(crate) fn read(path: &Path, keep: usize) -> Result<Streams> {
    let what = || format!("read {}", path.display());
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return Ok(Streams { stdout: Vec::new(), stderr: Vec::new(), skipped: 0 });
        }
        Err(e) => return Err(e).context(what),
    };
    parse(BufReader::new(file), keep).context(what)
}

fn parse(mut lines: impl BufRead, keep: usize) -> std::io::Result<Streams> {
    let (mut out, mut err, mut skipped) = (Capped::new(keep), Capped::new(keep), 0);
    let mut line = Vec::new();
    let mut whole = true;
    loop {
        line.clear();
        if lines.by_ref().take(LONGEST).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        let (began, ends) = (std::mem::replace(&mut whole, line.ends_with(b"\n")), line.ends_with(b"\n"));
        let Some((stream, text, full)) = split(&line).filter(|_| began && ends) else {
            skipped += 1;
            continue;
        };
        let sink = if stream == b"stdout" { &mut out } else { &mut err };
        sink.push(text);
        if full {
            sink.push(b"\n");
        }
    }
    Ok(Streams { stdout: out.into_kept(), stderr: err.into_kept(), skipped })
}

/// Stream, text and whether the line is a full one.
fn split(line: &[u8]) -> Option<(&[u8], &[u8], bool)> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut parts = line.splitn(4, |b| *b == b' ');
    let (time, stream, tag, text) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let timed = time.first().is_some_and(u8::is_ascii_digit) && time.contains(&b'T');
    let known = stream == b"stdout" || stream == b"stderr";
    match tag {
        b"F" if timed && known => Some((stream, text, true)),
        b"P" if timed && known => Some((stream, text, false)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const T: &str = "2016-10-06T00:17:09.669794202+00:00";

    #[test]
    fn streams_are_told_apart_and_pieces_joined() {
        let log = format!(
            "{T} stdout P ab\n{T} stderr F oops\n{T} stdout F c d \n{T} stdout F \n{T} stdout P end\n\
             what is this\n{T} stdin F x\n{T} stdout X x\nx stdout F x\n{T} stdout F cut off"
        );
        let s = parse(log.as_bytes(), 100).unwrap();
        assert_eq!(s.stdout, b"abc d \n\nend");
        assert_eq!(s.stderr, b"oops\n");
        assert_eq!(s.skipped, 5);
    }

    #[test]
    fn each_stream_is_kept_to_its_limit() {
        let log = format!("{T} stdout F 0123456789\n{T} stderr F abc\n");
        let s = parse(log.as_bytes(), 4).unwrap();
        assert_eq!((s.stdout.as_slice(), s.stderr.as_slice()), (&b"0123"[..], &b"abc\n"[..]));
        let missing = read(Path::new("/no/such/log"), 4).unwrap();
        assert!(missing.stdout.is_empty() && missing.skipped == 0);
    }

    proptest! {
        #[test]
        fn what_a_monitor_writes_is_read_back(pieces in prop::collection::vec(any::<Vec<u8>>(), 0..20)) {
            let mut log = Vec::new();
            for piece in &pieces {
                for line in piece.split_inclusive(|b| *b == b'\n') {
                    let full = line.ends_with(b"\n");
                    log.extend(format!("{T} stdout {} ", if full { "F" } else { "P" }).bytes());
                    log.extend(line.strip_suffix(b"\n").unwrap_or(line));
                    log.push(b'\n');
                }
            }
            let s = parse(log.as_slice(), usize::MAX >> 1).unwrap();
            prop_assert_eq!(s.stdout, pieces.concat());
            prop_assert_eq!(s.skipped, 0);
        }
    }
}
