//! Small images for tests, made from Debian's busybox-static or from nothing.
//!
//! What is made is deterministic: the same calls give the same digests. Layers
//! may be as evil as a test needs: names are written into the tar as given.

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// The digest of `bytes` as `sha256:…`.
pub fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// How a layer travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerCompression {
    /// As it is.
    None,
    /// gzip.
    Gzip,
}

/// One entry of a layer's tar, written exactly so.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its name, unchecked: may be absolute or contain `..`.
    pub path: String,
    /// Its type.
    pub kind: tar::EntryType,
    /// What a link points to.
    pub link: String,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Seconds since the epoch.
    pub mtime: u64,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Content of a file.
    pub data: Vec<u8>,
    /// PAX records before it, such as `SCHILY.xattr.user.x`.
    pub pax: Vec<(String, Vec<u8>)>,
}

impl Entry {
    /// An entry of type `kind` owned by root, 0755 for directories and hard links, else 0644.
    pub fn new(path: &str, kind: tar::EntryType) -> Self {
        // A link's mode becomes its file's in containerd: the usual archiver writes
        // the same one in both.
        let mode = match kind {
            tar::EntryType::Directory | tar::EntryType::Link => 0o755,
            _ => 0o644,
        };
        Self {
            path: path.into(),
            kind,
            link: String::new(),
            mode,
            uid: 0,
            gid: 0,
            mtime: 1_000_000_000,
            device: (0, 0),
            data: Vec::new(),
            pax: Vec::new(),
        }
    }

    fn write(&self, tar: &mut Vec<u8>) {
        let mut pax = self.pax.clone();
        // What the old fields can't hold goes into a PAX header.
        if self.path.len() > 100 {
            pax.push(("path".into(), self.path.clone().into_bytes()));
        }
        if self.link.len() > 100 {
            pax.push(("linkpath".into(), self.link.clone().into_bytes()));
        }
        if !pax.is_empty() {
            let records: Vec<u8> = pax.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(tar::EntryType::XHeader);
            header.as_mut_bytes()[..8].copy_from_slice(b"pax-head");
            header.set_mode(0o644);
            header.set_size(records.len() as u64);
            block(tar, &mut header, &records);
        }
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(self.kind);
        let name = &self.path.as_bytes()[..self.path.len().min(100)];
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        let link = &self.link.as_bytes()[..self.link.len().min(100)];
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link);
        header.set_mode(self.mode);
        header.set_uid(self.uid);
        header.set_gid(self.gid);
        header.set_mtime(self.mtime);
        header.set_size(self.data.len() as u64);
        header.set_device_major(self.device.0).unwrap();
        header.set_device_minor(self.device.1).unwrap();
        block(tar, &mut header, &self.data);
    }
}

fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

fn block(tar: &mut Vec<u8>, header: &mut tar::Header, data: &[u8]) {
    header.set_cksum();
    tar.extend_from_slice(header.as_bytes());
    tar.extend_from_slice(data);
    tar.resize(tar.len().next_multiple_of(512), 0);
}

/// A layer in the making.
#[derive(Debug, Clone, Default)]
pub struct Layer {
    tar: Vec<u8>,
    /// What is computed of it, shared by its clones.
    built: Arc<OnceLock<Built>>,
}

/// A layer as it travels.
#[derive(Debug)]
struct Built {
    diff_id: String,
    gzip: Vec<u8>,
}

impl Layer {
    /// An empty layer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an entry just as it is.
    #[must_use]
    pub fn entry(mut self, entry: Entry) -> Self {
        self.built = Arc::default();
        entry.write(&mut self.tar);
        self
    }

    /// Adds bytes that are no entry, to the byte.
    #[must_use]
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.built = Arc::default();
        self.tar.extend_from_slice(bytes);
        self
    }

    /// Adds a directory.
    #[must_use]
    pub fn dir(self, path: &str, mode: u32) -> Self {
        self.entry(Entry { mode, ..Entry::new(path, tar::EntryType::Directory) })
    }

    /// Adds a file.
    #[must_use]
    pub fn file(self, path: &str, data: &[u8], mode: u32) -> Self {
        self.entry(Entry { mode, data: data.to_vec(), ..Entry::new(path, tar::EntryType::Regular) })
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(Entry { link: target.into(), mode: 0o777, ..Entry::new(path, tar::EntryType::Symlink) })
    }

    /// Adds a hard link.
    #[must_use]
    pub fn hardlink(self, path: &str, target: &str) -> Self {
        self.entry(Entry { link: target.into(), ..Entry::new(path, tar::EntryType::Link) })
    }

    /// The uncompressed tar, with its end marker.
    pub fn tar(&self) -> Vec<u8> {
        let mut tar = self.tar.clone();
        tar.resize(tar.len() + 1024, 0);
        tar
    }

    fn built(&self) -> &Built {
        self.built.get_or_init(|| {
            let tar = self.tar();
            let mut gzip = flate2::GzBuilder::new().write(Vec::new(), flate2::Compression::fast());
            gzip.write_all(&tar).unwrap();
            Built { diff_id: sha256(&tar), gzip: gzip.finish().unwrap() }
        })
    }
}

