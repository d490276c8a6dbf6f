//! A bundle's frames one after the other, without a head that says where they are.

use super::FormatError;
use super::frame;
use super::tar;
use std::io::{BufReader, Read};

/// Bytes of a bundle, and of one frame's content, at most: what is larger was not written by us.
pub const LIMIT: u64 = 1 << 30;
/// Members of a frame at most.
const MEMBERS: usize = 1 << 20;

/// A file in a frame, named as `tar -t` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    pub name: Vec<u8>,
    pub content: Vec<u8>,
}

/// The frames of a bundle; what comes after one that cannot be read is not looked for.
pub fn frames(bytes: &[u8]) -> impl Iterator<Item = Result<Vec<Unpacked>, FormatError>> {
    let mut rest = Some(bytes);
    std::iter::from_fn(move || {
        let now = rest.take().filter(|bytes| !bytes.is_empty())?;
        let size = match zstd::zstd_safe::find_frame_compressed_size(now) {
            Ok(size) if size > 0 && size <= now.len() => size,
            _ => return Some(Err(FormatError::malformed("bundle", "not a zstd frame"))),
        };
        let (this, next) = now.split_at(size);
        let members = members(this);
        if members.is_ok() {
            rest = Some(next);
        }
        Some(members)
    })
}

fn members(frame: &[u8]) -> Result<Vec<Unpacked>, FormatError> {
    let source = BufReader::new(frame::Content::of(frame, LIMIT)?);
    let mut tar = tar::Members::new(source);
    let mut all = Vec::new();
    while let Some(name) = tar.next_member()? {
        if all.len() >= MEMBERS {
            return Err(FormatError::TooLarge { what: "bundle", limit: MEMBERS as u64 });
        }
        let content = tar.content()?;
        all.push(Unpacked { name, content });
    }
    // What zstd says of the frame's checksum is known at its end only.
    let mut end = tar.into_source();
    end.read_to_end(&mut Vec::new()).map_err(|e| FormatError::from_io("bundle", e))?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::super::bundle::{decode_table, encode_head_part, encode_table};
    use super::*;

    #[test]
    fn all_frames_are_found_and_damage_is_told() {
        let table = encode_table(&["one".to_owned(), "two".to_owned()]);
        assert_eq!(decode_table(&table, 1 << 20).unwrap(), ["one", "two"]);
        let bundle = [table.clone(), encode_head_part(b"{}")].concat();
        let all: Vec<_> = frames(&bundle).collect::<Result<_, _>>().unwrap();
        assert_eq!(
            all[0],
            [Unpacked { name: b"@table".to_vec(), content: b"one\ntwo\n".to_vec() }]
        );
        assert_eq!(all[1], [Unpacked { name: b"@head".to_vec(), content: b"{}".to_vec() }]);
        assert_eq!(frames(b"").count(), 0);
        assert!(frames(b"nonsense").next().unwrap().is_err());
        for cut in 1..table.len() {
            assert!(frames(&bundle[..cut]).any(|f| f.is_err()), "{cut}");
        }
        for at in 0..bundle.len() {
            let mut bad = bundle.clone();
            bad[at] ^= 0x10;
            // Whatever it is, it ends and allocates nothing absurd.
            let _ = frames(&bad).count();
        }
    }
}
