//! A shim that speaks gRPC, for the tests: there is none in Debian's packages.
//!
//! ```text
//!  the daemon ──gRPC──► this ──ttrpc, the same bytes──► containerd-shim-longshore-v2
//! ```
//!
//! It starts our own shim and stands before it: each call is passed on under the same
//! name, each answer and code passed back. It ends with the shim. `delete` is the
//! shim's own.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's peer has to stop where it can't go on")]

use bytes::{Buf, BufMut};
use hyper_util::rt::{TokioExecutor, TokioIo};
use longshore_tests::bin_dir;
use proto::ttrpc_glue::Caller;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
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
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let shim = shim.clone();
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                    let shim = shim.clone();
                    async move {
                        let pass = Pass { shim, path: request.uri().path().trim_matches('/').to_string() };
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
}

/// One call, passed on.
struct Pass {
    shim: ttrpc::r#async::Client,
    path: String,
}

impl tonic::server::UnaryService<Vec<u8>> for Pass {
    type Response = Vec<u8>;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<tonic::Response<Vec<u8>>, tonic::Status>> + Send>>;

    fn call(&mut self, request: tonic::Request<Vec<u8>>) -> Self::Future {
        let (shim, path) = (self.shim.clone(), self.path.clone());
        Box::pin(async move {
            let (service, method) = path.split_once('/').ok_or_else(|| tonic::Status::unimplemented(path.clone()))?;
            match shim.unary(service, method, Duration::ZERO, request.into_inner()).await {
                Ok(answer) => Ok(tonic::Response::new(answer)),
                Err(ttrpc::Error::RpcStatus(s)) => {
                    Err(tonic::Status::new(tonic::Code::from(s.code() as i32), s.message().to_string()))
                }
                Err(e) => Err(tonic::Status::unavailable(e.to_string())),
            }
        })
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
