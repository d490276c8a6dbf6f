//! Where a user lies below the mount: `%u`, `%d/%n`, `%2.256Nu/%u`, `%1Mu/%2.1Mu/%u` and so on,
//! with Dovecot's variables, modifiers and hashes, so that a site's `mail_location` fits.
//!
//! A layout must name the user: some component is `%u`, or `%n` and `%d` are components each.
//! Then a path has at most one user, found by reading those components and checking all others
//! against what Dovecot computes.

use md5::{Digest, Md5};

/// Longest user name, in bytes.
pub const MAX_USER: usize = 200;

/// What is wrong with a layout, for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error("the user layout is empty; the usual ones are %u and %d/%n")]
    Empty,
    #[error("the user layout {0:?} has an empty or relative component")]
    BadComponent(String),
    #[error("the user layout uses %{0}, which is not known here; use %u, %n or %d")]
    UnknownVariable(String),
    #[error("the user layout uses the modifier {0:?}, which is not supported here")]
    UnsupportedModifier(char),
    #[error("the user layout ends within a variable: {0:?}")]
    Unfinished(String),
    #[error(
        "the user layout {0:?} does not name the user: one component must be %u, or one %n and one %d"
    )]
    NoUser(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    User,
    Name,
    Domain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Modifier {
    Lower,
    Upper,
    Reverse,
    Trim,
    Hash,
    NewHash,
    Md5,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Variable {
    offset: i64,
    width: i64,
    zero_padding: bool,
    modifiers: Vec<Modifier>,
    key: Key,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    Literal(String),
    Variable(Variable),
}

/// A parsed layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    components: Vec<Vec<Segment>>,
    user_at: Option<usize>,
    name_at: Option<usize>,
    domain_at: Option<usize>,
}

/// Whether a name can be a user's: not empty, at most [`MAX_USER`] bytes, no `/`, no control
/// character, no leading dot, and both sides of an `@` usable as directory names.
pub fn is_valid_user(user: &str) -> bool {
    !user.is_empty()
        && user.len() <= MAX_USER
        && !user.starts_with('.')
        && !user.starts_with('@')
        && !user.ends_with('@')
        && !user.split_once('@').is_some_and(|(_, domain)| domain.starts_with('.'))
        && !user.chars().any(|c| c == '/' || c.is_control())
}

impl Layout {
    /// Parses a layout such as `%d/%n`; slashes at either end do not count.
    pub fn parse(text: &str) -> Result<Layout, LayoutError> {
        let trimmed = text.trim_matches('/');
        if trimmed.is_empty() {
            return Err(LayoutError::Empty);
        }
        let mut components = Vec::new();
        for component in trimmed.split('/') {
            if matches!(component, "" | "." | "..") {
                return Err(LayoutError::BadComponent(text.to_owned()));
            }
            components.push(parse_component(component)?);
        }
        let at = |key| components.iter().position(|c| is_identity(c, key));
        let layout = Layout {
            user_at: at(Key::User),
            name_at: at(Key::Name),
            domain_at: at(Key::Domain),
            components,
        };
        let only_names = !layout.uses(Key::Domain) && !layout.uses(Key::User);
        if layout.user_at.is_none()
            && (layout.name_at.is_none() || (layout.domain_at.is_none() && !only_names))
        {
            return Err(LayoutError::NoUser(text.to_owned()));
        }
        Ok(layout)
    }

    fn uses(&self, wanted: Key) -> bool {
        self.components
            .iter()
            .flatten()
            .any(|s| matches!(s, Segment::Variable(v) if v.key == wanted))
    }

    /// How many components a user's root has below the mount.
    pub fn depth(&self) -> usize {
        self.components.len()
    }

    /// The path of a user's root; `None` for a name that is not valid here (with `%d`, one
    /// without a domain).
    pub fn path_of(&self, user: &str) -> Option<Vec<String>> {
        if !is_valid_user(user) {
            return None;
        }
        let (name, domain) = user.split_once('@').unwrap_or((user, ""));
        let mut path = Vec::with_capacity(self.components.len());
        for component in &self.components {
            let mut text = String::new();
            for segment in component {
                match segment {
                    Segment::Literal(literal) => text.push_str(literal),
                    Segment::Variable(v) => {
                        let value = match v.key {
                            Key::User => user,
                            Key::Name => name,
                            Key::Domain => domain,
                        };
                        text.push_str(&v.expand(value));
                    }
                }
            }
            if matches!(text.as_str(), "" | "." | "..") || text.contains('/') || text.len() > 255 {
                return None;
            }
            path.push(text);
        }
        Some(path)
    }

    /// The user whose root has exactly these components.
    pub fn user_of(&self, components: &[&[u8]]) -> Option<String> {
        if components.len() != self.depth() {
            return None;
        }
        let user = self.candidate(components)?;
        self.matches(&user, components).then_some(user)
    }

    /// Whether these components can lead to some user's root, or are one.
    pub fn prefix_possible(&self, components: &[&[u8]]) -> bool {
        if components.len() > self.depth() {
            return false;
        }
        if let Some(user) = self.candidate(components) {
            return self.matches(&user, components);
        }
        if components.len() == self.depth() {
            return false;
        }
        components.iter().zip(&self.components).all(|(given, layout)| {
            std::str::from_utf8(given).is_ok_and(|given| plausible(layout, given))
        })
    }

    fn matches(&self, user: &str, components: &[&[u8]]) -> bool {
        self.path_of(user)
            .is_some_and(|path| path.iter().zip(components).all(|(a, b)| a.as_bytes() == *b))
    }

    /// The only user that these components can be of, if enough of them are there.
    fn candidate(&self, components: &[&[u8]]) -> Option<String> {
        let text = |at: Option<usize>| std::str::from_utf8(components.get(at?)?).ok();
        if self.user_at.is_some() {
            return text(self.user_at).map(str::to_owned);
        }
        let name = text(self.name_at)?;
        if self.domain_at.is_none() {
            return Some(name.to_owned());
        }
        Some(format!("{name}@{}", text(self.domain_at)?))
    }
}

/// Whether a component is the variable itself, so that its text is the value (in lower case or
/// upper case, which then is the user's name for us).
fn is_identity(component: &[Segment], key: Key) -> bool {
    match component {
        [Segment::Variable(v)] => {
            v.key == key
                && v.offset == 0
                && v.width == 0
                && v.modifiers.iter().all(|m| matches!(m, Modifier::Lower | Modifier::Upper))
        }
        _ => false,
    }
}

/// Whether a component before the user's name can be part of a path at all.
fn plausible(layout: &[Segment], given: &str) -> bool {
    match layout {
        [Segment::Literal(literal)] => literal == given,
        [Segment::Variable(v)] => match v.modifiers.as_slice() {
            [] | [Modifier::Lower | Modifier::Upper] if v.offset == 0 && v.width == 0 => {
                is_valid_user(given)
            }
            [Modifier::Hash | Modifier::NewHash] => {
                let longest = 8.max(v.offset);
                let canonical =
                    !given.starts_with('0') || given.len() as i64 == v.offset || given == "0";
                is_lower_hex(given)
                    && canonical
                    && given.len() as i64 >= v.offset
                    && given.len() as i64 <= longest
                    && u64::from_str_radix(given, 16)
                        .is_ok_and(|n| v.width == 0 || n < v.width.unsigned_abs())
            }
            [Modifier::Md5] => {
                is_lower_hex(given) && (v.width <= 0 || given.len() as i64 == v.width.min(32))
            }
            _ => !given.starts_with('.'),
        },
        [Segment::Literal(start), ..] => given.starts_with(start.as_str()),
        _ => true,
    }
}

fn is_lower_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn parse_component(text: &str) -> Result<Vec<Segment>, LayoutError> {
    let mut segments = Vec::new();
    let mut literal = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        literal.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            literal.push('%');
            rest = after;
            continue;
        }
        if !literal.is_empty() {
            segments.push(Segment::Literal(std::mem::take(&mut literal)));
        }
        let (variable, after) = parse_variable(rest, text)?;
        segments.push(Segment::Variable(variable));
        rest = after;
    }
    literal.push_str(rest);
    if !literal.is_empty() {
        segments.push(Segment::Literal(literal));
    }
    Ok(segments)
}

