//! (module root)
