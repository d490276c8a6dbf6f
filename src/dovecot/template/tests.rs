use super::*;

fn path(layout: &str, user: &str) -> Option<String> {
    Layout::parse(layout).unwrap().path_of(user).map(|p| p.join("/"))
}

fn user(layout: &str, path: &str) -> Option<String> {
    let parts: Vec<&[u8]> = path.split('/').map(str::as_bytes).collect();
    Layout::parse(layout).unwrap().user_of(&parts)
}

fn possible(layout: &str, path: &str) -> bool {
    let parts: Vec<&[u8]> = path.split('/').filter(|p| !p.is_empty()).map(str::as_bytes).collect();
    Layout::parse(layout).unwrap().prefix_possible(&parts)
}

#[test]
fn paths_and_users_agree() {
    for (layout, name, want) in [
        ("%u", "a@b.c", "a@b.c"),
        ("/%d/%n/", "a@b.c", "b.c/a"),
        ("%{domain}/%{username}", "a@b.c", "b.c/a"),
        ("%1Mu/%2.1Mu/%u", "user1", "2/c/user1"),
        ("users/%u", "x", "users/x"),
        ("%1u/%u", "anna", "a/anna"),
        ("%-2.2n/%d/%n", "anna@x", "na/x/anna"),
        ("%n", "anna", "anna"),
    ] {
        assert_eq!(path(layout, name).as_deref(), Some(want), "{layout}");
        assert_eq!(user(layout, want).as_deref(), Some(name), "{layout}");
    }
}

#[test]
fn a_wrong_hash_is_no_user() {
    let right = path("%2.256Nu/%u", "anna").unwrap();
    let (hash, _) = right.split_once('/').unwrap();
    assert_eq!(hash.len(), 2);
    let other = if hash == "00" { "01" } else { "00" };
    assert_eq!(user("%2.256Nu/%u", &format!("{other}/anna")), None);
    assert_eq!(user("%2.256Nu/%u", "anna"), None);
    assert_eq!(user("%d/%n", "b/a@b"), None);
    assert_eq!(user("%u", ".hidden"), None);
    assert_eq!(Layout::parse("%u").unwrap().user_of(&[b"a\xff"]), None);
}

#[test]
fn names_are_checked() {
    for good in ["a", "a@b", "ä@b.c", "a.b", &"x".repeat(200)] {
        assert!(is_valid_user(good), "{good}");
    }
    for bad in ["", ".a", "a/b", "a\0", "@b", "a@", "a@.b", "a\n", &"x".repeat(201)] {
        assert!(!is_valid_user(bad), "{bad}");
    }
    assert_eq!(path("%d/%n", "nodomain"), None);
}

#[test]
fn prefixes() {
    assert!(possible("%2.256Nu/%u", ""));
    assert!(possible("%2.256Nu/%u", "1f"));
    for wrong in ["1", "1F", "100", "lost+found", ".Trash"] {
        assert!(!possible("%2.256Nu/%u", wrong), "{wrong}");
    }
    assert!(possible("%1Mu/%2.1Mu/%u", "a/b"));
    assert!(!possible("%1Mu/%2.1Mu/%u", "a/bc"));
    assert!(possible("%d/%n", "example.org"));
    assert!(!possible("%d/%n", ".x"));
    assert!(!possible("%u", "a/b"));
    assert!(!possible("%u/%2.256Nu", "anna/zz"));
}

#[test]
fn mistakes_are_told() {
    assert_eq!(Layout::parse("/"), Err(LayoutError::Empty));
    assert!(matches!(Layout::parse("a//%u"), Err(LayoutError::BadComponent(_))));
    assert_eq!(Layout::parse("%h"), Err(LayoutError::UnknownVariable("h".into())));
    assert_eq!(Layout::parse("%Xu"), Err(LayoutError::UnsupportedModifier('X')));
    assert!(matches!(Layout::parse("%2.256N"), Err(LayoutError::Unfinished(_))));
    assert!(matches!(Layout::parse("%{user"), Err(LayoutError::Unfinished(_))));
    for layout in ["mail", "%2.256Nu", "%d", "x%u", "%n/%1d"] {
        assert!(matches!(Layout::parse(layout), Err(LayoutError::NoUser(_))), "{layout}");
    }
}

