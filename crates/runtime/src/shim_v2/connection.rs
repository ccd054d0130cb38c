//! The connection to a shim: ttrpc, or gRPC, with the same messages and codes.
//!
//! ```text
//!  TaskClient, SandboxClient, … ──► Connection ──┬─► ttrpc+unix:///path, ttrpc+vsock://CID:PORT
//!  (generated; proto::ttrpc_glue::Caller)        └─► grpc+unix:///path  (tonic, HTTP/2)
//! ```
//!
//! Whether the shim lives is told by its process, not by the connection: a gRPC
//! channel that broke dials again by itself at the next call.

use super::bootstrap::Bootstrap;
use crate::ops::step;
use bytes::{Buf, BufMut};
use hyper_util::rt::TokioIo;
use proto::ttrpc_glue::{Caller, status};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};
use types::{Error, ErrorKind, Result, ResultExt};

/// How long a plain dial may take (behaviours.md section 3).
const DIAL: Duration = Duration::from_secs(10);

/// A connection; clones share it.
#[derive(Clone)]
pub(crate) enum Connection {
    /// What nearly all shims speak.
    Ttrpc {
        /// The client.
        client: ttrpc::r#async::Client,
        /// Held while a call takes its number and its place in the queue.
        order: Arc<Mutex<()>>,
    },
    /// Shims that answer `"protocol":"grpc"`.
    Grpc(Channel),
}

