//! Reading a log file to its end, and on while it grows, without polling: an
//! inotify watch on its folder tells of writes and of the rotation that renames the
//! file and makes a new one.

use super::format::Line;
use rustix::fs::inotify;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use types::{Error, Result, ResultExt};

/// How much is read before other tasks get their turn.
const CHUNK: usize = 64 << 10;

/// Where reading begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the first line.
    Beginning,
    /// With the last so many lines.
    Tail(usize),
}

/// Reads the lines of one log file.
pub struct Follower {
    path: PathBuf,
    file: Option<File>,
    /// The beginning of a line whose end is not written yet.
    rest: Vec<u8>,
    chunk: Vec<u8>,
}

impl Follower {
    /// Opens the log file; one that does not exist yet may come later.
    ///
    /// # Errors
    /// Those of opening and reading it.
    pub fn open(path: &Path, start: Start) -> Result<Self> {
        let mut follower = Self { path: path.to_path_buf(), file: None, rest: Vec::new(), chunk: vec![0; CHUNK] };
        follower.file = follower.open_file()?;
        if let (Some(file), Start::Tail(lines)) = (&mut follower.file, start) {
            let at = tail_offset(file, lines).context(|| format!("read {}", path.display()))?;
            file.seek(SeekFrom::Start(at)).context(|| format!("read {}", path.display()))?;
        }
        Ok(follower)
    }

    /// True when there is a file to read.
    pub fn exists(&self) -> bool {
        self.file.is_some()
    }

    fn open_file(&self) -> Result<Option<File>> {
        match File::open(&self.path) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).context(|| format!("open the log {}", self.path.display())),
        }
    }

    /// Reads one chunk and gives its whole lines to `sink`, then `None`, so that it
    /// may write them out at once; false at the end of what is there now, rotated
    /// files included.
    ///
    /// # Errors
    /// Those of reading, and the sink's.
    pub fn read(&mut self, sink: &mut impl FnMut(Option<&Line<'_>>) -> Result<()>) -> Result<bool> {
        let Some(file) = &mut self.file else {
            self.file = self.open_file()?;
            return Ok(self.file.is_some());
        };
        let n = file.read(&mut self.chunk).context(|| format!("read {}", self.path.display()))?;
        if n == 0 {
            return self.next_file();
        }
        self.rest.extend_from_slice(&self.chunk[..n]);
        let Some(end) = self.rest.iter().rposition(|b| *b == b'\n') else { return Ok(true) };
        for line in self.rest[..end].split(|b| *b == b'\n').filter_map(Line::parse) {
            sink(Some(&line))?;
        }
        sink(None)?;
        self.rest.drain(..=end);
        Ok(true)
    }

    /// At the end of a file: goes on with its successor if it was rotated away.
    fn next_file(&mut self) -> Result<bool> {
        let Some(new) = self.open_file()? else { return Ok(false) };
        let identity = |f: &File| f.metadata().map(|m| (m.dev(), m.ino())).ok();
        let (old_file, new_identity) = (self.file.as_mut(), identity(&new));
        if old_file.as_ref().and_then(|f| identity(f)) == new_identity {
            return Ok(false);
        }
        // The writer may have added to the old file after our last read and before
        // it opened the new one: read on there until it is empty once more.
        if let Some(old) = old_file {
            let at = old.stream_position().unwrap_or(0);
            if old.metadata().is_ok_and(|m| m.len() > at) {
                return Ok(true);
            }
        }
        self.rest.clear();
        self.file = Some(new);
        Ok(true)
    }

    /// Reads on as the file grows until `ended` is, then to the file's end.
    ///
    /// # Errors
    /// Those of watching and reading, and the sink's.
    pub async fn follow(
        mut self,
        ended: impl Future<Output = ()>,
        mut sink: impl FnMut(Option<&Line<'_>>) -> Result<()>,
    ) -> Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let watch = watch(folder)?;
        tokio::pin!(ended);
        let mut over = false;
        loop {
            while self.read(&mut sink)? {
                tokio::task::yield_now().await;
            }
            if over {
                return Ok(());
            }
            tokio::select! {
                () = &mut ended => over = true,
                changed = watch.readable() => {
                    let mut ready = changed.context(|| "wait for the log to grow".to_string())?;
                    let mut events = [0u8; 4096];
                    while let Ok(Ok(n)) = ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut events)?)) {
                        if n < events.len() / 2 {
                            break;
                        }
                    }
                }
            }
        }
    }
}

