//! What was attached, on disk: before ADD is asked for, so that what a killed daemon
//! has left is found, and with its results afterwards, which DEL and CHECK are told.
//!
//! ```text
//! <dir>/                             0700
//!   <network>-<pod>-<interface>      libcni's form (kind cniCacheV1), which other
//!                                    tools read
//!   <record>.bad                     one that could not be read and was given up
//! ```

use ::types::{Error, Result, ResultExt};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::io::ErrorKind as Io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const KIND: &str = "cniCacheV1";
/// Files that are just being written begin so; no network's name does.
const TEMPORARY: &str = ".new-";
/// Records that were given up end so; no interface's name does.
const BAD: &str = ".bad";

/// One attachment of a pod to a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    kind: String,
    /// The pod's id.
    pub container_id: String,
    /// The network's configuration as it was, in base64.
    config: String,
    /// The interface's name in the pod.
    pub if_name: String,
    /// The network's name.
    pub network_name: String,
    /// Where the pod's network namespace was.
    #[serde(default)]
    pub netns: PathBuf,
    /// CNI_ARGS.
    #[serde(default)]
    pub cni_args: Vec<(String, String)>,
    /// What plugins could ask for.
    #[serde(default)]
    pub capability_args: Map<String, Value>,
    /// What the last ADD that went well has answered; `None` before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
}

impl Record {
    /// An attachment that is to be made.
    pub fn new(pod: &str, interface: &str, network: &str, config: &str) -> Self {
        Self {
            kind: KIND.into(),
            container_id: pod.into(),
            config: STANDARD.encode(config),
            if_name: interface.into(),
            network_name: network.into(),
            netns: PathBuf::new(),
            cni_args: Vec::new(),
            capability_args: Map::new(),
            result: None,
        }
    }

    /// The network's configuration as it was.
    ///
    /// # Errors
    /// When it can't be decoded.
    pub fn config(&self) -> Result<String> {
        let bytes = STANDARD.decode(&self.config).context(|| "decode its configuration".into())?;
        String::from_utf8(bytes).context(|| "decode its configuration".into())
    }

    fn file(&self) -> String {
        format!("{}-{}-{}", self.network_name, self.container_id, self.if_name)
    }
}

/// A record that can't be read, such as one that a loss of power has torn: what its name
/// says.
#[derive(Debug)]
pub struct Torn {
    /// The pod's id.
    pub pod: String,
    /// The network's name.
    pub network: String,
    /// The interface's name in the pod.
    pub interface: String,
    /// Why it can't be read.
    pub error: Error,
    path: PathBuf,
}

impl Torn {
    fn new(path: PathBuf, error: Error) -> Result<Self> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        // Neither an interface of ours nor a pod's id has a hyphen.
        let mut parts = name.rsplitn(3, '-').map(str::to_owned);
        match (parts.next(), parts.next(), parts.next()) {
            (Some(interface), Some(pod), Some(network)) => Ok(Self { pod, network, interface, error, path }),
            _ => Err(error),
        }
    }
}

/// What lies in the directory.
#[derive(Debug, Default)]
pub struct Found {
    /// By pod and interface.
    pub records: Vec<Record>,
    /// What can't be read and has a record's name.
    pub torn: Vec<Torn>,
    /// What else can't be read.
    pub errors: Vec<Error>,
}

/// The records that were given up, by their paths.
pub fn given_up(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut bad: Vec<PathBuf> = entries.map(|e| e.path()).filter(|p| p.to_string_lossy().ends_with(BAD)).collect();
    bad.sort();
    bad
}

