//! The node's time zone.

use std::mem::MaybeUninit;

/// How many seconds local time is ahead of UTC at `unix` (seconds since 1970), as
/// TZ or /etc/localtime say; 0 where they say nothing.
pub fn offset(unix: i64) -> i32 {
    let mut tm = MaybeUninit::<libc::tm>::zeroed();
    let time = libc::time_t::from(unix);
    // SAFETY: both pointers are valid for the call; zeroes are a valid tm.
    let offset = unsafe {
        libc::localtime_r(&raw const time, tm.as_mut_ptr());
        tm.assume_init().tm_gmtoff
    };
    i32::try_from(offset).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_offset_is_less_than_a_day() {
        assert!(super::offset(1_700_000_000).abs() < 86_400);
    }
}
