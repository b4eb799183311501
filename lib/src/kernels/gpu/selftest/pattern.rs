//! What the wrong outputs of a product have in common: it tells a wrong fragment from a group that was left out.

use std::collections::BTreeSet;
use std::ops::Range;

/// Rows of a fragment, and tokens of one.
const ROWS: usize = 16;
const TOKENS: usize = 8;

/// An output that is not as it should be.
pub(super) struct Wrong {
    /// Its place in [tokens, rows].
    pub(super) at: usize,
    /// What it is too large by.
    pub(super) excess: f64,
    /// What rounding allows it to be too large or too small by.
    pub(super) allowed: f64,
}

/// What some columns contribute to an output.
pub(super) struct Share {
    /// "group 3", "part 0".
    pub(super) name: String,
    pub(super) columns: Range<usize>,
    pub(super) value: f64,
}

/// In words: of a product with `rows` outputs a token. `shares` are the contributions of groups and parts of columns to an output.
pub(super) fn describe(wrong: &[Wrong], all: usize, rows: usize, shares: impl Fn(usize) -> Vec<Share>) -> String {
    let residues = |of: &dyn Fn(usize) -> usize, modulus: usize| {
        let found: BTreeSet<usize> = wrong.iter().map(|w| of(w.at) % modulus).collect();
        let there: BTreeSet<usize> = (0..all).map(|at| of(at) % modulus).collect();
        match found == there {
            true => "all".to_owned(),
            false => found.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        }
    };
    let mut text = format!(
        "{} of {all} outputs are wrong; rows mod {ROWS}: {}; tokens mod {TOKENS}: {}",
        wrong.len(),
        residues(&|at| at % rows, ROWS),
        residues(&|at| at / rows, TOKENS)
    );
    // Of each output the columns whose share is what it differs by; those that explain the first and most others.
    let explained = |w: &Wrong| -> Vec<String> {
        let by =
            |how: &str, s: &Share| format!("{} (columns {} to {}) {how}", s.name, s.columns.start, s.columns.end - 1);
        let near = |a: f64, s: &Share| (a - s.value).abs() <= w.allowed && s.value.abs() > 4.0 * w.allowed;
        let shares = shares(w.at);
        let out = shares.iter().filter(|s| near(-w.excess, s)).map(|s| by("left out", s));
        out.chain(shares.iter().filter(|s| near(w.excess, s)).map(|s| by("counted twice", s))).collect()
    };
    let some: Vec<Vec<String>> = wrong.iter().take(8).map(explained).collect();
    let common =
        some.first().into_iter().flatten().find(|e| some.iter().filter(|s| s.contains(e)).count() * 2 > some.len());
    if let Some(common) = common {
        text += &format!("; as with {common}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_names_rows_tokens_and_columns() {
        let shares = |at: usize| {
            let share = |g: usize| Share {
                name: format!("group {g}"),
                columns: 32 * g..32 * g + 32,
                value: (g + 1 + at) as f64,
            };
            (0..4).map(share).collect()
        };
        let wrong = |at: usize| Wrong { at, excess: -((3 + at) as f64), allowed: 0.01 };
        // 3 tokens of 32 rows: rows 5 and 21 of the second token.
        let text = describe(&[wrong(37), wrong(53)], 96, 32, shares);
        assert_eq!(
            text,
            "2 of 96 outputs are wrong; rows mod 16: 5; tokens mod 8: 1; as with group 2 (columns 64 to 95) left out"
        );
        let twice = Wrong { at: 0, excess: 4.0, allowed: 0.01 };
        assert!(
            describe(&[twice], 1, 1, shares)
                .ends_with("rows mod 16: all; tokens mod 8: all; as with group 3 (columns 96 to 127) counted twice")
        );
        let other = Wrong { at: 0, excess: 0.5, allowed: 0.01 };
        assert!(describe(&[other], 1, 1, shares).ends_with("tokens mod 8: all"));
    }
}
