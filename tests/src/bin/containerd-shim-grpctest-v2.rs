//! A shim that speaks gRPC, for the tests: there is none in Debian's packages.
//!
//! ```text
//!  the daemon ──gRPC──► this ──ttrpc, the same bytes──► containerd-shim-longshore-v2
//! ```
//!
//! It starts our own shim and stands before it: each call is passed on under the same
//! name, each answer and code passed back. It ends with the shim. `delete` is the
//! shim's own.
//!
//! As Go's generated server before Go's shim does, it goes on with a call whose
//! connection has gone, and starts an exec only once somebody reads its output; until
//! then it answers neither a Kill or Delete of an exec nor a Wait. A file
//! `hold-exec-start` in a container's bundle makes that start wait for its removal, and
//! `exec-start-held` tells of it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's peer has to stop where it can't go on")]

use bytes::{Buf, BufMut};
use hyper_util::rt::{TokioExecutor, TokioIo};
use longshore_tests::bin_dir;
use prost::Message;
use proto::containerd::task::v3 as wire;
use proto::ttrpc_glue::Caller;
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::RwLock;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.last().map(String::as_str) {
        Some("start") => start(&args),
        Some("delete") => panic!("{}", our_shim().args(&args).exec()),
        Some(address) if args.len() == 2 && args[0] == "stand-before" => stand_before(address),
        _ => panic!("unknown arguments {args:?}"),
    }
}

fn our_shim() -> Command {
    Command::new(bin_dir().join("containerd-shim-longshore-v2"))
}

#[allow(clippy::zombie_processes, reason = "it outlives us and is then PID 1's")]
fn start(args: &[String]) {
    let answer = our_shim().args(args).stderr(Stdio::inherit()).output().unwrap();
    assert!(answer.status.success(), "{answer:?}");
    let said = String::from_utf8(answer.stdout).unwrap();
    let address = match serde_json::from_str::<serde_json::Value>(&said) {
        Ok(json) => json["address"].as_str().unwrap().to_string(),
        Err(_) => said.trim().to_string(),
    };
    let theirs = address.strip_prefix("unix://").unwrap();
    let ours = format!("{theirs}.grpc");
    let listener = std::os::unix::net::UnixListener::bind(&ours).unwrap();
    Command::new(std::env::current_exe().unwrap())
        .args(["stand-before", theirs])
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    print!(r#"{{"version":3,"address":"unix://{ours}","protocol":"GRPC"}}"#);
}

#[tokio::main(flavor = "current_thread")]
async fn stand_before(address: &str) {
    let listener = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let listener = std::os::unix::net::UnixListener::from(listener);
    listener.set_nonblocking(true).unwrap();
    let listener = UnixListener::from_std(listener).unwrap();
    let shim = ttrpc::r#async::Client::new(UnixStream::connect(address).await.unwrap().into());
    let mut life = UnixStream::connect(address).await.unwrap();
    let execs = Arc::<Execs>::default();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (shim, execs) = (shim.clone(), execs.clone());
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                    let (shim, execs) = (shim.clone(), execs.clone());
                    async move {
                        let pass = Pass { shim, execs, path: request.uri().path().trim_matches('/').to_string() };
                        Ok::<_, std::convert::Infallible>(tonic::server::Grpc::new(Bytes).unary(pass, request).await)
                    }
                });
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    // The shim never writes unasked: what is read here is its end.
    let _ = life.read(&mut [0]).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    for path in [address.to_string(), format!("{address}.grpc")] {
        let _ = std::fs::remove_file(Path::new(&path));
    }
    // A FIFO that nobody reads must hold up no end.
    std::process::exit(0);
}

/// Execs that were made and not started yet.
#[derive(Default)]
struct Execs {
    /// The FIFOs of their stdout and stderr.
    outputs: Mutex<HashMap<String, Vec<PathBuf>>>,
    /// Held for writing while one is started.
    starts: RwLock<()>,
}

