//! What `start` is told and how it answers (behaviours.md section 3).
//!
//! ```text
//! containerd       stdin                      answer
//! 1.6              options or nothing         bare address (no GRPC_ADDRESS is set)
//! 1.7, 2.0 to 2.2  options or nothing         JSON, version 2, which all of them take
//! 2.3 and later    BootstrapParams            BootstrapResult, version 3
//! ```
//!
//! The two protobufs can't be told apart by their form: an Any parses as
//! BootstrapParams. They are, by id and namespace, which the flags carry too.

use crate::options;
use prost::Message;
use prost_types::Any;
use proto::containerd::runc::v1::Options;
use proto::containerd::runtime::bootstrap::v1::{BootstrapParams, BootstrapResult, LogLevel};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use types::{Error, ErrorKind, Result, ResultExt};

/// The most that is read of standard input.
const LONGEST_INPUT: u64 = 10 << 20;

/// How an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Bare,
    Json(i32),
    Protobuf,
}

/// What a caller has asked for, beside the flags.
#[derive(Debug, Clone, PartialEq)]
pub struct Bootstrap {
    dialect: Dialect,
    /// Where the socket shall be, instead of our own directory.
    pub socket_dir: Option<PathBuf>,
    /// Where events go, where the caller says so here.
    pub events: Option<String>,
    /// The caller's gRPC address, where it says so here.
    pub caller: Option<String>,
    /// Say more in the log.
    pub debug: bool,
    /// The cgroup that the shim shall live in; empty: the caller's.
    pub shim_cgroup: String,
}

/// What the environment says of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Caller {
    /// GRPC_ADDRESS is set: not containerd 1.6.
    pub takes_json: bool,
    /// It wants version 3 in JSON, which 1.7 refuses.
    pub wants_version_3: bool,
}

/// Reads standard input to its end.
///
/// # Errors
/// `InvalidArgument` beyond 10 MiB, before more memory than that is used.
pub fn read_input(input: impl Read) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(LONGEST_INPUT + 1).read_to_end(&mut bytes).context(|| "read standard input".into())?;
    if bytes.len() as u64 > LONGEST_INPUT {
        return Err(Error::invalid(format!("standard input is longer than {} MiB", LONGEST_INPUT >> 20)));
    }
    Ok(bytes)
}

impl Bootstrap {
    /// Understands what `start` was told on standard input by a caller whose
    /// flags name `id` and `namespace`.
    ///
    /// # Errors
    /// `InvalidArgument` where it is neither of the two forms, or the options
    /// inside can't be read.
    pub fn read(input: &[u8], id: &str, namespace: &str, caller: Caller) -> Result<Self> {
        if let Ok(params) = BootstrapParams::decode(input)
            && !params.instance_id.is_empty()
            && (params.instance_id.as_str(), params.namespace.as_str()) == (id, namespace)
        {
            return Self::from_params(params);
        }
        let given = Any::decode(input)
            .map_err(|e| Error::invalid("standard input holds neither bootstrap parameters nor options").because(e))?;
        let version = if caller.wants_version_3 { 3 } else { 2 };
        let dialect = if caller.takes_json { Dialect::Json(version) } else { Dialect::Bare };
        let o = options::read(Some(&given))?;
        Ok(Self { dialect, socket_dir: None, events: None, caller: None, debug: false, shim_cgroup: o.shim_cgroup })
    }

    fn from_params(params: BootstrapParams) -> Result<Self> {
        let mut o = Options::default();
        // Extensions of other kinds are for others, or for later versions of us.
        let ours = params.extensions.iter().filter_map(|e| e.value.as_ref()).find(|v| options::is_options(v));
        if let Some(value) = ours {
            o = options::read(Some(value))?;
        }
        let some = |s: String| (!s.is_empty()).then_some(s);
        Ok(Self {
            dialect: Dialect::Protobuf,
            socket_dir: params.socket_dir.and_then(some).map(PathBuf::from),
            events: some(params.containerd_ttrpc_address),
            caller: some(params.containerd_grpc_address),
            debug: params.log_level <= i32::from(LogLevel::Debug),
            shim_cgroup: o.shim_cgroup,
        })
    }

    /// What `start` prints for a shim at `address`.
    pub fn answer(&self, address: &str) -> Vec<u8> {
        match self.dialect {
            Dialect::Bare => address.as_bytes().to_vec(),
            Dialect::Json(version) => serde_json::json!({"version": version, "address": address, "protocol": "ttrpc"})
                .to_string()
                .into_bytes(),
            Dialect::Protobuf => {
                BootstrapResult { version: 3, address: address.into(), protocol: "ttrpc".into(), ..Default::default() }
                    .encode_to_vec()
            }
        }
    }
}

/// The group of the container in `bundle`, whose members share a shim: a name
/// given by annotation, or the pod's id; `None` where it is in none.
///
/// # Errors
/// `InvalidArgument` where config.json can't be understood or the group is no
/// identifier; a bundle without one is in no group.
pub fn group(bundle: &Path) -> Result<Option<String>> {
    #[derive(Deserialize)]
    struct Peek {
        #[serde(default)]
        annotations: Option<BTreeMap<String, String>>,
    }
    let path = bundle.join("config.json");
    let bytes = match std::fs::read(&path) {
        Ok(b) => b,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).context(|| format!("read {}", path.display())),
    };
    let peek: Peek = serde_json::from_slice(&bytes)
        .map_err(|e| Error::invalid(format!("{} is no OCI configuration", path.display())).because(e))?;
    let annotations = peek.annotations.unwrap_or_default();
    let name = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"]
        .into_iter()
        .find_map(|key| annotations.get(key).filter(|v| !v.is_empty()));
    Ok(name.cloned())
}

