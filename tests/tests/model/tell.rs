//! Synchronisation points: how a guest says what is stale.

use stagecraft::ioasid::Strategy;
use stagecraft::plugin::Tag;
use stagecraft::plugin::queue::{Effect, Invalidation, Scope};
use stagecraft::{Gpa, Span};
use stagecraft_tests::reference::generate::Rng;

use crate::guest::{Guest, Stale};
use crate::operation::Telling;
use crate::session::{Outcomes, Session, Space};

impl Session<'_> {
    /// A synchronisation point of one address space: from here on its DMA sees the tables as they are now.
    pub fn tell(&mut self, number: usize, telling: Telling, shuffle: u64) -> Outcomes {
        let now = self.moments.len() - 1;
        let space = &mut self.spaces[number];
        let (stale, written) = (std::mem::take(&mut space.stale), std::mem::take(&mut space.written));
        let ioasid = space.ioasid.clone();
        if self.setup.scarce.is_some() {
            let iovas = |stage: usize| stale[stage].iter().map(|stale| stale.iova);
            self.told.extend(iovas(0).chain(iovas(1)));
        }
        if space.since < now {
            let mut rng = Rng::new(shuffle);
            // Hardware that walks the guest's own table needs commands.
            let is_native = ioasid.strategies().contains(&Strategy::Native);
            // With two stages, what one command means may be nowhere without the other.
            let is_mixed = !stale[1].is_empty();
            match telling {
                Telling::Written if !is_native => {
                    for (address, length) in shuffled(written, &mut rng) {
                        self.report(Some(number), ioasid.table_written(Gpa(address), length), "writes")?;
                    }
                }
                Telling::Synchronise => self.report(Some(number), ioasid.synchronise(), "synchronise")?,
                Telling::Halves if !is_mixed => {
                    let commands = self.commands(&self.spaces[number], &stale, Telling::Ranges, &mut rng);
                    let (one, other) = commands.split_at(commands.len() / 2);
                    self.report(Some(number), ioasid.invalidate(one), "invalidate")?;
                    if self.trap.is_none() {
                        let told = self.told.clone();
                        self.compare().map_err(|error| format!("half told: {error}"))?;
                        // The other half follows.
                        self.told = told;
                    }
                    self.report(Some(number), ioasid.invalidate(other), "invalidate")?;
                }
                _ => {
                    let commands = self.commands(&self.spaces[number], &stale, telling, &mut rng);
                    self.report(Some(number), ioasid.invalidate(&commands), "invalidate")?;
                }
            }
        }
        self.is_told(number);
        Ok(())
    }

    /// An address space has read its tables as they are now.
    pub fn is_told(&mut self, number: usize) {
        let now = self.moments.len() - 1;
        let space = &mut self.spaces[number];
        (space.since, space.changed) = (now, [false; 2]);
        space.stale.iter_mut().for_each(Vec::clear);
        space.written.clear();
        self.forget_moments();
    }

    /// Moments that nobody can see any more.
    pub fn forget_moments(&mut self) {
        let now = self.moments.len() - 1;
        if self.spaces.iter().all(|space| space.since == now) {
            self.moments.drain(..now);
            self.spaces.iter_mut().for_each(|space| space.since = 0);
            self.guest.settled();
            self.second.iter_mut().for_each(Guest::settled);
        }
    }

    fn commands(&self, space: &Space, stale: &[Vec<Stale>; 2], telling: Telling, rng: &mut Rng) -> Vec<Invalidation> {
        let Tag { domain, space: number } = space.tag;
        let domain = domain.map(|domain| domain as u16);
        let whole = Scope { leaf: false, second_stage: false, domain, space: number, id: None };
        let range = |scope: Scope, first: u64, last: u64| Effect::Range { scope, iova: Span { first, last } };
        let second = Scope { second_stage: true, space: None, ..whole };
        let mut effects = match telling {
            Telling::Everything => vec![Effect::Everything],
            Telling::Domain | Telling::Written => vec![range(Scope { space: None, ..whole }, 0, u64::MAX), range(second, 0, u64::MAX)],
            Telling::Space => vec![range(whole, 0, u64::MAX), range(second, 0, u64::MAX)],
            _ => {
                let mut effects = Vec::new();
                for (stage, stale) in stale.iter().enumerate() {
                    let page = if stage == 0 { self.guest.page() } else { self.second.as_ref().map_or(4096, Guest::page) };
                    for Stale { iova: (first, last), leaf_only, .. } in stale {
                        let id = rng.percent(20).then_some((7, 0));
                        let leaf = *leaf_only && rng.percent(80);
                        let scope = if stage == 0 { Scope { leaf, id, ..whole } } else { Scope { leaf, ..second } };
                        let pages = (last - first) / page + 1;
                        if telling == Telling::Pages && pages <= 64 {
                            let firsts = (0..pages).map(|number| first + number * page);
                            effects.extend(firsts.map(|first| range(scope, first, first.saturating_add(page - 1).min(*last))));
                        } else {
                            effects.push(range(scope, *first, *last));
                        }
                    }
                }
                effects
            }
        };
        if rng.percent(20) {
            // Somebody else's, and nothing at all.
            effects.push(range(Scope { domain: Some(999), ..whole }, 0, u64::MAX));
            effects.push(Effect::Nothing);
        }
        let effects = shuffled(effects, rng);
        effects.into_iter().enumerate().map(|(index, effect)| Invalidation { index: index as u16, effect }).collect()
    }
}

fn shuffled<T>(mut items: Vec<T>, rng: &mut Rng) -> Vec<T> {
    (1..items.len()).for_each(|index| items.swap(index, rng.below(index as u64 + 1) as usize));
    items
}