/// busybox with a hard link per applet, and the directories and accounts of a
/// usual small image.
fn busybox_layer() -> &'static Layer {
    static LAYER: OnceLock<Layer> = OnceLock::new();
    LAYER.get_or_init(|| {
        let program = std::fs::read("/bin/busybox").expect("/bin/busybox of Debian's busybox-static");
        let list = std::process::Command::new("/bin/busybox").arg("--list").output().expect("busybox --list");
        let applets = String::from_utf8(list.stdout).expect("names of applets");
        let mut layer = Layer::new();
        for dir in ["bin", "dev", "etc", "home", "proc", "sys", "usr", "usr/bin", "var", "var/www"] {
            layer = layer.dir(&format!("{dir}/"), 0o755);
        }
        layer = layer.dir("root/", 0o700).dir("tmp/", 0o1777).file("bin/busybox", &program, 0o755);
        for applet in applets.lines().filter(|a| *a != "busybox") {
            layer = layer.hardlink(&format!("bin/{applet}"), "bin/busybox");
        }
        layer.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home:/bin/sh\n", 0o644).file(
            "etc/group",
            b"root:x:0:\nusers:x:100:alice\nalice:x:1000:\n",
            0o644,
        )
    })
}

/// An image in the making.
#[derive(Debug, Clone)]
pub struct ImageBuilder {
    layers: Vec<Layer>,
    compression: LayerCompression,
    config: Map<String, Value>,
    architecture: String,
    own_layer: bool,
}

