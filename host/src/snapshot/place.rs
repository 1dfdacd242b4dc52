//! Where in a JSON text something stands, in the names of members: a line of ten thousand characters has many columns.

/// What the text is in, from the outermost.
enum Inside {
    /// An object, in the member of this name, if one has begun.
    Object(Option<String>),
    /// A list, in the element of this index.
    List(u64),
}

/// Most characters of a member's name that are told.
const SHOWN: usize = 64;

/// The member in which `text` is after `column` bytes of `line`, as `serde_json` counts them: such as `devices[3].id`, or nothing outside all members.
/// `text` is JSON as far as that.
pub(super) fn member(text: &[u8], line: usize, column: usize) -> String {
    let before: usize = text.split_inclusive(|byte| *byte == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    let text = text.get(..before.saturating_add(column)).unwrap_or(text);
    let mut inside: Vec<Inside> = Vec::new();
    // A string in an object is the name of a member unless a colon came before it.
    let mut is_name = false;
    let mut at = 0;
    while let Some(byte) = text.get(at) {
        at += 1;
        match byte {
            b'"' => {
                let end = string_end(text, at);
                if let (Some(Inside::Object(name)), true) = (inside.last_mut(), is_name) {
                    *name = Some(String::from_utf8_lossy(&text[at..end]).chars().take(SHOWN).collect());
                }
                at = end + 1;
            }
            b'{' => inside.push(Inside::Object(None)),
            b'[' => inside.push(Inside::List(0)),
            b'}' | b']' => drop(inside.pop()),
            b',' => {
                if let Some(Inside::List(index)) = inside.last_mut() {
                    *index += 1;
                }
            }
            _ => {}
        }
        match byte {
            b'{' | b',' => is_name = true,
            b':' => is_name = false,
            _ => {}
        }
    }
    let mut path = String::new();
    for step in inside {
        match step {
            Inside::Object(Some(name)) if path.is_empty() => path = name,
            Inside::Object(Some(name)) => path.push_str(&format!(".{name}")),
            Inside::Object(None) => {}
            Inside::List(index) => path.push_str(&format!("[{index}]")),
        }
    }
    path
}

/// Where the string that begins at `from` ends: at its closing quote, or with the text.
fn string_end(text: &[u8], from: usize) -> usize {
    let mut at = from;
    while let Some(byte) = text.get(at) {
        match byte {
            b'"' => return at,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::member;

    /// The member in which `text` is at its end.
    fn at_end(text: &str) -> String {
        let (line, last) = text.lines().enumerate().last().unwrap_or_default();
        member(text.as_bytes(), line + 1, last.len())
    }

    #[test]
    fn members_are_named_from_the_outermost() {
        for (text, path) in [
            ("", ""),
            ("{", ""),
            ("{\"version\": 1.5", "version"),
            ("{\"version\": 1, \"pages", "pages"),
            ("{\"memory\": [{\"kind\": \"ram\"}, {\"first\": ", "memory[1].first"),
            ("{\"memory\": [{\"kind\": \"ram\"}, {\"first\": 1}", "memory[1]"),
            ("{\"memory\": [1, 2], \"devices\": [", "devices[0]"),
            ("{\"a,{\\\"[:\": {\"b\": \"]}\\\\\", \"c\": tru", "a,{\\\"[:.c"),
            ("{\"a\":\n [1,\n  2,\n {\"b\"\n:[[],[3", "a[2].b[1][0]"),
        ] {
            assert_eq!(at_end(text), path, "{text}");
        }
        assert_eq!(member(b"{\"a\": 1}", 9, 9), "", "beyond the text");
        assert_eq!(at_end(&format!("{{\"{}\": ", "x".repeat(1000))), "x".repeat(64));
    }
}
