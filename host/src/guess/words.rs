//! The evidence in words.

use super::{Candidate, Missing};
use crate::table::FaultKind;

impl Candidate {
    /// What speaks for the candidate and what against it, one sentence each, in lower case without a full stop; the weightiest first.
    #[must_use]
    pub fn words(&self, missing: Missing) -> Vec<String> {
        let evidence = &self.evidence;
        let mut words = Vec::new();
        let all = evidence.good() + evidence.bad();
        words.push(format!("{} of {} decode as this format says", evidence.good(), plural(all, "entry", "entries")));
        let targets = evidence.leaves + evidence.leaves_outside;
        if targets > 0 {
            words.push(format!(
                "{} of {} point into memory, {} to where the one before ends",
                evidence.leaves,
                plural(targets, "leaf", "leaves"),
                evidence.continued
            ));
        }
        let tables: Vec<String> = evidence.tables_by_level.iter().map(u64::to_string).collect();
        words.push(format!(
            "{} on {} from the root down: {}",
            plural(evidence.tables, "table", "tables"),
            plural(self.levels.into(), "level", "levels"),
            tables.join(", ")
        ));
        words.push(format!("{} in all", plural(evidence.patterns, "pattern", "patterns")));
        let mut odd = |count: u64, one: &str, many: &str| {
            if count > 0 {
                words.push(plural(count, one, many));
            }
        };
        let tables_outside = match missing {
            Missing::Against => [
                "entry points to a table that is not among the pages with structures",
                "entries point to tables that are not among the pages with structures",
            ],
            Missing::Unknown => ["entry points to a table outside memory", "entries point to tables outside memory"],
        };
        odd(evidence.tables_outside, tables_outside[0], tables_outside[1]);
        odd(evidence.unknown_tables, "table is in a part of memory that is not known", "tables are in a part of memory that is not known");
        odd(evidence.overlaps, "table is part of another one", "tables are part of others");
        odd(evidence.skips, "entry skips a level", "entries skip a level");
        odd(evidence.empty_tables, "table is empty", "tables are empty");
        odd(evidence.useless_leaves, "leaf lets nobody pass", "leaves let nobody pass");
        odd(evidence.idle_bits, "bit is unusual and changes nothing", "bits are unusual and change nothing");
        for (kind, count) in FaultKind::ALL.iter().zip(evidence.faults) {
            odd(count, &format!("entry faults: {kind}"), &format!("entries fault: {kind}"));
        }
        if let Some(why) = evidence.stopped {
            words.push(format!("not all was looked at: {why}"));
        }
        words
    }
}

fn plural(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}