proptest::proptest! {
    #[test]
    fn nothing_panics(layout in "[%a-z0-9.LUNHMRTudn{}/-]{0,16}", name: String, parts: Vec<Vec<u8>>) {
        if let Ok(layout) = Layout::parse(&layout) {
            let _ = layout.path_of(&name);
            let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            let _ = (layout.user_of(&parts), layout.prefix_possible(&parts));
        }
    }

    #[test]
    fn a_users_path_leads_back(name in "[a-z][a-z.]{0,8}@[a-z]{1,8}", n in 0usize..5) {
        let layout = ["%u", "%d/%n", "%2.256Nu/%u", "%1Mu/%2.1Mu/%u", "%3.500Hn/%d/%n"][n];
        let layout = Layout::parse(layout).unwrap();
        let path = layout.path_of(&name).unwrap();
        let parts: Vec<&[u8]> = path.iter().map(String::as_bytes).collect();
        for end in 0..=parts.len() {
            proptest::prop_assert!(layout.prefix_possible(&parts[..end]));
        }
        proptest::prop_assert_eq!(layout.user_of(&parts), Some(name));
    }
}

/// What Dovecot 2.3.19 made of them as `mail_location`.
#[test]
fn expansions_are_dovecots() {
    for (layout, name, want) in [
        ("%2.256Nu/%u", "anna@x.org", "90/anna@x.org"),
        ("%2.256Nu/%u", "ünïcode@b", "a6/ünïcode@b"),
        ("%2.256Nu/%u", "longer.name@example.com", "a6/longer.name@example.com"),
        ("%1Mu/%2.1Mu/%u", "anna@x.org", "7/5/anna@x.org"),
        ("%1Mu/%2.1Mu/%u", "ünïcode@b", "6/1/ünïcode@b"),
        ("%-3.2Hn/%d/%n", "anna@x.org", "1/x.org/anna"),
        ("%4.1000Hu/%Lu", "anna@x.org", "0127/anna@x.org"),
        ("%4.1000Hu/%Lu", "ünïcode@b", "0292/ünïcode@b"),
        ("%4.1000Hu/%Lu", "Longer.name@example.com", "0045/longer.name@example.com"),
        ("%02u/%u", "anna@x.org", "anna@x.org/anna@x.org"),
        ("%06n/%d/%n", "anna@x.org", "00anna/x.org/anna"),
        ("%06n/%d/%n", "ünïcode@b", "ünïcode/b/ünïcode"),
        ("%3.Nu/%u", "anna@x.org", "2c8b8690/anna@x.org"),
        ("%3.Nu/%u", "ünïcode@b", "3304cea6/ünïcode@b"),
        ("%-2u/%u", "ünïcode@b", "ü/ünïcode@b"),
        ("%1.-1u/%u", "anna@x.org", "nna@x.or/anna@x.org"),
        ("%8Nu/%u", "anna@x.org", "0/anna@x.org"),
        ("%2RLu/%u", "Longer.name@example.com", "mo/Longer.name@example.com"),
        ("%-2.2n/%d/%n", "ünïcode@b", "de/b/ünïcode"),
        ("%3.500Hn/%d/%n", "anna@x.org", "149/x.org/anna"),
        ("%3.500Hn/%d/%n", "ünïcode@b", "0bd/b/ünïcode"),
        ("%{domain}/%1{username}/%u", "anna@x.org", "x.org/a/anna@x.org"),
    ] {
        assert_eq!(path(layout, name).as_deref(), Some(want), "{layout} {name}");
    }
}
