//! Reads a file of vectors. The form is explained in `tests/vectors/README.md`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use stagecraft::table::ByteOrder;

use super::line::{bits, changed, level, number, outcome};
use super::{Block, Configuration, File, Link, Outcome, Outside, Tables, Vector, Want};

/// A line that changes one or more bits, or names a whole entry.
#[derive(Clone, Debug)]
struct Change {
    line: usize,
    which: Which,
    text: String,
    section: String,
}

#[derive(Clone, Debug)]
enum Which {
    Bits(Vec<u8>),
    Entry(u64),
}

/// A block of which not all lines were read yet.
#[derive(Debug)]
struct Open {
    block: Block,
    good: Option<(usize, u64)>,
    meaning: Option<Outcome>,
    section: String,
    changes: Vec<Change>,
}

struct Reader {
    file: File,
    groups: BTreeMap<String, Vec<Change>>,
    group: Option<String>,
    open: Option<Open>,
    settings: Vec<(String, u64)>,
    tables: Vec<Tables>,
    root: String,
}

/// The file called `name` with this text.
///
/// # Errors
/// A line that is not understood, with its number.
pub fn read(name: &str, text: &str) -> Result<File> {
    let file = File {
        name: name.to_owned(),
        format: String::new(),
        entry_bytes: 8,
        order: ByteOrder::Little,
        elsewhere: 0,
        configurations: Vec::new(),
        blocks: Vec::new(),
        outside: Vec::new(),
    };
    let mut reader =
        Reader { file, groups: BTreeMap::new(), group: None, open: None, settings: Vec::new(), tables: Vec::new(), root: "root".to_owned() };
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if !line.is_empty() {
            reader.line(index + 1, line).with_context(|| format!("{name}:{}", index + 1))?;
        }
    }
    reader.close()?;
    Ok(reader.file)
}

impl Reader {
    fn line(&mut self, number_of_line: usize, line: &str) -> Result<()> {
        let (statement, section) = line.split_once(';').unwrap_or((line, ""));
        let (statement, section) = (statement.trim(), section.trim());
        let (word, rest) = statement.split_once(char::is_whitespace).unwrap_or((statement, ""));
        let rest = rest.trim();
        if word.starts_with(|first: char| first.is_ascii_digit()) {
            return self.change(number_of_line, Which::Bits(bits(word)?), rest, section);
        }
        match word {
            "also" => {
                let (entry, text) = rest.split_once(char::is_whitespace).context("also ENTRY CHANGE")?;
                return self.change(number_of_line, Which::Entry(number(entry)?), text.trim(), section);
            }
            "use" => return self.use_group(rest),
            "iova" | "above" | "entry" | "below" | "means" => return self.of_block(number_of_line, word, rest),
            _ => self.close()?,
        }
        match word {
            "format" => rest.clone_into(&mut self.file.format),
            "entries" => self.entries(rest)?,
            "elsewhere" => self.file.elsewhere = number(rest)?,
            "settings" => self.settings = settings(rest)?,
            "tables" => {
                self.tables = tables(rest)?;
                "root".clone_into(&mut self.root);
                self.configure();
            }
            "root" => {
                rest.clone_into(&mut self.root);
                self.configure();
            }
            "group" => {
                ensure!(self.groups.insert(rest.to_owned(), Vec::new()).is_none(), "there is a group `{rest}` already");
                self.group = Some(rest.to_owned());
            }
            "outside" => {
                ensure!(!section.is_empty(), "which section?");
                let (iova, configuration) = (number(rest)?, self.configuration()?);
                self.file.outside.push(Outside { line: number_of_line, configuration, iova, section: section.to_owned() });
            }
            "block" | "part" => self.block(number_of_line, word == "part", rest, section)?,
            _ => bail!("`{word}` is not understood"),
        }
        Ok(())
    }

    fn entries(&mut self, text: &str) -> Result<()> {
        let (bytes, order) = text.split_once(' ').context("entries BYTES ORDER")?;
        self.file.entry_bytes = bytes.parse()?;
        self.file.order = match order {
            "little" => ByteOrder::Little,
            "big" => ByteOrder::Big,
            _ => bail!("`{order}` is no byte order"),
        };
        Ok(())
    }

    fn configure(&mut self) {
        let configuration = Configuration { settings: self.settings.clone(), tables: self.tables.clone(), root: self.root.clone() };
        self.file.configurations.push(configuration);
    }

    fn configuration(&self) -> Result<usize> {
        self.file.configurations.len().checked_sub(1).context("settings and tables come first")
    }

    /// `block LEVEL TITLE ; SECTION`
    fn block(&mut self, line: usize, part: bool, text: &str, section: &str) -> Result<()> {
        let (name, title) = text.split_once(' ').context("block LEVEL TITLE")?;
        ensure!(!section.is_empty(), "which section?");
        let block = Block {
            line,
            title: title.trim().to_owned(),
            configuration: self.configuration()?,
            part,
            level: level(name)?,
            iova: 0,
            above: Vec::new(),
            below: Vec::new(),
            vectors: Vec::new(),
        };
        self.open = Some(Open { block, good: None, meaning: None, section: section.to_owned(), changes: Vec::new() });
        Ok(())
    }

