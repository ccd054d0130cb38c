//! Root file systems: the trait and its overlayfs implementation.