#[expect(deprecated, reason = "its successor is unsafe; an OwnedFd never exchanges its descriptor")]
fn watch(folder: &Path) -> Result<AsyncFd<OwnedFd>> {
    use inotify::{CreateFlags, WatchFlags};
    let what = || format!("watch {} for the log's growth", folder.display());
    let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).context(what)?;
    inotify::add_watch(&fd, folder, WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO).map_err(|e| {
        let error = Error::internal(what()).because(e);
        if e == rustix::io::Errno::NOSPC { error.hint("raise fs.inotify.max_user_watches") } else { error }
    })?;
    AsyncFd::with_interest(fd, Interest::READABLE).context(what)
}

/// The offset of the last `lines` whole lines (a line in pieces counts once),
/// found from the end of the file in blocks.
fn tail_offset(file: &mut File, lines: usize) -> std::io::Result<u64> {
    let mut end = file.seek(SeekFrom::End(0))?;
    if lines == 0 {
        return Ok(end);
    }
    // The bytes from `end` on that belong to a line whose beginning is not read yet.
    let mut carried: Vec<u8> = Vec::new();
    let mut seen = 0;
    while end > 0 {
        let size = end.min(CHUNK as u64);
        let mut block = vec![0; usize::try_from(size).unwrap_or(CHUNK)];
        file.seek(SeekFrom::Start(end - size))?;
        file.read_exact(&mut block)?;
        block.append(&mut carried);
        end -= size;
        let first = if end == 0 { 0 } else { block.iter().position(|b| *b == b'\n').map_or(block.len(), |i| i + 1) };
        let mut at = block.len();
        while at > first {
            let stop = if block[at - 1] == b'\n' { at - 1 } else { at };
            let begin = block[first..stop].iter().rposition(|b| *b == b'\n').map_or(first, |i| first + i + 1);
            if Line::parse(&block[begin..stop]).is_some_and(|l| !l.partial) {
                if seen == lines {
                    return Ok(end + at as u64);
                }
                seen += 1;
            }
            at = begin;
        }
        block.truncate(first);
        carried = block;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    fn read_all(path: &Path, start: Start) -> Vec<String> {
        let mut lines = Vec::new();
        let mut follower = Follower::open(path, start).unwrap();
        let mut sink = |l: Option<&Line<'_>>| {
            lines.extend(l.map(|l| String::from_utf8_lossy(l.text).into_owned()));
            Ok(())
        };
        while follower.read(&mut sink).unwrap() {}
        lines
    }

    #[test]
    fn tails_count_whole_lines_across_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut file = File::create(&path).unwrap();
        assert!(read_all(&path, Start::Tail(3)).is_empty());
        for i in 0..5000 {
            writeln!(file, "t stdout P {}", "x".repeat(100)).unwrap();
            writeln!(file, "t stdout F {i}").unwrap();
        }
        assert_eq!(read_all(&path, Start::Beginning).len(), 10_000);
        let two = read_all(&path, Start::Tail(2));
        assert_eq!(two.len(), 4, "two lines of two pieces each");
        assert_eq!((two[1].as_str(), two[3].as_str()), ("4998", "4999"));
        assert_eq!(read_all(&path, Start::Tail(3000)).len(), 6000);
        assert_eq!(read_all(&path, Start::Tail(5000)).len(), 10_000);
        assert_eq!(read_all(&path, Start::Tail(9999)).len(), 10_000);
        assert!(read_all(&path, Start::Tail(0)).is_empty());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn growth_and_rotation_are_followed_to_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let seen = Arc::new(Mutex::new(String::new()));
        let (ended, on_end) = tokio::sync::oneshot::channel::<()>();
        let sink = Arc::clone(&seen);
        let follower = Follower::open(&path, Start::Beginning).unwrap();
        assert!(!follower.exists());
        let task = tokio::spawn(follower.follow(
            async {
                let _ = on_end.await;
            },
            move |l| {
                sink.lock().unwrap().push_str(l.map_or("", |l| std::str::from_utf8(l.text).unwrap()));
                Ok(())
            },
        ));
        let until = async |want: &str| {
            for _ in 0..6000 {
                if *seen.lock().unwrap() == want {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            panic!("{:?} is not {want:?}", seen.lock().unwrap());
        };
        let mut file = File::create(&path).unwrap();
        write!(file, "t stdout F a\nt std").unwrap();
        until("a").await;
        writeln!(file, "out F b").unwrap();
        until("ab").await;
        std::fs::rename(&path, dir.path().join("0.log.1")).unwrap();
        writeln!(file, "t stdout F c").unwrap();
        until("abc").await;
        let mut file = File::create(&path).unwrap();
        writeln!(file, "t stdout F d").unwrap();
        until("abcd").await;
        writeln!(file, "t stdout F e").unwrap();
        ended.send(()).unwrap();
        task.await.unwrap().unwrap();
        assert_eq!(*seen.lock().unwrap(), "abcde");
    }
}
