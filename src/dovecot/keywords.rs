//! Keywords: `dovecot-keywords`, which names those that stand as letters in a Maildir's names, and
//! those that Dovecot sets by itself.
//!
//! A line has a number, a space and the keyword; number 0 is the letter `a`, 25 is `z`.

/// Dovecot derives these from the mail, when it is delivered (`mail_attachment_detection_options`).
pub fn is_derived(keyword: &[u8]) -> bool {
    matches!(keyword, b"$HasAttachment" | b"$HasNoAttachment")
}

/// The flags and keywords of a Maildir name.
pub fn letters(name: &[u8]) -> &[u8] {
    let info = name.windows(3).rposition(|w| w == b":2,");
    info.and_then(|at| name.get(at + 3..)).unwrap_or_default()
}

/// The keyword that a letter stands for, by the content of `dovecot-keywords`.
pub fn of_letter(content: &[u8], letter: u8) -> Option<&[u8]> {
    let number = letter.checked_sub(b'a').filter(|n| *n < 26)?;
    content.split(|b| *b == b'\n').find_map(|line| {
        let space = line.iter().position(|b| *b == b' ')?;
        let (said, keyword) = (line.get(..space)?, line.get(space + 1..)?);
        let said: u8 = std::str::from_utf8(said).ok()?.parse().ok()?;
        (said == number && !keyword.is_empty()).then_some(keyword)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_have_names() {
        let file = b"0 $HasAttachment\n1 work\ntorn\n25 last\n26 none\n3 ";
        assert_eq!(of_letter(file, b'a'), Some(&b"$HasAttachment"[..]));
        assert_eq!(of_letter(file, b'b'), Some(&b"work"[..]));
        assert_eq!(of_letter(file, b'z'), Some(&b"last"[..]));
        for letter in *b"cdS{`" {
            assert_eq!(of_letter(file, letter), None);
        }
        assert!(is_derived(b"$HasNoAttachment") && !is_derived(b"work"));
        assert_eq!(letters(b"1:2.host:2,Sa"), b"Sa");
        assert_eq!(letters(b"1.host:2,"), b"");
        assert_eq!(letters(b"1.host"), b"");
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(file: Vec<u8>, letter: u8) {
            let _ = (of_letter(&file, letter), letters(&file));
        }
    }
}
