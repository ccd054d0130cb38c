//! What stands between the manager and a shim, and breaks their connection.

use super::{Node, our_shim};
use longshore_runtime::shim_v2::ShimConfig;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// Passes on what comes to its socket; ends with the test's process.
pub struct Proxy {
    socket: PathBuf,
    streams: Arc<Mutex<Vec<UnixStream>>>,
}

impl Proxy {
    /// The configuration of `node` with our shim, whose `start` names the proxy's socket.
    pub fn before(node: &Node) -> (Self, ShimConfig) {
        let (script, socket, real) = (node.root.join("shim"), node.root.join("proxy"), node.root.join("real"));
        let text = format!(
            "#!/bin/sh\ncase \" $* \" in *\" start \"*) ;; *) exec {shim} \"$@\" ;; esac\n\
             {shim} \"$@\" >{real} || exit 1\necho unix://{socket}\n",
            shim = our_shim().display(),
            real = real.display(),
            socket = socket.display(),
        );
        testkit::script(&script, text);
        let mut config = node.config();
        config.handlers[0].shim = script;
        let proxy = Self { socket, streams: Arc::default() };
        proxy.listen(real);
        (proxy, config)
    }

    fn listen(&self, real: PathBuf) {
        let listener = UnixListener::bind(&self.socket).unwrap();
        let streams = self.streams.clone();
        std::thread::spawn(move || {
            for from in listener.incoming() {
                let answer: serde_json::Value = serde_json::from_slice(&std::fs::read(&real).unwrap()).unwrap();
                let address = answer["address"].as_str().unwrap().trim_start_matches("unix://");
                let (from, to) = (from.unwrap(), UnixStream::connect(address).unwrap());
                for (a, b) in [(&from, &to), (&to, &from)] {
                    let (mut a, mut b) = (a.try_clone().unwrap(), b.try_clone().unwrap());
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut a, &mut b);
                        let _ = b.flush();
                        let _ = (a.shutdown(Shutdown::Both), b.shutdown(Shutdown::Both));
                    });
                }
                streams.lock().unwrap().extend([from, to]);
            }
        });
    }

    /// Breaks every connection; a new one is passed on again.
    pub fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Where it listens.
    pub fn socket(&self) -> &std::path::Path {
        &self.socket
    }
}
