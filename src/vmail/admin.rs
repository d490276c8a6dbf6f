//! What an administrator asks of the heart.
