//! The command line, in Go's manner: one dash or two, `-flag value` or
//! `-flag=value`, the command last.

use std::ffi::OsString;
use std::path::PathBuf;
use types::{Error, Result, ResultExt};

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Action {
    /// Be the shim.
    #[default]
    Serve,
    /// Start one.
    Start,
    /// Clean up after one.
    Delete,
    /// Print the version.
    Version,
    /// Print what this runtime is, as protobuf.
    Info,
}

/// The command line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Flags {
    /// What to do.
    pub action: Action,
    /// The caller's namespace.
    pub namespace: String,
    /// The container's or pod's id.
    pub id: String,
    /// The caller's gRPC socket.
    pub address: String,
    /// A binary that publishes events; ours go by ttrpc.
    pub publish_binary: String,
    /// The bundle; the working directory where it is absent.
    pub bundle: Option<PathBuf>,
    /// Where to listen, instead of a name of our own choice.
    pub socket: Option<PathBuf>,
    /// Say more in the log.
    pub debug: bool,
}

impl Flags {
    /// Reads the arguments after the program's name.
    ///
    /// # Errors
    /// `InvalidArgument`, naming what is unknown or missing.
    pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self> {
        let mut flags = Self::default();
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let text = argument.to_string_lossy().into_owned();
            let Some(name) = text.strip_prefix("--").or_else(|| text.strip_prefix('-')) else {
                flags.action = match text.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    _ => return Err(Error::invalid(format!("unknown command {text:?}")).hint("start or delete")),
                };
                continue;
            };
            let (name, inline) = match name.split_once('=') {
                Some((n, v)) => (n, Some(v.to_string())),
                None => (name, None),
            };
            match name {
                "debug" => flags.debug = inline.as_deref() != Some("false"),
                "v" | "version" => flags.action = Action::Version,
                "info" => flags.action = Action::Info,
                "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket" | "debug-socket" => {
                    let value = match inline {
                        Some(v) => v,
                        None => arguments
                            .next()
                            .ok_or_else(|| Error::invalid(format!("flag -{name} needs a value")))?
                            .to_string_lossy()
                            .into_owned(),
                    };
                    flags.set(name, value);
                }
                _ => return Err(Error::invalid(format!("unknown flag -{name}"))),
            }
        }
        Ok(flags)
    }

    fn set(&mut self, name: &str, value: String) {
        match name {
            "namespace" => self.namespace = value,
            "id" => self.id = value,
            "address" => self.address = value,
            "publish-binary" => self.publish_binary = value,
            "bundle" => self.bundle = Some(value.into()).filter(|p: &PathBuf| !p.as_os_str().is_empty()),
            "socket" => self.socket = Some(value.into()).filter(|p: &PathBuf| !p.as_os_str().is_empty()),
            // Go's profiles, which we have not.
            _ => {}
        }
    }

    /// Whose container it is, which every command but `-version` and `-info` has to
    /// know.
    ///
    /// # Errors
    /// `InvalidArgument` where it is missing.
    pub fn require_namespace(&self) -> Result<()> {
        if self.namespace.is_empty() {
            return Err(Error::invalid("the namespace is missing").hint("-namespace NAME"));
        }
        Ok(())
    }

    /// The bundle's absolute path.
    ///
    /// # Errors
    /// Where there is no working directory.
    pub fn bundle(&self) -> Result<PathBuf> {
        let here = || std::env::current_dir().context(|| "find the bundle".into());
        match &self.bundle {
            Some(b) if b.is_absolute() => Ok(b.clone()),
            Some(b) => Ok(here()?.join(b)),
            None => here(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags> {
        Flags::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn containerd_s_command_line_is_read() {
        let f = parse("-namespace k8s.io -address /run/c.sock -publish-binary /bin/c -id abc -debug start").unwrap();
        assert_eq!((f.action, f.namespace.as_str(), f.id.as_str()), (Action::Start, "k8s.io", "abc"));
        assert!(f.debug);
        let f = parse("--namespace=n --id=x --bundle=/b delete").unwrap();
        assert_eq!((f.action, f.bundle), (Action::Delete, Some("/b".into())));
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("").unwrap().action, Action::Serve);
        assert_eq!(parse("-debug-socket /d start").unwrap(), parse("start").unwrap());
    }

    #[test]
    fn what_is_unknown_is_named() {
        for (line, word) in [("-nope x", "-nope"), ("fly", "fly"), ("-id", "-id")] {
            assert!(parse(line).unwrap_err().to_string().contains(word));
        }
        assert!(parse("-id x start").unwrap().require_namespace().is_err());
        assert!(parse("-namespace n start").unwrap().require_namespace().is_ok());
    }
}
