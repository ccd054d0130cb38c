//! What runs: arguments, environment, working directory; and the process of an
//! exec, which is the container's own with other arguments.

use crate::facts::ImageDefaults;
use crate::paths;
use oci_spec::runtime::Process;
use proto::cri;
use std::path::PathBuf;
use types::{Error, Result, ResultExt};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The command line: CRI's command replaces ENTRYPOINT, CRI's args replace CMD,
/// and a command without args ignores CMD.
pub(crate) fn args(config: &cri::ContainerConfig, image: &ImageDefaults) -> Result<Vec<String>> {
    let (mut line, mut args) = (config.command.clone(), config.args.clone());
    if line.is_empty() {
        if args.is_empty() {
            args.clone_from(&image.cmd);
        }
        // An image can only clear an inherited ENTRYPOINT by an empty word.
        if image.entrypoint != [""] {
            line.clone_from(&image.entrypoint);
        }
    }
    line.append(&mut args);
    if line.is_empty() {
        return Err(
            Error::invalid("no command: neither the container nor its image names one").hint("set command or args")
        );
    }
    check_args(&line)?;
    Ok(line)
}

fn check_args(args: &[String]) -> Result<()> {
    match args.iter().find(|a| a.contains('\0')) {
        Some(arg) => Err(Error::invalid(format!("argument {arg:?} contains a NUL byte"))),
        None => Ok(()),
    }
}

/// The environment: defaults, then the image's, then CRI's; the last word on a
/// variable counts, and each is there once.
pub(crate) fn env(config: &cri::ContainerConfig, image: &ImageDefaults, hostname: &str) -> Result<Vec<String>> {
    let mut env = Environment::default();
    env.set("PATH", PATH);
    if config.tty {
        env.set("TERM", "xterm");
    }
    env.set("HOSTNAME", hostname);
    for entry in &image.env {
        match entry.split_once('=') {
            Some((key, value)) if !key.is_empty() => env.put("the image's ENV", key, value)?,
            // Some builders leave words without a value; they set nothing.
            _ => {}
        }
    }
    for pair in &config.envs {
        let value = std::str::from_utf8(&pair.value)
            .map_err(|e| Error::invalid(format!("envs: the value of {:?} is no UTF-8", pair.key)).because(e))?;
        if pair.key.is_empty() || pair.key.contains('=') {
            return Err(Error::invalid(format!("envs: {:?} is no variable's name", pair.key)));
        }
        env.put("envs", &pair.key, value)?;
    }
    Ok(env.0.into_iter().map(|(key, value)| format!("{key}={value}")).collect())
}

#[derive(Default)]
struct Environment(Vec<(String, String)>);

impl Environment {
    fn set(&mut self, key: &str, value: &str) {
        match self.0.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value.to_string(),
            None => self.0.push((key.to_string(), value.to_string())),
        }
    }

    /// Values may span lines (certificates do), but not HOME's, which programs and
    /// runtimes write into a line of /etc/passwd (CVE-2022-4318, CVE-2026-15809).
    fn put(&mut self, source: &str, key: &str, value: &str) -> Result<()> {
        let broken =
            key.contains(['\0', '\n']) || value.contains('\0') || (key == "HOME" && value.contains(['\n', '\r']));
        if broken {
            return Err(Error::invalid(format!("{source}: {key:?} holds a NUL byte or a newline")));
        }
        self.set(key, value);
        Ok(())
    }
}

