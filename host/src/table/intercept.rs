//! Addresses that something else than the tables serves, such as those of interrupts.

use crate::Span;
use crate::memory::Budget;
use crate::table::leaves::{Piece, Run};
use crate::table::passage::Receiver;
use crate::table::recode::Passed;
use crate::table::visit::{Cause, FaultAt, Step, Visitor};
use crate::table::walk::WalkError;

/// Addresses with `address & mask == value`, which do not go the way of the tables.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Intercept {
    /// How many tables an address has passed when it is compared: 0, it is the IOVA.
    pub passed: u8,
    /// Bits that are compared.
    pub mask: u64,
    /// Their value.
    pub value: u64,
    /// What serves these addresses.
    pub server: String,
    /// Where that stands in guest memory, if it does.
    pub address: Option<u64>,
    /// Document and section.
    pub section: String,
}

impl Intercept {
    /// Whether `address`, an IOVA or the output of a table as [`Intercept::passed`] says, is one of these.
    #[must_use]
    pub const fn matches(&self, address: u64) -> bool {
        address & self.mask == self.value
    }

    /// The IOVAs that are intercepted, if they are one span: it is IOVAs that are compared, and the bits that are not compared are the lowest ones.
    #[must_use]
    pub const fn iovas(&self) -> Option<Span> {
        let free = !self.mask;
        if self.passed == 0 && free & free.wrapping_add(1) == 0 { Some(Span { first: self.value, last: self.value | free }) } else { None }
    }

    /// Whether a unit that does not look up the `untranslated` IOVAs in its tables does to this one what the guest's does.
    #[must_use]
    pub fn is_kept_by(&self, untranslated: &[Span]) -> bool {
        // One of the guest's own, in its memory, is something that no other unit knows.
        let within = |iovas: Span| untranslated.iter().any(|span| span.first <= iovas.first && iovas.last <= span.last);
        self.address.is_none() && self.iovas().is_some_and(within)
    }

    /// Whether it stands in the guest's memory, so that the guest set it up. Others come with the architecture, like interrupts at fixed addresses.
    #[must_use]
    pub const fn is_guests_own(&self) -> bool {
        self.address.is_some()
    }

    /// Whether `address` matches, and up to which address that stays so.
    fn extent(&self, address: u64) -> (bool, u64) {
        let different = (address ^ self.value) & self.mask;
        // While the highest bit that differs is the same, nothing matches; while all compared bits are the same, everything does.
        let constant = if different == 0 { self.mask.trailing_zeros() } else { 63 - different.leading_zeros() };
        (different == 0, Span::of_log2(0, constant as u8).last | address)
    }
}

/// Which addresses of a mapping are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    Iova,
    Output,
}

/// Hears a walk, and turns what is intercepted into faults.
pub(crate) struct Intercepted<'a, V: ?Sized> {
    pub(crate) intercepts: &'a [Intercept],
    /// Which of them count here, and what they are compared with.
    pub(crate) rules: &'a [(u8, Compared)],
    /// How many tables there are.
    pub(crate) tables: u8,
    pub(crate) budget: &'a Budget,
    pub(crate) visitor: &'a mut V,
}

impl<V: Visitor + ?Sized> Intercepted<'_, V> {
    /// The stage before which a byte of a mapping is intercepted, if it is, and how many of the bytes after it are like it.
    fn look(&self, iova: u64, address: u64) -> (Option<u8>, u64) {
        let (mut caught, mut alike) = (None, u64::MAX);
        for intercept in self.intercepts {
            let compared = self.rules.iter().find(|(passed, _)| *passed == intercept.passed);
            let Some((_, compared)) = compared else { continue };
            let at = if *compared == Compared::Iova { iova } else { address };
            let (matches, last) = intercept.extent(at);
            if matches {
                caught = Some((intercept.passed + 1).min(self.tables.max(1)));
            }
            alike = alike.min(last - at);
        }
        (caught, alike)
    }

    /// Whether nothing of a run is intercepted. Its leaves may be anywhere in [`Run::within`].
    fn is_clear_of(&self, run: &Run<'_>) -> bool {
        let length = (run.entries.len() as u64).checked_shl(run.size_log2.into()).unwrap_or(0);
        let iovas = Span { first: run.iova.0, last: run.iova.0.saturating_add(length.wrapping_sub(1)) };
        self.intercepts.iter().all(|intercept| {
            let compared = self.rules.iter().find(|(passed, _)| *passed == intercept.passed);
            compared.is_none_or(|(_, compared)| {
                let span = if *compared == Compared::Iova { iovas } else { run.within };
                let (matches, last) = intercept.extent(span.first);
                !matches && last >= span.last
            })
        })
    }
}

