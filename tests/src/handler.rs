//! The handler that the suite runs with: the same cases pass with each, but for
//! those that name the handler for which they don't hold, and why.

/// What runs the containers of every [`Daemon`](crate::Daemon).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handler {
    /// `containerd-shim-longshore-v2`.
    Ours,
    /// Go's `containerd-shim-runc-v2` from PATH (Debian's package containerd).
    GoShim,
}

/// As `LONGSHORE_TEST_HANDLER` says: `ours` (the default) or `go-shim`.
pub fn handler() -> Handler {
    match std::env::var("LONGSHORE_TEST_HANDLER").as_deref() {
        Err(_) | Ok("" | "ours") => Handler::Ours,
        Ok("go-shim") => Handler::GoShim,
        Ok(other) => panic!("LONGSHORE_TEST_HANDLER={other}: there are ours and go-shim"),
    }
}

impl Handler {
    /// The default handler's name in that configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "runc",
            Self::GoShim => "go-shim",
        }
    }

    /// What a daemon's configuration says of it.
    pub fn config(self) -> &'static str {
        match self {
            Self::Ours => "",
            Self::GoShim => "[runtime]\nhandler = \"go-shim\"\n[runtimes.go-shim]\nshim = \"io.containerd.runc.v2\"\n",
        }
    }
}

/// True where the suite runs with `other`, of which a case can't be asked; says so.
pub fn not_with(other: Handler, why: &str) -> bool {
    let skipped = handler() == other;
    if skipped {
        println!("not with {other:?}: {why}");
    }
    skipped
}
