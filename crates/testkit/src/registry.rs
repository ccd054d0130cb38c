//! Debian's docker-registry on a free loopback port, for as long as the value lives.

use crate::{ImageBuilder, TempRoot, sha256};
use serde_json::json;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A running registry.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    port: u16,
    root: TempRoot,
    tls: bool,
}

/// Starts an empty registry that speaks plain http on 127.0.0.1.
pub fn registry() -> Registry {
    start(false)
}

/// Starts an empty registry that speaks https, with a certificate that
/// [`Registry::ca_file`] vouches for (made by openssl).
pub fn registry_tls() -> Registry {
    start(true)
}

fn start(tls: bool) -> Registry {
    let root = TempRoot::new();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = root.join("registry.yml");
    let (certificate, key) = (root.join("ca.pem"), root.join("key.pem"));
    let mut text = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp:\n  addr: '127.0.0.1:{port}'\n",
        root.join("data").display()
    );
    if tls {
        make_certificate(&certificate, &key);
        text += &format!("  tls: {{certificate: {}, key: {}}}\n", certificate.display(), key.display());
    }
    std::fs::write(&config, text).unwrap();
    let child = Command::new("docker-registry")
        .arg("serve")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("start docker-registry (Debian package docker-registry)");
    let registry = Registry { child, port, root, tls };
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "docker-registry does not listen on port {port}");
        std::thread::sleep(Duration::from_millis(20));
    }
    registry
}

fn make_certificate(certificate: &Path, key: &Path) {
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"])
        // One that is its own authority but says that it is none, as rustls wants it.
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout"])
        .arg(key)
        .arg("-out")
        .arg(certificate)
        .stderr(Stdio::null())
        .status()
        .expect("make a certificate (Debian package openssl)");
    assert!(made.success(), "openssl made no certificate");
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    /// `127.0.0.1:PORT`, as it stands in an image's name.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// `http://127.0.0.1:PORT` (or https), as it stands in a configuration.
    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.host())
    }

    /// The certificate authority of a registry with TLS.
    pub fn ca_file(&self) -> PathBuf {
        self.root.join("ca.pem")
    }

    /// Pushes `image` as `repository:tag` over plain http and returns the digest
    /// of its manifest.
    pub fn push(&self, repository: &str, tag: &str, image: &ImageBuilder) -> String {
        for blob in image.layer_blobs().into_iter().chain([image.config_json()]) {
            self.push_blob(repository, &blob);
        }
        let manifest = image.manifest_json();
        self.put_manifest(repository, tag, MANIFEST, &manifest);
        sha256(&manifest)
    }

    /// Pushes an index of `images`, one per platform, and returns its digest.
    pub fn push_index(&self, repository: &str, tag: &str, images: &[ImageBuilder]) -> String {
        let manifests: Vec<_> = images
            .iter()
            .map(|image| {
                let digest = self.push(repository, &format!("{tag}-part"), image);
                let size = image.manifest_json().len();
                json!({"mediaType": MANIFEST, "digest": digest, "size": size, "platform": image.platform_json()})
            })
            .collect();
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        let body = serde_json::to_vec(&index).unwrap();
        self.put_manifest(repository, tag, INDEX, &body);
        sha256(&body)
    }

    /// Pushes one blob.
    pub fn push_blob(&self, repository: &str, blob: &[u8]) {
        let (status, head) = self.call("POST", &format!("/v2/{repository}/blobs/uploads/"), "", &[]);
        assert_eq!(status, 202, "{head}");
        let location = head
            .lines()
            .find_map(|l| l.split_once(": ").filter(|(k, _)| k.eq_ignore_ascii_case("location")))
            .map(|(_, v)| v.trim().to_owned())
            .expect("a Location for the upload");
        let path = location.strip_prefix(&self.url()).unwrap_or(&location);
        let separator = if path.contains('?') { '&' } else { '?' };
        let put = format!("{path}{separator}digest={}", sha256(blob));
        let (status, head) = self.call("PUT", &put, "application/octet-stream", blob);
        assert_eq!(status, 201, "{head}");
    }

    /// Puts a manifest or an index, unchecked by us.
    pub fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, body: &[u8]) {
        let (status, head) = self.call("PUT", &format!("/v2/{repository}/manifests/{tag}"), media_type, body);
        assert_eq!(status, 201, "{head}");
    }

    fn call(&self, method: &str, path: &str, content_type: &str, body: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\r\n",
            self.host(),
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).unwrap();
        let reply = String::from_utf8_lossy(&reply).into_owned();
        let status = reply.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        (status, reply)
    }
}
