//! `longshore-conmon`: the monitor's binary.

/// What is inherited is taken up before anything else is opened.
fn main() {
    sys::malloc::be_small();
    let code = match sys::fork::take_all_inherited() {
        Ok(inherited) => monitor::run(std::env::args_os().skip(1), inherited, env!("CARGO_PKG_VERSION")),
        Err(e) => {
            eprintln!("conmon: look at the inherited descriptors: {e}");
            1
        }
    };
    std::process::exit(code);
}