/// `[-][0]<offset>.[0][-]<width><modifiers><variable>`, or without the offset.
fn parse_variable<'t>(text: &'t str, whole: &str) -> Result<(Variable, &'t str), LayoutError> {
    let unfinished = || LayoutError::Unfinished(whole.to_owned());
    let mut rest = text;
    let mut take = |c: char| match rest.strip_prefix(c) {
        Some(after) => {
            rest = after;
            true
        }
        None => false,
    };
    let mut negative = take('-');
    let mut zero_padding = take('0');
    let number = |rest: &mut &'t str| {
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let digits = &rest[..end];
        *rest = &rest[end..];
        // Nothing sensible is longer; an overlong number is as good as this one.
        digits.parse::<i64>().map_or(i64::from(digits.len() > 6) * 999_999, |n| n.min(999_999))
    };
    let mut width = number(&mut rest);
    let mut offset = 0;
    if let Some(after) = rest.strip_prefix('.') {
        offset = if negative { -width } else { width };
        rest = after;
        zero_padding = false;
        if let Some(after) = rest.strip_prefix('0') {
            zero_padding = true;
            rest = after;
        }
        negative = false;
        if let Some(after) = rest.strip_prefix('-') {
            negative = true;
            rest = after;
        }
        width = number(&mut rest);
        if negative {
            width = -width;
        }
    }
    let mut modifiers = Vec::new();
    loop {
        let c = rest.chars().next().ok_or_else(unfinished)?;
        let modifier = match c {
            'L' => Modifier::Lower,
            'U' => Modifier::Upper,
            'R' => Modifier::Reverse,
            'T' => Modifier::Trim,
            'H' => Modifier::Hash,
            'N' => Modifier::NewHash,
            'M' => Modifier::Md5,
            'E' | 'X' | 'D' => return Err(LayoutError::UnsupportedModifier(c)),
            _ => break,
        };
        modifiers.push(modifier);
        rest = &rest[1..];
    }
    let (name, after) = match rest.strip_prefix('{') {
        Some(long) => long.split_once('}').ok_or_else(unfinished)?,
        None => rest.split_at(rest.chars().next().map_or(0, char::len_utf8)),
    };
    let key = match name {
        "u" | "user" => Key::User,
        "n" | "username" => Key::Name,
        "d" | "domain" => Key::Domain,
        other => return Err(LayoutError::UnknownVariable(other.to_owned())),
    };
    Ok((Variable { offset, width, zero_padding, modifiers, key }, after))
}

