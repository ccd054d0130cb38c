//! The CRI log format (behaviours.md section 6):
//!
//! ```text
//! 2016-10-06T00:17:09.669794202Z stdout F text
//! └ time, RFC 3339               │      │ └ the line's bytes
//!                                │      └ F: a whole line or the end of one, P: a piece
//!                                └ stdout or stderr
//! ```

use std::io::{self, Write};

/// Where a line was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One line of the log file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line<'a> {
    /// RFC 3339, as it was written.
    pub time: &'a str,
    /// Where it was written to.
    pub stream: Stream,
    /// A piece whose line goes on in the next entry of the same stream.
    pub partial: bool,
    /// What was written, without the newline.
    pub text: &'a [u8],
}

impl<'a> Line<'a> {
    /// Reads one line without its newline; `None` for what is none of the format,
    /// which readers skip.
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.splitn(4, |b| *b == b' ');
        let time = std::str::from_utf8(fields.next()?).ok()?;
        let stream = match fields.next()? {
            b"stdout" => Stream::Stdout,
            b"stderr" => Stream::Stderr,
            _ => return None,
        };
        // Further tags may follow after a colon.
        let partial = match fields.next()?.split(|b| *b == b':').next()? {
            b"F" => false,
            b"P" => true,
            _ => return None,
        };
        let text = fields.next().unwrap_or_default();
        (!time.is_empty()).then_some(Self { time, stream, partial, text })
    }
}

/// Writes lines to stdout and stderr as the container wrote them.
#[derive(Debug)]
pub struct Printer {
    /// Each line begins with its time.
    timestamps: bool,
    /// Whether the streams are in the middle of a line: stdout, stderr.
    within: [bool; 2],
}

impl Printer {
    /// Begins each line with its time, or not.
    pub fn new(timestamps: bool) -> Self {
        Self { timestamps, within: [false; 2] }
    }

    /// Writes one line or piece to the right one of the two.
    ///
    /// # Errors
    /// As the writes.
    pub fn print(&mut self, line: &Line<'_>, out: &mut impl Write, err: &mut impl Write) -> io::Result<()> {
        match line.stream {
            Stream::Stdout => Self::write(self.timestamps, &mut self.within[0], line, out),
            Stream::Stderr => Self::write(self.timestamps, &mut self.within[1], line, err),
        }
    }

    fn write(timestamps: bool, within: &mut bool, line: &Line<'_>, to: &mut impl Write) -> io::Result<()> {
        if timestamps && !*within {
            write!(to, "{} ", line.time)?;
        }
        *within = line.partial;
        to.write_all(line.text)?;
        if line.partial { Ok(()) } else { to.write_all(b"\n") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_others_refused() {
        let line = Line::parse(b"2016-10-06T00:17:09.669794202Z stderr P  two  spaces ").unwrap();
        assert_eq!((line.stream, line.partial, line.text), (Stream::Stderr, true, b" two  spaces ".as_slice()));
        assert_eq!(Line::parse(b"t stdout F").unwrap().text, b"");
        assert_eq!(Line::parse(b"t stdout F ").unwrap().text, b"");
        assert!(!Line::parse(b"t stdout F:x \xff\x00").unwrap().partial);
        for bad in [&b""[..], b"t", b"t stdout", b"t stdin F x", b"t stdout X x", b" stdout F x", b"\xff stdout F x"] {
            assert_eq!(Line::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn pieces_are_joined_per_stream_and_timed_once() {
        let mut printer = Printer::new(true);
        let (mut out, mut err) = (Vec::new(), Vec::new());
        for text in [&b"1 stdout P ab"[..], b"2 stderr F e", b"3 stdout F c", b"4 stdout F d"] {
            printer.print(&Line::parse(text).unwrap(), &mut out, &mut err).unwrap();
        }
        assert_eq!(out, b"1 abc\n4 d\n");
        assert_eq!(err, b"2 e\n");
    }
}
