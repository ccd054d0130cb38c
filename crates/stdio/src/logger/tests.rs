//! What needs a look inside: signals that fail.

use super::*;
use std::path::Path;
use std::sync::Mutex;

fn sleeper(script: &str) -> Process {
    let pid = sys::spawn::spawn(Path::new("/bin/sh"), &["-c".into(), script.into()], &[], &[]).unwrap();
    Process::claim(pid, &|_| Ok(Box::new(()))).unwrap()
}

fn short() -> Bounds {
    let ms = Duration::from_millis;
    Bounds { ready: ms(300), end: ms(50), terminate: Duration::from_secs(30), kill: Duration::from_secs(5) }
}

#[tokio::test]
async fn if_sigterm_fails_sigkill_follows_at_once_and_both_are_told() {
    let process = sleeper("exec sleep 60");
    let sent = Mutex::new(Vec::new());
    let signal = |s: Signal| {
        sent.lock().unwrap().push(s.number());
        // The kill arrives, but says that it failed.
        let done = if s == Signal::KILL { process.signal(s) } else { Ok(()) };
        done.and(Err(Error::internal(format!("no {s}"))))
    };
    let begun = std::time::Instant::now();
    let (errors, reaped) = finish(&process, short(), signal).await;
    assert!(begun.elapsed() < Duration::from_secs(20), "SIGTERM's bound is not waited for");
    assert_eq!((sent.into_inner().unwrap(), reaped), (vec![15, 9], true));
    let text = Error::join("close", errors).unwrap_err().to_string();
    assert!(text.contains("no SIGTERM") && text.contains("no SIGKILL"), "{text}");
}

#[tokio::test]
async fn one_that_has_gone_meanwhile_is_no_error() {
    let process = sleeper("exec sleep 0.2");
    let (errors, reaped) = finish(&process, short(), |_| Err(Error::not_found("gone"))).await;
    assert!(errors.is_empty() && reaped, "{errors:?}");
}

#[tokio::test]
async fn a_child_that_can_t_be_claimed_is_killed_and_reaped() {
    let pid = sys::spawn::spawn(Path::new("/bin/sleep"), &["60".into()], &[], &[]).unwrap();
    let e = Process::claim(pid, &|_| Err(Error::internal("no room"))).err().unwrap();
    assert!(e.to_string().contains("no room"), "{e}");
    assert_eq!(sys::pidfd::peek_child(pid).unwrap(), sys::pidfd::Waited::NotOurs);
}

#[tokio::test]
async fn a_failed_start_says_how_it_ended_too() {
    let process = sleeper("exit 3");
    while sys::pidfd::peek_child(process.pid()).unwrap() == sys::pidfd::Waited::Running {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let e = undo(process, Error::precondition("not ready"), Duration::from_secs(5)).await;
    assert_eq!(e.to_string(), "not ready; it exited with 3");
    let e = undo(sleeper("exec sleep 60"), Error::precondition("not ready"), Duration::from_secs(5)).await;
    assert_eq!(e.to_string(), "not ready");
}
