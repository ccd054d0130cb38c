//! SQLite's errors as ours.

use rusqlite::ErrorCode;
use types::{Error, ErrorKind, Result};

/// Gives a database result its message and the kind that its code stands for.
pub trait SqlExt<T> {
    /// Names the operation and its object.
    ///
    /// # Errors
    /// `AlreadyExists` for a broken unique key, `NotFound` for a missing row,
    /// `ResourceExhausted` for a full disk, `Unavailable` for a lock that was
    /// not had in time, else `Internal`.
    fn sql(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> SqlExt<T> for rusqlite::Result<T> {
    fn sql(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| told(e, what()))
    }
}

/// The error that `what` failed with.
pub(crate) fn told(e: rusqlite::Error, what: String) -> Error {
    let error = Error::new(kind(&e), what);
    match error.kind() {
        ErrorKind::ResourceExhausted => error.because(e).hint("the disk is full: free some space"),
        _ => error.because(e),
    }
}

fn kind(e: &rusqlite::Error) -> ErrorKind {
    match e {
        rusqlite::Error::QueryReturnedNoRows => ErrorKind::NotFound,
        _ => match e.sqlite_error_code() {
            Some(ErrorCode::ConstraintViolation) => ErrorKind::AlreadyExists,
            Some(ErrorCode::DiskFull) => ErrorKind::ResourceExhausted,
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => ErrorKind::Unavailable,
            Some(ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => ErrorKind::PermissionDenied,
            _ => ErrorKind::Internal,
        },
    }
}