/// The directory of attachments. Clones share it.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// Opens the directory and makes it where it is missing.
    ///
    /// # Errors
    /// Names the directory.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(dir).context(|| format!("make {}", dir.display()))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Where a record lies.
    pub fn path(&self, record: &Record) -> PathBuf {
        self.dir.join(record.file())
    }

    /// Writes a record, whole or not at all, also when the power fails.
    ///
    /// # Errors
    /// Names the file.
    pub fn put(&self, record: &Record) -> Result<()> {
        let path = self.path(record);
        let temporary = self.dir.join(format!("{TEMPORARY}{}", record.file()));
        let what = || format!("write {}", path.display());
        let text = serde_json::to_vec(record).context(what)?;
        let mut options = std::fs::OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary);
        let written = file.and_then(|mut file| {
            std::io::Write::write_all(&mut file, &text)?;
            file.sync_data()
        });
        let placed = written.and_then(|()| std::fs::rename(&temporary, &path));
        // The name has to be there before anything is attached, and stays.
        let placed = match &record.result {
            None => placed.and_then(|()| std::fs::File::open(&self.dir)?.sync_all()),
            Some(_) => placed,
        };
        if placed.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        placed.context(what)
    }

    /// Removes a record; none is success.
    ///
    /// # Errors
    /// Names the file.
    pub fn remove(&self, record: &Record) -> Result<()> {
        let path = self.path(record);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != Io::NotFound => Err(e).context(|| format!("remove {}", path.display())),
            _ => Ok(()),
        }
    }

    /// Gives a torn record another name, under which nobody looks for it.
    ///
    /// # Errors
    /// Names the file.
    pub fn give_up(&self, torn: &Torn) -> Result<()> {
        let mut bad = torn.path.clone().into_os_string();
        bad.push(BAD);
        match std::fs::rename(&torn.path, &bad) {
            Err(e) if e.kind() != Io::NotFound => Err(e).context(|| format!("rename {}", torn.path.display())),
            _ => Ok(()),
        }
    }

    /// The records of one pod, by interface, and what of them can't be read.
    pub fn of(&self, pod: &str) -> Found {
        let mark = format!("-{pod}-");
        let mut found = self.read(|name| name.contains(&mark));
        // A network may have a part like this in its own name.
        found.records.retain(|r| r.container_id == pod);
        found.torn.retain(|t| t.pod == pod);
        found
    }

    /// All records, and what of them can't be read.
    pub fn all(&self) -> Found {
        self.read(|_| true)
    }

    fn read(&self, wanted: impl Fn(&str) -> bool) -> Found {
        let mut found = Found::default();
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == Io::NotFound => return found,
            Err(e) => {
                found.errors.extend(Err::<(), _>(e).context(|| format!("list {}", self.dir.display())).err());
                return found;
            }
        };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(TEMPORARY) || name.ends_with(BAD) || !wanted(&name) {
                continue;
            }
            let path = entry.path();
            let text = match std::fs::read(&path) {
                // It has just been removed.
                Err(e) if e.kind() == Io::NotFound => continue,
                other => other.context(|| format!("read the attachment {}", path.display())),
            };
            match text.map(|text| parse(&path, &text)) {
                Ok(Ok(record)) => found.records.push(record),
                Ok(Err(e)) => match Torn::new(path, e) {
                    Ok(torn) => found.torn.push(torn),
                    Err(e) => found.errors.push(e),
                },
                Err(e) => found.errors.push(e),
            }
        }
        found.records.sort_by(|a, b| (&a.container_id, &a.if_name).cmp(&(&b.container_id, &b.if_name)));
        found
    }
}

fn parse(path: &Path, text: &[u8]) -> Result<Record> {
    let what = || format!("read the attachment {}", path.display());
    let record: Record = serde_json::from_slice(text).context(what)?;
    if path.file_name().is_none_or(|n| n.to_string_lossy() != record.file()) {
        return Err(Error::internal(what()).because("its name is not that of what is in it"));
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_found_by_pod_and_a_bad_one_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("results")).unwrap();
        let mut first = Record::new("p1", "eth0", "net-a", "{}");
        cache.put(&first).unwrap();
        first.result = Some(serde_json::json!({"ips": []}));
        cache.put(&first).unwrap();
        let second = Record::new("p1", "eth1", "b", "{}");
        cache.put(&second).unwrap();
        cache.put(&Record::new("p11", "eth0", "net-a", "{}")).unwrap();
        assert_eq!(cache.of("p1").records, [first.clone(), second]);
        assert_eq!(first.config().unwrap(), "{}");
        std::fs::write(dir.path().join("results/net-a-p2-eth0"), "garbage").unwrap();
        std::fs::write(dir.path().join("results/.new-net-a-p3-eth0"), "half").unwrap();
        let found = cache.all();
        assert_eq!((found.records.len(), found.torn.len(), found.errors.len()), (3, 1, 0), "{found:?}");
        let torn = &found.torn[0];
        assert_eq!(
            (torn.network.as_str(), torn.pod.as_str(), torn.interface.as_str()),
            ("net-a", "p2", "eth0"),
            "{torn:?}"
        );
        assert!(torn.error.to_string().contains("net-a-p2-eth0"), "{}", torn.error);
        assert!(cache.of("p1").torn.is_empty() && cache.of("p2").torn.len() == 1);
        cache.give_up(torn).unwrap();
        assert!(cache.all().torn.is_empty());
        assert_eq!(given_up(&cache.dir), [cache.dir.join("net-a-p2-eth0.bad")]);
        cache.remove(&first).unwrap();
        cache.remove(&first).unwrap();
        assert_eq!(cache.of("p1").records.len(), 1);
    }

    #[test]
    fn it_is_libcnis_form() {
        let record = Record::new("p", "eth0", "n", "{\"a\":1}");
        let json = serde_json::to_value(&record).unwrap();
        assert_eq!(json["kind"], "cniCacheV1");
        assert_eq!(json["containerId"], "p");
        assert_eq!(json["config"], "eyJhIjoxfQ==");
        assert_eq!((json["ifName"].as_str(), json["networkName"].as_str()), (Some("eth0"), Some("n")));
    }
}
