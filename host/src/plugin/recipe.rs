//! How the kernel is told to forget what was cached of a nested table: a plugin says it once, and the host writes invalidation arrays by itself from then on.
//!
//! A recipe is templates of entries, and the places in them where an address and a number of pages go. What a plugin answers is checked; what it writes wrong
//! into a template is between the plugin and the kernel, which checks entries itself.

use crate::Span;
use crate::plugin::bindings::exports::stagecraft::format::detect as wit;

/// Bits `number_lsb .. number_lsb + width` of a number are bits `lsb .. lsb + width` of word `word` of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which word of the entry.
    pub word: u8,
    /// The lowest bit there.
    pub lsb: u8,
    /// How many bits, 1 to 64.
    pub width: u8,
    /// The lowest bit of the number.
    pub number_lsb: u8,
}

impl Place {
    const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.width)
    }

    fn put(self, entry: &mut [u64], number: u64) {
        if let Some(word) = entry.get_mut(usize::from(self.word)) {
            *word |= (number >> self.number_lsb & self.mask()) << self.lsb;
        }
    }
}

/// How one entry says that it means several pages in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Their number.
    Count(Place),
    /// There are `(number + 1) * 2^scale` pages.
    Scaled {
        /// One less than the number.
        number: Place,
        /// Its scale.
        scale: Place,
    },
    /// `2^n` pages aligned to their size, n at least 1: bits `page_log2 .. page_log2 + n - 1` of the address are ones, and the one above is zero.
    Block,
}

/// An entry for several pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeEntry {
    /// Its words, with zeroes where the address and the extent go.
    pub words: Vec<u64>,
    /// How it says how many pages there are.
    pub extent: Extent,
}

/// Whose caches an invalidation array is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The nested page table.
    PageTable,
    /// The vIOMMU that it is in.
    Viommu,
}

/// What entries of an invalidation array are made of. All have the same number of words, which are little-endian in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// An `iommu_hwpt_invalidate_data_type`.
    pub data_type: u32,
    /// Whose caches.
    pub target: Target,
    /// Log2 of the bytes of a page, 12 to 21.
    pub page_log2: u8,
    /// The entry for one page, without its address.
    pub page: Vec<u64>,
    /// Where the IOVA of the first page goes: all its bits from `page_log2` on.
    pub address: Place,
    /// The entry for several pages.
    pub range: Option<RangeEntry>,
    /// Ones that are added if only leaves were changed.
    pub leaf: Vec<u64>,
    /// Ones that are added if tables were changed as well; none: what was cached of tables only goes with `everything`.
    pub tables: Option<Vec<u64>>,
    /// The entry that is for all pages and tables.
    pub everything: Vec<u64>,
    /// With more entries than this, `everything` is better.
    pub most: u32,
}

/// Most words of an entry.
const MAX_WORDS: usize = 8;
/// Most entries of an array.
const MAX_ENTRIES: u32 = 4096;

impl Recipe {
    /// Bytes of one entry.
    #[must_use]
    pub fn entry_bytes(&self) -> u32 {
        self.page.len() as u32 * 8
    }

    /// Fills `array` with the entries that make the hardware forget `spans`, and tables that it cached on the way there if `tables`; how many there are.
    /// More may be forgotten than that, and never less. `array` is emptied first.
    ///
    /// `spans` are ascending and do not overlap. None at all with `tables` is everything.
    pub fn write(&self, spans: &[Span], tables: bool, array: &mut Vec<u8>) -> u32 {
        array.clear();
        let added = if tables { self.tables.as_deref() } else { Some(&self.leaf[..]) };
        let Some(added) = added.filter(|_| !(tables && spans.is_empty())) else { return self.write_everything(array) };
        let mut entries = Entries { recipe: self, added, array, count: 0 };
        for span in spans {
            if !entries.span(*span) {
                return self.write_everything(array);
            }
        }
        entries.count
    }

    /// Fills `array` with the entry for everything.
    pub fn write_everything(&self, array: &mut Vec<u8>) -> u32 {
        array.clear();
        array.extend(self.everything.iter().flat_map(|word| word.to_le_bytes()));
        1
    }
}

struct Entries<'a> {
    recipe: &'a Recipe,
    added: &'a [u64],
    array: &'a mut Vec<u8>,
    count: u32,
}

