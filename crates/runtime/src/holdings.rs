//! What lies on this node of a backend's pods, whether or not anybody knows of them.

use crate::api::Holdings;
use crate::bundle::Layout;
use crate::holders;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Lists the bundles; `roots` are the OCI runtimes' directories, of which only those below
/// `state` are nobody else's.
pub(crate) fn list(layout: &Layout, state: &Path, roots: &BTreeSet<PathBuf>) -> Holdings {
    let mut all = Holdings::default();
    for entry in fs::read_dir(layout.bundles()).into_iter().flatten().flatten() {
        let (name, path) = (entry.file_name().into_string(), entry.path());
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        match name {
            // One that a killed daemon had just begun is empty.
            Ok(id) if is_dir && types::check_identifier("pod id", &id).is_ok() && is_bundle(&id, &path) => {
                all.tasks.extend(subdirs(&layout.tasks(&id)).into_iter().map(|task| (id.clone(), task)));
                all.pods.insert(id);
            }
            _ => all.strange.push(path),
        }
    }
    all.strange.sort();
    for root in roots.iter().filter(|r| r.starts_with(state)) {
        all.orphans.extend(subdirs(root).into_iter().filter(|id| is_id(id)));
    }
    all.orphans.extend(holders::orphaned_shims(&layout.bundles()).into_iter().map(|(id, _)| id));
    all
}

/// As [`types::new_id`] makes them.
fn is_id(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

fn is_bundle(id: &str, path: &Path) -> bool {
    is_id(id) || ["handler.json", "config.json", "bootstrap.json", "tasks"].iter().any(|f| path.join(f).exists())
}

fn subdirs(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let dirs = entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    dirs.filter_map(|e| e.file_name().into_string().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_strange_is_told_from_bundles() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path().to_path_buf());
        let id = types::new_id().unwrap();
        for dir in [format!("bundles/{id}"), "bundles/p1/tasks/c1".into(), "bundles/odd".into(), format!("oci/ns/{id}")]
        {
            fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        fs::create_dir_all(root.path().join("oci/ns/short")).unwrap();
        fs::write(root.path().join("bundles/file"), "").unwrap();
        let roots = BTreeSet::from([root.path().join("oci/ns"), PathBuf::from("/proc")]);
        let all = list(&layout, root.path(), &roots);
        assert_eq!(all.pods, BTreeSet::from([id.clone(), "p1".into()]));
        assert_eq!(all.tasks, BTreeSet::from([("p1".to_string(), "c1".to_string())]));
        assert_eq!(all.orphans, BTreeSet::from([id]));
        assert_eq!(all.strange, [root.path().join("bundles/file"), root.path().join("bundles/odd")]);
    }
}
