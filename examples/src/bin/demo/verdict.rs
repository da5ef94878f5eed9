//! What the call proves.

use std::fmt;

use crate::member::Member;

/// Claims, and whether each held.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    claims: Vec<(bool, String)>,
    remarks: Vec<String>,
}

impl Verdict {
    pub(crate) fn holds(&self) -> bool {
        self.claims.iter().all(|(held, _)| *held)
    }

    pub(crate) fn claim(&mut self, held: bool, text: impl Into<String>) {
        self.claims.push((held, text.into()));
    }

    /// Takes over what a member reports: failures as claims that did not hold, the rest as remarks.
    pub(crate) fn reports(&mut self, member: &Member) {
        let (failures, remarks) = member.seen(|seen| (seen.failures.clone(), seen.remarks.clone()));
        self.claims.extend(failures.into_iter().map(|text| (false, format!("{}: {text}", member.name))));
        self.remarks.extend(remarks.into_iter().map(|text| format!("{}: {text}", member.name)));
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nVerdict")?;
        for (held, text) in &self.claims {
            writeln!(f, "  {} {text}", if *held { "✓" } else { "✗" })?;
        }
        if !self.remarks.is_empty() {
            writeln!(f, "Remarks of the members")?;
        }
        for remark in &self.remarks {
            writeln!(f, "  · {remark}")?;
        }
        let summary = if self.holds() { "Every claim held." } else { "At least one claim did NOT hold." };
        writeln!(f, "{summary}")
    }
}
