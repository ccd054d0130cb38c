//! The handler that the suite runs with: the same cases pass with each, but for
//! those that name the handler for which they don't hold, and why.

/// What runs the containers of every [`Daemon`](crate::Daemon).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handler {
    /// `containerd-shim-longshore-v2`.
    Ours,
    /// Go's `containerd-shim-runc-v2` from PATH (Debian's package containerd).
    GoShim,
    /// The original conmon from PATH (Debian's package conmon).
    Conmon,
    /// `longshore-conmon`.
    OurConmon,
}

/// As `LONGSHORE_TEST_HANDLER` says: `ours` (the default), `go-shim`, `conmon` or
/// `longshore-conmon`.
pub fn handler() -> Handler {
    match std::env::var("LONGSHORE_TEST_HANDLER").as_deref() {
        Err(_) | Ok("" | "ours") => Handler::Ours,
        Ok("go-shim") => Handler::GoShim,
        Ok("conmon") => Handler::Conmon,
        Ok("longshore-conmon") => Handler::OurConmon,
        Ok(other) => panic!("LONGSHORE_TEST_HANDLER={other}: there are ours, go-shim, conmon and longshore-conmon"),
    }
}

impl Handler {
    /// The default handler's name in that configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "runc",
            Self::GoShim => "go-shim",
            Self::Conmon | Self::OurConmon => "conmon",
        }
    }

    /// What a daemon's configuration says of it.
    pub fn config(self) -> &'static str {
        match self {
            Self::Ours => "",
            Self::Conmon => "[runtime]\nhandler = \"conmon\"\n[runtimes.conmon]\nmonitor = \"/usr/bin/conmon\"\n",
            // Beside the daemon's own binary.
            Self::OurConmon => "[runtime]\nhandler = \"conmon\"\n[runtimes.conmon]\nmonitor = \"longshore-conmon\"\n",
            Self::GoShim => "[runtime]\nhandler = \"go-shim\"\n[runtimes.go-shim]\nshim = \"io.containerd.runc.v2\"\n",
        }
    }

    /// True where containers have a monitor each and pods no shim.
    pub fn monitored(self) -> bool {
        matches!(self, Self::Conmon | Self::OurConmon)
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

/// True where the suite runs with monitors, of which a case can't be asked; says so.
pub fn not_with_monitors(why: &str) -> bool {
    let skipped = handler().monitored();
    if skipped {
        println!("not with {:?}: {why}", handler());
    }
    skipped
}
