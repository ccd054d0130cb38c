//! The init of a pod that shares one pid namespace.

fn main() {}
