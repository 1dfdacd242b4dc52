//! The words of a line: numbers, ranges of bits, meanings, changes of a meaning.

use anyhow::{Context as _, Result, bail, ensure};
use stagecraft::table::FaultKind;
use stagecraft::{Attributes, MemoryType};

use super::{Outcome, Want};

/// Decimal, or hexadecimal after `0x`; underscores are for the eye.
pub fn number(text: &str) -> Result<u64> {
    let text = text.replace('_', "");
    let value = text.strip_prefix("0x").map_or_else(|| text.parse(), |digits| u64::from_str_radix(digits, 16));
    value.with_context(|| format!("`{text}` is no number"))
}

pub fn level(text: &str) -> Result<i8> {
    text.parse().with_context(|| format!("`{text}` is no level"))
}

/// `62:52`, `63`, `47:39,12`: bit positions, highest first within a range.
pub fn bits(text: &str) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    for part in text.split(',') {
        let (high, low) = part.split_once(':').unwrap_or((part, part));
        let (high, low): (u8, u8) = (high.parse()?, low.parse()?);
        ensure!(low <= high && high < 64, "bits {part}");
        all.extend(low..=high);
    }
    Ok(all)
}

/// `4K`, `512M`, `2^20`: log2 of a number of bytes.
fn size(text: &str) -> Result<u8> {
    if let Some(exponent) = text.strip_prefix("2^") {
        return Ok(exponent.parse()?);
    }
    let (count, unit) = text.split_at(text.len() - 1);
    let unit = match unit {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        _ => bail!("`{text}` is no size"),
    };
    let count: u64 = count.parse()?;
    ensure!(count.is_power_of_two(), "`{text}` is no power of two");
    Ok(unit + count.trailing_zeros() as u8)
}

fn fault(text: &str) -> Result<FaultKind> {
    FaultKind::ALL.into_iter().find(|kind| kind.as_str() == text).with_context(|| format!("`{text}` is no kind of fault"))
}

fn flag(text: &str) -> Option<Attributes> {
    Some(match text {
        "read" => Attributes::READ,
        "write" => Attributes::WRITE,
        "execute" => Attributes::EXECUTE,
        "privileged-only" => Attributes::PRIVILEGED_ONLY,
        "coherent" => Attributes::COHERENT,
        "accessed" => Attributes::ACCESSED,
        "dirty" => Attributes::DIRTY,
        "writable-when-dirty" => Attributes::WRITABLE_WHEN_DIRTY,
        _ => return None,
    })
}

fn memory_type(text: &str) -> Option<MemoryType> {
    Some(match text {
        "write-back" => MemoryType::WriteBack,
        "non-cacheable" => MemoryType::NonCacheable,
        "device" => MemoryType::Device,
        _ => return None,
    })
}

/// `rw-`, and words for everything else; write-back if no type is named.
fn attributes(words: &[&str]) -> Result<Attributes> {
    let (permissions, rest) = words.split_first().context("a leaf without permissions")?;
    ensure!(permissions.len() == 3, "`{permissions}` are no permissions");
    let mut all = Attributes::none();
    for (given, (letter, flag)) in permissions.chars().zip([('r', Attributes::READ), ('w', Attributes::WRITE), ('x', Attributes::EXECUTE)]) {
        ensure!(given == letter || given == '-', "`{permissions}` are no permissions");
        all = if given == letter { all.with(flag) } else { all };
    }
    for word in rest {
        all = match (flag(word), memory_type(word)) {
            (Some(flag), _) => all.with(flag),
            (_, Some(memory_type)) => all.with_memory_type(memory_type),
            _ => bail!("`{word}` is no attribute"),
        };
    }
    Attributes::from_bits(all.bits()).with_context(|| format!("`{}` contradict each other", words.join(" ")))
}

