//! Some gRPC clients on unix sockets send the socket's path as `:authority`, plain
//! or percent-encoded; the HTTP library below tonic refuses both with
//! PROTOCOL_ERROR. This filter on the byte stream makes such a value harmless.
//!
//! ```text
//!  socket ──► frames ──► HEADERS + CONTINUATIONs, held until END_HEADERS
//!                           └─► literals named by HPACK's static index 1
//!                                  '%' and '/' become '-' in place
//! ```
//!
//! In HPACK's Huffman code all three characters have 6 bits, so that no length
//! changes; and as literals enter the peer's dynamic table with the size that they
//! have here, no table changes either. The filter keeps no HPACK state.

use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// A header block larger than this is passed on unread: the HTTP library has its
/// own limit below it, and answers as it sees fit.
const MOST_HELD: usize = 128 << 10;

/// The canonical code of HPACK's Huffman table: for each length in bits, the first
/// code and how many there are (RFC 7541, appendix B).
const CODES: [(u32, u32, u32); 21] = [
    (5, 0x0, 10),
    (6, 0x14, 26),
    (7, 0x5c, 32),
    (8, 0xf8, 6),
    (10, 0x3f8, 5),
    (11, 0x7fa, 3),
    (12, 0xffa, 2),
    (13, 0x1ff8, 6),
    (14, 0x3ffc, 2),
    (15, 0x7ffc, 3),
    (19, 0x7fff0, 3),
    (20, 0xfffe6, 8),
    (21, 0x1fffdc, 13),
    (22, 0x3fffd2, 26),
    (23, 0x7fffd8, 29),
    (24, 0xffffea, 12),
    (25, 0x1ffffec, 4),
    (26, 0x3ffffe0, 15),
    (27, 0x7ffffde, 19),
    (28, 0xfffffe2, 29),
    (30, 0x3ffffffc, 4),
];
const PERCENT: u32 = 0x15;
const SLASH: u32 = 0x18;
const DASH: u32 = 0x16;

/// Where the reader is in the connection's frames.
enum At {
    /// So many bytes of the preface, or of a frame that is passed on, are to come.
    Passing(usize),
    /// In a frame's header.
    Header(Vec<u8>),
    /// In a header block: whole frames so far, and what the present one lacks.
    Block { held: Vec<u8>, fragments: Vec<std::ops::Range<usize>>, missing: usize, last: bool },
    /// A block was too large: nothing is read any more.
    Blind,
}

/// The filter over a byte stream, without the stream.
struct Filter {
    at: At,
}

impl Filter {
    fn new() -> Self {
        Self { at: At::Passing(PREFACE) }
    }