impl Entries<'_> {
    /// False if there are too many.
    fn span(&mut self, span: Span) -> bool {
        let log2 = self.recipe.page_log2;
        let (mut page, last) = (span.first >> log2, span.last >> log2);
        loop {
            let left = last - page + 1;
            let Some(done) = self.entry(page, left) else { return false };
            match page.checked_add(done) {
                Some(next) if next <= last => page = next,
                _ => return true,
            }
        }
    }

    /// Writes an entry that begins with a page, and is for as many of `left` as it can be; for how many. None: there are too many.
    fn entry(&mut self, page: u64, left: u64) -> Option<u64> {
        if self.count == self.recipe.most {
            return None;
        }
        self.count += 1;
        let log2 = self.recipe.page_log2;
        let mut entry = [0; MAX_WORDS];
        let words = self.recipe.page.len();
        let entry = &mut entry[..words];
        let range = self.recipe.range.as_ref().filter(|_| left > 1);
        let several = range.and_then(|range| Some((range, Several::new(range.extent, page, left)?)));
        let done = match several {
            None => {
                entry.copy_from_slice(&self.recipe.page);
                self.recipe.address.put(entry, page << log2);
                1
            }
            Some((range, several)) => {
                entry.copy_from_slice(&range.words);
                let ones = several.put(range.extent, entry);
                self.recipe.address.put(entry, (page | ones) << log2);
                several.pages
            }
        };
        for (word, added) in entry.iter_mut().zip(self.added) {
            *word |= added;
        }
        self.array.extend(entry.iter().flat_map(|word| word.to_le_bytes()));
        Some(done)
    }
}

/// Several pages as one entry says it.
struct Several {
    pages: u64,
    scale: u32,
}

impl Several {
    /// As many of `left` pages from `page` on as one entry can say; none if that is only one.
    fn new(extent: Extent, page: u64, left: u64) -> Option<Self> {
        match extent {
            Extent::Count(place) => Some(Self { pages: left.min(place.mask()), scale: 0 }),
            // The smallest scale that says it: what is too many is less than one in a number's worth.
            Extent::Scaled { number, scale } => {
                let fits = |shift: &u32| (left - 1) >> shift <= number.mask();
                let most = u32::try_from(scale.mask()).unwrap_or(u32::MAX).min(63 - 12);
                let shift = (0..=most).find(fits).unwrap_or(most);
                let count = ((left - 1) >> shift).min(number.mask()) + 1;
                Some(Self { pages: count << shift, scale: shift })
            }
            Extent::Block => {
                let shift = left.ilog2().min(page.trailing_zeros());
                (shift > 0).then_some(Self { pages: 1 << shift, scale: shift })
            }
        }
    }

    /// The ones that the address gets.
    fn put(&self, extent: Extent, entry: &mut [u64]) -> u64 {
        match extent {
            Extent::Count(place) => {
                place.put(entry, self.pages);
                0
            }
            Extent::Scaled { number, scale } => {
                number.put(entry, (self.pages >> self.scale) - 1);
                scale.put(entry, self.scale.into());
                0
            }
            Extent::Block => (self.pages >> 1) - 1,
        }
    }
}

/// The answer of a plugin; the reason if it makes no sense.
pub(super) fn checked(recipe: wit::Recipe) -> Result<Recipe, String> {
    let wit::Recipe { data_type, target, page_log2, page, address, range, leaf, tables, everything, most } = recipe;
    let words = page.len();
    if words == 0 || words > MAX_WORDS {
        return Err(format!("invalidations of {words} words; there are 1 to {MAX_WORDS}"));
    }
    let others = [Some(&leaf), tables.as_ref(), Some(&everything), range.as_ref().map(|range| &range.words)];
    if let Some(other) = others.into_iter().flatten().find(|other| other.len() != words) {
        return Err(format!("invalidations of {words} and of {} words", other.len()));
    }
    if !(12..=21).contains(&page_log2) {
        return Err(format!("invalidations of pages of 2^{page_log2} bytes; there are 2^12 to 2^21"));
    }
    if most == 0 || most > MAX_ENTRIES {
        return Err(format!("at most {most} invalidations; there are 1 to {MAX_ENTRIES}"));
    }
    let address = place(address, words)?;
    if address.number_lsb > page_log2 || address.number_lsb + address.width != 64 {
        return Err("invalidations without all bits of a page's address".to_owned());
    }
    let range = range.map(|wit::RangeEntry { words: range, extent }| {
        let extent = match extent {
            wit::Extent::Count(count) => Extent::Count(number(count, words)?),
            wit::Extent::Scaled((first, second)) => Extent::Scaled { number: number(first, words)?, scale: number(second, words)? },
            wit::Extent::Block => Extent::Block,
        };
        Ok::<_, String>(RangeEntry { words: range, extent })
    });
    let target = match target {
        wit::InvalidationTarget::PageTable => Target::PageTable,
        wit::InvalidationTarget::Viommu => Target::Viommu,
    };
    Ok(Recipe { data_type, target, page_log2, page, address, range: range.transpose()?, leaf, tables, everything, most })
}

