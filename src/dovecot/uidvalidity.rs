//! Dovecot's counter of UIDVALIDITY values.
//!
//! The next value to give lies in the name of an empty file, `dovecot-uidvalidity.<8 hex>`,
//! which each new folder moves on by a rename; `dovecot-uidvalidity` holds the same value as
//! text and is only a hint. Raising the counter means renaming the file (I2).

/// The name's part before the number.
pub const PREFIX: &[u8] = b"dovecot-uidvalidity.";

/// The counter in the name `dovecot-uidvalidity.<8 hex>`; `None` for any other name.
pub fn parse(name: &[u8]) -> Option<u32> {
    let hex = name.strip_prefix(PREFIX)?;
    if hex.len() != 8 || !hex.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u32::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()
}

/// The file name of a counter.
pub fn format(counter: u32) -> String {
    format!("dovecot-uidvalidity.{counter:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for counter in [0, 1, 0x5a3b_2c1d, u32::MAX] {
            assert_eq!(parse(format(counter).as_bytes()), Some(counter));
        }
        for name in ["dovecot-uidvalidity", "dovecot-uidvalidity.", "dovecot-uidvalidity.+1234567"]
        {
            assert_eq!(parse(name.as_bytes()), None, "{name}");
        }
    }
}
