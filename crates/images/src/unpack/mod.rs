//! From a layer's blob to a directory.
//!
//! ```text
//! blob ─▶ hash (its own digest) ─▶ gzip | zstd | as it is ─▶ hash (diff id)
//!      ─▶ tar entries, bounded ─▶ files, all resolved inside the layer's directory
//! ```

mod extract;
mod tar;

pub(crate) use tar::{Entry, Kind, Reader};

use crate::{Digest, Hasher};
use snapshots::Draft;
use std::io::{BufReader, Read};
use types::{Error, Result, ResultExt};

const BUFFER: usize = 128 << 10;

/// Unpacks `blob` into `draft` and checks its digests.
///
/// `digest` is that of the blob as it travelled, where it is not known to be
/// right already. Blocks.
pub(crate) fn unpack(
    blob: impl Read + 'static,
    digest: Option<&Digest>,
    diff_id: &Digest,
    draft: &Draft,
) -> Result<()> {
    let what = || format!("unpack layer {diff_id}");
    let mut outer = Hashing::new(blob, digest.map(Digest::hasher));
    {
        let plain = decompress(Box::new(&mut outer)).map_err(|e| e.within(what()))?;
        let mut inner = Hashing::new(plain, Some(diff_id.hasher()));
        extract::extract(&mut inner, &draft.path, &draft.parents).map_err(|e| e.within(what()))?;
        // What follows the tar's end belongs to the digest too.
        drain(&mut inner).context(what)?;
        if let Some(computed) = inner.finish() {
            diff_id.verify(&computed, "the unpacked layer").map_err(|e| e.within(what()))?;
        }
    }
    drain(&mut outer).context(what)?;
    match (digest, outer.finish()) {
        (Some(digest), Some(computed)) => digest.verify(&computed, "the layer").map_err(|e| e.within(what())),
        _ => Ok(()),
    }
}

fn drain(reader: &mut impl Read) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    while reader.read(&mut buffer)? > 0 {}
    Ok(())
}

/// Undoes a compression that the first bytes show; media types are often wrong.
pub(crate) fn decompress<'a>(raw: Box<dyn Read + 'a>) -> Result<Box<dyn Read + 'a>> {
    let mut raw = raw;
    let mut head = Vec::with_capacity(6);
    raw.by_ref().take(6).read_to_end(&mut head).context(|| "read the layer's first bytes".into())?;
    let kind = head.clone();
    let whole = BufReader::with_capacity(BUFFER, std::io::Cursor::new(head).chain(raw));
    match kind.as_slice() {
        // A layer may be many gzip members one after the other.
        [0x1f, 0x8b, ..] => Ok(Box::new(flate2::bufread::MultiGzDecoder::new(whole))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let decoder = zstd::stream::read::Decoder::with_buffer(whole).context(|| "start zstd".into())?;
            Ok(Box::new(decoder))
        }
        [b'B', b'Z', b'h', ..] => Err(unsupported("bzip2")),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Err(unsupported("xz")),
        _ => Ok(Box::new(whole)),
    }
}

fn unsupported(what: &str) -> Error {
    Error::invalid(format!("{what} compression is none of those that layers may have: none, gzip, zstd"))
}

/// Computes a digest of what is read through it.
struct Hashing<R> {
    inner: R,
    hasher: Option<Hasher>,
}

impl<R: Read> Hashing<R> {
    fn new(inner: R, hasher: Option<Hasher>) -> Self {
        Self { inner, hasher }
    }

    fn finish(self) -> Option<Digest> {
        self.hasher.map(Hasher::finish)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..n]);
        }
        Ok(n)
    }
}
