//! The daemon's namespace helper as a program of its own: the tests of sandboxes
//! start it, whose own `main` has threads.

fn main() -> std::process::ExitCode {
    sys::ns_helper::helper_main()
}
