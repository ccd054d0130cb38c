//! The CRI log: `2016-10-06T00:17:09.669794202Z stdout F text`, one line each.
//!
//! A line of more than `limit` bytes becomes pieces of `limit` bytes marked P
//! and a last one marked F (behaviours.md section 6). Pure: bytes in, bytes out.

use std::time::{Duration, SystemTime};

/// The longest line in bytes, where nothing else is configured.
pub const DEFAULT_LIMIT: usize = 16384;

/// Which of the two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Descriptor 1.
    Stdout,
    /// Descriptor 2.
    Stderr,
}

impl Stream {
    /// Its name in a log line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// One stream's way into the log: it keeps the line that has no end yet.
#[derive(Debug)]
pub struct Lines {
    stream: Stream,
    limit: usize,
    pending: Vec<u8>,
}

impl Lines {
    /// Lines of `stream`, split beyond `limit` bytes (at least 1).
    pub fn new(stream: Stream, limit: usize) -> Self {
        Self { stream, limit: limit.max(1), pending: Vec::new() }
    }

    /// Takes the bytes of one read, which get one time, and appends the
    /// finished log lines to `out`.
    pub fn feed(&mut self, at: SystemTime, mut bytes: &[u8], out: &mut Vec<u8>) {
        let mut head = [0u8; 64];
        let head = self.head(at, &mut head);
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            self.take(&bytes[..end], head, out);
            let rest = std::mem::take(&mut self.pending);
            emit(head, b'F', &rest, out);
            // The buffer of a long line is not kept for short ones.
            if rest.capacity() <= 1024 {
                self.pending = rest;
                self.pending.clear();
            }
            bytes = &bytes[end + 1..];
        }
        self.take(bytes, head, out);
    }

    /// The stream has ended: what is left is a line too.
    pub fn finish(&mut self, at: SystemTime, out: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            let mut head = [0u8; 64];
            let head = self.head(at, &mut head);
            emit(head, b'F', &std::mem::take(&mut self.pending), out);
        }
    }

    /// Adds to the unfinished line; what is surely too long goes out as P.
    fn take(&mut self, mut bytes: &[u8], head: &[u8], out: &mut Vec<u8>) {
        while self.pending.len() + bytes.len() > self.limit {
            let fits = self.limit - self.pending.len();
            self.pending.extend_from_slice(&bytes[..fits]);
            bytes = &bytes[fits..];
            emit(head, b'P', &self.pending, out);
            self.pending.clear();
        }
        self.pending.extend_from_slice(bytes);
    }

    fn head<'a>(&self, at: SystemTime, buffer: &'a mut [u8; 64]) -> &'a [u8] {
        use std::io::Write;
        let mut rest = &mut buffer[..];
        // 30 bytes of time, two blanks, six of name: it fits.
        let _ = write!(rest, "{} {} ", timestamp(at), self.stream.name());
        let left = rest.len();
        &buffer[..64 - left]
    }
}

fn emit(head: &[u8], tag: u8, text: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(head);
    out.extend_from_slice(&[tag, b' ']);
    out.extend_from_slice(text);
    out.push(b'\n');
}

/// The lines that the bytes of one read make where nothing is kept for the next:
/// the text and the tag of each, P for what has no end yet. That is how conmon
/// writes its log, so that a prompt is seen at once.
pub fn pieces(bytes: &[u8]) -> impl Iterator<Item = (&[u8], u8)> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (piece, tag, after) = match memchr::memchr(b'\n', rest) {
            Some(end) => (&rest[..end], b'F', &rest[end + 1..]),
            None => (rest, b'P', &rest[rest.len()..]),
        };
        rest = after;
        Some((piece, tag))
    })
}

/// RFC 3339 in UTC with nine digits of a second, as the CRI's logs have it.
pub fn timestamp(at: SystemTime) -> String {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    format!("{}Z", date_and_time(since))
}

