//! A damaged database, directories that can't be written to: survived and named
//! (with a real shim and runtime).
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{Cri, Daemon, IMAGE, command_line, container, wait_for};
use proto::cri::*;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const BOUND: Duration = Duration::from_secs(30);

/// What a client is told of a pod and its containers that must not change.
async fn told(cri: &Cri, pod: &str) -> (PodSandboxStatus, Vec<Container>, Vec<ContainerStatus>) {
    let status = cri.pod_status(pod).await.unwrap().status.unwrap();
    let listed = cri.runtime.clone().list_containers(ListContainersRequest::default()).await.unwrap();
    let listed = listed.into_inner().containers;
    let mut all = Vec::new();
    for c in &listed {
        all.push(cri.status(&c.id).await.unwrap());
    }
    (status, listed, all)
}

fn scribble(path: &Path, at: u64, len: usize) {
    std::fs::File::options().write(true).open(path).unwrap().write_all_at(&vec![0x5a; len], at).unwrap();
}

/// Damages what lies in a database's directory.
type Damage = (&'static str, fn(&Path));

const DAMAGES: [Damage; 4] = [
    ("its header and its log are garbage", |db| {
        scribble(&db.join("longshore.db"), 0, 4096);
        scribble(&db.join("longshore.db-wal"), 0, 8192);
    }),
    ("it is cut off in the middle", |db| {
        let file = std::fs::File::options().write(true).open(db.join("longshore.db")).unwrap();
        let _ = std::fs::remove_file(db.join("longshore.db-wal"));
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    }),
    ("its log is torn", |db| {
        let file = std::fs::File::options().write(true).open(db.join("longshore.db-wal")).unwrap();
        file.set_len(file.metadata().unwrap().len() / 3).unwrap();
    }),
    ("all of it is gone", |db| std::fs::remove_dir_all(db).unwrap()),
];

#[tokio::test(flavor = "multi_thread")]
async fn from_a_damaged_database_everything_comes_back_and_goes_on() {
    let (mut daemon, cri) = Daemon::stocked().await;
    let before = daemon.footprint();
    let mut config = daemon.pod("damage");
    config.log_directory = daemon.dir().join("logs").to_string_lossy().into_owned();
    config.labels.insert("app".into(), "damage".into());
    let pod = cri.run_pod(&config).await.unwrap();
    let mut main = container("main", IMAGE, &["sh", "-c", "echo kept > /kept; exec sleep 100000"]);
    main.metadata.as_mut().unwrap().attempt = 3;
    main.labels.insert("tier".into(), "main".into());
    main.log_path = "main.log".into();
    let main = cri.run(&pod, &main, &config).await.unwrap();
    let ended = cri.run(&pod, &container("ended", IMAGE, &["sh", "-c", "exit 5"]), &config).await.unwrap();
    assert_eq!(cri.exited(&ended, BOUND).await.exit_code, 5);
    let created = cri.create(&pod, &container("created", IMAGE, &["sh", "-c", "exit 6"]), &config).await.unwrap();
    let (pid, known) = (cri.pid_of(&main).await.unwrap(), told(&cri, &pod).await);
    wait_for("it has written", BOUND, || daemon.log().contains("CRI"));
    drop(cri);
    for (what, damage) in DAMAGES {
        daemon.kill();
        let told_before = daemon.log().matches("was damaged").count();
        damage(&daemon.dir().join("root/db"));
        daemon.begin().await;
        let cri = daemon.cri().await;
        assert!(daemon.log().matches("was damaged").count() > told_before, "{what}");
        assert_eq!(cri.pid_of(&main).await.unwrap(), pid, "{what}");
        assert_eq!(told(&cri, &pod).await, known, "{what}");
        assert_eq!(cri.exec(&main, &["cat", "/kept"], 10).await.unwrap().stdout, "kept\n", "{what}");
        let image = ImageSpec { image: IMAGE.into(), ..Default::default() };
        let request = ImageStatusRequest { image: Some(image), verbose: false };
        assert!(cri.images.clone().image_status(request).await.unwrap().into_inner().image.is_some(), "{what}");
    }
    let cri = daemon.cri().await;
    let aside = std::fs::read_dir(daemon.dir().join("root/db")).unwrap().flatten();
    let aside: Vec<String> = aside.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    assert_eq!(aside.iter().filter(|n| n.contains("damaged")).count(), 0, "the directory went too: {aside:?}");
    cri.start(&created).await.unwrap();
    assert_eq!(cri.exited(&created, BOUND).await.exit_code, 6);
    cri.run(&pod, &container("new", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    cri.stop_pod(&pod).await.unwrap();
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_database_lies_aside() {
    let (mut daemon, _) = Daemon::stocked().await;
    daemon.terminate();
    scribble(&daemon.dir().join("root/db/longshore.db"), 0, 4096);
    daemon.begin().await;
    let db = daemon.dir().join("root/db");
    let aside = std::fs::read_dir(&db).unwrap().flatten().find(|e| {
        let name = e.file_name().to_string_lossy().into_owned();
        name.starts_with("longshore.db.damaged-20") && name.ends_with('Z')
    });
    let aside = std::fs::read(aside.unwrap().path()).unwrap();
    assert!(aside.starts_with(&[0x5a; 4096]) && aside.len() > 4096, "as it was");
}

/// Bound read-only onto itself while it lives.
struct Closed(std::path::PathBuf);

impl Closed {
    fn on(dir: &Path) -> Self {
        for args in [["--bind"].as_slice(), &["-o", "remount,bind,ro"]] {
            let mut mount = Command::new("mount");
            mount.args(args);
            if args[0] == "--bind" {
                mount.arg(dir);
            }
            assert!(mount.arg(dir).status().unwrap().success());
        }
        Self(dir.to_path_buf())
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_cannot_be_written_to_is_named_with_its_remedy() {
    let (mut daemon, cri) = Daemon::stocked().await;
    let config = daemon.pod("closed");
    let pod = cri.run_pod(&config).await.unwrap();
    let id = cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    let pid = cri.pid_of(&id).await.unwrap();
    daemon.terminate();
    for (dir, flag) in [("state", "--state"), ("root", "--root")] {
        let dir = daemon.dir().join(dir);
        let closed = Closed::on(&dir);
        let out = daemon.serve().stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success(), "it can't serve");
        for part in [dir.to_str().unwrap(), "remount,rw", flag, "Read-only file system"] {
            assert!(said.contains(part), "{part:?} is missing in: {said}");
        }
        drop(closed);
        assert_eq!(command_line(pid), "sleep 100000");
    }
    daemon.begin().await;
    let cri = daemon.cri().await;
    assert_eq!(cri.pid_of(&id).await.unwrap(), pid);

    // One that is closed while the daemon runs: calls fail and name it, nothing is half
    // made, and once it is open again all goes on.
    let before = daemon.footprint();
    let bundles = daemon.bundles();
    let closed = Closed::on(&bundles);
    let e = cri.run_pod(&daemon.pod("more")).await.unwrap_err();
    assert!(e.message().contains(bundles.to_str().unwrap()) && e.message().contains("Read-only file system"), "{e}");
    assert_eq!(cri.exec(&id, &["true"], 10).await.map(|o| o.exit_code).unwrap_or(-1), -1, "its streams can't be made");
    drop(closed);
    daemon.leaves_nothing_but(&before);
    assert_eq!(cri.exec(&id, &["echo", "on"], 10).await.unwrap().stdout, "on\n");
    let more = cri.run_pod(&daemon.pod("more")).await.unwrap();
    cri.remove_pod(&more).await.unwrap();
}
