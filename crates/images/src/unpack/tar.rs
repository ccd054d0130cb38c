//! Entries of a tar, with every allocation bounded.
//!
//! The tar crate reads the headers. The loop over them is ours: its own reads
//! long names and PAX records of any length into memory (CVE-2025-58183), and
//! unrolls sparse files, which no image builder writes and we refuse.

use std::io::Read;
use tar::{EntryType, Header};
use types::{Error, ErrorKind, Result, ResultExt};

const BLOCK: usize = 512;
/// The largest PAX header or long name, in bytes.
const META_MAX: u64 = 1 << 20;
/// How many headers may precede one entry.
const META_RUN: usize = 16;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Dir,
    Symlink,
    HardLink,
    Char,
    Block,
    Fifo,
}

/// One entry; its content follows through [`Reader`]'s `Read`.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub path: Vec<u8>,
    pub kind: Kind,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds since the epoch.
    pub mtime: (i64, u32),
    pub device: (u32, u32),
    pub size: u64,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads entries one after the other.
pub(crate) struct Reader<R> {
    inner: R,
    /// Content of the present entry that has not been read, in bytes.
    data: u64,
    /// What fills its last block.
    padding: u64,
}

/// What the headers before an entry say of it.
#[derive(Default)]
struct Meta {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

fn broken(why: impl Into<String>) -> Error {
    Error::invalid(format!("broken tar: {}", why.into()))
}

impl<R: Read> Reader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, data: 0, padding: 0 }
    }

    /// The reader beneath, for one who passes over content by seeking; the
    /// number of bytes up to the next header.
    pub(crate) fn beneath(&mut self) -> (&mut R, u64) {
        let skip = std::mem::take(&mut self.data).saturating_add(std::mem::take(&mut self.padding));
        (&mut self.inner, skip)
    }

    /// The next entry, or `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>> {
        let mut meta = Meta::default();
        for _ in 0..META_RUN {
            self.skip()?;
            let Some(header) = self.header()? else { return Ok(None) };
            let size = header.entry_size().map_err(|e| broken(e.to_string()))?;
            match header.entry_type() {
                EntryType::GNULongName => meta.path = Some(self.text(size)?),
                EntryType::GNULongLink => meta.link = Some(self.text(size)?),
                EntryType::XHeader => {
                    let records = self.meta(size)?;
                    self.pax(&records, &mut meta)?;
                }
                // Says something of the whole archive; nothing that we need.
                EntryType::XGlobalHeader => self.begin(size),
                EntryType::GNUSparse => return Err(broken("sparse files are not unpacked")),
                kind => return self.entry(&header, kind, size, meta).map(Some),
            }
        }
        Err(broken(format!("more than {META_RUN} headers before one entry")))
    }

    fn entry(&mut self, header: &Header, kind: EntryType, size: u64, meta: Meta) -> Result<Entry> {
        let path = meta.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let kind = match kind {
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => Kind::Dir,
            EntryType::Regular | EntryType::Continuous => Kind::File,
            EntryType::Directory => Kind::Dir,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Link => Kind::HardLink,
            EntryType::Char => Kind::Char,
            EntryType::Block => Kind::Block,
            EntryType::Fifo => Kind::Fifo,
            other => return Err(broken(format!("entries of type {:?} are not unpacked", other.as_byte() as char))),
        };
        // Only files have content, whatever the field says.
        let size = if kind == Kind::File { meta.size.unwrap_or(size) } else { 0 };
        self.begin(size);
        let field = |r: std::io::Result<u64>| r.map_err(|e| broken(e.to_string()));
        let id = |n: u64, what: &str| match u32::try_from(n) {
            // -1 means "leave it" to chown.
            Ok(n) if n != u32::MAX => Ok(n),
            _ => Err(broken(format!("{what} {n} is no 32-bit id"))),
        };
        let uid = if let Some(n) = meta.uid { n } else { field(header.uid())? };
        let gid = if let Some(n) = meta.gid { n } else { field(header.gid())? };
        let mtime = match meta.mtime {
            Some(t) => t,
            None => (i64::try_from(field(header.mtime())?).unwrap_or(0), 0),
        };
        let device = match kind {
            Kind::Char | Kind::Block => (
                header.device_major().map_err(|e| broken(e.to_string()))?.unwrap_or(0),
                header.device_minor().map_err(|e| broken(e.to_string()))?.unwrap_or(0),
            ),
            _ => (0, 0),
        };
        Ok(Entry {
            link: meta.link.or_else(|| header.link_name_bytes().map(|l| l.into_owned())).unwrap_or_default(),
            path,
            kind,
            mode: header.mode().map_err(|e| broken(e.to_string()))? & 0o7777,
            uid: id(uid, "uid")?,
            gid: id(gid, "gid")?,
            mtime,
            device,
            size,
            xattrs: meta.xattrs,
        })
    }

    fn begin(&mut self, size: u64) {
        self.data = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    /// Passes over what is left of the present entry.
    fn skip(&mut self) -> Result<()> {
        let left = self.data.saturating_add(self.padding);
        (self.data, self.padding) = (0, 0);
        let read = std::io::copy(&mut self.inner.by_ref().take(left), &mut std::io::sink())
            .context(|| "read the tar".into())?;
        if read < left { Err(broken("it ends in the middle of an entry")) } else { Ok(()) }
    }

    fn header(&mut self) -> Result<Option<Header>> {
        let mut header = Header::new_old();
        let mut filled = 0;
        while filled < BLOCK {
            let n = self.inner.read(&mut header.as_mut_bytes()[filled..]).context(|| "read the tar".into())?;
            if n == 0 && filled == 0 {
                // Some writers leave the end marker out.
                return Ok(None);
            }
            if n == 0 {
                return Err(broken("it ends in the middle of a header"));
            }
            filled += n;
        }
        let bytes = header.as_bytes();
        if bytes.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let sum: u32 =
            bytes[..148].iter().chain(&bytes[156..]).map(|b| u32::from(*b)).sum::<u32>() + 8 * u32::from(b' ');
        match header.cksum() {
            Ok(stored) if stored == sum => Ok(Some(header)),
            _ => Err(broken("a header's checksum is wrong")),
        }
    }

    /// The content of a header of headers.
    fn meta(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > META_MAX {
            return Err(Error::new(
                ErrorKind::ResourceExhausted,
                format!("a tar header of {size} bytes is over the bound of {META_MAX}"),
            ));
        }
        self.begin(size);
        let mut content = Vec::new();
        self.by_ref().read_to_end(&mut content).context(|| "read the tar".into())?;
        if content.len() as u64 == size { Ok(content) } else { Err(broken("it ends in the middle of a header")) }
    }

    fn text(&mut self, size: u64) -> Result<Vec<u8>> {
        let mut text = self.meta(size)?;
        let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
        text.truncate(end);
        Ok(text)
    }

    fn pax(&mut self, records: &[u8], meta: &mut Meta) -> Result<()> {
        const XATTR: &[u8] = b"SCHILY.xattr.";
        let mut rest = records;
        while !rest.is_empty() {
            let (key, value, after) = pax_record(rest).ok_or_else(|| broken("a PAX record is none"))?;
            rest = after;
            let number = || {
                let text = std::str::from_utf8(value).ok();
                text.and_then(|t| t.parse::<u64>().ok()).ok_or_else(|| broken("a PAX number is none"))
            };
            match key {
                b"path" => meta.path = Some(value.to_vec()),
                b"linkpath" => meta.link = Some(value.to_vec()),
                b"size" => meta.size = Some(number()?),
                b"uid" => meta.uid = Some(number()?),
                b"gid" => meta.gid = Some(number()?),
                b"mtime" => meta.mtime = Some(pax_time(value).ok_or_else(|| broken("a PAX time is none"))?),
                key if key.starts_with(b"GNU.sparse.") => return Err(broken("sparse files are not unpacked")),
                key => {
                    if let Some(name) = key.strip_prefix(XATTR) {
                        meta.xattrs.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Splits `LENGTH KEY=VALUE\n` off. The tar crate's own reader ends a record at
/// the first newline, which a binary value may contain.
fn pax_record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = records.iter().position(|b| *b == b' ')?;
    let length: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
    let record = records.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|b| *b == b'=')?;
    Some((&record[..equals], &record[equals + 1..], &records[length..]))
}

/// Reads `[-]seconds[.fraction]`.
fn pax_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanos: u32 = digits.parse().ok()?;
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = usize::try_from(self.data).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let n = self.inner.read(&mut buffer[..most])?;
        if n == 0 {
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the tar ends in the middle of a file"));
        }
        self.data -= n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::{Entry as Made, Layer};

    #[test]
    fn pax_times_have_signs_and_fractions() {
        assert_eq!(pax_time(b"12"), Some((12, 0)));
        assert_eq!(pax_time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(pax_time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(pax_time(b"1.1234567899"), Some((1, 123_456_789)));
        assert_eq!(pax_time(b"x"), None);
    }

    #[test]
    fn cve_2025_58183_huge_headers_and_sparse_files_are_refused_before_they_are_read() {
        for kind in [EntryType::XHeader, EntryType::GNULongName, EntryType::GNULongLink] {
            let mut header = Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(1 << 40);
            header.set_cksum();
            let e = Reader::new(header.as_bytes().as_slice()).next().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::ResourceExhausted, "{e}");
        }
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNUSparse);
        header.set_cksum();
        assert!(Reader::new(header.as_bytes().as_slice()).next().is_err());
        let mut sparse = Made::new("a", EntryType::Regular);
        sparse.pax.push(("GNU.sparse.major".into(), b"1".to_vec()));
        assert!(Reader::new(Layer::new().entry(sparse).tar().as_slice()).next().is_err());
    }

    #[test]
    fn endless_headers_before_an_entry_are_refused() {
        let mut global = Made::new("g", EntryType::XGlobalHeader);
        global.data = b"11 a=bcdef\n".to_vec();
        let layer = (0..100).fold(Layer::new(), |l, _| l.entry(global.clone()));
        assert!(Reader::new(layer.tar().as_slice()).next().is_err());
    }

    #[test]
    fn pax_overrides_the_header_and_content_is_passed_over() {
        let long = format!("{}/file", "d".repeat(200));
        let mut made = Made::new(&long, EntryType::Regular);
        made.data = b"content".to_vec();
        made.pax = vec![
            ("uid".into(), b"70000".to_vec()),
            ("mtime".into(), b"1.5".to_vec()),
            ("SCHILY.xattr.user.a".into(), b"b\n=c".to_vec()),
        ];
        let tar = Layer::new().entry(made).dir("next/", 0o750).tar();
        let mut reader = Reader::new(tar.as_slice());
        let first = reader.next().unwrap().unwrap();
        assert_eq!((first.path, first.uid, first.mtime), (long.into_bytes(), 70_000, (1, 500_000_000)));
        assert_eq!(first.xattrs, [(b"user.a".to_vec(), b"b\n=c".to_vec())]);
        let second = reader.next().unwrap().unwrap();
        assert_eq!((second.path.as_slice(), second.kind, second.mode), (b"next/".as_slice(), Kind::Dir, 0o750));
        assert!(reader.next().unwrap().is_none());
    }

    #[test]
    fn a_size_near_the_end_of_numbers_is_an_error() {
        let mut made = Made::new("a", EntryType::Regular);
        made.pax = vec![("size".into(), u64::MAX.to_string().into_bytes())];
        let tar = Layer::new().entry(made).tar();
        let mut reader = Reader::new(tar.as_slice());
        assert_eq!(reader.next().unwrap().unwrap().size, u64::MAX);
        assert!(reader.next().is_err());
    }

    proptest::proptest! {
        /// Whatever bytes come: entries or an error, never a panic.
        #[test]
        fn damaged_tars_never_panic(changes in proptest::collection::vec((0usize..6000, proptest::num::u8::ANY), 1..40)) {
            let mut made = Made::new(&"n".repeat(120), EntryType::Regular);
            made.data = vec![1; 700];
            made.pax = vec![("mtime".into(), b"1.5".to_vec()), ("SCHILY.xattr.user.a".into(), b"b".to_vec())];
            let mut tar = Layer::new().dir("d/", 0o755).entry(made).symlink("s", "t").hardlink("h", "d").tar();
            let length = tar.len();
            for (at, byte) in changes {
                tar[at % length] = byte;
            }
            // Headers whose checksum is wrong would hide what is behind them.
            for start in (0..length - 511).step_by(512) {
                let sum: u32 = (0..512).filter(|i| !(148..156).contains(i)).map(|i| u32::from(tar[start + i])).sum();
                tar[start + 148..start + 156].copy_from_slice(format!("{:06o}\0 ", sum + 256).as_bytes());
            }
            let mut reader = Reader::new(tar.as_slice());
            for _ in 0..length {
                if !matches!(reader.next(), Ok(Some(_))) {
                    break;
                }
            }
        }
    }

    #[test]
    fn a_cut_tar_is_an_error() {
        let tar = Layer::new().file("a", &[7; 2000], 0o644).tar();
        let mut reader = Reader::new(&tar[..1000]);
        reader.next().unwrap();
        assert!(reader.next().is_err());
        assert!(Reader::new(&tar[..100]).next().is_err());
    }
}
