//! Between prost's messages and the ttrpc crate's byte payloads.
//!
//! The crate's own generator speaks rust-protobuf; ours shares prost with the
//! gRPC side, so that one message library is linked.

use prost::Message;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;
use ttrpc::r#async::{MethodHandler, TtrpcContext};

type Answer<T> = Pin<Box<dyn Future<Output = ttrpc::Result<T>> + Send>>;

struct Unary<I, O> {
    serve: Box<dyn Fn(TtrpcContext, I) -> Answer<O> + Send + Sync>,
}

#[async_trait::async_trait]
impl<I, O> MethodHandler for Unary<I, O>
where
    I: Message + Default + 'static,
    O: Message + 'static,
{
    async fn handler(&self, ctx: TtrpcContext, req: ttrpc::Request) -> ttrpc::Result<ttrpc::Response> {
        let input = I::decode(req.payload.as_slice()).map_err(|e| {
            status(
                ttrpc::Code::INVALID_ARGUMENT,
                format!("{}/{}: the request can't be read: {e}", req.service, req.method),
            )
        })?;
        let mut res = ttrpc::Response::new();
        match (self.serve)(ctx, input).await {
            Ok(output) => {
                res.set_status(ttrpc::get_status(ttrpc::Code::OK, ""));
                res.payload = output.encode_to_vec();
            }
            Err(ttrpc::Error::RpcStatus(s)) => res.set_status(s),
            Err(e) => res.set_status(ttrpc::get_status(ttrpc::Code::UNKNOWN, e.to_string())),
        }
        Ok(res)
    }
}

/// A handler of one unary method.
pub fn unary<I, O>(
    serve: impl Fn(TtrpcContext, I) -> Answer<O> + Send + Sync + 'static,
) -> Box<dyn MethodHandler + Send + Sync>
where
    I: Message + Default + 'static,
    O: Message + 'static,
{
    Box::new(Unary { serve: Box::new(serve) })
}

/// What carries encoded calls: a ttrpc connection, or another transport with the
/// same codes.
pub trait Caller: Send + Sync {
    /// One unary call. A `timeout` of zero means none.
    ///
    /// # Errors
    /// `RpcStatus` with the peer's code; `RemoteClosed` and others of the transport.
    fn unary(
        &self,
        service: &str,
        method: &str,
        timeout: Duration,
        payload: Vec<u8>,
    ) -> impl Future<Output = ttrpc::Result<Vec<u8>>> + Send;
}

impl Caller for ttrpc::r#async::Client {
    async fn unary(&self, service: &str, method: &str, timeout: Duration, payload: Vec<u8>) -> ttrpc::Result<Vec<u8>> {
        let mut request = ttrpc::Request::new();
        request.service = service.to_string();
        request.method = method.to_string();
        request.timeout_nano = i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX);
        request.payload = payload;
        self.request(request).await.map(|response| response.payload)
    }
}

/// One unary call. A `timeout` of zero means none.
///
/// # Errors
/// Those of the [`Caller`].
pub async fn call<I: Message, O: Message + Default>(
    client: &impl Caller,
    service: &str,
    method: &str,
    timeout: Duration,
    req: &I,
) -> ttrpc::Result<O> {
    let answer = client.unary(service, method, timeout, req.encode_to_vec()).await?;
    O::decode(answer.as_slice())
        .map_err(|e| ttrpc::Error::Others(format!("{service}/{method}: the answer can't be read: {e}")))
}

/// An error with a code, as a server gives it.
pub fn status(code: ttrpc::Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message.into()))
}

/// The answer of a method that a server does not override.
pub fn unserved(service: &str, method: &str) -> ttrpc::Error {
    status(ttrpc::Code::UNIMPLEMENTED, format!("{service}/{method} is not served by this shim"))
}
