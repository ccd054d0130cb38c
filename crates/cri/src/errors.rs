//! From kinds of errors to gRPC codes: the one place.

use tonic::{Code, Status};
use types::{Error, ErrorKind};

fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::FailedPrecondition => Code::FailedPrecondition,
        ErrorKind::ResourceExhausted => Code::ResourceExhausted,
        ErrorKind::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Unimplemented => Code::Unimplemented,
        ErrorKind::PermissionDenied => Code::PermissionDenied,
        ErrorKind::Cancelled => Code::Cancelled,
        ErrorKind::Internal => Code::Internal,
    }
}

/// An error as a client sees it; the server's log has it too, by call.
pub fn status(call: &str) -> impl FnOnce(Error) -> Status + '_ {
    move |e| {
        let code = code(e.kind());
        match code {
            Code::Internal | Code::Unavailable | Code::ResourceExhausted => tracing::error!("{call}: {e}"),
            _ => tracing::info!("{call}: {e}"),
        }
        // A gRPC status travels in HTTP headers: a long one would be refused by the
        // client, and its end says least.
        let mut message = e.to_string();
        if message.len() > 6000 {
            message.truncate(message.floor_char_boundary(6000));
            message.push('…');
        }
        Status::new(code, message)
    }
}

/// What a call that comes with a later release answers.
pub fn not_yet(call: &str) -> Status {
    Status::unimplemented(format!("{call} is not served by this version of longshore"))
}
