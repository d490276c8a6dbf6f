//! Strategies for any legal value.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use vmailfs::format::escape::is_name;
use vmailfs::format::head::*;
use vmailfs::format::journal::*;
use vmailfs::format::key::*;
use vmailfs::format::listing::*;
use vmailfs::format::part::*;
use vmailfs::format::*;

pub fn name() -> impl Strategy<Value = Vec<u8>> {
    let special: Vec<Vec<u8>> = vec![
        b"@listing".to_vec(),
        b"x@tail-5".to_vec(),
        b"x@blocks-5-1".to_vec(),
        b"%40".to_vec(),
        b"-".to_vec(),
        b"cur".to_vec(),
        b" \n\t".to_vec(),
        b"...".to_vec(),
        vec![b'@'; 255],
        vec![0xff; 255],
        vec![b'a'; 100],
    ];
    prop_oneof![
        4 => "[a-z0-9._,=:@%-]{1,40}".prop_map(String::into_bytes),
        2 => vec(1u8.., 1..=255),
        1 => select(special),
    ]
    .prop_filter("a file name", |name| is_name(name))
}

pub fn object_id() -> impl Strategy<Value = ObjectId> {
    (any::<u32>(), 0..=ObjectId::MAX_COUNTER)
        .prop_map(|(epoch, counter)| ObjectId { epoch: Epoch(epoch), counter })
}

fn folder_id() -> impl Strategy<Value = FolderId> {
    prop_oneof![any::<u64>(), Just(0)].prop_map(FolderId)
}

fn sub() -> impl Strategy<Value = Sub> {
    select(Sub::ALL.to_vec())
}

fn place() -> impl Strategy<Value = Place> {
    (folder_id(), sub()).prop_map(|(folder, sub)| Place { folder, sub })
}

fn time() -> impl Strategy<Value = Timestamp> {
    let secs = prop_oneof![any::<i64>(), -2..2i64, Just(i64::MIN), 0..2_000_000_000i64];
    (secs, 0..1_000_000_000u32).prop_map(|(secs, nanos)| Timestamp { secs, nanos })
}

fn owner() -> impl Strategy<Value = Owner> {
    (any::<u32>(), any::<u32>()).prop_map(|(uid, gid)| Owner { uid, gid })
}

fn attrs() -> impl Strategy<Value = Attrs> {
    (0..=0o7777u32, option::of(owner()), time()).prop_map(|(mode, owner, mtime)| Attrs {
        mode,
        owner,
        mtime,
    })
}

fn piece() -> impl Strategy<Value = Piece> {
    prop_oneof![
        Just(Piece::Whole),
        (any::<u64>(), option::of(object_id()))
            .prop_map(|(offset, predecessor)| Piece::Extent { offset, predecessor }),
    ]
}

pub fn mail_key() -> impl Strategy<Value = MailKey> {
    let front = (object_id(), folder_id(), time(), 0..=0o7777u32, any::<u32>());
    (front, piece(), option::of(name())).prop_map(|(front, piece, name)| {
        let (id, folder, mtime, mode, crc) = front;
        MailKey { id, folder, mtime, mode, crc, piece, name }
    })
}

pub fn key_tail() -> impl Strategy<Value = KeyTail> {
    mail_key().prop_map(|key| key.encode().0)
}

fn extents() -> impl Strategy<Value = (u64, Vec<Extent>)> {
    vec((0..1u64 << 40, key_tail()), 0..5).prop_map(|pieces| {
        let mut size = 0;
        let mut extents = Vec::new();
        for (len, object) in pieces {
            extents.push(Extent { offset: size, len, object });
            size += len;
        }
        (size, extents)
    })
}

fn entry() -> impl Strategy<Value = Entry> {
    let target = vec(1u8.., 1..=300);
    prop_oneof![
        (any::<u64>(), attrs(), key_tail()).prop_map(|(size, attrs, object)| Entry::Mail {
            size,
            attrs,
            object
        }),
        (extents(), attrs()).prop_map(|((size, extents), attrs)| Entry::Extents {
            size,
            attrs,
            extents
        }),
        (any::<u64>(), attrs(), option::of(object_id()))
            .prop_map(|(size, attrs, object)| Entry::Local { size, attrs, object }),
        (target, attrs()).prop_map(|(target, attrs)| Entry::Symlink { target, attrs }),
    ]
}

fn base_line() -> impl Strategy<Value = Line> {
    prop_oneof![
        1 => (sub(), attrs()).prop_map(|(sub, attrs)| Line::Dir { sub, attrs }),
        4 => (sub(), name(), entry()).prop_map(|(sub, name, entry)| Line::Set { sub, name, entry }),
    ]
}

pub fn line() -> impl Strategy<Value = Line> {
    prop_oneof![
        4 => base_line(),
        1 => select(Sub::ALL[1..].to_vec()).prop_map(|sub| Line::NoDir { sub }),
        1 => (sub(), name()).prop_map(|(sub, name)| Line::Unset { sub, name }),
    ]
}

fn disk_op() -> impl Strategy<Value = DiskOp> {
    (0..5, place(), name(), place(), name()).prop_map(|(kind, from, name, to, new_name)| match kind
    {
        0 => DiskOp::Create { at: from, name },
        1 => DiskOp::Unlink { at: from, name },
        2 => DiskOp::Rename { from, name, to, new_name },
        3 => DiskOp::Exchange { from, name, to, new_name },
        _ => DiskOp::Link { from, name, to, new_name },
    })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (folder_id(), place(), name()).prop_map(|(id, parent, name)| match id {
            FolderId::ROOT => Change::Folder { id, parent: Place::ROOT, name: Vec::new() },
            _ => Change::Folder { id, parent, name },
        }),
        folder_id().prop_map(|id| Change::NoFolder { id }),
        (folder_id(), line()).prop_map(|(folder, line)| Change::Line { folder, line }),
        (object_id(), any::<u32>()).prop_map(|(object, count)| Change::Names { object, count }),
        key_tail().prop_map(|object| Change::Drop { object }),
        key_tail().prop_map(|object| Change::Again { object }),
        (owner(), 0..=0o7777u32).prop_map(|(owner, mode)| Change::User { owner, mode }),
        disk_op().prop_map(Change::Disk),
    ]
}

