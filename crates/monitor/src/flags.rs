//! The command line of conmon 2.1 and 2.2, with GLib's rules: `--name VALUE`,
//! `--name=VALUE`, `-c VALUE`, `-cVALUE`, several letters behind one dash, the
//! last of repeated values counts, and positional arguments are ignored (Podman
//! passes one behind `--api-version`). Pure: words in, flags out.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use types::{Error, Result};

/// What the command line asks for.
#[derive(Debug)]
pub enum Asked {
    /// Monitor a container or an exec.
    Run(Box<Flags>),
    /// Print the version.
    Version,
    /// Print the help.
    Help,
}

/// The flags as they were given, unchecked.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "it is a command line")]
pub struct Flags {
    pub api_version: bool,
    pub bundle: Option<PathBuf>,
    pub cid: Option<String>,
    pub conmon_pidfile: Option<PathBuf>,
    pub container_pidfile: Option<PathBuf>,
    pub cuuid: Option<String>,
    pub exec: bool,
    pub exec_attach: bool,
    pub exec_process_spec: Option<PathBuf>,
    pub exit_command: Option<PathBuf>,
    pub exit_command_arg: Vec<OsString>,
    pub exit_delay: i64,
    pub exit_dir: Option<PathBuf>,
    pub full_attach: bool,
    pub leave_stdin_open: bool,
    pub log_allowlist_dir: Vec<PathBuf>,
    pub log_global_size_max: Option<i64>,
    pub log_label: Vec<String>,
    pub log_level: Option<String>,
    pub log_max_files: Option<i64>,
    pub log_path: Vec<String>,
    pub log_rotate: bool,
    pub log_size_max: Option<i64>,
    pub log_tag: Option<String>,
    pub name: Option<String>,
    pub no_container_partial_message: bool,
    pub no_new_keyring: bool,
    pub no_pivot: bool,
    pub no_sync_log: bool,
    pub persist_dir: Option<PathBuf>,
    pub replace_listen_pid: bool,
    pub restore: Option<PathBuf>,
    pub runtime: Option<PathBuf>,
    pub runtime_arg: Vec<OsString>,
    pub runtime_opt: Vec<OsString>,
    pub sdnotify_socket: Option<PathBuf>,
    pub socket_dir_path: Option<PathBuf>,
    pub stdin: bool,
    pub sync: bool,
    pub syslog: bool,
    pub systemd_cgroup: bool,
    pub terminal: bool,
    pub timeout: i64,
}

/// Where a flag's value goes.
enum Slot {
    On(fn(&mut Flags) -> &mut bool),
    Path(fn(&mut Flags) -> &mut Option<PathBuf>),
    Text(fn(&mut Flags) -> &mut Option<String>),
    Number(Bits, fn(&mut Flags, i64)),
    Paths(fn(&mut Flags) -> &mut Vec<PathBuf>),
    Texts(fn(&mut Flags) -> &mut Vec<String>),
    Words(fn(&mut Flags) -> &mut Vec<OsString>),
    Version,
    Help,
}

/// The range of a number.
#[derive(Clone, Copy)]
enum Bits {
    B32,
    B64,
}

struct Entry {
    name: &'static str,
    letter: Option<u8>,
    slot: Slot,
    help: &'static str,
}

const fn entry(name: &'static str, letter: &str, slot: Slot, help: &'static str) -> Entry {
    let letter = letter.as_bytes();
    Entry { name, letter: if letter.is_empty() { None } else { Some(letter[0]) }, slot, help }
}

