//! Custom sections at the top level of a component.

/// Appends a custom section.
pub fn append(component: &mut Vec<u8>, name: &str, content: &[u8]) {
    let mut payload = Vec::new();
    leb128(&mut payload, name.len());
    payload.extend_from_slice(name.as_bytes());
    payload.extend_from_slice(content);
    component.push(0);
    leb128(component, payload.len());
    component.extend_from_slice(&payload);
}

/// The content of the last custom section called `name`.
pub fn find<'a>(component: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut rest = component.get(8..)?;
    let mut found = None;
    while let Some((&id, after)) = rest.split_first() {
        let (length, after) = read_leb128(after)?;
        let payload = after.get(..length)?;
        rest = &after[length..];
        if id == 0 {
            let (length, payload) = read_leb128(payload)?;
            if payload.get(..length)? == name.as_bytes() {
                found = Some(&payload[length..]);
            }
        }
    }
    found
}

/// The bytes before the last section, if that is a custom one called `name`, and its content.
pub fn last<'a>(component: &'a [u8], name: &str) -> Option<(&'a [u8], &'a [u8])> {
    let content = find(component, name)?;
    let mut section = Vec::new();
    append(&mut section, name, content);
    Some((component.strip_suffix(&*section)?, content))
}

fn leb128(out: &mut Vec<u8>, mut value: usize) {
    loop {
        let low = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

fn read_leb128(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let mut value = 0_usize;
    for (index, &byte) in bytes.iter().enumerate().take(5) {
        value |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[index + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_is_found() {
        let mut component = b"\0asm\x0d\0\x01\0".to_vec();
        append(&mut component, "first", b"one");
        append(&mut component, "second", &[7; 300]);
        assert_eq!(find(&component, "first"), Some(&b"one"[..]));
        assert_eq!(find(&component, "second"), Some(&[7; 300][..]));
        assert_eq!(find(&component, "third"), None);
    }

    #[test]
    fn the_last_section_is_told_from_what_stands_before_it() {
        let mut component = b"\0asm\x0d\0\x01\0".to_vec();
        append(&mut component, "first", b"one");
        let before = component.clone();
        append(&mut component, "second", b"two");
        assert_eq!(last(&component, "second"), Some((&*before, &b"two"[..])));
        assert_eq!(last(&component, "first"), None, "another one follows");
    }

    #[test]
    fn the_last_one_counts_and_cut_files_do_not_panic() {
        let mut component = b"\0asm\x0d\0\x01\0".to_vec();
        append(&mut component, "hash", b"old");
        append(&mut component, "hash", b"new");
        assert_eq!(find(&component, "hash"), Some(&b"new"[..]));
        for length in 0..component.len() {
            find(&component[..length], "hash");
        }
    }
}