/// Records with numbers from `first` on.
pub fn records(first: u64) -> impl Strategy<Value = Vec<Record>> {
    vec(vec(change(), 0..4), 0..6).prop_map(move |all| {
        let number = |(index, changes)| Record { seq: first + index as u64, changes };
        all.into_iter().enumerate().map(number).collect()
    })
}

fn part_ref() -> impl Strategy<Value = PartRef> {
    let range = (0..u64::MAX / 2, 0..u64::MAX / 2, any::<u32>(), any::<u64>());
    (object_id(), range, any::<bool>()).prop_map(|(bundle, (offset, len, crc, raw_len), base)| {
        let kind = if base { PartKind::Base } else { PartKind::Diff };
        PartRef { bundle, offset, len, crc, kind, raw_len }
    })
}

fn folders() -> impl Strategy<Value = Vec<HeadFolder>> {
    let rest = (name(), any::<prop::sample::Index>(), sub());
    let one = (rest, vec(part_ref(), 0..3), option::of(any::<u32>()));
    vec(one, 1..12).prop_map(|all| {
        let mut folders: Vec<HeadFolder> = Vec::new();
        for (index, ((mut name, parent, sub), parts, uid_ceiling)) in all.into_iter().enumerate() {
            let id = FolderId(index as u64 * 0x1234_5678_9abc);
            let (parent, name) = if index == 0 {
                (Place::ROOT, Vec::new())
            } else {
                // A first byte of its own keeps names in one place different.
                name[0] = b'a' + index as u8;
                (Place { folder: folders[parent.index(index)].id, sub }, name)
            };
            let burnt_below = uid_ceiling.filter(|c| c % 2 == 0);
            let unfinished = uid_ceiling.is_some_and(|c| c % 3 == 0);
            let folder =
                HeadFolder { id, parent, name, parts, uid_ceiling, burnt_below, unfinished };
            folders.push(folder);
        }
        folders
    })
}

pub fn head() -> impl Strategy<Value = Head> {
    let who = ("\\PC{0,20}", any::<u32>(), "\\PC{0,20}", any::<i64>());
    let owner_now = option::of(("\\PC{0,9}", "[0-9a-f]{32}"));
    let owner_now =
        owner_now.prop_map(|o| o.map(|(backend, session)| HeadOwner { backend, session }));
    let closed = (any::<u32>().prop_map(Epoch), object_id());
    let closed = vec(closed.prop_map(|(epoch, end)| ClosedEpoch { epoch, end }), 0..3);
    let root = (owner(), 0..=0o7777u32, option::of(any::<u32>()));
    let tables = (vec(part_ref(), 0..3), vec(part_ref(), 0..3), option::of(part_ref()));
    (who, owner_now, object_id(), closed, root, tables, folders()).prop_map(
        |(who, owner, watermark, closed, root, tables, folders)| Head {
            user: who.0,
            epoch: Epoch(who.1),
            write_id: who.2,
            owner,
            watermark,
            closed,
            root_owner: root.0,
            root_mode: root.1,
            folders,
            uidvalidity_ceiling: root.2,
            uidvalidity_burnt: root.2.filter(|c| c % 2 == 0),
            known_above: Vec::new(),
            names: tables.0,
            dropped: tables.1,
            previous: tables.2,
            written: who.3,
        },
    )
}

fn some_bytes() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..2000).prop_map(Bytes::from)
}

/// Some of the blocks of a file with these bytes.
pub fn blocks(bytes: Vec<u8>, block_size: u32) -> impl Strategy<Value = Content> {
    let size = bytes.len() as u64;
    let all: Vec<(u64, Bytes)> = bytes
        .chunks(block_size as usize)
        .enumerate()
        .map(|(number, block)| (number as u64, Bytes::copy_from_slice(block)))
        .collect();
    let count = all.len();
    subsequence(all, 0..=count).prop_map(move |blocks| Content::Blocks { size, block_size, blocks })
}

fn change_of_content() -> impl Strategy<Value = Content> {
    prop_oneof![
        some_bytes().prop_map(Content::Whole),
        (0..u64::MAX / 2, some_bytes()).prop_map(|(offset, bytes)| Content::Tail { offset, bytes }),
        (vec(any::<u8>(), 0..2000), 1..600u32).prop_flat_map(|(bytes, size)| blocks(bytes, size)),
    ]
}

fn members(content: impl Strategy<Value = Content>) -> impl Strategy<Value = Vec<Member>> {
    let member = (sub(), name(), content);
    vec(member.prop_map(|(sub, name, content)| Member { sub, name, content }), 0..6)
}

pub fn part() -> impl Strategy<Value = Part> {
    let base = (vec(base_line(), 0..8), members(some_bytes().prop_map(Content::Whole)));
    let diff = (vec(line(), 0..8), members(change_of_content()));
    prop_oneof![
        base.prop_map(|(lines, members)| Part { lines, members }),
        diff.prop_map(|(lines, members)| Part { lines, members }),
    ]
}

/// A folder's path as it stands in a tar: bytes, with slashes.
pub fn folder_path() -> impl Strategy<Value = Vec<u8>> {
    vec(name(), 0..4).prop_map(|names| names.join(&b'/'))
}
