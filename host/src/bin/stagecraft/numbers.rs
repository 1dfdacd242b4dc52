//! Numbers as people write them.

/// A number below 2^64, in decimal or in hex with `0x`.
pub fn number(text: &str) -> Result<u64, String> {
    let digits = |text: &str, radix| {
        let plain = !text.is_empty() && text.chars().all(|c| c.is_digit(radix));
        if plain { u64::from_str_radix(text, radix).ok() } else { None }
    };
    let value = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => digits(hex, 16),
        None => digits(text, 10),
    };
    value.ok_or_else(|| "a number below 2^64 is expected, such as 4096 or 0x1000".to_owned())
}

/// A PASID: 20 bits.
pub fn pasid(text: &str) -> Result<u32, String> {
    let value = number(text)?;
    u32::try_from(value).ok().filter(|pasid| *pasid < 1 << 20).ok_or_else(|| "a PASID has 20 bits: 0 to 0xfffff".to_owned())
}

/// `name=value`, where the value is a number, `true` or `false`.
pub fn setting(text: &str) -> Result<(String, u64), String> {
    let Some((name, value)) = text.split_once('=').filter(|(name, _)| !name.is_empty()) else {
        return Err("name=value is expected, such as granule=4096".to_owned());
    };
    let value = match value {
        "true" => 1,
        "false" => 0,
        digits => number(digits).map_err(|_| format!("`{digits}` is not a value: a number such as 4096 or 0x1000, true or false"))?,
    };
    Ok((name.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_and_hex_are_read_and_nothing_else() {
        assert_eq!(number("4096"), Ok(4096));
        assert_eq!(number("0x1000"), Ok(0x1000));
        assert_eq!(number("0xFFFFFFFFFFFFFFFF"), Ok(u64::MAX));
        for bad in ["", "0x", "+1", "-1", "1 ", "0x+1", "1_000", "18446744073709551616", "abc"] {
            assert!(number(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn settings_are_numbers_or_words_of_truth() {
        assert_eq!(setting("granule=0x1000"), Ok(("granule".to_owned(), 4096)));
        assert_eq!(setting("tbi=true"), Ok(("tbi".to_owned(), 1)));
        assert!(setting("tbi").is_err() && setting("=1").is_err() && setting("tbi=yes").is_err());
    }

    #[test]
    fn a_pasid_has_twenty_bits() {
        assert_eq!(pasid("0xfffff"), Ok(0xfffff));
        assert!(pasid("0x100000").is_err());
    }
}
