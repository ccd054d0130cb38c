//! Side by side with Debian's containerd, in one run.

fn main() {}