#[rustfmt::skip]
static TABLE: [Entry; 47] = [
    entry("api-version", "", Slot::On(|f| &mut f.api_version), "Two answers on the sync pipe, keyed \"data\""),
    entry("bundle", "b", Slot::Path(|f| &mut f.bundle), "The OCI bundle"),
    entry("cid", "c", Slot::Text(|f| &mut f.cid), "The container's id"),
    entry("conmon-pidfile", "P", Slot::Path(|f| &mut f.conmon_pidfile), "File for the monitor's own pid"),
    entry("container-pidfile", "p", Slot::Path(|f| &mut f.container_pidfile), "File for the process's pid"),
    entry("cuuid", "u", Slot::Text(|f| &mut f.cuuid), "The container's UUID, which names its sockets"),
    entry("exec", "e", Slot::On(|f| &mut f.exec), "Run one more process in a running container"),
    entry("exec-attach", "", Slot::On(|f| &mut f.exec_attach), "Wait for a client before the exec begins"),
    entry("exec-process-spec", "", Slot::Path(|f| &mut f.exec_process_spec), "The exec's OCI process document"),
    entry("exit-command", "", Slot::Path(|f| &mut f.exit_command), "Program to run when the process has ended"),
    entry("exit-command-arg", "", Slot::Words(|f| &mut f.exit_command_arg), "An argument of it; repeatable"),
    entry("exit-delay", "", Slot::Number(Bits::B32, |f, n| f.exit_delay = n), "Seconds to wait before it"),
    entry("exit-dir", "", Slot::Path(|f| &mut f.exit_dir), "Directory that gets the exit file"),
    entry("full-attach", "", Slot::On(|f| &mut f.full_attach), "Attach socket in the bundle itself, without a symlink"),
    entry("help", "h", Slot::Help, "Print this"),
    entry("leave-stdin-open", "", Slot::On(|f| &mut f.leave_stdin_open), "Keep stdin open when a client goes"),
    entry("log-allowlist-dir", "", Slot::Paths(|f| &mut f.log_allowlist_dir), "Directory that logs may be in; repeatable"),
    entry("log-global-size-max", "", Slot::Number(Bits::B64, |f, n| f.log_global_size_max = Some(n)), "Bytes to log altogether"),
    entry("log-label", "", Slot::Texts(|f| &mut f.log_label), "LABEL=VALUE for journald; repeatable"),
    entry("log-level", "", Slot::Text(|f| &mut f.log_level), "Which messages of its own: error, warning, info, debug, trace"),
    entry("log-max-files", "", Slot::Number(Bits::B32, |f, n| f.log_max_files = Some(n)), "How many rotated logs are kept (1)"),
    entry("log-path", "l", Slot::Texts(|f| &mut f.log_path), "Log: PATH, k8s-file:PATH, journald, passthrough, none; repeatable"),
    entry("log-rotate", "", Slot::On(|f| &mut f.log_rotate), "Rotate at --log-size-max instead of truncating"),
    entry("log-size-max", "", Slot::Number(Bits::B64, |f, n| f.log_size_max = Some(n)), "Bytes per log file; -1 means no limit"),
    entry("log-tag", "", Slot::Text(|f| &mut f.log_tag), "Tag for journald"),
    entry("name", "n", Slot::Text(|f| &mut f.name), "The container's name, for journald"),
    entry("no-container-partial-message", "", Slot::On(|f| &mut f.no_container_partial_message), "No CONTAINER_PARTIAL_MESSAGE in the journal"),
    entry("no-new-keyring", "", Slot::On(|f| &mut f.no_new_keyring), "Passed to the runtime's create"),
    entry("no-pivot", "", Slot::On(|f| &mut f.no_pivot), "Passed to the runtime's create"),
    entry("no-sync-log", "", Slot::On(|f| &mut f.no_sync_log), "Leave syncing the log to the kernel"),
    entry("persist-dir", "0", Slot::Path(|f| &mut f.persist_dir), "Directory that gets the files exit and oom"),
    entry("pidfile", "", Slot::Path(|f| &mut f.container_pidfile), "The older name of --container-pidfile"),
    entry("replace-listen-pid", "", Slot::On(|f| &mut f.replace_listen_pid), "LISTEN_PID becomes the runtime's pid"),
    entry("restore", "", Slot::Path(|f| &mut f.restore), "Restore from this checkpoint instead of creating"),
    entry("restore-arg", "", Slot::Words(|f| &mut f.runtime_opt), "The older name of --runtime-opt"),
    entry("runtime", "r", Slot::Path(|f| &mut f.runtime), "The OCI runtime's binary"),
    entry("runtime-arg", "", Slot::Words(|f| &mut f.runtime_arg), "Argument before the runtime's verb; repeatable"),
    entry("runtime-opt", "", Slot::Words(|f| &mut f.runtime_opt), "Argument behind the runtime's verb; repeatable"),
    entry("sdnotify-socket", "", Slot::Path(|f| &mut f.sdnotify_socket), "The host's notify socket, to pass messages on to"),
    entry("socket-dir-path", "", Slot::Path(|f| &mut f.socket_dir_path), "Directory of the short links to attach sockets"),
    entry("stdin", "i", Slot::On(|f| &mut f.stdin), "Give the process a pipe as stdin"),
    entry("sync", "", Slot::On(|f| &mut f.sync), "Stay the caller's child"),
    entry("syslog", "", Slot::On(|f| &mut f.syslog), "Messages of its own go to syslog too"),
    entry("systemd-cgroup", "s", Slot::On(|f| &mut f.systemd_cgroup), "Cgroups are systemd's"),
    entry("terminal", "t", Slot::On(|f| &mut f.terminal), "Give the process a terminal"),
    entry("timeout", "T", Slot::Number(Bits::B32, |f, n| f.timeout = n), "Seconds after which the process is killed"),
    entry("version", "", Slot::Version, "Print the version"),
];