impl Connection {
    /// A plain connect first, so that a dead socket fails at once; one whose backlog
    /// is full fails, too, and holds up no thread.
    ///
    /// # Errors
    /// `Unavailable` where nobody listens, which is the shim's death; anything else is
    /// no word of that.
    pub(crate) async fn dial(bootstrap: &Bootstrap) -> Result<Self> {
        let endpoint = format!("{}+{}", bootstrap.protocol, bootstrap.address);
        let what = || format!("connect to the shim at {endpoint}");
        let Some(path) = bootstrap.address.strip_prefix("unix://") else {
            if bootstrap.is_grpc() {
                return Err(Error::unimplemented(format!("{}: gRPC is spoken over unix sockets only", what())));
            }
            let client = ttrpc::r#async::Client::connect(&bootstrap.address).await;
            return client.map(Self::ttrpc).context_kind(ErrorKind::Unavailable, what);
        };
        let dialled = tokio::time::timeout(DIAL, UnixStream::connect(path)).await;
        let stream = match dialled {
            Ok(stream) => stream.map_err(|e| {
                let nobody = matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
                // Too many descriptors, or a full backlog, are no death.
                let kind = if nobody { ErrorKind::Unavailable } else { ErrorKind::ResourceExhausted };
                Error::new(kind, what()).because(e)
            })?,
            Err(_) => return Err(Error::deadline(format!("{}: no answer within {DIAL:?}", what()))),
        };
        if bootstrap.is_grpc() {
            Ok(Self::Grpc(channel(Path::new(path), stream)))
        } else {
            Ok(Self::ttrpc(ttrpc::r#async::Client::new(stream.into())))
        }
    }

    fn ttrpc(client: ttrpc::r#async::Client) -> Self {
        Self::Ttrpc { client, order: Arc::default() }
    }
}

/// A channel that begins with a stream that stands, and dials again when it must.
fn channel(path: &Path, stream: UnixStream) -> Channel {
    let path = path.to_path_buf();
    let mut first = Some(stream);
    // The address is for HTTP's sake alone: what is dialled is the socket.
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(tower::service_fn(move |_| {
        let (path, first) = (path.clone(), first.take());
        async move {
            match first {
                Some(stream) => Ok(TokioIo::new(stream)),
                None => UnixStream::connect(path).await.map(TokioIo::new),
            }
        }
    }))
}

impl Caller for Connection {
    async fn unary(&self, service: &str, method: &str, timeout: Duration, payload: Vec<u8>) -> ttrpc::Result<Vec<u8>> {
        let answer = async {
            match self {
                Self::Ttrpc { client, order } => in_order(order, client.unary(service, method, timeout, payload)).await,
                Self::Grpc(channel) => grpc(channel.clone(), service, method, timeout, payload).await,
            }
        };
        step(format!("the shim's {method}"), answer).await
    }
}

/// Runs a ttrpc call so that calls go out in the order of their stream numbers: Go's
/// server (from ttrpc 1.2 on) refuses a number below the last one. The client numbers
/// a call and queues it the first time that it is polled, which therefore happens
/// under a lock; its queue has room for a hundred calls that are not written yet.
async fn in_order<T>(order: &Mutex<()>, call: impl Future<Output = T>) -> T {
    // A task's budget would end that first poll before the call is queued.
    let mut call = std::pin::pin!(tokio::task::unconstrained(call));
    let mut first = true;
    std::future::poll_fn(|cx| {
        let _turn = std::mem::take(&mut first).then(|| order.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        call.as_mut().poll(cx)
    })
    .await
}

async fn grpc(
    channel: Channel,
    service: &str,
    method: &str,
    timeout: Duration,
    payload: Vec<u8>,
) -> ttrpc::Result<Vec<u8>> {
    let path = format!("/{service}/{method}")
        .parse()
        .map_err(|e| ttrpc::Error::Others(format!("{service}/{method} is no path: {e}")))?;
    let mut request = tonic::Request::new(payload);
    let call = async {
        let mut client = tonic::client::Grpc::new(channel);
        // A channel that has to dial first fails here where nobody answers.
        if let Err(e) = client.ready().await {
            tracing::debug!(error = %e, "a shim's gRPC connection can't be used");
            return Err(ttrpc::Error::RemoteClosed);
        }
        client.unary(request_of(&mut request, timeout), path, Bytes).await.map_err(fault)
    };
    let answer = if timeout.is_zero() {
        call.await
    } else {
        match tokio::time::timeout(timeout, call).await {
            Ok(answer) => answer,
            Err(_) => Err(status(ttrpc::Code::DEADLINE_EXCEEDED, format!("no answer within {timeout:?}"))),
        }
    };
    answer.map(tonic::Response::into_inner)
}

/// The request with the bound that the shim is told of: a little longer than ours, so
/// that ours is the one that passes.
fn request_of(request: &mut tonic::Request<Vec<u8>>, timeout: Duration) -> tonic::Request<Vec<u8>> {
    let mut out = tonic::Request::new(std::mem::take(request.get_mut()));
    if !timeout.is_zero() {
        out.set_timeout(timeout + Duration::from_secs(1));
    }
    out
}

/// ttrpc and gRPC have the same codes. What the transport itself met has a source,
/// an answer of the shim's has none.
fn fault(e: tonic::Status) -> ttrpc::Error {
    let source = std::error::Error::source(&e);
    if std::iter::successors(source, |e| e.source()).any(|e| e.is::<tonic::TimeoutExpired>()) {
        return status(ttrpc::Code::DEADLINE_EXCEEDED, e.message());
    }
    if source.is_some() {
        tracing::debug!(error = %e, "a shim's gRPC connection broke");
        return ttrpc::Error::RemoteClosed;
    }
    use tonic::Code as Grpc;
    let code = match e.code() {
        Grpc::Ok => ttrpc::Code::OK,
        Grpc::Cancelled => ttrpc::Code::CANCELLED,
        Grpc::Unknown => ttrpc::Code::UNKNOWN,
        Grpc::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        Grpc::DeadlineExceeded => ttrpc::Code::DEADLINE_EXCEEDED,
        Grpc::NotFound => ttrpc::Code::NOT_FOUND,
        Grpc::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
        Grpc::PermissionDenied => ttrpc::Code::PERMISSION_DENIED,
        Grpc::ResourceExhausted => ttrpc::Code::RESOURCE_EXHAUSTED,
        Grpc::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
        Grpc::Aborted => ttrpc::Code::ABORTED,
        Grpc::OutOfRange => ttrpc::Code::OUT_OF_RANGE,
        Grpc::Unimplemented => ttrpc::Code::UNIMPLEMENTED,
        Grpc::Internal => ttrpc::Code::INTERNAL,
        Grpc::Unavailable => ttrpc::Code::UNAVAILABLE,
        Grpc::DataLoss => ttrpc::Code::DATA_LOSS,
        Grpc::Unauthenticated => ttrpc::Code::UNAUTHENTICATED,
    };
    status(code, e.message())
}

/// Messages that are encoded already: the generated clients do that.
#[derive(Debug, Clone, Copy)]
struct Bytes;

impl Codec for Bytes {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = tonic::Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> std::result::Result<(), tonic::Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Bytes {
    type Item = Vec<u8>;
    type Error = tonic::Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> std::result::Result<Option<Vec<u8>>, tonic::Status> {
        let mut all = vec![0; from.remaining()];
        from.copy_to_slice(&mut all);
        Ok(Some(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn concurrent_calls_go_out_in_the_order_of_their_numbers() {
        const CALLS: usize = 96;
        for _ in 0..30 {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let connection = Connection::ttrpc(ttrpc::r#async::Client::new(ours.into()));
            let mut calls = tokio::task::JoinSet::new();
            for _ in 0..CALLS {
                let connection = connection.clone();
                calls.spawn(async move { connection.unary("s", "m", Duration::from_secs(60), vec![1; 100]).await });
            }
            let mut last = 0;
            for _ in 0..CALLS {
                // Length, stream number, type, flags.
                let mut header = [0; 10];
                theirs.read_exact(&mut header).await.unwrap();
                let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
                assert!(number(4) > last, "{} after {last}", number(4));
                last = number(4);
                theirs.read_exact(&mut vec![0; number(0) as usize]).await.unwrap();
            }
        }
    }
}
