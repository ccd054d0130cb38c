//! What people and programs read: tables, JSON, sizes, times.

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::Value;
use std::io::{IsTerminal, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use types::{Error, Result, ResultExt};

/// The length of a short id, as crictl's.
pub const SHORT_ID: usize = 13;

/// A table with a header; columns are as wide as their widest cell.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column heads.
    pub fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(ToString::to_string).collect()] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table as text. Control characters in a cell, which may come from an image
    /// or a pod of somebody else, are replaced: they must not reach the terminal.
    pub fn render(&self) -> String {
        let clean = |cell: &String| -> String { cell.chars().map(|c| if c.is_control() { '?' } else { c }).collect() };
        let rows: Vec<Vec<String>> = self.rows.iter().map(|r| r.iter().map(clean).collect()).collect();
        let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |i: usize| rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 3));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Writes to stdout.
///
/// # Errors
/// As the write; see [`is_broken_pipe`].
pub fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// Writes bytes to stdout.
///
/// # Errors
/// As the write; see [`is_broken_pipe`].
pub fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|e| match e.kind() {
        std::io::ErrorKind::BrokenPipe => broken_pipe(),
        _ => Error::internal("write to standard output").because(e),
    })
}

const BROKEN_PIPE: &str = "standard output was closed by its reader";

/// The error that says that nobody reads our output any more.
pub fn broken_pipe() -> Error {
    Error::new(types::ErrorKind::Cancelled, BROKEN_PIPE)
}

/// True when our reader has gone (`longshore ps | head`): that is no failure.
pub fn is_broken_pipe(e: &Error) -> bool {
    e.kind() == types::ErrorKind::Cancelled && e.to_string() == BROKEN_PIPE
}

/// A message as proto3 JSON in crictl's form: names in camelCase, 64-bit numbers as
/// strings, defaults spelled out (a READY pod's state is the enum's zero).
///
/// # Errors
/// `Internal` when `name` is no message of ours.
pub fn to_json(name: &str, message: &impl Message) -> Result<Value> {
    let pool = DescriptorPool::decode(proto::cri::DESCRIPTORS).context(|| "read our own descriptors".to_string())?;
    let descriptor =
        pool.get_message_by_name(name).ok_or_else(|| Error::internal(format!("no message is named {name}")))?;
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .context(|| format!("read a {name} again"))?;
    dynamic
        .serialize_with_options(serde_json::value::Serializer, &SerializeOptions::new().skip_default_fields(false))
        .context(|| format!("make JSON of a {name}"))
}

/// Prints a value as indented JSON.
///
/// # Errors
/// As [`print`].
pub fn print_json(value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context(|| "make JSON".to_string())?;
    print(&format!("{text}\n"))
}

/// An id as tables show it: without its algorithm, cut unless `full`.
pub fn shown_id(id: &str, full: bool) -> String {
    let bare = id.split_once(':').map_or(id, |(_, hex)| hex);
    if full { id.to_string() } else { bare.chars().take(SHORT_ID).collect() }
}

/// A size in decimal units with three digits, as docker prints it: "4.26MB".
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let mut unit = 0;
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = bytes as f64;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{}", UNITS[unit])
}

/// How long ago a Unix time in nanoseconds was: "2 minutes ago".
pub fn ago(nanoseconds: i64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let then = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0));
    format!("{} ago", span(now.saturating_sub(then)))
}

/// A duration in words, as docker has them.
pub fn span(d: Duration) -> String {
    let seconds = d.as_secs();
    let (minutes, hours) = (seconds / 60, (seconds + 1800) / 3600);
    match seconds {
        0 => "Less than a second".to_string(),
        1 => "1 second".to_string(),
        2..60 => format!("{seconds} seconds"),
        _ if minutes == 1 => "About a minute".to_string(),
        _ if minutes < 60 => format!("{minutes} minutes"),
        _ if hours == 1 => "About an hour".to_string(),
        _ if hours < 48 => format!("{hours} hours"),
        _ if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        _ if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        _ if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        _ => format!("{} years", hours / 24 / 365),
    }
}

/// The terminal's width in columns; 100 where there is none.
pub fn width() -> usize {
    if let Some(columns) = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok()) {
        return columns;
    }
    let out = std::io::stdout();
    match rustix::termios::tcgetwinsize(&out) {
        Ok(size) if out.is_terminal() && size.ws_col > 0 => usize::from(size.ws_col),
        _ => 100,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut t = Table::new(&["ID", "NAME"]);
        t.row(vec!["0123456789abc".into(), "a\x1b[31m".into()]);
        t.row(vec!["é".into(), String::new()]);
        assert_eq!(t.render(), "ID              NAME\n0123456789abc   a?[31m\né\n");
    }

    #[test]
    fn times_are_told_as_docker_tells_them() {
        let cases = [
            (0, "Less than a second"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (119, "About a minute"),
            (150, "2 minutes"),
            (3600, "About an hour"),
            (3 * 3600, "3 hours"),
            (47 * 3600, "47 hours"),
            (48 * 3600, "2 days"),
            (15 * 86400, "2 weeks"),
            (90 * 86400, "3 months"),
            (3 * 365 * 86400, "3 years"),
        ];
        for (seconds, words) in cases {
            assert_eq!(span(Duration::from_secs(seconds)), words, "{seconds}");
        }
        assert!(ago(0).ends_with("years ago"));
        assert_eq!(ago(i64::MAX), "Less than a second ago");
    }

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0B"),
            (999, "999B"),
            (1000, "1kB"),
            (4_261_550, "4.26MB"),
            (42_615_500, "42.6MB"),
            (999_999, "1MB"),
            (100_000_000, "100MB"),
            (u64::MAX, "18.4EB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn ids_lose_their_algorithm_where_they_are_cut() {
        let id = format!("sha256:{}", "ab".repeat(32));
        assert_eq!(shown_id(&id, false), "ababababababa");
        assert_eq!(shown_id(&id, true), id);
    }

    #[test]
    fn json_is_crictls() {
        let pod = proto::cri::PodSandbox { id: "x".into(), created_at: 5, ..Default::default() };
        let json = to_json("runtime.v1.PodSandbox", &pod).unwrap();
        assert_eq!(json["createdAt"], "5");
        assert_eq!(json["state"], "SANDBOX_READY");
        assert!(to_json("runtime.v1.Nope", &pod).is_err());
    }
}