/// The help text.
pub fn help() -> String {
    use std::fmt::Write;
    let mut text = "Usage:\n  longshore-conmon [OPTION…]\n\nOptions:\n".to_string();
    for e in &TABLE {
        let letter = e.letter.map_or_else(|| "    ".to_string(), |l| format!("-{}, ", char::from(l)));
        // Writing to a String can't fail.
        let _ = writeln!(text, "  {letter}--{:<32} {}", e.name, e.help);
    }
    text
}

/// Reads the words behind the program's name.
///
/// # Errors
/// `InvalidArgument` for an unknown flag, a missing value, a bad number.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Asked> {
    let mut flags = Box::<Flags>::default();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let bytes = word.as_bytes();
        if bytes == b"--" {
            break;
        }
        let asked = if let Some(long) = bytes.strip_prefix(b"--") {
            long_flag(&mut flags, long, &mut words)?
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            letters(&mut flags, &bytes[1..], &mut words)?
        } else {
            None
        };
        if let Some(other) = asked {
            return Ok(other);
        }
    }
    Ok(Asked::Run(flags))
}

fn long_flag(flags: &mut Flags, long: &[u8], words: &mut impl Iterator<Item = OsString>) -> Result<Option<Asked>> {
    let (name, inline) = match memchr::memchr(b'=', long) {
        Some(at) => (&long[..at], Some(OsStr::from_bytes(&long[at + 1..]).to_os_string())),
        None => (long, None),
    };
    let e = TABLE.iter().find(|e| e.name.as_bytes() == name).ok_or_else(|| unknown("--", name))?;
    set(flags, e, inline, words)
}

fn letters(flags: &mut Flags, letters: &[u8], words: &mut impl Iterator<Item = OsString>) -> Result<Option<Asked>> {
    for (i, letter) in letters.iter().enumerate() {
        let e = TABLE.iter().find(|e| e.letter == Some(*letter)).ok_or_else(|| unknown("-", &[*letter]))?;
        let takes_value = !matches!(e.slot, Slot::On(_) | Slot::Version | Slot::Help);
        let rest = &letters[i + 1..];
        let inline = (takes_value && !rest.is_empty()).then(|| OsStr::from_bytes(rest).to_os_string());
        if let Some(asked) = set(flags, e, inline, words)? {
            return Ok(Some(asked));
        }
        if takes_value {
            break;
        }
    }
    Ok(None)
}

fn unknown(dashes: &str, name: &[u8]) -> Error {
    bad(format!("Unknown option {dashes}{}", String::from_utf8_lossy(name)))
}

fn bad(text: String) -> Error {
    Error::invalid(format!("option parsing failed: {text}"))
}

fn set(
    flags: &mut Flags,
    e: &Entry,
    inline: Option<OsString>,
    words: &mut impl Iterator<Item = OsString>,
) -> Result<Option<Asked>> {
    let name = e.name;
    let no_value = matches!(e.slot, Slot::On(_) | Slot::Version | Slot::Help);
    if no_value && inline.is_some() {
        return Err(bad(format!("--{name} takes no value")));
    }
    let value = || inline.or_else(|| words.next()).ok_or_else(|| bad(format!("Missing argument for --{name}")));
    let text = |v: OsString| {
        String::from_utf8(v.into_vec()).map_err(|_| bad(format!("the value of --{name} is no UTF-8 text")))
    };
    match &e.slot {
        Slot::Version => return Ok(Some(Asked::Version)),
        Slot::Help => return Ok(Some(Asked::Help)),
        Slot::On(slot) => *slot(flags) = true,
        Slot::Path(slot) => *slot(flags) = Some(value()?.into()),
        Slot::Text(slot) => *slot(flags) = Some(text(value()?)?),
        Slot::Number(bits, store) => store(flags, number(name, *bits, &text(value()?)?)?),
        Slot::Paths(slot) => slot(flags).push(value()?.into()),
        Slot::Texts(slot) => slot(flags).push(text(value()?)?),
        Slot::Words(slot) => slot(flags).push(value()?),
    }
    Ok(None)
}

fn number(name: &str, bits: Bits, text: &str) -> Result<i64> {
    let wide = of_any_base(text.trim_start());
    let wide = wide.ok_or_else(|| bad(format!("Cannot parse integer value “{text}” for --{name}")))?;
    let fits = match bits {
        Bits::B32 => i32::try_from(wide).ok().map(i64::from),
        Bits::B64 => i64::try_from(wide).ok(),
    };
    fits.ok_or_else(|| bad(format!("Integer value “{text}” for --{name} out of range")))
}