impl<V: Visitor + ?Sized> Visitor for Intercepted<'_, V> {
    fn takes_gaps(&self) -> bool {
        self.visitor.takes_gaps()
    }

    fn takes_large(&self) -> bool {
        self.visitor.takes_large()
    }

    fn table(&mut self) {
        self.visitor.table();
    }

    fn receive(&mut self, run: &Run<'_>) -> Option<Receiver<'_>> {
        if self.is_clear_of(run) { self.visitor.receive(run) } else { None }
    }

    fn received(&mut self, run: &Run<'_>, passed: Passed) -> Result<bool, WalkError> {
        self.visitor.received(run, passed)
    }

    fn leaves(&mut self, run: &Run<'_>, path: &[Step]) -> Result<(), WalkError> {
        if self.is_clear_of(run) {
            return self.visitor.leaves(run, path);
        }
        run.pieces().try_for_each(|piece| self.piece(&piece, path))
    }

    fn piece(&mut self, piece: &Piece, path: &[Step]) -> Result<(), WalkError> {
        if piece.attributes.grants_nothing() {
            return self.visitor.piece(piece, path);
        }
        let mut done = 0;
        loop {
            let (iova, address) = (piece.iova.first + done, piece.address + done);
            let (caught, alike) = self.look(iova, address);
            let alike = alike.min(piece.iova.last - iova);
            let span = Span { first: iova, last: iova + alike };
            // The first part was paid for with the mapping.
            if done > 0 {
                self.budget.charge_leaves(1)?;
            }
            if let Some(stage) = caught {
                self.visitor.fault(&FaultAt { stage, cause: Cause::Intercepted, span, address: Some(address), reading_table: false, path })?;
            } else {
                self.visitor.piece(&Piece { iova: span, address, ..*piece }, path)?;
            }
            if span.last == piece.iova.last {
                return Ok(());
            }
            done += alike + 1;
        }
    }

    fn absent(&mut self, span: Span, path: &[Step]) -> Result<(), WalkError> {
        self.visitor.absent(span, path)
    }

    fn nothing_below(&mut self, span: Span, entries: u64, path: &[Step]) -> Result<(), WalkError> {
        self.visitor.nothing_below(span, entries, path)
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.visitor.fault(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attributes;
    use crate::memory::Limits;

    fn intercept(mask: u64, value: u64) -> Intercept {
        Intercept { passed: 1, mask, value, server: String::new(), address: None, section: String::new() }
    }

    /// IOVAs, and where the first of them goes; none: intercepted.
    type Part = (Span, Option<u64>);

    struct Seen(Vec<Part>);

    impl Visitor for Seen {
        fn piece(&mut self, piece: &Piece, _: &[Step]) -> Result<(), WalkError> {
            self.0.push((piece.iova, Some(piece.address)));
            Ok(())
        }
        fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
            self.0.push((fault.span, None));
            Ok(())
        }
    }

    fn split(intercepts: &[Intercept], rules: &[(u8, Compared)], piece: Piece, leaves: u64) -> (Vec<Part>, Result<(), WalkError>) {
        let budget = Budget::new(Limits { leaves, ..Limits::default() });
        let mut seen = Seen(Vec::new());
        let result = Intercepted { intercepts, rules, tables: 1, budget: &budget, visitor: &mut seen }.piece(&piece, &[]);
        (seen.0, result)
    }

    #[test]
    fn each_byte_goes_where_it_alone_would_go() {
        let intercepts = [intercept(!0x5fff, 0x28_0000), intercept(!0xfff, 0x29_7000)];
        for (first, length, address) in [(0x1000, 0x4_0000, 0x27_0000), (0, 0x1000, 0x28_0000), (0x800, 0x2_0000, 0x28_0800), (0, 1, 0x29_7000)] {
            for (rule, iova, address) in [(Compared::Output, first, address), (Compared::Iova, address, first)] {
                let piece = Piece { iova: Span { first: iova, last: iova + length - 1 }, address, attributes: Attributes::READ };
                let (parts, result) = split(&intercepts, &[(1, rule)], piece, 1000);
                assert!(result.is_ok());
                let mut next = iova;
                for (span, goes) in parts {
                    assert_eq!(span.first, next, "without gaps");
                    for byte in (span.first..=span.last).step_by(0x400) {
                        let to = address + (byte - iova);
                        let caught = intercepts.iter().any(|intercept| intercept.matches(if rule == Compared::Iova { byte } else { to }));
                        assert_eq!(goes.map(|goes| goes + (byte - span.first)), (!caught).then_some(to), "{byte:#x}");
                    }
                    next = span.last + 1;
                }
                assert_eq!(next, iova + length);
            }
        }
    }

    #[test]
    fn a_mask_with_many_holes_costs_the_budget() {
        let piece = Piece { iova: Span { first: 0, last: (1 << 40) - 1 }, address: 0, attributes: Attributes::READ };
        let (parts, result) = split(&[intercept(1 << 12, 1 << 12)], &[(1, Compared::Output)], piece, 100);
        assert!(matches!(result, Err(WalkError::Exhausted(_))));
        assert!(parts.len() <= 102);
        let (parts, result) = split(&[intercept(1 << 12, 1 << 12)], &[(2, Compared::Output)], piece, 100);
        assert!(result.is_ok() && parts.len() == 1, "compared elsewhere");
        let (parts, _) = split(&[intercept(0, 0)], &[(1, Compared::Iova)], piece, 100);
        assert_eq!(parts, [(piece.iova, None)]);
    }
}
