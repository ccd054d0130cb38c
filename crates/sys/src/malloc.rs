//! The C library's allocator, told to be small: one of these processes runs per
//! pod, so what it keeps for later counts as many times as there are pods.

/// One arena, small thresholds: freed memory goes back to the kernel soon.
///
/// To be called before the first thread starts.
#[cfg(target_env = "gnu")]
pub fn be_small() {
    // SAFETY: mallopt takes integers only and is called before there are threads.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 * 1024);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
        libc::mallopt(libc::M_TOP_PAD, 16 * 1024);
    }
}

/// Gives unused memory back to the kernel.
#[cfg(target_env = "gnu")]
pub fn trim() {
    // SAFETY: malloc_trim locks the allocator itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Nothing to do for other C libraries.
#[cfg(not(target_env = "gnu"))]
pub fn be_small() {}

/// Nothing to do for other C libraries.
#[cfg(not(target_env = "gnu"))]
pub fn trim() {}