    fn of_block(&mut self, line: usize, word: &str, rest: &str) -> Result<()> {
        let tables = self.tables.clone();
        let open = self.open.as_mut().context("outside of a block")?;
        match word {
            "iova" => open.block.iova = number(rest)?,
            "above" => open.block.above = links(rest, &tables)?,
            "below" => {
                let after = tables.iter().position(|table| table.level == open.block.level).map_or(0, |at| at + 1);
                open.block.below = links(rest, tables.get(after..).unwrap_or_default())?;
            }
            "entry" => open.good = Some((line, number(rest)?)),
            _ => open.meaning = Some(outcome(rest)?),
        }
        Ok(())
    }

    fn change(&mut self, line: usize, which: Which, text: &str, section: &str) -> Result<()> {
        let change = Change { line, which, text: text.to_owned(), section: section.to_owned() };
        match (&mut self.open, &self.group) {
            (Some(open), _) => open.changes.push(change),
            (None, Some(group)) => self.groups.entry(group.clone()).or_default().push(change),
            (None, None) => bail!("outside of a block"),
        }
        Ok(())
    }

    fn use_group(&mut self, name: &str) -> Result<()> {
        let changes = self.groups.get(name).with_context(|| format!("there is no group `{name}`"))?.clone();
        match (&mut self.open, &self.group) {
            (Some(open), _) => open.changes.extend(changes),
            (None, Some(group)) => self.groups.entry(group.clone()).or_default().extend(changes),
            (None, None) => bail!("outside of a block"),
        }
        Ok(())
    }

    /// Ends a group or a block: what it says becomes vectors.
    fn close(&mut self) -> Result<()> {
        self.group = None;
        let Some(open) = self.open.take() else { return Ok(()) };
        let block = open.vectors(self.file.entry_bytes * 8).with_context(|| self.file.name.clone())?;
        self.file.blocks.push(block);
        Ok(())
    }
}

impl Open {
    fn vectors(self, width: u8) -> Result<Block> {
        let Self { mut block, good, meaning, section, changes } = self;
        let title = block.title.clone();
        let (line, good) = good.with_context(|| format!("`{title}` has no entry"))?;
        let meaning = meaning.with_context(|| format!("`{title}` does not say what the entry means"))?;
        block.vectors.push(Vector { line, bit: None, entry: good, outcome: meaning, section: section.clone() });
        // Later lines about a bit replace earlier ones, so that a block can differ from the group that it uses.
        let mut flipped: BTreeMap<u8, Vector> = BTreeMap::new();
        for change in changes {
            let section = if change.section.is_empty() { section.clone() } else { change.section };
            let at = || format!("line {} `{}`", change.line, change.text);
            match change.which {
                Which::Bits(bits) => {
                    let lowest = bits.first().copied().unwrap_or_default();
                    for bit in bits {
                        ensure!(bit < width, "{}: no bit {bit}", at());
                        let outcome = changed(meaning, &change.text, bit, lowest).with_context(at)?;
                        let entry = good ^ 1 << bit;
                        flipped.insert(bit, Vector { line: change.line, bit: Some(bit), entry, outcome, section: section.clone() });
                    }
                }
                Which::Entry(entry) => {
                    let outcome = changed(meaning, &change.text, 0, 0).with_context(at)?;
                    block.vectors.push(Vector { line: change.line, bit: None, entry, outcome, section });
                }
            }
        }
        block.vectors.extend(flipped.into_values());
        Ok(block)
    }
}

/// `NAME=VALUE ...`
fn settings(text: &str) -> Result<Vec<(String, u64)>> {
    let pairs = text.split_whitespace().map(|pair| pair.split_once('=').with_context(|| format!("`{pair}` is no setting")));
    pairs.map(|pair| pair.and_then(|(name, value)| Ok((name.to_owned(), number(value)?)))).collect()
}

/// `LEVEL=HIGH:LOW ...` from the root down
fn tables(text: &str) -> Result<Vec<Tables>> {
    let one = |text: &str| {
        let (name, bits) = text.split_once('=').context("LEVEL=HIGH:LOW")?;
        let (high, low) = bits.split_once(':').context("LEVEL=HIGH:LOW")?;
        Ok(Tables { level: level(name)?, high: high.parse()?, low: low.parse()? })
    };
    text.split_whitespace().map(one).collect()
}

/// `ENTRY>NEXT[@LEVEL] ...`: entries, where the next table is, and the level that they are at if a level was skipped.
fn links(text: &str, tables: &[Tables]) -> Result<Vec<Link>> {
    let mut links = Vec::new();
    for (at, text) in text.split_whitespace().enumerate() {
        let (text, name) = text.split_once('@').map_or((text, None), |(text, name)| (text, Some(name)));
        let (entry, next) = text.split_once('>').map_or((text, None), |(entry, next)| (entry, Some(next)));
        let level = match name {
            Some(name) => level(name)?,
            None => tables.get(at).context("there is no such level")?.level,
        };
        links.push(Link { level, entry: number(entry)?, next: next.map(number).transpose()? });
    }
    Ok(links)
}

impl Block {
    /// What the block's own entry is.
    pub fn good(&self) -> Want {
        self.vectors[0].outcome.entry
    }

    /// The bits below `width` that no vector flips.
    pub fn missing(&self, width: u8) -> Vec<u8> {
        (0..width).filter(|bit| !self.vectors.iter().any(|vector| vector.bit == Some(*bit))).collect()
    }
}
