//! The daemon and the command line: the composition root.

fn main() {}
