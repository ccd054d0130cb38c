//! From ttrpc's faults to errors that name the shim and the call.

use std::time::{Duration, Instant};
use types::{Error, ErrorKind};

/// How the client says that it has stopped writing: its connection broke before this call.
const NO_WRITER: &str = "reserve channel capacity failed";

/// What a call to a shim can meet.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The shim answered with an error.
    Status(ErrorKind, String),
    /// The call's own bound passed.
    Late,
    /// The connection is gone, as a rule with the shim.
    Closed,
    /// The wire's encoding failed.
    Wire(String),
}

impl Fault {
    /// The error of this fault in `call`, a few words such as "kill container x".
    pub(crate) fn within(self, call: &str, bound: Duration) -> Error {
        match self {
            Self::Status(kind, message) => Error::new(kind, format!("{call}: {message}")),
            Self::Late => Error::deadline(format!("{call}: the shim did not answer within {bound:?}"))
                .hint("is it stopped, or is the OCI runtime stuck? the daemon's log has the shim's own lines"),
            Self::Closed => Error::unavailable(format!("{call}: the connection to the shim is closed"))
                .hint("as a rule the shim has died, and its containers with it: the daemon's log tells"),
            Self::Wire(message) => Error::internal(format!("{call}: {message}")),
        }
    }

    /// True where the named object is not there.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Status(ErrorKind::NotFound, _))
    }
}

/// Awaits a call that was given `bound` (zero is none). The client says in words
/// only that the bound has passed, so it is told by the clock.
pub(crate) async fn call<T>(bound: Duration, work: impl Future<Output = ttrpc::Result<T>>) -> Result<T, Fault> {
    let begun = Instant::now();
    match work.await.map_err(Fault::from) {
        Err(Fault::Wire(_)) if !bound.is_zero() && begun.elapsed() >= bound => Err(Fault::Late),
        other => other,
    }
}

impl From<ttrpc::Error> for Fault {
    fn from(e: ttrpc::Error) -> Self {
        match e {
            ttrpc::Error::RpcStatus(s) => match kind(s.code()) {
                ErrorKind::DeadlineExceeded => Self::Late,
                kind => Self::Status(kind, s.message().to_string()),
            },
            ttrpc::Error::LocalClosed
            | ttrpc::Error::RemoteClosed
            | ttrpc::Error::Eof
            | ttrpc::Error::Socket(_)
            | ttrpc::Error::Nix(_) => Self::Closed,
            ttrpc::Error::Others(text) if text.starts_with(NO_WRITER) => Self::Closed,
            ttrpc::Error::Others(text) => Self::Wire(text),
        }
    }
}

/// The one mapping from ttrpc's codes.
fn kind(code: ttrpc::Code) -> ErrorKind {
    use ttrpc::Code;
    match code {
        Code::INVALID_ARGUMENT | Code::OUT_OF_RANGE => ErrorKind::InvalidArgument,
        Code::NOT_FOUND => ErrorKind::NotFound,
        Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
        Code::FAILED_PRECONDITION | Code::ABORTED => ErrorKind::FailedPrecondition,
        Code::RESOURCE_EXHAUSTED => ErrorKind::ResourceExhausted,
        Code::DEADLINE_EXCEEDED => ErrorKind::DeadlineExceeded,
        Code::UNAVAILABLE => ErrorKind::Unavailable,
        Code::UNIMPLEMENTED => ErrorKind::Unimplemented,
        Code::PERMISSION_DENIED | Code::UNAUTHENTICATED => ErrorKind::PermissionDenied,
        Code::CANCELLED => ErrorKind::Cancelled,
        Code::OK | Code::UNKNOWN | Code::INTERNAL | Code::DATA_LOSS => ErrorKind::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_bound_that_has_passed_is_told_by_the_clock() {
        let bound = Duration::from_millis(5);
        let late = async {
            tokio::time::sleep(bound * 2).await;
            Err::<(), _>(ttrpc::Error::Others("whatever".into()))
        };
        assert!(matches!(call(bound, late).await, Err(Fault::Late)));
        let early = async { Err::<(), _>(ttrpc::Error::Others("too long".into())) };
        assert!(matches!(call(Duration::from_secs(9), early).await, Err(Fault::Wire(_))));
    }

    #[tokio::test]
    async fn a_connection_that_broke_before_the_call_is_closed_too() {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        let client = ttrpc::r#async::Client::new(ours.into());
        drop(theirs);
        for _ in 0..20 {
            let request = ttrpc::Request { service: "s".into(), method: "m".into(), ..Default::default() };
            let fault = call(Duration::ZERO, client.request(request)).await.unwrap_err();
            assert!(matches!(fault, Fault::Closed), "{fault:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn a_closed_connection_is_told_from_an_answer() {
        assert!(matches!(Fault::from(ttrpc::Error::RemoteClosed), Fault::Closed));
        assert!(matches!(Fault::from(ttrpc::Error::Socket("x".into())), Fault::Closed));
        let missing = Fault::from(proto::ttrpc_glue::status(ttrpc::Code::NOT_FOUND, "no such container"));
        assert!(missing.is_not_found());
        let e = missing.within("kill container x", Duration::ZERO);
        assert_eq!(e.to_string(), "kill container x: no such container");
        let late = Fault::from(proto::ttrpc_glue::status(ttrpc::Code::DEADLINE_EXCEEDED, ""));
        assert_eq!(late.within("state", Duration::from_secs(2)).kind(), ErrorKind::DeadlineExceeded);
    }
}
