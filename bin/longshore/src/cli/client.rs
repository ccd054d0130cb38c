//! The connection to the daemon, and its statuses as errors.

use hyper_util::rt::TokioIo;
use proto::admin::admin_client::AdminClient;
use proto::cri::image_service_client::ImageServiceClient;
use proto::cri::runtime_service_client::RuntimeServiceClient;
use std::error::Error as _;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use types::{Error, ErrorKind, Result, ResultExt};

/// The longest message in either direction: two streams of 16 MiB in ExecSync's
/// answer (behaviours.md section 6), with room to spare.
const LONGEST_MESSAGE: usize = 64 << 20;

/// How long a daemon that listens may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The daemon's three services over one connection. Clones share it.
#[derive(Clone)]
pub struct Client {
    /// Pods and containers.
    pub runtime: RuntimeServiceClient<Channel>,
    /// Images.
    pub images: ImageServiceClient<Channel>,
    /// What CRI can't say.
    pub admin: AdminClient<Channel>,
}

impl Client {
    /// Connects to the daemon at `socket`.
    ///
    /// # Errors
    /// `Unavailable` when nobody listens there, `PermissionDenied` when we may not.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let path = socket.to_path_buf();
        // The URI only fills in `:authority`; the connector knows where to go.
        let channel = Endpoint::from_static("http://localhost")
            .connect_timeout(CONNECT_TIMEOUT)
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .map_err(|e| unreachable(socket, &e))?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(LONGEST_MESSAGE)
                .max_encoding_message_size(LONGEST_MESSAGE),
            images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(LONGEST_MESSAGE),
            admin: AdminClient::new(channel),
        })
    }
}

fn unreachable(socket: &Path, error: &(dyn std::error::Error + 'static)) -> Error {
    let shown = socket.display();
    let mut cause = Some(error);
    while let Some(e) = cause {
        if let Some(io) = e.downcast_ref::<io::Error>() {
            return match io.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::unavailable(format!(
                    "no daemon answers on {shown}"
                ))
                .hint(
                    "start it with 'longshore serve' or 'systemctl start longshore', or name its socket with --socket",
                ),
                io::ErrorKind::PermissionDenied => {
                    Error::new(ErrorKind::PermissionDenied, format!("not allowed to speak to the daemon on {shown}"))
                        .hint("run as root or as a member of the socket's group")
                }
                _ => Error::unavailable(format!("connect to the daemon on {shown}: {io}")),
            };
        }
        cause = e.source();
    }
    Error::unavailable(format!("connect to the daemon on {shown}: {error}"))
}

/// The error behind a status; the daemon's message names the object already.
pub fn error(status: &Status) -> Error {
    // What the daemon answers has no source: the connection broke.
    let lost = status.source().is_some_and(|s| !s.is::<tonic::TimeoutExpired>());
    let kind = match status.code() {
        Code::Unknown | Code::Internal | Code::Cancelled if lost => ErrorKind::Unavailable,
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::InvalidArgument,
        Code::NotFound => ErrorKind::NotFound,
        Code::AlreadyExists => ErrorKind::AlreadyExists,
        Code::FailedPrecondition | Code::Aborted => ErrorKind::FailedPrecondition,
        Code::ResourceExhausted => ErrorKind::ResourceExhausted,
        Code::DeadlineExceeded => ErrorKind::DeadlineExceeded,
        Code::Unavailable => ErrorKind::Unavailable,
        Code::Unimplemented => ErrorKind::Unimplemented,
        Code::PermissionDenied | Code::Unauthenticated => ErrorKind::PermissionDenied,
        Code::Cancelled => ErrorKind::Cancelled,
        Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => ErrorKind::Internal,
    };
    let text = match status.message() {
        "" => status.code().description(),
        text => text,
    };
    Error::new(kind, text)
}

/// Unwraps a call's answer and says in the error what was attempted.
pub trait Answer<T> {
    /// `what` names the operation and its object: "stop container web".
    fn answer(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Answer<T> for Result<tonic::Response<T>, Status> {
    fn answer(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map(tonic::Response::into_inner).map_err(|s| {
            let what = what();
            // The daemon's own errors often begin with the very words.
            if s.message().starts_with(&what) { error(&s) } else { error(&s).within(what) }
        })
    }
}

/// Fills in what CRI declares optional and a daemon always sends.
pub fn present<T>(field: Option<T>, what: impl FnOnce() -> String) -> Result<T> {
    field.ok_or_else(|| Error::internal(format!("the daemon's answer has no {}", what())))
}

/// A blocking call, on a thread that may block.
pub async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.context(|| what.to_string())?
}

/// The failures of a command that went on after each; a single one says by itself
/// what it was about.
pub fn all_of(what: &str, mut failures: Vec<Error>) -> Result<()> {
    if failures.len() == 1 { Err(failures.remove(0)) } else { Error::join(what, failures) }
}
