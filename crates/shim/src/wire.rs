//! Between our words and those of ttrpc.

use prost_types::Timestamp;
use proto::ttrpc_glue::status;
use std::time::SystemTime;
use types::{Error, ErrorKind};

/// The one mapping from kinds of errors to ttrpc codes.
fn code(kind: ErrorKind) -> ttrpc::Code {
    match kind {
        ErrorKind::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        ErrorKind::NotFound => ttrpc::Code::NOT_FOUND,
        ErrorKind::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
        ErrorKind::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
        ErrorKind::ResourceExhausted => ttrpc::Code::RESOURCE_EXHAUSTED,
        ErrorKind::DeadlineExceeded => ttrpc::Code::DEADLINE_EXCEEDED,
        ErrorKind::Unavailable => ttrpc::Code::UNAVAILABLE,
        ErrorKind::Unimplemented => ttrpc::Code::UNIMPLEMENTED,
        ErrorKind::PermissionDenied => ttrpc::Code::PERMISSION_DENIED,
        ErrorKind::Cancelled => ttrpc::Code::CANCELLED,
        ErrorKind::Internal => ttrpc::Code::UNKNOWN,
    }
}

/// An error as ttrpc carries it.
#[expect(clippy::needless_pass_by_value, reason = "it stands in map_err")]
pub fn error(e: Error) -> ttrpc::Error {
    status(code(e.kind()), e.to_string())
}

/// A point in time as protobuf carries it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    Timestamp::from(at)
}

/// An exit code as protobuf carries it.
pub fn exit_status(status: types::ExitStatus) -> u32 {
    u32::try_from(status.code()).unwrap_or(255)
}

/// A pid as protobuf carries it.
pub fn pid(pid: i32) -> u32 {
    u32::try_from(pid).unwrap_or(0)
}
