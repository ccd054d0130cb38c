//! The single-threaded helper that makes a pod's user namespace, and the
//! namespaces that belong to it.
//!
//! The daemon starts its own binary again with [`ARGUMENT`]; a stream socket is
//! the helper's stdin. Each message on it is its length (4 bytes, little-endian)
//! and its fields, each with its own length:
//!
//! ```text
//! helper  "unshared"                        it is in its user namespace, unmapped
//! daemon  flags, hostname, key, value, …    the maps are written; make these
//! helper  "done", index, …                  all is made; these sysctls were denied
//! helper  "failed", kind, text              at any time; it ends
//! ```
//!
//! The helper lives until its socket ends, so that a daemon that dies leaves none.

use crate::namespace::{Kind, ThisThread, Wanted, furnish, inside, is_of_an_interface, write_sysctl};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;
use types::{Error, ErrorKind, Result, ResultExt};

/// The hidden first argument that makes our binary the helper.
pub const ARGUMENT: &str = "ns-helper";

/// How long the daemon waits for each answer of the helper.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest message in bytes: a few hundred sysctls.
const LONGEST: usize = 1 << 20;

/// How the helper is started.
#[derive(Debug, Clone)]
pub struct HelperCommand {
    /// The binary.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

impl HelperCommand {
    /// The running binary, even where it has been replaced on disk, with
    /// [`ARGUMENT`]. Its `main` must call [`run_if_asked`] before anything else.
    pub fn this_binary() -> Self {
        Self { program: "/proc/self/exe".into(), args: vec![ARGUMENT.into()] }
    }
}

/// A range of ids of a user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The first id as seen inside.
    pub inside: u32,
    /// The first id as seen on the node.
    pub outside: u32,
    /// How many ids.
    pub length: u32,
}

/// To be called at the very top of `main`: runs the helper where that is what
/// this process was started for, and gives the code to exit with.
pub fn run_if_asked() -> Option<ExitCode> {
    (std::env::args_os().nth(1)? == ARGUMENT).then(helper_main)
}