impl ImageBuilder {
    /// An image without a layer.
    pub fn scratch() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            layers: Vec::new(),
            compression: LayerCompression::Gzip,
            config: Map::new(),
            architecture: architecture.into(),
            own_layer: false,
        }
    }

    /// busybox in one layer, `sh` as its command.
    pub fn busybox() -> Self {
        let image = Self { layers: vec![busybox_layer().clone()], ..Self::scratch() };
        image.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").cmd(["sh"])
    }

    fn set(mut self, key: &str, value: Value) -> Self {
        self.config.insert(key.into(), value);
        self
    }

    fn push(mut self, key: &str, value: &str) -> Self {
        let list = self.config.entry(key).or_insert_with(|| json!([]));
        list.as_array_mut().unwrap().push(json!(value));
        self
    }

    fn member(mut self, key: &str, name: &str, value: Value) -> Self {
        let map = self.config.entry(key).or_insert_with(|| json!({}));
        map.as_object_mut().unwrap().insert(name.into(), value);
        self
    }

    /// Sets USER.
    #[must_use]
    pub fn user(self, user: &str) -> Self {
        self.set("User", json!(user))
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(self, key: &str, value: &str) -> Self {
        self.push("Env", &format!("{key}={value}"))
    }

    /// Sets ENTRYPOINT.
    #[must_use]
    pub fn entrypoint<S: AsRef<str>>(self, args: impl IntoIterator<Item = S>) -> Self {
        let args: Vec<String> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
        self.set("Entrypoint", json!(args))
    }

    /// Sets CMD.
    #[must_use]
    pub fn cmd<S: AsRef<str>>(self, args: impl IntoIterator<Item = S>) -> Self {
        let args: Vec<String> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
        self.set("Cmd", json!(args))
    }

    /// Sets WORKDIR.
    #[must_use]
    pub fn workdir(self, dir: &str) -> Self {
        self.set("WorkingDir", json!(dir))
    }

    /// Adds a VOLUME.
    #[must_use]
    pub fn volume(self, path: &str) -> Self {
        self.member("Volumes", path, json!({}))
    }

    /// Adds a LABEL.
    #[must_use]
    pub fn label(self, key: &str, value: &str) -> Self {
        self.member("Labels", key, json!(value))
    }

    /// Sets STOPSIGNAL.
    #[must_use]
    pub fn stop_signal(self, signal: &str) -> Self {
        self.set("StopSignal", json!(signal))
    }

    /// Says which architecture it is for, in Go's words.
    #[must_use]
    pub fn architecture(mut self, architecture: &str) -> Self {
        self.architecture = architecture.into();
        self
    }

    /// Says how its layers travel; gzip unless told.
    #[must_use]
    pub fn compression(mut self, compression: LayerCompression) -> Self {
        self.compression = compression;
        self
    }

    /// Adds a layer on top.
    #[must_use]
    pub fn layer(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self.own_layer = false;
        self
    }

    /// Adds a file (its path may begin with `/`) in a layer for such files.
    #[must_use]
    pub fn file(mut self, path: &str, data: &[u8], mode: u32) -> Self {
        if !std::mem::replace(&mut self.own_layer, true) {
            self.layers.push(Layer::new());
        }
        let top = self.layers.pop().unwrap_or_default();
        self.layers.push(top.file(path.trim_start_matches('/'), data, mode));
        self
    }

    /// Its configuration's bytes; their digest is the image's id.
    pub fn config_json(&self) -> Vec<u8> {
        let diff_ids: Vec<String> = self.layers.iter().map(|l| l.built().diff_id.clone()).collect();
        let config = json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        serde_json::to_vec(&config).unwrap()
    }

    /// The image's id: `sha256:…` of its configuration.
    pub fn id(&self) -> String {
        sha256(&self.config_json())
    }

    /// The layers as they travel.
    pub fn layer_blobs(&self) -> Vec<Vec<u8>> {
        let squeeze = |layer: &Layer| match self.compression {
            LayerCompression::None => layer.tar(),
            LayerCompression::Gzip => layer.built().gzip.clone(),
        };
        self.layers.iter().map(squeeze).collect()
    }

    /// Its OCI manifest.
    pub fn manifest_json(&self) -> Vec<u8> {
        let config = self.config_json();
        let media_type = match self.compression {
            LayerCompression::None => "application/vnd.oci.image.layer.v1.tar",
            LayerCompression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
        };
        let layers: Vec<Value> = self
            .layer_blobs()
            .iter()
            .map(|b| json!({"mediaType": media_type, "digest": sha256(b), "size": b.len()}))
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": sha256(&config),
                "size": config.len(),
            },
            "layers": layers,
        });
        serde_json::to_vec(&manifest).unwrap()
    }

    /// The platform as an index gives it.
    pub fn platform_json(&self) -> Value {
        json!({"architecture": self.architecture, "os": "linux"})
    }

    fn layout_files(&self, name: &str) -> Vec<(String, Vec<u8>)> {
        let (config, manifest) = (self.config_json(), self.manifest_json());
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": sha256(&manifest),
                "size": manifest.len(),
                "annotations": {"org.opencontainers.image.ref.name": name},
            }],
        });
        let mut files = vec![
            ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
            ("index.json".to_owned(), serde_json::to_vec(&index).unwrap()),
        ];
        for blob in self.layer_blobs().into_iter().chain([config, manifest]) {
            let path = format!("blobs/{}", sha256(&blob).replace(':', "/"));
            // Two layers may be the same.
            if !files.iter().any(|(p, _)| *p == path) {
                files.push((path, blob));
            }
        }
        files
    }

    /// Writes an OCI archive (a tar of an image layout).
    pub fn oci_archive(&self, path: &Path, name: &str) {
        write_tar(path, self.layout_files(name));
    }

    /// Writes an OCI image layout into the directory `dir`.
    pub fn oci_layout(&self, dir: &Path, name: &str) {
        for (file, data) in self.layout_files(name) {
            let at = dir.join(file);
            std::fs::create_dir_all(at.parent().unwrap()).unwrap();
            std::fs::write(at, data).unwrap();
        }
    }

    /// Writes what `docker save` wrote before version 25.
    pub fn docker_archive(&self, path: &Path, name: &str) {
        let config = self.config_json();
        let config_name = format!("{}.json", sha256(&config).trim_start_matches("sha256:"));
        let mut files = vec![(config_name.clone(), config)];
        let mut layers = Vec::new();
        for (n, layer) in self.layers.iter().enumerate() {
            layers.push(format!("{n}/layer.tar"));
            files.push((format!("{n}/layer.tar"), layer.tar()));
        }
        let manifest = json!([{"Config": config_name, "RepoTags": [name], "Layers": layers}]);
        files.push(("manifest.json".into(), serde_json::to_vec(&manifest).unwrap()));
        write_tar(path, files);
    }
}

fn write_tar(path: &Path, files: Vec<(String, Vec<u8>)>) {
    let archive = files.into_iter().fold(Layer::new(), |tar, (name, data)| tar.file(&name, &data, 0o644));
    std::fs::write(path, archive.tar()).unwrap();
}