impl Execs {
    /// The end of the starts that are under way.
    async fn started(&self) {
        drop(self.starts.read().await);
    }
}

/// Waits until somebody reads each, as Go's shim does.
fn await_readers(outputs: &[PathBuf]) {
    if let Some(bundle) = outputs.first().and_then(|p| p.ancestors().nth(3)) {
        let hold = bundle.join("hold-exec-start");
        if hold.exists() {
            std::fs::write(bundle.join("exec-start-held"), "").unwrap();
        }
        while hold.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    for path in outputs {
        drop(std::fs::OpenOptions::new().write(true).open(path));
    }
}

/// One call, passed on.
#[derive(Clone)]
struct Pass {
    shim: ttrpc::r#async::Client,
    execs: Arc<Execs>,
    path: String,
}

impl Pass {
    async fn pass(&self, request: Vec<u8>) -> Result<tonic::Response<Vec<u8>>, tonic::Status> {
        let path = &self.path;
        let (service, method) = path.split_once('/').ok_or_else(|| tonic::Status::unimplemented(path.clone()))?;
        match self.shim.unary(service, method, Duration::ZERO, request).await {
            Ok(answer) => Ok(tonic::Response::new(answer)),
            Err(ttrpc::Error::RpcStatus(s)) => {
                Err(tonic::Status::new(tonic::Code::from(s.code() as i32), s.message().to_string()))
            }
            Err(e) => Err(tonic::Status::unavailable(e.to_string())),
        }
    }

    async fn call(self, request: Vec<u8>) -> Result<tonic::Response<Vec<u8>>, tonic::Status> {
        let Some(method) = self.path.strip_prefix("containerd.task.v3.Task/") else { return self.pass(request).await };
        match method {
            "Exec" => {
                let exec = wire::ExecProcessRequest::decode(request.as_slice()).unwrap();
                let outputs = [exec.stdout, exec.stderr].into_iter().filter(|p| !p.is_empty()).map(PathBuf::from);
                self.execs.outputs.lock().unwrap().insert(exec.exec_id, outputs.collect());
            }
            "Start" => {
                let start = wire::StartRequest::decode(request.as_slice()).unwrap();
                let outputs = self.execs.outputs.lock().unwrap().remove(&start.exec_id);
                if let Some(outputs) = outputs {
                    let _starting = self.execs.starts.write().await;
                    tokio::task::spawn_blocking(move || await_readers(&outputs)).await.unwrap();
                    return self.pass(request).await;
                }
            }
            "Wait" => {
                let answer = self.pass(request).await;
                self.execs.started().await;
                return answer;
            }
            "Kill" if !wire::KillRequest::decode(request.as_slice()).unwrap().exec_id.is_empty() => {
                self.execs.started().await;
            }
            "Delete" if !wire::DeleteRequest::decode(request.as_slice()).unwrap().exec_id.is_empty() => {
                self.execs.started().await;
            }
            _ => {}
        }
        self.pass(request).await
    }
}

impl tonic::server::UnaryService<Vec<u8>> for Pass {
    type Response = Vec<u8>;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<tonic::Response<Vec<u8>>, tonic::Status>> + Send>>;

    fn call(&mut self, request: tonic::Request<Vec<u8>>) -> Self::Future {
        // A task of its own: it goes on when the connection has gone.
        let call = tokio::spawn(self.clone().call(request.into_inner()));
        Box::pin(async move { call.await.map_err(|e| tonic::Status::internal(e.to_string()))? })
    }
}

/// Messages that stay encoded.
#[derive(Debug, Clone, Copy)]
struct Bytes;

impl Codec for Bytes {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = tonic::Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), tonic::Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Bytes {
    type Item = Vec<u8>;
    type Error = tonic::Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, tonic::Status> {
        let mut all = vec![0; from.remaining()];
        from.copy_to_slice(&mut all);
        Ok(Some(all))
    }
}