/// The pid of the shim that serves `socket`; it answers for itself, so that a
/// socket that only still listens is not taken for a shim.
///
/// # Errors
/// `Unavailable` where it is ending or gone, `DeadlineExceeded` after 5 s.
pub async fn pid_of(socket: &Path) -> Result<i32> {
    let bound = std::time::Duration::from_secs(5);
    let what = || format!("the shim at {} does not answer", socket.display());
    let gone = |e: Error| e.with_kind(ErrorKind::Unavailable);
    let stream = tokio::net::UnixStream::connect(socket).await.context(what).map_err(gone)?;
    let client = ttrpc::r#async::Client::new(stream.into());
    let client = proto::containerd::task::v3::TaskClient::new(client, proto::TASK_SERVICES[0]);
    let call = client.connect(std::time::Duration::ZERO, proto::containerd::task::v3::ConnectRequest::default());
    let answer = match tokio::time::timeout(bound, call).await {
        Ok(answer) => answer.context(what).map_err(gone)?,
        Err(_) => return Err(Error::deadline(what())),
    };
    i32::try_from(answer.shim_pid).context(what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::containerd::runtime::bootstrap::v1::Extension;

    const OLD: Caller = Caller { takes_json: false, wants_version_3: false };
    const NEW: Caller = Caller { takes_json: true, wants_version_3: false };

    fn params() -> BootstrapParams {
        let o = Options { shim_cgroup: "/shims".into(), ..Default::default() };
        let other = Any { type_url: "some.Thing".into(), value: vec![0xff] };
        BootstrapParams {
            instance_id: "pod".into(),
            namespace: "k8s.io".into(),
            log_level: LogLevel::Debug.into(),
            containerd_ttrpc_address: "/run/c.ttrpc".into(),
            extensions: vec![
                Extension { value: Some(other) },
                Extension { value: Some(proto::pack("type.googleapis.com/containerd.runc.v1.Options", &o)) },
            ],
            socket_dir: Some("/run/s".into()),
            ..Default::default()
        }
    }

    #[test]
    fn parameters_are_answered_in_protobuf() {
        let b = Bootstrap::read(&params().encode_to_vec(), "pod", "k8s.io", NEW).unwrap();
        assert_eq!(
            (b.shim_cgroup.as_str(), b.debug, b.socket_dir.as_deref()),
            ("/shims", true, Some(Path::new("/run/s")))
        );
        assert_eq!(b.events.as_deref(), Some("/run/c.ttrpc"));
        let answer = BootstrapResult::decode(b.answer("unix:///s").as_slice()).unwrap();
        assert_eq!((answer.version, answer.address.as_str(), answer.protocol.as_str()), (3, "unix:///s", "ttrpc"));
    }

    #[test]
    fn options_and_nothing_are_answered_as_older_callers_expect() {
        let o = Options { shim_cgroup: "/x".into(), ..Default::default() };
        let input = proto::pack("containerd.runc.v1.Options", &o).encode_to_vec();
        let b = Bootstrap::read(&input, "pod", "k8s.io", NEW).unwrap();
        assert_eq!(b.shim_cgroup, "/x");
        let json: serde_json::Value = serde_json::from_slice(&b.answer("unix:///s")).unwrap();
        assert_eq!(json, serde_json::json!({"version": 2, "address": "unix:///s", "protocol": "ttrpc"}));
        assert_eq!(Bootstrap::read(&[], "pod", "k8s.io", OLD).unwrap().answer("unix:///s"), b"unix:///s");
        let three = Caller { wants_version_3: true, ..NEW };
        assert!(String::from_utf8(Bootstrap::read(&[], "", "", three).unwrap().answer("a")).unwrap().contains("3"));
    }

    #[test]
    fn parameters_of_somebody_else_are_no_parameters() {
        for (id, namespace) in [("other", "k8s.io"), ("pod", "default")] {
            let b = Bootstrap::read(&params().encode_to_vec(), id, namespace, NEW).unwrap();
            assert_eq!(b.dialect, Dialect::Json(2));
        }
    }

    #[test]
    fn input_has_a_bound() {
        assert_eq!(read_input(std::io::repeat(1).take(10 << 20)).unwrap().len(), 10 << 20);
        assert_eq!(read_input(std::io::repeat(1)).unwrap_err().kind(), ErrorKind::InvalidArgument);
        assert!(Bootstrap::read(&[0xff; 9], "a", "b", NEW).is_err());
    }

    #[test]
    fn groups_come_from_annotations() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(group(dir.path()).unwrap(), None);
        let with = |annotations: &str| {
            std::fs::write(dir.path().join("config.json"), format!("{{\"annotations\": {annotations}}}")).unwrap();
            group(dir.path()).unwrap()
        };
        assert_eq!(with("null"), None);
        assert_eq!(with(r#"{"io.kubernetes.cri.sandbox-id": "p"}"#).as_deref(), Some("p"));
        let both = r#"{"io.kubernetes.cri.sandbox-id": "p", "io.containerd.runc.v2.group": "g"}"#;
        assert_eq!(with(both).as_deref(), Some("g"));
    }

    proptest::proptest! {
        #[test]
        fn any_input_is_understood_or_refused(input: Vec<u8>) {
            let _ = Bootstrap::read(&input, "a", "b", NEW);
        }
    }
}
