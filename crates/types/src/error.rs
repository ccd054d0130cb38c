//! One error type for all of our crates: what failed, on what object, why, and
//! what to do about it.

use std::fmt;

/// What sort of failure it was, independent of any wire.
///
/// `cri` maps it to gRPC codes, `shim` to ttrpc codes, the binaries to exit
/// codes; each has one exhaustive match.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The caller's input is wrong and will be wrong next time too.
    InvalidArgument,
    /// The named object does not exist.
    NotFound,
    /// An object of that name exists already.
    AlreadyExists,
    /// The object exists but is in a state that forbids the call.
    FailedPrecondition,
    /// Disk, memory, ids or addresses have run out.
    ResourceExhausted,
    /// A bound passed before the operation ended.
    DeadlineExceeded,
    /// The peer (shim, registry, runtime) can't be reached now; a retry may help.
    Unavailable,
    /// Nobody serves this call.
    Unimplemented,
    /// The peer or the kernel refused for lack of rights.
    PermissionDenied,
    /// The caller went away.
    Cancelled,
    /// Anything else: a fault of ours or of the node.
    Internal,
}

/// An error that names its culprit.
///
/// `Display` prints the message, then each cause after a colon, then the hint in
/// brackets. Log it or return it, never both.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The result that goes with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident;)*) => {$(
        $(#[$doc])*
        pub fn $name(message: impl Into<String>) -> Self {
            Self::new(ErrorKind::$kind, message)
        }
    )*};
}

impl Error {
    /// An error of `kind` whose message names the operation and its object.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, source: None }
    }

    constructors! {
        /// [`ErrorKind::InvalidArgument`].
        invalid => InvalidArgument;
        /// [`ErrorKind::NotFound`].
        not_found => NotFound;
        /// [`ErrorKind::AlreadyExists`].
        exists => AlreadyExists;
        /// [`ErrorKind::FailedPrecondition`].
        precondition => FailedPrecondition;
        /// [`ErrorKind::DeadlineExceeded`].
        deadline => DeadlineExceeded;
        /// [`ErrorKind::Unavailable`].
        unavailable => Unavailable;
        /// [`ErrorKind::Unimplemented`].
        unimplemented => Unimplemented;
        /// [`ErrorKind::Internal`].
        internal => Internal;
    }

    /// Adds what an operator can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Whether an error of this type is among the causes.
    pub fn is_because_of<T: std::error::Error + 'static>(&self) -> bool {
        let mut next = self.source.as_deref().map(|e| e as &dyn std::error::Error);
        while let Some(e) = next {
            if e.is::<T>() || e.downcast_ref::<Self>().is_some_and(Self::is_because_of::<T>) {
                return true;
            }
            next = e.source();
        }
        false
    }

    /// Puts `context` in front of the message and keeps kind, hint and cause.
    #[must_use]
    pub fn within(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// The same error under another kind, for a layer that knows better.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// The kind, for the one mapping of each wire.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// True when the object is simply not there, which many cleanups ignore.
    pub fn is_not_found(&self) -> bool {
        self.kind == ErrorKind::NotFound
    }

    /// The same words and kind once more, for each of several who wait.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self::new(self.kind, self.to_string())
    }

    /// Joins the failures of a cleanup that went on to its end: none is `Ok`,
    /// one is itself, several become one error that lists them all.
    pub fn join(context: &str, mut errors: Vec<Error>) -> Result<()> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0).within(context)),
            n => {
                let kind = errors[0].kind;
                let all: Vec<String> = errors.iter().map(ToString::to_string).collect();
                Err(Self::new(kind, format!("{context}: {n} failures: {}", all.join("; "))))
            }
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        let mut next = self.source.as_deref().map(|e| e as &dyn std::error::Error);
        while let Some(e) = next {
            write!(f, ": {e}")?;
            // Our own errors print their causes themselves.
            next = if e.is::<Error>() { None } else { e.source() };
        }
        if let Some(hint) = &self.hint {
            write!(f, " ({hint})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    // `Display` prints the whole chain, so that a caller who prints sources too
    // (anyhow's `{:#}`) does not print it twice.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        None
    }
}

/// Maps an IO error's errno to the kind that a caller can act upon.
fn kind_of_io(e: &std::io::Error) -> ErrorKind {
    use std::io::ErrorKind as Io;
    match e.kind() {
        Io::NotFound => ErrorKind::NotFound,
        Io::AlreadyExists => ErrorKind::AlreadyExists,
        Io::PermissionDenied => ErrorKind::PermissionDenied,
        Io::StorageFull | Io::QuotaExceeded | Io::OutOfMemory => ErrorKind::ResourceExhausted,
        Io::TimedOut => ErrorKind::DeadlineExceeded,
        Io::InvalidInput => ErrorKind::InvalidArgument,
        _ => ErrorKind::Internal,
    }
}

/// Gives a foreign result its message.
pub trait ResultExt<T> {
    /// Names the operation and its object; the kind follows the errno where the
    /// cause is an IO error, else it is `Internal`.
    fn context(self, message: impl FnOnce() -> String) -> Result<T>;
    /// The same with a kind of the caller's choice.
    fn context_kind(self, kind: ErrorKind, message: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> ResultExt<T> for Result<T, E> {
    fn context(self, message: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| {
            let e: Box<dyn std::error::Error + Send + Sync> = e.into();
            let kind = if let Some(io) = e.downcast_ref::<std::io::Error>() {
                kind_of_io(io)
            } else if let Some(errno) = e.downcast_ref::<rustix::io::Errno>() {
                kind_of_io(&std::io::Error::from(*errno))
            } else if let Some(own) = e.downcast_ref::<Error>() {
                own.kind
            } else {
                ErrorKind::Internal
            };
            Error { kind, message: message(), hint: None, source: Some(e) }
        })
    }

    fn context_kind(self, kind: ErrorKind, message: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error { kind, message: message(), hint: None, source: Some(e.into()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_object_cause_and_remedy() {
        let e = Err::<(), _>(std::io::Error::from_raw_os_error(28))
            .context(|| "write /var/log/x".into())
            .map_err(|e| e.hint("free some space"))
            .unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ResourceExhausted);
        let text = e.to_string();
        assert!(text.starts_with("write /var/log/x: No space left on device"), "{text}");
        assert!(text.ends_with("(free some space)"), "{text}");
    }

    #[test]
    fn a_nested_error_keeps_its_kind_and_prints_once() {
        let inner = Error::not_found("image a").hint("pull it");
        let outer = Err::<(), _>(inner).context(|| "create container b".into()).unwrap_err();
        assert_eq!(outer.kind(), ErrorKind::NotFound);
        assert_eq!(outer.to_string(), "create container b: image a (pull it)");
    }

    #[test]
    fn a_cause_is_known_by_its_type() {
        let io = Err::<(), _>(std::io::Error::from_raw_os_error(28)).context(|| "write x".into()).unwrap_err();
        assert!(io.is_because_of::<std::io::Error>() && !io.is_because_of::<std::fmt::Error>());
        assert!(Error::internal("outer").because(io).is_because_of::<std::io::Error>());
        assert!(!Error::internal("none").is_because_of::<std::io::Error>());
    }

    #[test]
    fn join_reports_every_failure() {
        assert!(Error::join("stop", vec![]).is_ok());
        let e = Error::join("stop", vec![Error::internal("a"), Error::not_found("b")]).unwrap_err();
        assert_eq!(e.to_string(), "stop: 2 failures: a; b");
    }
}
