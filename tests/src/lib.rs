//! End to end: the real binaries, real peers.
