//! Masks of names, as Dovecot's commands take them: `*` and `?`, and nothing else special.

/// Whether a name matches a mask.
pub fn matches(mask: &[u8], name: &[u8]) -> bool {
    let (mut m, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match mask.get(m) {
            Some(b'*') => {
                star = Some((m, n));
                m += 1;
            }
            Some(c) if *c == b'?' || *c == name[n] => {
                m += 1;
                n += 1;
            }
            _ => match &mut star {
                Some((at, from)) => {
                    *from += 1;
                    m = *at + 1;
                    n = *from;
                }
                None => return false,
            },
        }
    }
    mask[m..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn masks_match_as_in_a_shell() {
        let yes = |mask: &str, name: &str| assert!(matches(mask.as_bytes(), name.as_bytes()));
        let no = |mask: &str, name: &str| assert!(!matches(mask.as_bytes(), name.as_bytes()));
        yes("*", "");
        yes("*@example.com", "a@example.com");
        yes("a?c*", "abcd");
        yes("*a*b", "xxaxxaxb");
        no("a", "ab");
        no("?", "");
        no("*x", "axb");
    }
}