/// `absent`, `fault KIND`, `leaf SIZE ADDRESS rwx WORDS`, `part FRONT BACK SIZE ADDRESS rwx WORDS` (with the bytes that are missing), `table ADDRESS level LEVEL [indices A..B]`.
fn want(words: &[&str]) -> Result<Want> {
    Ok(match words {
        ["absent"] => Want::Absent,
        ["fault", kind] => Want::Fault(fault(kind)?),
        ["leaf", bytes, address, rest @ ..] => Want::Leaf { size_log2: size(bytes)?, address: number(address)?, attributes: attributes(rest)? },
        ["part", front, back, bytes, address, rest @ ..] => Want::Part {
            size_log2: size(bytes)?,
            address: number(address)?,
            attributes: attributes(rest)?,
            front: number(front)?,
            back: number(back)?,
        },
        ["table", address, "level", name] => Want::Table { address: number(address)?, level: level(name)?, indices: None },
        ["table", address, "level", name, "indices", indices] => {
            let (first, last) = indices.split_once("..").context("indices are FIRST..LAST")?;
            Want::Table { address: number(address)?, level: level(name)?, indices: Some((first.parse()?, last.parse()?)) }
        }
        _ => bail!("`{}` is no meaning", words.join(" ")),
    })
}

/// A meaning; after a table and a comma, where the translation ends: `table 0x2000 level 1, leaf 4K 0x5000 r--`.
pub fn outcome(text: &str) -> Result<Outcome> {
    let (entry, end) = text.split_once(',').unwrap_or((text, text));
    let words = |text: &str| want(&text.split_whitespace().collect::<Vec<_>>());
    let outcome = Outcome { entry: words(entry)?, end: words(end)? };
    ensure!(!matches!(outcome.end, Want::Table { .. }), "where does the translation end?");
    ensure!(matches!(outcome.entry, Want::Table { .. }) || outcome.entry == outcome.end, "only a table leads somewhere else");
    Ok(outcome)
}

fn with_address(want: Want, change: impl Fn(u64) -> u64) -> Result<Want> {
    Ok(match want {
        Want::Leaf { size_log2, address, attributes } => Want::Leaf { size_log2, address: change(address), attributes },
        Want::Table { address, level, indices } => Want::Table { address: change(address), level, indices },
        _ => bail!("there is no address"),
    })
}

/// What becomes of `good` if bit `bit` is flipped, the lowest of its range being `lowest`.
pub fn changed(good: Outcome, text: &str, bit: u8, lowest: u8) -> Result<Outcome> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let both = |want| Ok(Outcome { entry: want, end: want });
    let is_table = matches!(good.entry, Want::Table { .. });
    let moved = |bit: u8| {
        let entry = with_address(good.entry, |address| address ^ 1 << bit)?;
        Ok(Outcome { entry, end: if is_table { good.end } else { entry } })
    };
    match &words[..] {
        ["ignored"] => Ok(good),
        ["address"] => moved(bit),
        ["address", bits] => {
            let low = bits.split_once(':').map_or(*bits, |(_, low)| low);
            moved(bit - lowest + low.parse::<u8>()?)
        }
        ["absent"] | ["fault", _] => both(want(&words)?),
        ["below", rest @ ..] if is_table => Ok(Outcome { entry: good.entry, end: want(rest)? }),
        // So many units of bytes as the bit says are missing.
        [side @ ("without-front" | "without-back"), unit] => {
            let Want::Leaf { size_log2, address, attributes } = good.entry else { bail!("`{text}` of something that is no leaf") };
            let bytes = number(unit)? << (bit - lowest);
            let (front, back) = if *side == "without-front" { (bytes, 0) } else { (0, bytes) };
            both(Want::Part { size_log2, address, attributes, front, back })
        }
        ["means", ..] => outcome(text.trim_start().trim_start_matches("means")),
        [first, ..] if first.starts_with(['+', '-']) || memory_type(first).is_some() => {
            let end = words.iter().try_fold(good.end, |end, word| attribute_changed(end, word))?;
            Ok(Outcome { entry: if is_table { good.entry } else { end }, end })
        }
        _ => bail!("`{text}` is no change"),
    }
}

/// `+write`, `-write`, or a memory type.
fn attribute_changed(want: Want, word: &str) -> Result<Want> {
    let Want::Leaf { size_log2, address, attributes } = want else { bail!("there are no attributes") };
    let attributes = if let Some(memory_type) = memory_type(word) {
        attributes.with_memory_type(memory_type)
    } else {
        let flag = flag(&word[1..]).with_context(|| format!("`{word}` is no attribute"))?;
        // A change that changes nothing is a slip of the pen.
        ensure!(attributes.contains(flag) != word.starts_with('+'), "`{word}` changes nothing");
        if word.starts_with('+') { attributes.with(flag) } else { attributes.without(flag) }
    };
    Ok(Want::Leaf { size_log2, address, attributes })
}
