//! The allocator's habits.
//!
//! glibc keeps what is freed: each thread fills an arena of its own, and each large block that
//! is freed once makes it put larger ones on the heap, too. A daemon that has loaded one large
//! folder would then stay large for good (I8). So there are few arenas, large blocks are always
//! mapped and unmapped, and whoever is done with much memory has the rest given back.

/// Sets the habits. To be called before the first thread is started.
#[cfg(target_env = "gnu")]
pub fn configure() {
    let settings = [
        (libc::M_ARENA_MAX, 2),
        // Given explicitly, it does not grow by itself.
        (libc::M_MMAP_THRESHOLD, 256 << 10),
        (libc::M_TRIM_THRESHOLD, 1 << 20),
    ];
    for (what, value) in settings {
        // SAFETY: sets a parameter of the allocator; any value is legal.
        if unsafe { libc::mallopt(what, value) } == 0 {
            tracing::debug!(what, value, "allocator setting refused");
        }
    }
}

/// Gives memory that is not in use back to the kernel. Takes some milliseconds for each hundred
/// megabytes.
#[cfg(target_env = "gnu")]
pub fn give_back() {
    // SAFETY: no pointer is involved; it is safe at any time, from any thread.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(target_env = "gnu"))]
pub fn configure() {}

#[cfg(not(target_env = "gnu"))]
pub fn give_back() {}
