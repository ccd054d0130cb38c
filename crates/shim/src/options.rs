//! The caller's options for this runtime, in each of their three shapes.
//!
//! ```text
//! containerd.runc.v1.Options   protobuf; what ctr, nerdctl and tasks send
//! runtimeoptions.v1.Options    what containerd's CRI sends to a runtime whose
//!                              type it does not know: TOML, inline or in a file
//! BootstrapParams.extensions   either of them, inside (containerd 2.3 and later)
//! ```

use crate::log;
use prost::Message;
use prost_types::Any;
use proto::containerd::runc::v1::Options;
use std::path::PathBuf;
use types::{Error, ErrorKind, Result, ResultExt};

/// The type URL of [`Options`], as containerd writes it.
pub const TYPE: &str = "containerd.runc.v1.Options";
const GENERIC: &str = "runtimeoptions.v1.Options";

/// Are these options of one of the shapes that we read?
pub fn is_options(any: &Any) -> bool {
    matches!(short(any), TYPE | GENERIC)
}

fn short(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

/// Reads options of any shape; none, or those of another runtime, are the
/// defaults.
///
/// # Errors
/// `InvalidArgument` where they can't be read, naming the key where there is one.
pub fn read(any: Option<&Any>) -> Result<Options> {
    let Some(any) = any else { return Ok(Options::default()) };
    let bad = |e: prost::DecodeError| {
        Error::invalid(format!("the options of type {} can't be read", any.type_url)).because(e)
    };
    match short(any) {
        TYPE => Options::decode(any.value.as_slice()).map_err(bad),
        GENERIC => {
            let generic = proto::runtimeoptions::Options::decode(any.value.as_slice()).map_err(bad)?;
            from_generic(&generic)
        }
        "" => Ok(Options::default()),
        _ => {
            log::warn(format_args!("options of type {} are not ours; defaults are used", any.type_url));
            Ok(Options::default())
        }
    }
}

fn from_generic(generic: &proto::runtimeoptions::Options) -> Result<Options> {
    if !generic.config_body.is_empty() {
        let text = std::str::from_utf8(&generic.config_body)
            .map_err(|e| Error::invalid("the runtime's options are no UTF-8").because(e))?;
        return from_toml(text, "the runtime's options");
    }
    if generic.config_path.is_empty() {
        return Ok(Options::default());
    }
    let what = || format!("read the runtime's options in {}", generic.config_path);
    let text = std::fs::read_to_string(&generic.config_path).context(what)?;
    from_toml(&text, &generic.config_path)
}

/// Reads the keys of containerd's `runtimes.NAME.options` table, in any case of
/// letters, as containerd does.
fn from_toml(text: &str, place: &str) -> Result<Options> {
    let table: toml::Table =
        toml::from_str(text).map_err(|e| Error::invalid(format!("{place}: no TOML")).because(e))?;
    let mut o = Options::default();
    for (key, value) in &table {
        let bad = || Error::invalid(format!("{place}: {key} = {value} is of the wrong type"));
        let text = || value.as_str().map(String::from).ok_or_else(bad);
        let flag = || value.as_bool().ok_or_else(bad);
        let id = || value.as_integer().and_then(|n| u32::try_from(n).ok()).ok_or_else(bad);
        match key.to_ascii_lowercase().as_str() {
            "binaryname" => o.binary_name = text()?,
            "root" => o.root = text()?,
            "shimcgroup" => o.shim_cgroup = text()?,
            "criuimagepath" => o.criu_image_path = text()?,
            "criuworkpath" => o.criu_work_path = text()?,
            "systemdcgroup" => o.systemd_cgroup = flag()?,
            "nopivotroot" => o.no_pivot_root = flag()?,
            "nonewkeyring" => o.no_new_keyring = flag()?,
            "iouid" => o.io_uid = id()?,
            "iogid" => o.io_gid = id()?,
            // containerd's own, which say how to read the rest.
            "typeurl" | "configpath" | "configbody" => {}
            // Where the runtime finds criu is the runtime's own affair since runc 1.1.
            "criupath" => {}
            _ => log::warn(format_args!("{place}: {key} is unknown and does nothing")),
        }
    }
    Ok(o)
}

/// The OCI runtime that the options name, else the first that is installed.
///
/// # Errors
/// `NotFound`, naming what was searched.
pub fn runtime_binary(o: &Options) -> Result<PathBuf> {
    let names: &[&str] = if o.binary_name.is_empty() { &["runc", "crun", "youki"] } else { &[o.binary_name.as_str()] };
    names.iter().find_map(|n| oci::find_binary(n)).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("no OCI runtime: {} not found", names.join(", ")))
            .hint("install runc, or set BinaryName in the runtime's options")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(body: &str, path: &str) -> Any {
        let g =
            proto::runtimeoptions::Options { config_body: body.into(), config_path: path.into(), ..Default::default() };
        proto::pack(GENERIC, &g)
    }

    #[test]
    fn each_shape_gives_the_same_options() {
        let want = Options { binary_name: "/x/runc".into(), systemd_cgroup: true, io_uid: 7, ..Default::default() };
        let text = "BinaryName = '/x/runc'\nSystemdCgroup = true\niouid = 7\n";
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("o.toml");
        std::fs::write(&file, text).unwrap();
        for any in [proto::pack(TYPE, &want), generic(text, ""), generic("", file.to_str().unwrap())] {
            assert_eq!(read(Some(&any)).unwrap(), want);
        }
        assert_eq!(read(None).unwrap(), Options::default());
        assert_eq!(read(Some(&proto::pack("other.Options", &want))).unwrap(), Options::default());
    }

    #[test]
    fn what_can_t_be_read_is_named() {
        let e = read(Some(&generic("SystemdCgroup = 'yes'", ""))).unwrap_err();
        assert!(e.kind() == ErrorKind::InvalidArgument && e.to_string().contains("SystemdCgroup"), "{e}");
        assert!(read(Some(&Any { type_url: TYPE.into(), value: vec![0xff] })).is_err());
        let e = runtime_binary(&Options { binary_name: "no-such-runtime".into(), ..Default::default() }).unwrap_err();
        assert!(e.is_not_found() && e.to_string().contains("no-such-runtime"), "{e}");
    }
}