/// As strtoll reads it with base 0: 0x for sixteen, 0 for eight.
fn of_any_base(text: &str) -> Option<i128> {
    let (minus, digits) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let (base, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', _, ..] => (16, &digits[2..]),
        [b'0', _, ..] => (8, &digits[1..]),
        _ => (10, digits),
    };
    // A second sign is none.
    let unsigned = digits.bytes().all(|b| b.is_ascii_hexdigit());
    let number = i128::from_str_radix(digits, base).ok().filter(|_| unsigned)?;
    Some(if minus { -number } else { number })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(words: &[&str]) -> Flags {
        match parse(words.iter().map(OsString::from)).unwrap() {
            Asked::Run(f) => *f,
            other => panic!("{other:?}"),
        }
    }

    fn error(words: &[&str]) -> String {
        parse(words.iter().map(OsString::from)).unwrap_err().to_string()
    }

    #[test]
    fn cri_o_s_create_is_understood() {
        let f = flags(&[
            "-b",
            "/b",
            "-c",
            "id",
            "--exit-dir",
            "/e",
            "-l",
            "/log",
            "--log-level",
            "info",
            "-n",
            "name",
            "-P",
            "/cp",
            "-p",
            "/p",
            "--persist-dir",
            "/pd",
            "-r",
            "/usr/sbin/runc",
            "--runtime-arg",
            "--root=/run/runc",
            "--socket-dir-path",
            "/s",
            "--syslog",
            "-u",
            "uuid",
            "-s",
            "-t",
            "--log-size-max",
            "-1",
        ]);
        let want = Flags {
            bundle: Some("/b".into()),
            cid: Some("id".into()),
            exit_dir: Some("/e".into()),
            log_path: vec!["/log".into()],
            log_level: Some("info".into()),
            name: Some("name".into()),
            conmon_pidfile: Some("/cp".into()),
            container_pidfile: Some("/p".into()),
            persist_dir: Some("/pd".into()),
            runtime: Some("/usr/sbin/runc".into()),
            runtime_arg: vec!["--root=/run/runc".into()],
            socket_dir_path: Some("/s".into()),
            syslog: true,
            cuuid: Some("uuid".into()),
            systemd_cgroup: true,
            terminal: true,
            log_size_max: Some(-1),
            ..Flags::default()
        };
        assert_eq!(f, want);
    }

    #[test]
    fn podman_s_stray_one_is_ignored() {
        let f = flags(&["--api-version", "1", "-c", "x", "--exit-command-arg", "--rm", "--exit-command-arg", "a=b"]);
        assert!(f.api_version);
        assert_eq!(f.exit_command_arg, ["--rm", "a=b"]);
    }

    #[test]
    fn letters_share_a_dash() {
        let f = flags(&["-it", "-cx", "-T5", "--bundle=/b", "-0", "/keep", "--", "--nonsense"]);
        assert!(f.stdin && f.terminal);
        assert_eq!((f.cid.as_deref(), f.timeout), (Some("x"), 5));
        assert_eq!((f.bundle, f.persist_dir), (Some("/b".into()), Some("/keep".into())));
        assert_eq!(flags(&["--pidfile", "/a", "-p", "/b"]).container_pidfile, Some("/b".into()));
        assert_eq!(flags(&["--restore-arg", "a", "--runtime-opt", "b"]).runtime_opt, ["a", "b"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(error(&["--nonsense"]).contains("Unknown option --nonsense"));
        assert!(error(&["-x"]).contains("Unknown option -x"));
        assert!(error(&["--cid"]).contains("Missing argument for --cid"));
        assert!(error(&["--exec=1"]).contains("--exec takes no value"));
        assert!(error(&["--timeout", "soon"]).contains("“soon”"));
        for (text, number) in [("0x10", 16), ("010", 8), ("-1", -1), ("+7", 7), ("0", 0), (" 9", 9)] {
            assert_eq!(flags(&["--timeout", text]).timeout, number, "{text:?}");
        }
        for bad in ["0x", "08", "1_000", "--1", "0x-1", "1.5", ""] {
            error(&["--timeout", bad]);
        }
        assert!(error(&["--log-max-files", "2147483648"]).contains("out of range"));
        assert!(matches!(parse(["--version".into()]), Ok(Asked::Version)));
        assert!(matches!(parse(["-h".into()]), Ok(Asked::Help)));
    }

    #[test]
    fn names_and_letters_are_unique_and_helped() {
        let names: std::collections::BTreeSet<_> = TABLE.iter().map(|e| e.name).collect();
        assert_eq!(names.len(), TABLE.len());
        let letters: Vec<_> = TABLE.iter().filter_map(|e| e.letter).collect();
        assert_eq!(letters.len(), letters.iter().collect::<std::collections::BTreeSet<_>>().len());
        assert!(TABLE.iter().all(|e| help().contains(&format!("--{} ", e.name))));
    }
}