impl Variable {
    fn expand(&self, value: &str) -> String {
        let (mut offset, mut width) = (self.offset, self.width);
        let mut value = value.as_bytes().to_vec();
        for modifier in &self.modifiers {
            match modifier {
                Modifier::Lower => value.make_ascii_lowercase(),
                Modifier::Upper => value.make_ascii_uppercase(),
                Modifier::Reverse => value.reverse(),
                Modifier::Trim => value.truncate(value.trim_ascii_end().len()),
                Modifier::Hash | Modifier::NewHash => {
                    let mut hash = match modifier {
                        Modifier::Hash => u64::from(str_hash(&value)),
                        _ => md5_hash(&value),
                    };
                    // The hash uses up both: width is its range, offset its length.
                    if let Some(range) = u64::try_from(width).ok().filter(|range| *range != 0) {
                        hash %= range;
                    }
                    let digits = usize::try_from(offset).unwrap_or(0).min(255);
                    value = format!("{:0digits$x}", hash as u32).into_bytes();
                    (offset, width) = (0, 0);
                }
                Modifier::Md5 => {
                    let digest = Md5::digest(&value);
                    value = digest.iter().flat_map(|b| format!("{b:02x}").into_bytes()).collect();
                }
            }
        }
        let len = value.len() as i64;
        let skip = if offset < 0 { (len + offset).max(0) } else { offset.min(len) };
        let mut value = value.split_off(skip as usize);
        if width != 0 && self.zero_padding {
            let missing = usize::try_from(width).unwrap_or(0).min(255).saturating_sub(value.len());
            value.splice(0..0, std::iter::repeat_n(b'0', missing));
        } else if width != 0 {
            let width = if width < 0 { value.len() as i64 + width } else { width };
            value.truncate(usize::try_from(width).unwrap_or(0));
        }
        // Cutting may split a character; Dovecot would make such a name, we make none.
        String::from_utf8(value).unwrap_or_default()
    }
}

/// The first eight bytes of the MD5 (`%N`).
fn md5_hash(value: &[u8]) -> u64 {
    Md5::digest(value).iter().take(8).fold(0, |n, b| n << 8 | u64::from(*b))
}

/// Dovecot's `%<range>Nu`: which of so many places a user belongs to.
pub fn place_of(user: &str, range: u64) -> u64 {
    md5_hash(user.as_bytes()).checked_rem(range).unwrap_or(0)
}

/// The hash of P. J. Weinberger (`%H`).
fn str_hash(value: &[u8]) -> u32 {
    value.iter().fold(0u32, |hash, byte| {
        let hash = (hash << 4).wrapping_add(u32::from(*byte));
        let top = hash & 0xf000_0000;
        if top != 0 { (hash ^ top >> 24) ^ top } else { hash }
    })
}

#[cfg(test)]
#[path = "template/tests.rs"]
mod tests;
