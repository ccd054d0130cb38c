//! Limits of traffic: a token bucket on the way out of an interface.

use super::{Batch, flags};

const NEW_QDISC: u16 = 36;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TBF_PARMS: u16 = 1;
const TBF_RATE64: u16 = 4;
const TBF_BURST: u16 = 6;
/// `TC_H_ROOT`
const ROOT: u32 = u32::MAX;
/// `1:0`
const HANDLE: u32 = 0x1_0000;
/// `TC_LINKLAYER_ETHERNET`: the kernel computes what a packet costs by itself.
const ETHERNET: u8 = 1;
/// The bucket holds what the rate makes in this part of a second, and so much again
/// may wait behind it.
const PART_OF_SECOND: u64 = 40;
/// One packet as large as offloading makes them, or it could never pass whole.
const LEAST: u64 = 64 * 1024;

/// Lets `bits` per second out of the interface.
pub(crate) fn limit(batch: &mut Batch, index: u32, name: &str, bits: u64) {
    let rate = (bits / 8).max(1);
    let burst = u32::try_from((rate / PART_OF_SECOND).max(LEAST)).unwrap_or(u32::MAX);
    batch.push(
        format!("limit {name} to {bits} bits per second"),
        NEW_QDISC,
        flags::ACK | flags::CREATE | flags::REPLACE,
        |w| {
            let mut header = [0; 20];
            header[4..8].copy_from_slice(&index.to_ne_bytes());
            header[8..12].copy_from_slice(&HANDLE.to_ne_bytes());
            header[12..16].copy_from_slice(&ROOT.to_ne_bytes());
            w.raw(&header);
            w.text(TCA_KIND, "tbf");
            w.nest(TCA_OPTIONS, |w| {
                w.attr(TBF_PARMS, &parameters(rate, burst));
                w.attr(TBF_RATE64, &rate.to_ne_bytes());
                w.u32(TBF_BURST, burst);
            });
        },
    );
}

/// `struct tc_tbf_qopt`: two rates of 12 bytes, then limit, buffer and mtu.
fn parameters(rate: u64, burst: u32) -> [u8; 36] {
    let mut p = [0; 36];
    p[1] = ETHERNET;
    p[8..12].copy_from_slice(&u32::try_from(rate).unwrap_or(u32::MAX).to_ne_bytes());
    p[24..28].copy_from_slice(&burst.saturating_mul(2).to_ne_bytes());
    p
}
