//! The words that every crate shares: ids, names, signals, exit status, errors.
//!
//! No IO and no wire types are here; [`Error`] carries a [`ErrorKind`], and each
//! wire (CRI, ttrpc, exit codes) maps the kinds to its own codes in one place.

mod error;
mod exit;
mod id;
mod signal;

pub use error::{Error, ErrorKind, Result, ResultExt};
pub use exit::{Certificate, ExitStatus};
pub use id::{check_identifier, new_id};
pub use signal::Signal;
