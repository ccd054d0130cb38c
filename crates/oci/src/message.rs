//! What a runtime's own words mean.
//!
//! The OCI command line has one failure code, 1, for everything, so its text is
//! all there is to tell a container that does not exist from one that can't be
//! stopped. This is the only place that looks at it.

use types::ErrorKind;

/// The message of the last error in a `--log-format json` file, or the last
/// line of plain text, with Go's leading `level=error` dress taken off.
pub fn last_error(log: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Line {
        #[serde(default)]
        level: String,
        #[serde(default)]
        msg: String,
    }
    let mut plain = None;
    for line in log.lines().rev().map(str::trim).filter(|l| !l.is_empty()) {
        match serde_json::from_str::<Line>(line) {
            Ok(l) if matches!(l.level.as_str(), "error" | "fatal" | "panic") => return Some(l.msg),
            Ok(_) => {}
            // crun and youki write some messages as plain text.
            Err(_) if plain.is_none() => plain = Some(line.to_string()),
            Err(_) => {}
        }
    }
    plain
}

/// The last error in criu's log, without place and time.
pub(crate) fn criu_error(log: &str) -> Option<String> {
    let line = log.lines().rev().find(|l| l.contains("Error ("))?;
    let text = line.split_once("): ").map_or(line, |(_, text)| text);
    Some(text.trim().to_string())
}

/// The kind behind a message of runc, crun or youki.
pub fn kind(message: &str) -> ErrorKind {
    const TABLE: [(&[&str], ErrorKind); 5] = [
        (
            &["does not exist", "process already finished", "no such process", "os: process not initialized"],
            ErrorKind::NotFound,
        ),
        (&["already exists", "id already in use"], ErrorKind::AlreadyExists),
        (
            &[
                "container not running",
                "container is not running",
                "cannot exec in a stopped container",
                "cannot exec a container that has stopped",
                "cannot exec in a paused container",
                "container not stopped",
                "is not stopped",
                "not paused",
                "not running or created",
                "cannot start a container",
                "cannot start an already running container",
            ],
            ErrorKind::FailedPrecondition,
        ),
        (&["permission denied", "operation not permitted"], ErrorKind::PermissionDenied),
        (&["no space left on device", "cannot allocate memory"], ErrorKind::ResourceExhausted),
    ];
    let lower = message.to_ascii_lowercase();
    let has = |words: &[&str]| words.iter().any(|w| lower.contains(w));
    // A command that is missing in the image is the caller's fault, not a
    // missing container, though runc's words for it end the same way. Its "exec failed: "
    // says no more than which call it was.
    let command = has(&["executable file not found", "exec: "]);
    let known = TABLE.iter().filter(|(_, kind)| !(command && *kind == ErrorKind::NotFound));
    match known.into_iter().find(|(words, _)| has(words)) {
        Some((_, kind)) => *kind,
        None if command || has(&["exec failed"]) && has(&["no such file"]) => ErrorKind::InvalidArgument,
        None => ErrorKind::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn criu_s_last_error_is_found() {
        let log = "(00.1) Warn  (x.c:1): w\n(00.2) Error (criu/vdso.c:613): vdso: no table\n(00.3) Dumping FAILED.\n";
        assert_eq!(criu_error(log).as_deref(), Some("vdso: no table"));
        assert_eq!(criu_error("(00.1) all is well"), None);
    }

    #[test]
    fn the_last_error_of_a_json_log_is_taken() {
        let log = concat!(
            "{\"level\":\"warning\",\"msg\":\"a\",\"time\":\"t\"}\n",
            "{\"level\":\"error\",\"msg\":\"container does not exist\",\"time\":\"t\"}\n",
            "{\"level\":\"info\",\"msg\":\"b\"}\n"
        );
        assert_eq!(last_error(log).as_deref(), Some("container does not exist"));
        assert_eq!(last_error("Error: no such file\n\n").as_deref(), Some("Error: no such file"));
        assert_eq!(last_error("{\"level\":\"debug\",\"msg\":\"x\"}"), None);
        assert_eq!(last_error(""), None);
    }

    #[test]
    fn words_become_kinds() {
        for (text, want) in [
            ("container does not exist", ErrorKind::NotFound),
            ("error opening file `/run/crun/x/status`: container x does not exist", ErrorKind::NotFound),
            ("os: process already finished", ErrorKind::NotFound),
            ("container with given ID already exists", ErrorKind::AlreadyExists),
            ("cannot exec in a stopped container", ErrorKind::FailedPrecondition),
            (
                "runc create failed: unable to start container process: exec: \"nope\": executable file not found in $PATH",
                ErrorKind::InvalidArgument,
            ),
            (
                "exec failed: unable to start container process: exec: \"nope\": executable file not found in $PATH",
                ErrorKind::InvalidArgument,
            ),
            (
                "exec failed: unable to start container process: exec: \"/x\": stat /x: no such file or directory",
                ErrorKind::InvalidArgument,
            ),
            (
                "exec failed: chdir to cwd (\"/x\") set in config.json failed: no such file or directory",
                ErrorKind::InvalidArgument,
            ),
            ("exec failed: exec: \"/x\": the file does not exist", ErrorKind::InvalidArgument),
            ("exec failed: cannot exec in a stopped container", ErrorKind::FailedPrecondition),
            ("exec failed: container does not exist", ErrorKind::NotFound),
            (
                "exec failed: unable to start: fork/exec /proc/self/exe: cannot allocate memory",
                ErrorKind::ResourceExhausted,
            ),
            ("exec failed: write /run/x: no space left on device", ErrorKind::ResourceExhausted),
            ("exec failed: something else", ErrorKind::Internal),
            ("something else", ErrorKind::Internal),
        ] {
            assert_eq!(kind(text), want, "{text}");
        }
    }
}