    /// Takes what came from the peer and appends what goes to the HTTP library.
    fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) {
        while !input.is_empty() {
            match &mut self.at {
                At::Blind => {
                    out.extend_from_slice(input);
                    return;
                }
                At::Passing(left) => {
                    let n = input.len().min(*left);
                    out.extend_from_slice(&input[..n]);
                    input = &input[n..];
                    *left -= n;
                    if *left == 0 {
                        self.at = At::Header(Vec::with_capacity(FRAME_HEADER));
                    }
                }
                At::Header(header) => {
                    let n = input.len().min(FRAME_HEADER - header.len());
                    header.extend_from_slice(&input[..n]);
                    input = &input[n..];
                    if header.len() == FRAME_HEADER {
                        let header = std::mem::take(header);
                        self.frame(&header, out);
                    }
                }
                At::Block { held, missing, .. } => {
                    let n = input.len().min(*missing);
                    held.extend_from_slice(&input[..n]);
                    input = &input[n..];
                    *missing -= n;
                    if *missing == 0 {
                        self.frame_complete(out);
                    }
                }
            }
        }
    }

    /// Begins a frame whose nine bytes of header are there.
    fn frame(&mut self, header: &[u8], out: &mut Vec<u8>) {
        let length = usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
        let (kind, flags) = (header[3], header[4]);
        if kind != HEADERS {
            out.extend_from_slice(header);
            self.at = if length == 0 { At::Header(Vec::new()) } else { At::Passing(length) };
            return;
        }
        if FRAME_HEADER + length > MOST_HELD {
            out.extend_from_slice(header);
            self.at = At::Blind;
            return;
        }
        self.at =
            At::Block { held: header.to_vec(), fragments: Vec::new(), missing: length, last: flags & END_HEADERS != 0 };
        if length == 0 {
            self.frame_complete(out);
        }
    }

    /// The frame at the end of `held` is whole: notes its fragment, and either
    /// rewrites the block or begins the next CONTINUATION, whose header is read here.
    fn frame_complete(&mut self, out: &mut Vec<u8>) {
        let At::Block { held, fragments, missing, last } = &mut self.at else { return };
        let start = fragments.last().map_or(0, |f| next_frame(held, f));
        if held.len() - start < FRAME_HEADER {
            // The header of a CONTINUATION came in as "missing" bytes.
            return;
        }
        let header: [u8; FRAME_HEADER] = std::array::from_fn(|i| held[start + i]);
        let length = usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
        let whole = start + FRAME_HEADER + length;
        if held.len() < whole {
            let foreign = !fragments.is_empty() && header[3] != CONTINUATION;
            if foreign || whole > MOST_HELD {
                out.append(held);
                self.at = At::Blind;
                return;
            }
            *last = header[4] & END_HEADERS != 0;
            *missing = whole - held.len();
            return;
        }
        if !fragments.is_empty() {
            *last = header[4] & END_HEADERS != 0;
        }
        fragments.push(fragment(held, start, whole, &header));
        if *last {
            rewrite(held, fragments);
            out.append(held);
            self.at = At::Header(Vec::new());
        } else {
            *missing = FRAME_HEADER;
        }
    }
}

/// Where the frame after the one with this fragment begins.
fn next_frame(held: &[u8], fragment: &std::ops::Range<usize>) -> usize {
    // The padding, if any, lies between the fragment's end and the next frame;
    // frames are contiguous, so walk them.
    let mut at = 0;
    loop {
        let length = usize::from(held[at]) << 16 | usize::from(held[at + 1]) << 8 | usize::from(held[at + 2]);
        let end = at + FRAME_HEADER + length;
        if end >= fragment.end {
            return end;
        }
        at = end;
    }
}

/// The part of a whole frame that belongs to the header block; empty where the
/// frame is ill-formed, which the HTTP library will find out itself.
fn fragment(held: &[u8], start: usize, end: usize, header: &[u8; FRAME_HEADER]) -> std::ops::Range<usize> {
    let (mut from, mut to) = (start + FRAME_HEADER, end);
    if header[3] == HEADERS {
        if header[4] & PADDED != 0 && from < to {
            to = to.saturating_sub(usize::from(held[from]));
            from += 1;
        }
        if header[4] & PRIORITY != 0 {
            from += 5;
        }
    }
    if from <= to { from..to } else { end..end }
}

/// Rewrites the authority in a whole block that may lie in several frames.
fn rewrite(held: &mut [u8], fragments: &[std::ops::Range<usize>]) {
    let mut block: Vec<u8> = fragments.iter().flat_map(|f| held[f.clone()].iter().copied()).collect();
    if rewrite_block(&mut block).is_none() {
        return; // ill-formed: left as it came
    }
    let mut from = 0;
    for f in fragments {
        held[f.clone()].copy_from_slice(&block[from..from + f.len()]);
        from += f.len();
    }
}

/// Walks a header block's representations (RFC 7541, section 6); `None` where it
/// is ill-formed.
fn rewrite_block(block: &mut [u8]) -> Option<()> {
    let mut at = 0;
    while at < block.len() {
        let first = block[at];
        if first & 0x80 != 0 {
            integer(block, &mut at, 7)?; // indexed
        } else if first & 0xe0 == 0x20 {
            integer(block, &mut at, 5)?; // dynamic table size update
        } else {
            let bits = if first & 0x40 != 0 { 6 } else { 4 };
            let index = integer(block, &mut at, bits)?;
            if index == 0 {
                string(block, &mut at)?;
            }
            let (range, huffman) = string(block, &mut at)?;
            if index == 1 {
                let value = &mut block[range];
                if huffman { dash_huffman(value) } else { dash_plain(value) }
            }
        }
    }
    Some(())
}