/// The working directory: CRI's, else the image's, else `/`.
///
/// A descriptor of the runtime's can't be one (CVE-2024-21626); that it isn't
/// reached through a symlink either is the OCI runtime's to check.
pub(crate) fn cwd(config: &cri::ContainerConfig, image: &ImageDefaults) -> Result<PathBuf> {
    let (field, text) = match (&config.working_dir, &image.working_dir) {
        (given, _) if !given.is_empty() => ("working_dir", given),
        (_, own) => ("the image's WORKDIR", own),
    };
    paths::check_text(field, text)?;
    let path = paths::clean(text);
    let mut parts = path.iter().skip(1);
    let (first, _, third) = (parts.next(), parts.next(), parts.next());
    let named = |part: Option<&std::ffi::OsStr>, name: &str| part.is_some_and(|p| p == name);
    let beneath_descriptors = path.starts_with("/dev/fd")
        || (named(first, "proc") && (named(third, "fd") || named(third, "fdinfo") || named(third, "task")));
    if beneath_descriptors {
        return Err(Error::invalid(format!("{field} {text:?} is below a process's descriptors")));
    }
    Ok(path)
}

/// The process of an exec in a container whose own process is `own`: everything is
/// the container's but the arguments, and it has a terminal only if `tty`, then with
/// TERM=xterm (behaviours.md section 1).
///
/// # Errors
/// `InvalidArgument` for an empty command or one with a NUL byte.
pub fn exec_process(own: &Process, cmd: Vec<String>, tty: bool) -> Result<Process> {
    if cmd.is_empty() {
        return Err(Error::invalid("exec: the command is empty"));
    }
    check_args(&cmd).map_err(|e| e.within("exec"))?;
    let mut process = own.clone();
    process.set_args(Some(cmd)).set_terminal(Some(tty)).set_console_size(None);
    if tty {
        let mut env = Environment::default();
        for (key, value) in own.env().iter().flatten().filter_map(|e| e.split_once('=')) {
            env.set(key, value);
        }
        env.set("TERM", "xterm");
        process.set_env(Some(env.0.into_iter().map(|(k, v)| format!("{k}={v}")).collect()));
    }
    Ok(process)
}

