//! What the tests share: a node's images in a temporary root, and a server that
//! does what a test says.
#![allow(clippy::unwrap_used, dead_code)]

use longshore_images::{Image, Images, ImagesConfig, RegistryConfig};
use snapshots::{Overlay, Snapshotter};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use store::Store;
use testkit::{ImageBuilder, TempRoot, sha256};

pub struct Node {
    pub root: TempRoot,
    pub snapshots: Arc<Overlay>,
    pub images: Images,
}

impl Node {
    pub async fn new() -> Self {
        Self::with(TempRoot::new(), |_| {}).await
    }

    pub async fn with(root: TempRoot, change: impl FnOnce(&mut ImagesConfig)) -> Self {
        let store = Store::open(&root.join("db")).unwrap();
        let snapshots = Arc::new(Overlay::open(&root.join("snapshots"), store.clone()).await.unwrap());
        let mut config = ImagesConfig::new(root.join("images"));
        config.idle_timeout = Duration::from_secs(5);
        change(&mut config);
        let images = Images::open(config, store, snapshots.clone()).await.unwrap();
        Self { root, snapshots, images }
    }

    /// Everything on docker.io comes from `url` alone.
    pub async fn mirrored(url: &str) -> Self {
        let mirror = RegistryConfig { mirrors: vec![url.to_owned()], mirror_only: true, ..Default::default() };
        Self::with(TempRoot::new(), |c| drop(c.registries.insert("*".into(), mirror))).await
    }

    /// The directory of an image's topmost layer.
    pub async fn top(&self, image: &Image) -> PathBuf {
        let mounts = self.snapshots.prepare("top", Some(&image.chain_id), None).await.unwrap();
        self.snapshots.remove("top").await.unwrap();
        let lower = mounts[0].options.iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap();
        PathBuf::from(lower.split(':').next().unwrap())
    }

    /// Fails if a layer or a download is left.
    pub async fn assert_empty(&self) {
        for dir in ["snapshots", "images/ingest"] {
            let left: Vec<_> = std::fs::read_dir(self.root.join(dir)).unwrap().map(|e| e.unwrap().path()).collect();
            assert!(left.is_empty(), "left behind: {left:?}");
        }
        assert!(self.images.list(None).is_empty());
    }
}

/// A request as the server saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub path: String,
    pub authorization: Option<String>,
    pub range: Option<String>,
}

/// What the server answers.
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Only so many bytes of the body are sent before the connection is cut.
    pub cut: Option<usize>,
}

impl Reply {
    pub fn new(status: u16, body: &[u8]) -> Self {
        Self { status, headers: Vec::new(), body: body.to_vec(), cut: None }
    }

    pub fn header(mut self, key: &str, value: &str) -> Self {
        self.headers.push((key.into(), value.into()));
        self
    }
}

/// An http server on a thread, for as long as the value lives.
pub struct Server {
    pub address: String,
    pub seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
}

impl Server {
    pub fn new(answer: impl Fn(&Seen, &str) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (seen, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (log, stopped, own, answer) = (seen.clone(), stop.clone(), address.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (log, own, answer) = (log.clone(), own.clone(), answer.clone());
                std::thread::spawn(move || serve(stream, &log, &own, &*answer));
            }
        });
        Self { address, seen, stop }
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.address);
    }
}

fn serve(mut stream: TcpStream, log: &Mutex<Vec<Seen>>, own: &str, answer: &dyn Fn(&Seen, &str) -> Reply) {
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    let mut first = String::new();
    if lines.read_line(&mut first).unwrap_or(0) == 0 {
        return;
    }
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let mut seen = Seen { path, authorization: None, range: None };
    let mut length = 0usize;
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
            break;
        }
        let (key, value) = line.trim().split_once(": ").unwrap();
        match key.to_ascii_lowercase().as_str() {
            "authorization" => seen.authorization = Some(value.into()),
            "range" => seen.range = Some(value.into()),
            "content-length" => length = value.parse().unwrap(),
            _ => {}
        }
    }
    let _ = std::io::copy(&mut lines.take(length as u64), &mut std::io::sink());
    log.lock().unwrap().push(seen.clone());
    let reply = answer(&seen, own);
    let mut head =
        format!("HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {}\r\n", reply.status, reply.body.len());
    for (key, value) in &reply.headers {
        head.push_str(&format!("{key}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let body = &reply.body[..reply.cut.unwrap_or(reply.body.len())];
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
}

/// What a faithful registry answers for `image` under any name and tag.
pub fn faithful(image: &ImageBuilder) -> impl Fn(&Seen, &str) -> Reply + Send + Sync + 'static {
    let manifest = image.manifest_json();
    let mut blobs = image.layer_blobs();
    blobs.push(image.config_json());
    let blobs: Vec<(String, Vec<u8>)> = blobs.into_iter().map(|b| (sha256(&b), b)).collect();
    move |seen, _| {
        if seen.path.contains("/manifests/") {
            return Reply::new(200, &manifest).header("Content-Type", "application/vnd.oci.image.manifest.v1+json");
        }
        match blobs.iter().find(|(digest, _)| seen.path.contains(digest)) {
            Some((_, blob)) => ranged(seen, blob),
            None => Reply::new(404, b"nothing"),
        }
    }
}

/// A blob, or the part of it that was asked for.
pub fn ranged(seen: &Seen, blob: &[u8]) -> Reply {
    let from = seen.range.as_deref().and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    match from {
        Some(from) => Reply::new(206, &blob[from..])
            .header("Content-Range", &format!("bytes {from}-{}/{}", blob.len() - 1, blob.len())),
        None => Reply::new(200, blob),
    }
}