/// The same in a zone that is `offset` seconds ahead of UTC, as conmon's log has it.
pub fn local_timestamp(at: SystemTime, offset: i32) -> String {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let ahead = Duration::from_secs(u64::from(offset.unsigned_abs()));
    let local = if offset < 0 { since.saturating_sub(ahead) } else { since + ahead };
    let sign = if offset < 0 { '-' } else { '+' };
    let minutes = offset.unsigned_abs() / 60;
    format!("{}{sign}{:02}:{:02}", date_and_time(local), minutes / 60, minutes % 60)
}

fn date_and_time(since: Duration) -> String {
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}

/// The Gregorian date of a day since 1970-01-01, counted in eras of 400 years
/// whose years begin in March, so that the leap day is the last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: u64, nanos: u32) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos)
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (s, n, want) in [
            (0, 0, "1970-01-01T00:00:00.000000000Z"),
            (1_475_712_429, 669_794_202, "2016-10-06T00:07:09.669794202Z"),
            (951_782_400, 1, "2000-02-29T00:00:00.000000001Z"),
            (4_107_542_399, 0, "2100-02-28T23:59:59.000000000Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000000000Z"),
        ] {
            assert_eq!(timestamp(at(s, n)), want);
        }
    }

    #[test]
    fn local_times_carry_their_offset() {
        let then = at(1_475_712_429, 669_794_202);
        assert_eq!(local_timestamp(then, 0), "2016-10-06T00:07:09.669794202+00:00");
        assert_eq!(local_timestamp(then, 5 * 3600 + 1800), "2016-10-06T05:37:09.669794202+05:30");
        assert_eq!(local_timestamp(then, -3600), "2016-10-05T23:07:09.669794202-01:00");
    }

    #[test]
    fn pieces_keep_nothing() {
        let all = |bytes| pieces(bytes).collect::<Vec<_>>();
        assert_eq!(all(b"a\n\nb"), [(&b"a"[..], b'F'), (b"", b'F'), (b"b", b'P')]);
        assert_eq!(all(b"a\n"), [(&b"a"[..], b'F')]);
        assert!(all(b"").is_empty());
    }

    fn run(limit: usize, chunks: &[&[u8]]) -> String {
        let mut lines = Lines::new(Stream::Stderr, limit);
        let mut out = Vec::new();
        for c in chunks {
            lines.feed(at(0, 0), c, &mut out);
        }
        lines.finish(at(0, 0), &mut out);
        String::from_utf8(out).unwrap().replace("1970-01-01T00:00:00.000000000Z ", "")
    }

    #[test]
    fn long_lines_are_split_and_the_last_piece_is_full() {
        assert_eq!(run(4, &[b"abcd\n"]), "stderr F abcd\n");
        assert_eq!(run(4, &[b"abcdefghij\nk"]), "stderr P abcd\nstderr P efgh\nstderr F ij\nstderr F k\n");
        assert_eq!(run(4, &[b"abcd", b"e\n"]), "stderr P abcd\nstderr F e\n");
        assert_eq!(run(4, &[b"\n\n"]), "stderr F \nstderr F \n");
        assert_eq!(run(4, &[b"ab", b"c"]), "stderr F abc\n");
        assert_eq!(run(4, &[]), "");
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_however_reads_fall(
            text in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'x'), Just(b'y')], 0..200),
            cuts in proptest::collection::vec(1usize..20, 0..40),
            limit in 1usize..12,
        ) {
            let mut lines = Lines::new(Stream::Stdout, limit);
            let (mut out, mut rest) = (Vec::new(), &text[..]);
            for c in cuts {
                let n = c.min(rest.len());
                lines.feed(at(0, 0), &rest[..n], &mut out);
                rest = &rest[n..];
            }
            lines.feed(at(0, 0), rest, &mut out);
            lines.finish(at(0, 0), &mut out);
            let mut back = Vec::new();
            for line in String::from_utf8(out).unwrap().lines() {
                let fields: Vec<&str> = line.splitn(4, ' ').collect();
                prop_assert!(fields[3].len() <= limit);
                back.extend_from_slice(fields[3].as_bytes());
                if fields[2] == "F" { back.push(b'\n'); }
            }
            let mut want = text.clone();
            if want.last().is_some_and(|b| *b != b'\n') { want.push(b'\n'); }
            prop_assert_eq!(back, want);
        }
    }
}