/// The helper: talks to the daemon on stdin until that ends.
pub fn helper_main() -> ExitCode {
    let socket = match std::io::stdin().as_fd().try_clone_to_owned() {
        Ok(fd) => UnixStream::from(fd),
        Err(_) => return ExitCode::FAILURE,
    };
    if let Err(e) = serve(&socket) {
        // A daemon that is gone can't be told, and needn't.
        let _ = send(&socket, &[b"failed", kind_name(e.kind()).as_bytes(), e.to_string().as_bytes()]);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn serve(socket: &UnixStream) -> Result<()> {
    let thread = ThisThread::of_a_process_that_ends();
    thread.unshare(&[Kind::User])?;
    send(socket, &[b"unshared"])?;
    let Some(request) = receive(socket)? else { return Ok(()) };
    let wanted = decode(&request)?;
    let root = "become root of the user namespace";
    set_thread_res_gid(rustix::fs::Gid::ROOT, rustix::fs::Gid::ROOT, rustix::fs::Gid::ROOT).context(|| root.into())?;
    set_thread_res_uid(rustix::fs::Uid::ROOT, rustix::fs::Uid::ROOT, rustix::fs::Uid::ROOT).context(|| root.into())?;
    set_thread_groups(&[]).context(|| root.into())?;
    thread.unshare(&wanted.kinds())?;
    furnish(&wanted)?;
    let mut reply = vec![b"done".to_vec()];
    for (index, (key, value)) in wanted.sysctls.iter().enumerate() {
        if is_of_an_interface(key) {
            continue;
        }
        match write_sysctl(key, value) {
            // Before Linux 6.10 the ipc sysctls were the node's root's to write.
            Err(e) if e.kind() == ErrorKind::PermissionDenied => reply.push(index.to_string().into_bytes()),
            other => other?,
        }
    }
    send(socket, &reply)?;
    // Until the daemon has pinned the namespaces.
    receive(socket).map(|_| ())
}

/// A started helper; dropping it ends and reaps it.
struct Helper {
    child: Child,
    socket: UnixStream,
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It fails only where the child has ended, and then `wait` reaps it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Helper {
    fn start(command: &HelperCommand) -> Result<Self> {
        let what = || format!("start the namespace helper {}", command.program.display());
        let (socket, theirs) = UnixStream::pair().context(what)?;
        socket.set_read_timeout(Some(PATIENCE)).context(what)?;
        socket.set_write_timeout(Some(PATIENCE)).context(what)?;
        let child = Command::new(&command.program)
            .arg0("longshore")
            .args(&command.args)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .context(what)?;
        Ok(Self { child, socket })
    }

    /// The next message, which must begin with `word`.
    fn expect(&self, word: &str) -> Result<Vec<Vec<u8>>> {
        let text = |field: Option<&Vec<u8>>| String::from_utf8_lossy(field.map_or(&[], Vec::as_slice)).into_owned();
        let message = receive(&self.socket)?
            .ok_or_else(|| Error::internal("the namespace helper ended early").hint("its stderr is the daemon's"))?;
        match text(message.first()) {
            first if first == word => Ok(message),
            first if first == "failed" => Err(Error::new(kind_of(&text(message.get(1))), text(message.get(2)))),
            first => Err(Error::internal(format!("the namespace helper said {first:?} instead of {word:?}"))),
        }
    }

    fn write_map(&self, file: &str, ranges: &[IdRange]) -> Result<()> {
        let path = format!("/proc/{}/{file}", self.child.id());
        let mut text = String::new();
        for r in ranges {
            let _ = writeln!(text, "{} {} {}", r.inside, r.outside, r.length);
        }
        // The kernel takes a map in one write, once.
        std::fs::write(&path, &text)
            .context(|| format!("map the user namespace: write {:?} to {path}", text.trim_end()))
            .map_err(|e| e.hint("container ids must not overlap, and at most 340 ranges are possible"))
    }
}

/// Makes a user namespace with these maps, and the wanted namespaces inside it.
/// `pin` and `mark` are as in [`crate::namespace::make`].
///
/// # Errors
/// As [`crate::namespace::make`]; `InvalidArgument` for maps that the kernel
/// refuses, `DeadlineExceeded` when the helper says nothing for 10 s.
pub fn make_in_user_namespace<T>(
    command: &HelperCommand,
    uids: &[IdRange],
    gids: &[IdRange],
    wanted: &Wanted,
    mark: &mut dyn FnMut(&'static str),
    pin: impl FnOnce(&Path) -> Result<T>,
) -> Result<T> {
    wanted.check()?;
    let helper = Helper::start(command)?;
    helper.expect("unshared")?;
    mark("helper");
    helper.write_map("uid_map", uids)?;
    helper.write_map("gid_map", gids)?;
    mark("map");
    send(&helper.socket, &encode(wanted))?;
    let done = helper.expect("done")?;
    mark("furnish");
    let links = PathBuf::from(format!("/proc/{}/ns", helper.child.id()));
    write_denied(wanted, &done[1..], &links)?;
    let pinned = pin(&links)?;
    mark("pin");
    Ok(pinned)
}

/// Writes as the node's root what the pod's root was denied.
fn write_denied(wanted: &Wanted, denied: &[Vec<u8>], links: &Path) -> Result<()> {
    if denied.is_empty() {
        return Ok(());
    }
    let names: Vec<(Kind, PathBuf)> = wanted.kinds().into_iter().map(|k| (k, links.join(k.name()))).collect();
    let paths: Vec<(Kind, &Path)> = names.iter().map(|(k, p)| (*k, p.as_path())).collect();
    inside(&paths, |_| {
        for index in denied {
            let index: Option<usize> = std::str::from_utf8(index).ok().and_then(|t| t.parse().ok());
            let (key, value) = index
                .and_then(|i| wanted.sysctls.get(i))
                .ok_or_else(|| Error::internal("the namespace helper named a sysctl that it wasn't given"))?;
            write_sysctl(key, value)?;
        }
        Ok(())
    })
}

fn encode(wanted: &Wanted) -> Vec<Vec<u8>> {
    let flag = |on: bool, letter: u8| if on { letter } else { b'-' };
    let mut fields = vec![
        vec![flag(wanted.net, b'n'), flag(wanted.ipc, b'i'), flag(wanted.uts, b'u')],
        wanted.hostname.clone().unwrap_or_default().into_bytes(),
    ];
    for (key, value) in &wanted.sysctls {
        fields.push(key.clone().into_bytes());
        fields.push(value.clone().into_bytes());
    }
    fields
}

fn decode(fields: &[Vec<u8>]) -> Result<Wanted> {
    let bad = || Error::internal("a message to the namespace helper makes no sense");
    let text = |field: &Vec<u8>| String::from_utf8(field.clone()).map_err(|_| bad());
    let [flags, hostname, sysctls @ ..] = fields else { return Err(bad()) };
    let (pairs, rest) = sysctls.as_chunks::<2>();
    if flags.len() != 3 || !rest.is_empty() {
        return Err(bad());
    }
    Ok(Wanted {
        net: flags[0] == b'n',
        ipc: flags[1] == b'i',
        uts: flags[2] == b'u',
        hostname: Some(text(hostname)?).filter(|h| !h.is_empty()),
        sysctls: pairs.iter().map(|[k, v]| Ok((text(k)?, text(v)?))).collect::<Result<_>>()?,
    })
}

fn send<F: AsRef<[u8]>>(mut socket: &UnixStream, fields: &[F]) -> Result<()> {
    let what = || "talk to the namespace helper".to_owned();
    let mut body = Vec::new();
    for field in fields {
        let field = field.as_ref();
        body.extend_from_slice(&u32::try_from(field.len()).context(what)?.to_le_bytes());
        body.extend_from_slice(field);
    }
    if body.len() > LONGEST {
        return Err(Error::invalid(format!("the sysctls are longer than {LONGEST} bytes in all")));
    }
    let mut message = u32::try_from(body.len()).context(what)?.to_le_bytes().to_vec();
    message.append(&mut body);
    socket.write_all(&message).context(what)
}

/// The next message; `None` at the end of the stream.
fn receive(mut socket: &UnixStream) -> Result<Option<Vec<Vec<u8>>>> {
    let what = || "hear from the namespace helper".to_owned();
    let mut length = [0u8; 4];
    match socket.read_exact(&mut length) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
            return Err(Error::deadline(format!("the namespace helper said nothing for {} s", PATIENCE.as_secs())));
        }
        Err(e) => return Err(e).context(what),
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST {
        return Err(Error::internal(what()).because("its message is too long"));
    }
    let mut body = vec![0; length];
    socket.read_exact(&mut body).context(what)?;
    let (mut fields, mut rest) = (Vec::new(), body.as_slice());
    while let Some((head, tail)) = rest.split_first_chunk::<4>() {
        let (field, next) = tail
            .split_at_checked(u32::from_le_bytes(*head) as usize)
            .ok_or_else(|| Error::internal(what()).because("its message is cut off"))?;
        fields.push(field.to_vec());
        rest = next;
    }
    Ok(Some(fields))
}

/// The kinds that cross the socket; the others are `Internal`.
const KINDS: [(ErrorKind, &str); 4] = [
    (ErrorKind::InvalidArgument, "invalid"),
    (ErrorKind::ResourceExhausted, "exhausted"),
    (ErrorKind::PermissionDenied, "denied"),
    (ErrorKind::NotFound, "not found"),
];

fn kind_name(kind: ErrorKind) -> &'static str {
    KINDS.iter().find(|(k, _)| *k == kind).map_or("internal", |(_, name)| name)
}

fn kind_of(name: &str) -> ErrorKind {
    KINDS.iter().find(|(_, n)| *n == name).map_or(ErrorKind::Internal, |(kind, _)| *kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_survives_the_socket() {
        let wanted = Wanted {
            net: true,
            uts: true,
            hostname: Some("pod".into()),
            sysctls: vec![("net.x".into(), "1 2\t3".into()), ("kernel.sem".into(), String::new())],
            ..Wanted::default()
        };
        let (a, b) = UnixStream::pair().unwrap();
        send(&a, &encode(&wanted)).unwrap();
        assert_eq!(decode(&receive(&b).unwrap().unwrap()).unwrap(), wanted);
        drop(a);
        assert!(receive(&b).unwrap().is_none());
        assert!(decode(&[]).is_err() && decode(&vec![b"ni-".to_vec(); 3]).is_err());
    }

    #[test]
    fn a_cut_or_oversized_message_is_an_error() {
        for bytes in [&[1, 0, 0, 0][..], &[8, 0, 0, 0, 9, 0, 0, 0, 1, 1, 1, 1][..], &[255, 255, 255, 255][..]] {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(bytes).unwrap();
            drop(a);
            assert!(receive(&b).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn what_the_pods_root_was_denied_the_nodes_root_writes() {
        let sysctls = vec![("kernel.sem".into(), "1 2 3 4".into()), ("kernel.msgmax".into(), "1234".into())];
        let later = Wanted { ipc: true, sysctls, ..Wanted::default() };
        let now = Wanted { ipc: true, ..Wanted::default() };
        let read = |file| std::fs::read_to_string(format!("/proc/sys/kernel/{file}")).unwrap();
        let of_node = (read("sem"), read("msgmax"));
        let seen = crate::namespace::make(&now, &mut |_| {}, |links| {
            let sem = read("sem");
            write_denied(&later, &[b"1".to_vec()], links)?;
            assert_eq!(read("sem"), sem, "only what was denied is written");
            assert!(write_denied(&later, &[b"2".to_vec()], links).is_err());
            Ok(read("msgmax"))
        })
        .unwrap();
        assert_eq!(seen.trim(), "1234");
        assert_eq!((read("sem"), read("msgmax")), of_node);
    }
}