fn place(place: wit::Place, words: usize) -> Result<Place, String> {
    let wit::Place { word, lsb, width, number_lsb } = place;
    let within = |from: u8| u32::from(from) + u32::from(width) <= 64;
    if width == 0 || !within(lsb) || !within(number_lsb) || usize::from(word) >= words {
        return Err(format!("{width} bits of a number from {number_lsb} on at bit {lsb} of word {word} of an invalidation of {words} words"));
    }
    Ok(Place { word, lsb, width, number_lsb })
}

/// A place for a number of pages, whose lowest bit is there.
fn number(number: wit::Place, words: usize) -> Result<Place, String> {
    let place = place(number, words)?;
    if place.number_lsb == 0 { Ok(place) } else { Err("a number of pages without its lowest bits".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: Place = Place { word: 1, lsb: 12, width: 52, number_lsb: 12 };

    fn recipe(range: Option<RangeEntry>, tables: Option<Vec<u64>>) -> Recipe {
        Recipe {
            data_type: 1,
            target: Target::Viommu,
            page_log2: 12,
            page: vec![7, 0],
            address: ADDRESS,
            range,
            leaf: vec![0, 1],
            tables,
            everything: vec![9, 9],
            most: 4,
        }
    }

    fn written(recipe: &Recipe, spans: &[(u64, u64)], tables: bool) -> Vec<[u64; 2]> {
        let spans: Vec<Span> = spans.iter().map(|&(first, last)| Span { first, last }).collect();
        let mut array = vec![1, 2, 3];
        let count = recipe.write(&spans, tables, &mut array);
        let words: Vec<u64> = array.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        assert_eq!((words.len(), array.len() % 16), (count as usize * 2, 0));
        words.as_chunks::<2>().0.to_vec()
    }

    #[test]
    fn pages_one_by_one_and_at_last_everything() {
        let pages = recipe(None, Some(vec![0, 2]));
        assert_eq!(written(&pages, &[(0x1000, 0x1fff), (0x5234, 0x6000)], false), [[7, 0x1001], [7, 0x5001], [7, 0x6001]]);
        assert_eq!(written(&pages, &[(0x1000, 0x1fff)], true), [[7, 0x1002]]);
        assert_eq!(written(&pages, &[(u64::MAX - 1, u64::MAX)], false), [[7, 0xffff_ffff_ffff_f001]]);
        assert_eq!(written(&pages, &[(0, 0x4fff)], false), [[9, 9]], "five pages are more than four entries");
        assert_eq!(written(&pages, &[(0, 0x3fff)], false).len(), 4);
        assert_eq!(written(&pages, &[], true), [[9, 9]]);
        assert_eq!(written(&recipe(None, None), &[(0, 0xfff)], true), [[9, 9]], "tables only go with everything");
        assert_eq!(written(&recipe(None, None), &[(0, 0xfff)], false), [[7, 1]]);
    }

    #[test]
    fn a_count_is_in_one_entry() {
        let count = Place { word: 0, lsb: 32, width: 3, number_lsb: 0 };
        let counted = recipe(Some(RangeEntry { words: vec![8, 0], extent: Extent::Count(count) }), Some(vec![0, 0]));
        assert_eq!(written(&counted, &[(0x1000, 0x7fff)], false), [[8 | 7 << 32, 0x1001]]);
        assert_eq!(written(&counted, &[(0x1000, 0x9fff)], false), [[8 | 7 << 32, 0x1001], [8 | 2 << 32, 0x8001]]);
        assert_eq!(written(&counted, &[(0x1000, 0x8fff)], false), [[8 | 7 << 32, 0x1001], [7, 0x8001]], "one page has its own entry");
    }

    #[test]
    fn a_scaled_number_says_at_least_as_much() {
        let (number, scale) = (Place { word: 0, lsb: 12, width: 5, number_lsb: 0 }, Place { word: 0, lsb: 20, width: 5, number_lsb: 0 });
        let scaled = recipe(Some(RangeEntry { words: vec![8, 0], extent: Extent::Scaled { number, scale } }), Some(vec![0, 0]));
        assert_eq!(written(&scaled, &[(0x1000, 0x1fff)], false), [[7, 0x1001]]);
        for pages in [2_u64, 3, 31, 32, 33, 63, 64, 65, 1000, 1 << 20, (1 << 36) - 1, 1 << 36] {
            let [[low, high]] = written(&scaled, &[(0x7000, 0x7000 + (pages << 12) - 1)], false)[..] else { panic!("{pages} pages") };
            let said = ((low >> 12 & 0x1f) + 1) << (low >> 20 & 0x1f);
            assert!(said >= pages && said - pages <= pages / 16 && high == 0x7001, "{pages}: {said}");
        }
        // Beyond what one entry can say there are several.
        assert!(matches!(written(&scaled, &[(0, u64::MAX)], false)[..], [[9, 9]]));
    }

    #[test]
    fn blocks_are_exactly_what_is_meant() {
        let blocks = recipe(Some(RangeEntry { words: vec![8, 0], extent: Extent::Block }), Some(vec![0, 0]));
        assert_eq!(written(&blocks, &[(0x2000, 0x3fff)], false), [[8, 0x2001]], "two pages: no ones, and a zero");
        assert_eq!(written(&blocks, &[(0x1000, 0x1fff)], false), [[7, 0x1001]]);
        assert_eq!(written(&blocks, &[(0x3000, 0x8fff)], false), [[7, 0x3001], [8, 0x5001], [7, 0x8001]]);
        assert_eq!(written(&blocks, &[(0x20_0000, 0x3f_ffff)], false), [[8, 0x2f_f001]], "nine zeroes become eight ones");
    }

    #[test]
    fn nonsense_is_refused_with_the_reason() {
        let good = || wit::Recipe {
            data_type: 0,
            target: wit::InvalidationTarget::PageTable,
            page_log2: 12,
            page: vec![0, 0],
            address: wit::Place { word: 1, lsb: 12, width: 52, number_lsb: 12 },
            range: None,
            leaf: vec![0, 0],
            tables: None,
            everything: vec![0, 0],
            most: 1,
        };
        assert!(checked(good()).is_ok());
        let refused = |recipe: wit::Recipe, reason: &str| {
            let error = checked(recipe).expect_err(reason);
            assert!(error.contains(reason), "{error}");
        };
        let place = |word, lsb, width, number_lsb| wit::Place { word, lsb, width, number_lsb };
        refused(wit::Recipe { page: vec![], ..good() }, "of 0 words");
        refused(wit::Recipe { page: vec![0; 9], ..good() }, "of 9 words");
        refused(wit::Recipe { leaf: vec![0], ..good() }, "of 2 and of 1 words");
        refused(wit::Recipe { tables: Some(vec![0; 3]), ..good() }, "of 2 and of 3 words");
        refused(wit::Recipe { page_log2: 11, ..good() }, "2^11 bytes");
        refused(wit::Recipe { most: 0, ..good() }, "at most 0");
        refused(wit::Recipe { most: 4097, ..good() }, "at most 4097");
        refused(wit::Recipe { address: place(2, 12, 52, 12), ..good() }, "of word 2");
        refused(wit::Recipe { address: place(1, 13, 52, 12), ..good() }, "52 bits of a number");
        refused(wit::Recipe { address: place(1, 255, 255, 255), ..good() }, "255 bits of a number");
        refused(wit::Recipe { address: place(1, 12, 0, 12), ..good() }, "0 bits of a number");
        refused(wit::Recipe { address: place(1, 12, 51, 13), ..good() }, "without all bits");
        refused(wit::Recipe { address: place(1, 12, 20, 12), ..good() }, "without all bits");
        let range = wit::RangeEntry { words: vec![0, 0], extent: wit::Extent::Count(place(0, 0, 8, 3)) };
        refused(wit::Recipe { range: Some(range), ..good() }, "without its lowest bits");
    }
}
