//! How a lead's memory grows and shrinks.

#![expect(unsafe_code, reason = "the C library's only interface for this")]

/// Lets glibc keep a little more of what was freed: out of the box it takes memory from the kernel 4 KiB at a time in every
/// thread but the first, and gives back whatever is more than 128 KiB at the end of a heap. A lead that takes changes
/// frees and takes as much a thousand times in a second, which was 7 % of its processor time.
///
/// Other C libraries are left as they are.
pub(crate) fn keep() {
    #[cfg(target_env = "gnu")]
    for (what, bytes) in [
        (libc::M_TOP_PAD, 1 << 20),
        (libc::M_TRIM_THRESHOLD, 8 << 20),
    ] {
        // SAFETY: mallopt takes any numbers, and is called before other threads are started (mallopt(3)). What it refuses
        // stays as it was.
        unsafe { libc::mallopt(what, bytes) };
    }
}