/// An integer with a prefix of `bits` (RFC 7541, section 5.1).
fn integer(block: &[u8], at: &mut usize, bits: u32) -> Option<usize> {
    let mask = (1usize << bits) - 1;
    let mut value = usize::from(*block.get(*at)?) & mask;
    *at += 1;
    if value < mask {
        return Some(value);
    }
    for shift in (0..28).step_by(7) {
        let byte = *block.get(*at)?;
        *at += 1;
        value += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// A string's bytes and whether they are Huffman-coded.
fn string(block: &[u8], at: &mut usize) -> Option<(std::ops::Range<usize>, bool)> {
    let huffman = *block.get(*at)? & 0x80 != 0;
    let length = integer(block, at, 7)?;
    let range = *at..at.checked_add(length)?;
    if range.end > block.len() {
        return None;
    }
    *at = range.end;
    Some((range, huffman))
}

fn dash_plain(value: &mut [u8]) {
    for byte in value {
        if matches!(byte, b'%' | b'/') {
            *byte = b'-';
        }
    }
}

fn dash_huffman(value: &mut [u8]) {
    let total = value.len() * 8;
    let bit = |value: &[u8], i: usize| u32::from(value[i / 8] >> (7 - i % 8) & 1);
    let mut start = 0;
    'symbols: while start < total {
        let mut code = 0;
        let mut length = 0;
        for &(bits, first, count) in &CODES {
            while length < bits {
                let i = start + length as usize;
                if i >= total {
                    return; // the padding at the end
                }
                code = code << 1 | bit(value, i);
                length += 1;
            }
            if code >= first && code - first < count {
                if bits == 6 && (code == PERCENT || code == SLASH) {
                    for k in 0..6 {
                        let i = start + k;
                        let mask = 1u8 << (7 - i % 8);
                        if DASH >> (5 - k) & 1 == 1 { value[i / 8] |= mask } else { value[i / 8] &= !mask }
                    }
                }
                start += bits as usize;
                continue 'symbols;
            }
        }
        return; // EOS or no code: ill-formed
    }
}

/// A connection whose `:authority` may be a path.
pub struct LenientAuthority<S> {
    inner: S,
    filter: Filter,
    ready: Vec<u8>,
    given: usize,
}

impl<S> LenientAuthority<S> {
    /// Filters what is read from `inner`.
    pub fn new(inner: S) -> Self {
        Self { inner, filter: Filter::new(), ready: Vec::new(), given: 0 }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for LenientAuthority<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.given < this.ready.len() {
                let n = buf.remaining().min(this.ready.len() - this.given);
                buf.put_slice(&this.ready[this.given..this.given + n]);
                this.given += n;
                return Poll::Ready(Ok(()));
            }
            this.ready.clear();
            this.given = 0;
            let mut chunk = [0u8; 8192];
            let mut chunk = ReadBuf::new(&mut chunk);
            match Pin::new(&mut this.inner).poll_read(cx, &mut chunk) {
                Poll::Ready(Ok(())) if chunk.filled().is_empty() => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(())) => this.filter.feed(chunk.filled(), &mut this.ready),
                other => return other,
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LenientAuthority<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

impl<S> Connected for LenientAuthority<S> {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let n = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut f = vec![n[1], n[2], n[3], kind, flags, 0, 0, 0, 1];
        f.extend_from_slice(payload);
        f
    }

    fn run(bytes: &[u8], step: usize) -> Vec<u8> {
        let mut filter = Filter::new();
        let mut out = Vec::new();
        for chunk in bytes.chunks(step) {
            filter.feed(chunk, &mut out);
        }
        out
    }

    fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut all = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        all.extend(frames.iter().flatten());
        all
    }

    /// `:method POST` indexed, then `:authority` as a plain literal, then a custom
    /// header whose slashes must stay.
    fn block(authority: &[u8], huffman: bool) -> Vec<u8> {
        let mut b = vec![0x83, 0x41, u8::try_from(authority.len()).unwrap() | if huffman { 0x80 } else { 0 }];
        b.extend_from_slice(authority);
        b.extend_from_slice(b"\x00\x01x\x03a/b");
        b
    }

    #[test]
    fn a_path_as_authority_becomes_dashes_in_every_split() {
        let frames = [frame(4, 0, &[]), frame(1, END_HEADERS, &block(b"%2Frun%2Fx", false)), frame(0, 1, b"da/ta%")];
        let wanted =
            connection(&[frames[0].clone(), frame(1, END_HEADERS, &block(b"-2Frun-2Fx", false)), frames[2].clone()]);
        let input = connection(&frames);
        for step in 1..=input.len() {
            assert_eq!(run(&input, step), wanted, "split every {step}");
        }
    }

    #[test]
    fn huffman_coded_values_are_rewritten_by_symbol() {
        // "/run/a%2F-": each 6-bit code of '/', '%' must become that of '-'.
        let code = |c: u8| -> (u32, u32) {
            match c {
                b'/' => (0x18, 6),
                b'r' => (0x2c, 6),
                b'u' => (0x2d, 6),
                b'n' => (0x2a, 6),
                b'a' => (0x3, 5),
                b'%' => (0x15, 6),
                b'2' => (0x2, 5),
                b'F' => (0x61, 7),
                b'-' => (0x16, 6),
                _ => unreachable!(),
            }
        };
        let encode = |text: &[u8]| -> Vec<u8> {
            let mut bits = String::new();
            for &c in text {
                let (v, n) = code(c);
                bits += &format!("{v:0w$b}", w = n as usize);
            }
            while !bits.len().is_multiple_of(8) {
                bits.push('1');
            }
            bits.as_bytes().chunks(8).map(|b| u8::from_str_radix(std::str::from_utf8(b).unwrap(), 2).unwrap()).collect()
        };
        let input = connection(&[frame(1, END_HEADERS, &block(&encode(b"/run/a%2F-"), true))]);
        let wanted = connection(&[frame(1, END_HEADERS, &block(&encode(b"-run-a-2F-"), true))]);
        for step in [1, 2, 3, 7, 4096] {
            assert_eq!(run(&input, step), wanted);
        }
    }

    #[test]
    fn a_block_may_go_on_in_continuations_with_padding_and_priority() {
        let b = block(b"/run/longshore.sock", false);
        let w = block(b"-run-longshore.sock", false);
        for cut in 1..b.len() - 1 {
            let build = |b: &[u8]| {
                let mut first = vec![3, 0, 0, 0, 0, 16]; // pad length, priority
                first.extend_from_slice(&b[..cut]);
                first.extend_from_slice(&[0, 0, 0]);
                connection(&[
                    frame(1, PADDED | PRIORITY, &first),
                    frame(9, 0, &b[cut..cut + 1]),
                    frame(9, END_HEADERS, &b[cut + 1..]),
                    frame(0, 1, b"x/y"),
                ])
            };
            for step in [1, 5, 4096] {
                assert_eq!(run(&build(&b), step), build(&w), "cut {cut} step {step}");
            }
        }
    }

    #[test]
    fn ill_formed_blocks_pass_as_they_came() {
        for payload in [&[0x41u8, 0x20, b'/'][..], &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff], &[]] {
            let input = connection(&[frame(1, END_HEADERS, payload), frame(0, 0, b"rest")]);
            assert_eq!(run(&input, 3), input);
        }
        // A block without end is not held for ever.
        let mut input = connection(&[frame(1, 0, &[0x82])]);
        for _ in 0..20 {
            input.extend(frame(9, 0, &[0x82; 16_000]));
        }
        assert_eq!(run(&input, 1000), input);
    }
}
