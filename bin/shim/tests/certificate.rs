//! Init's death certificate: when it is on disk, and what a shim's death leaves of it.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::common::{Bundle, Shape, sh};
use harness::{BINARY, Io, Shim};
use std::time::{Duration, SystemTime};

#[tokio::test]
async fn it_is_on_disk_before_the_log_is_waited_for() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape { args: sh("head -c 300000 /dev/zero; exec sleep 1000"), ..Shape::default() });
    // A file that takes no more, and does not say so, until its reader goes.
    let full = b.path().join("full");
    stdio::fifo::make(&full).unwrap();
    let reader = stdio::fifo::open_reader(&full).unwrap();
    shim.create(&b, Io { stdout: &format!("file://{}", full.display()), ..Io::default() }).await.unwrap();
    shim.start_task(&b).await.unwrap();
    harness::until("a full log", || rustix::io::ioctl_fionread(&reader).unwrap() >= 65536).await;
    shim.kill(&b, "", 9).await.unwrap();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 137);
    let told = SystemTime::now();
    let written = b.path().join("exit.json").metadata().unwrap().modified().unwrap();
    let before = told.duration_since(written).unwrap();
    assert!(before > Duration::from_millis(200), "the log was waited for 250 ms, and it came {before:?} before");
    drop(reader);
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn a_second_delete_after_the_shim_s_death_tells_the_same() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    sys::pidfd::PidFd::open(shim.pid).unwrap().signal(types::Signal::KILL).unwrap();
    let delete = || {
        let mut command = std::process::Command::new(BINARY);
        command.args(["-namespace", "test", "-id", &b.id, "-bundle"]).arg(b.path()).arg("delete");
        let out = command.output().unwrap();
        assert!(out.status.success(), "{out:?}");
        shim::decode_delete(&out.stdout).unwrap()
    };
    let first = delete();
    assert_eq!(first.exit_status, 137);
    assert_eq!(delete().exited_at, first.exited_at);
}