/// [`exec_process`] from and to JSON: `own` is the `process` object of the
/// container's config.json.
///
/// # Errors
/// As there, and `Internal` if `own` is no process.
pub fn exec_process_json(own: &str, cmd: Vec<String>, tty: bool) -> Result<String> {
    let own: Process = serde_json::from_str(own).context(|| "exec: read the container's process".into())?;
    serde_json::to_string(&exec_process(&own, cmd, tty)?).context(|| "exec: encode the process".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(ToString::to_string).collect()
    }

    #[test]
    fn command_and_args_follow_kubernetes() {
        for (command, args_, entrypoint, cmd, expected) in [
            ("", "", "e", "c", "e c"),
            ("x", "", "e", "c", "x"),
            ("", "y", "e", "c", "e y"),
            ("x", "y", "e", "c", "x y"),
            ("", "", "", "c d", "c d"),
            ("", "", "e f", "", "e f"),
        ] {
            let config = cri::ContainerConfig { command: words(command), args: words(args_), ..Default::default() };
            let image = ImageDefaults { entrypoint: words(entrypoint), cmd: words(cmd), ..Default::default() };
            assert_eq!(args(&config, &image).unwrap(), words(expected), "{command:?} {args_:?}");
        }
        let cleared = ImageDefaults { entrypoint: vec![String::new()], cmd: words("c"), ..Default::default() };
        assert_eq!(args(&Default::default(), &cleared).unwrap(), words("c"));
        assert!(args(&Default::default(), &Default::default()).is_err());
    }

    #[test]
    fn an_exec_is_the_containers_process_with_other_arguments() {
        let own = r#"{"terminal":true,"user":{"uid":5,"gid":6,"additionalGids":[6,7]},"args":["a"],"cwd":"/w",
            "env":["TERM=vt100","A=1"],"capabilities":{"bounding":["CAP_KILL"],"inheritable":[]},"noNewPrivileges":true}"#;
        let exec: Process = serde_json::from_str(&exec_process_json(own, words("b c"), false).unwrap()).unwrap();
        let own: Process = serde_json::from_str(own).unwrap();
        assert_eq!(exec.args().as_ref().unwrap(), &words("b c"));
        assert_eq!(exec.terminal(), Some(false));
        let mut expected = own.clone();
        expected.set_args(exec.args().clone()).set_terminal(Some(false));
        assert_eq!(exec, expected, "nothing else differs");
        let with_tty = exec_process(&own, words("b"), true).unwrap();
        assert_eq!(with_tty.env().as_ref().unwrap(), &words("TERM=xterm A=1"));
        assert!(exec_process(&own, vec![], false).is_err());
    }

    fn pair(key: &str, value: &str) -> cri::KeyValue {
        cri::KeyValue { key: key.into(), value: value.as_bytes().to_vec() }
    }

    #[test]
    fn cri_wins_over_the_image_and_defaults() {
        let config =
            cri::ContainerConfig { envs: vec![pair("A", "2"), pair("PEM", "a\nb")], tty: true, ..Default::default() };
        let image = ImageDefaults { env: vec!["A=1".into(), "PATH=/x".into(), "LONE".into()], ..Default::default() };
        let env = env(&config, &image, "host").unwrap();
        assert_eq!(env, ["PATH=/x", "TERM=xterm", "HOSTNAME=host", "A=2", "PEM=a\nb"]);
    }

    #[test]
    fn cve_2022_4318_cve_2026_15809_no_newline_in_home() {
        let config = cri::ContainerConfig { envs: vec![pair("HOME", "/\nroot2:x:0:0:::")], ..Default::default() };
        assert!(env(&config, &Default::default(), "h").unwrap_err().to_string().contains("HOME"));
        let image = ImageDefaults { env: vec!["HOME=/\nx".into()], ..Default::default() };
        assert!(env(&Default::default(), &image, "h").is_err());
        for bad in [pair("A=B", ""), pair("", "x"), pair("A\0", ""), pair("A", "\0"), pair("A\nB", "")] {
            assert!(
                env(&cri::ContainerConfig { envs: vec![bad], ..Default::default() }, &Default::default(), "h").is_err()
            );
        }
    }

    #[test]
    fn cve_2024_21626_no_descriptor_as_working_directory() {
        let dir =
            |d: &str| cwd(&cri::ContainerConfig { working_dir: d.into(), ..Default::default() }, &Default::default());
        for bad in [
            "/proc/self/fd/7",
            "/proc/self/fd",
            "/proc/1/fd/8/../9",
            "/x/../proc/self/fd/7",
            "proc/self/fd/3",
            "/dev/fd/7",
            "/proc/self/task/1/fd/3",
            "/a\nb",
        ] {
            assert!(dir(bad).is_err(), "{bad}");
        }
        assert_eq!(dir("/srv/./a").unwrap(), PathBuf::from("/srv/a"));
        assert_eq!(dir("").unwrap(), PathBuf::from("/"));
        let image = ImageDefaults { working_dir: "app".into(), ..Default::default() };
        assert_eq!(cwd(&Default::default(), &image).unwrap(), PathBuf::from("/app"));
    }

    proptest! {
        #[test]
        fn each_variable_is_there_once(envs in proptest::collection::vec(("[A-C]{1,2}", "[a-z]{0,3}"), 0..12)) {
            let config = cri::ContainerConfig { envs: envs.iter().map(|(k, v)| pair(k, v)).collect(), ..Default::default() };
            let got = env(&config, &Default::default(), "h").unwrap();
            let mut keys: Vec<&str> = got.iter().map(|e| e.split_once('=').unwrap().0).collect();
            keys.sort_unstable();
            let all = keys.len();
            keys.dedup();
            prop_assert_eq!(all, keys.len());
            for (k, v) in envs.iter().rev() {
                if envs.iter().rev().find(|(key, _)| key == k).unwrap().1 == *v {
                    let expected = format!("{k}={v}");
                    prop_assert!(got.contains(&expected));
                }
            }
        }
    }
}
